//! Batches to the RPS, in order. While it is away they wait in memory, so many as the configuration allows; then the oldest are dropped.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tracing::{debug, info, warn};
use umbra_api::sample::SampleBatch;
use umbra_daemon::client::{Client, ClientError};
use umbra_daemon::stop::Stop;

const PATH: &str = "/v1/samples";
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How long a stop waits for what is still to be sent.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A bounded queue. Pure.
#[derive(Debug)]
pub struct Buffer {
    queue: VecDeque<Arc<SampleBatch>>,
    max: usize,
}

impl Buffer {
    pub fn new(max: usize) -> Self {
        Self {
            queue: VecDeque::new(),
            max: max.max(1),
        }
    }

    /// Whether the oldest had to go.
    pub fn push(&mut self, batch: SampleBatch) -> bool {
        let full = self.queue.len() >= self.max;
        if full {
            self.queue.pop_front();
        }
        self.queue.push_back(Arc::new(batch));
        full
    }

    pub fn front(&self) -> Option<Arc<SampleBatch>> {
        self.queue.front().cloned()
    }

    /// Takes a batch away that was dealt with. It may be gone: dropped while it was under way.
    pub fn done(&mut self, seq: u64) {
        if self.queue.front().is_some_and(|b| b.seq == seq) {
            self.queue.pop_front();
        }
    }

    pub fn len(&self) -> usize {
        self.queue.len()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    pub sent: u64,
    pub refused: u64,
    pub dropped: u64,
    pub waiting: usize,
}

/// Shared by the collector, which adds, and the sender, which takes.
pub struct Outbox {
    state: Mutex<(Buffer, Counts)>,
    added: Notify,
}

impl Outbox {
    pub fn new(max: usize) -> Self {
        Self {
            state: Mutex::new((Buffer::new(max), Counts::default())),
            added: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, (Buffer, Counts)> {
        // A queue is whole after every step: a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, batch: SampleBatch) {
        let mut state = self.lock();
        if state.0.push(batch) {
            // Told as the powers of two: an RPS may be away for days.
            state.1.dropped += 1;
            if state.1.dropped.is_power_of_two() {
                warn!(
                    "the RPS is away for longer than the buffer: {} batches were dropped",
                    state.1.dropped
                );
            }
        }
        drop(state);
        self.added.notify_one();
    }

    pub fn counts(&self) -> Counts {
        let state = self.lock();
        Counts {
            waiting: state.0.len(),
            ..state.1
        }
    }

    fn front(&self) -> Option<Arc<SampleBatch>> {
        self.lock().0.front()
    }

    fn done(&self, seq: u64, verdict: &Verdict) {
        let mut state = self.lock();
        state.0.done(seq);
        match verdict {
            Verdict::Sent => state.1.sent += 1,
            Verdict::Refused(_) => state.1.refused += 1,
            Verdict::Later(_) => {}
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Verdict {
    Sent,
    /// The RPS will never take this batch: the next one must not wait for it.
    Refused(String),
    Later(String),
}

fn verdict(result: Result<serde_json::Value, ClientError>) -> Verdict {
    match result {
        Ok(_) => Verdict::Sent,
        // It was taken, whatever was said about it.
        Err(ClientError::Answer { .. }) => Verdict::Sent,
        Err(e) => match e.problem().map(|p| p.status) {
            Some(400 | 409 | 413 | 422) => Verdict::Refused(e.to_string()),
            _ => Verdict::Later(e.to_string()),
        },
    }
}

/// Sends until the stop, then what is left for at most a second.
pub async fn run(outbox: Arc<Outbox>, client: Client, mut stop: Stop) {
    let mut wait = RETRY_FIRST;
    let mut away = false;
    while !stop.is_asked() {
        let Some(batch) = outbox.front() else {
            tokio::select! { () = outbox.added.notified() => {}, () = stop.asked() => {} }
            continue;
        };
        let verdict = tokio::select! {
            v = send(&client, &batch) => v,
            () = stop.asked() => break,
        };
        match &verdict {
            Verdict::Sent if away => info!("the RPS is back at {}", client.base()),
            Verdict::Sent => debug!(seq = batch.seq, "sent"),
            Verdict::Refused(e) => warn!(seq = batch.seq, "the RPS refused a batch, which is dropped: {e}"),
            Verdict::Later(e) => {
                if !away {
                    warn!("the RPS is away, batches wait: {e}");
                }
                away = true;
                tokio::select! { () = tokio::time::sleep(wait) => {}, () = stop.asked() => {} }
                wait = (wait * 2).min(RETRY_MAX);
                continue;
            }
        }
        away = false;
        wait = RETRY_FIRST;
        outbox.done(batch.seq, &verdict);
    }
    let flush = async {
        while let Some(batch) = outbox.front() {
            match send(&client, &batch).await {
                Verdict::Later(_) => break,
                v => outbox.done(batch.seq, &v),
            }
        }
    };
    if tokio::time::timeout(LAST_WORDS, flush).await.is_err() || outbox.counts().waiting > 0 {
        info!("{} batches are left unsent", outbox.counts().waiting);
    }
}

async fn send(client: &Client, batch: &SampleBatch) -> Verdict {
    verdict(client.post(PATH, batch).await)
}

#[cfg(test)]
mod tests {
    use umbra_api::UnixMs;
    use umbra_api::problem::Problem;
    use umbra_api::sample::{HostSample, SAMPLE_VERSION};
    use umbra_daemon::http::{self, Limits, Request, status};

    use super::*;

    fn batch(seq: u64) -> SampleBatch {
        SampleBatch {
            version: SAMPLE_VERSION,
            host: "a".parse().unwrap(),
            agent_start: UnixMs(1),
            seq,
            t: UnixMs(seq as i64 * 1000),
            interval_ms: 1000,
            node: HostSample {
                cpus: 1.0,
                ..HostSample::default()
            },
            vms: Vec::new(),
        }
    }

    #[test]
    fn the_oldest_are_dropped_and_the_rest_stay_in_order() {
        let mut b = Buffer::new(3);
        assert_eq!((1..=5).filter(|s| b.push(batch(*s))).count(), 2);
        b.done(1);
        let mut order = Vec::new();
        while let Some(x) = b.front() {
            order.push(x.seq);
            b.done(x.seq);
        }
        assert_eq!(order, [3, 4, 5]);
        assert!(b.is_empty());
    }

    #[test]
    fn only_a_batch_that_can_never_pass_is_given_up() {
        let refused = |code| {
            Err(ClientError::Refused {
                url: String::new(),
                problem: Box::new(Problem::new(code, "x", "x", "x")),
            })
        };
        assert!(matches!(verdict(refused(400)), Verdict::Refused(_)));
        assert!(matches!(verdict(refused(422)), Verdict::Refused(_)));
        for code in [404, 429, 500, 503] {
            assert!(matches!(verdict(refused(code)), Verdict::Later(_)), "{code}");
        }
        let away = ClientError::Unreachable {
            url: String::new(),
            reason: String::new(),
        };
        assert!(matches!(verdict(Err(away)), Verdict::Later(_)));
        assert_eq!(verdict(Ok(serde_json::Value::Null)), Verdict::Sent);
    }

    /// The RPS is away, comes, refuses one, and all others arrive in order.
    #[tokio::test]
    async fn batches_wait_for_the_rps() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let outbox = Arc::new(Outbox::new(10));
        (1..=4).for_each(|s| outbox.add(batch(s)));
        let client = Client::new(&format!("http://{address}"), Duration::from_secs(5)).unwrap();
        let (stopper, stop) = umbra_daemon::stop::pair();
        let sender = tokio::spawn(run(outbox.clone(), client, stop.clone()));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let log = seen.clone();
        let server = tokio::spawn(http::serve(listener, Limits::default(), stop, move |r: Request| {
            let log = log.clone();
            async move {
                let b: SampleBatch = r.json().unwrap();
                match b.seq {
                    2 => http::problem(&Problem::bad_request("not this one")),
                    _ => {
                        log.lock().unwrap().push(b.seq);
                        http::reply(status::ACCEPTED, "application/json", "")
                    }
                }
            }
        }));
        while outbox.counts().waiting > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(*seen.lock().unwrap(), [1, 3, 4]);
        let c = outbox.counts();
        assert_eq!((c.sent, c.refused, c.dropped), (3, 1, 0));
        stopper.stop();
        sender.await.unwrap();
        server.await.unwrap();
    }
}
