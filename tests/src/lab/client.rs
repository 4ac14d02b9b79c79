//! A steady web client: so many requests a second, whether answers come or not.
//!
//! Several connections take turns, so that a late answer does not delay the next question; latency counts from when a
//! request was *due*, so that time spent waiting for a free connection is not hidden.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::http::Connection;
use super::net::Netns;
use super::sys;
use super::vm::HTTP;

/// Connections that take turns.
const LANES: u32 = 8;
const REPLY: Duration = Duration::from_secs(3);
const CONNECT: Duration = Duration::from_secs(1);

/// One answered request.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Answer {
    /// When the answer was there.
    pub at: Instant,
    /// From when the request was due.
    pub latency: Duration,
}

#[derive(Default)]
struct Book {
    answers: Vec<Answer>,
    errors: u64,
    last_error: Option<String>,
}

pub struct Client {
    stop: Arc<AtomicBool>,
    book: Arc<Mutex<Book>>,
    lanes: Vec<JoinHandle<()>>,
}

#[derive(Clone, Copy)]
struct Plan {
    to: Ipv4Addr,
    period: Duration,
    keep_alive: bool,
    start: Instant,
}

impl Plan {
    /// When a request is due: somewhere in its period, not at the same point of each. Evenly spaced requests would meet a
    /// neighbour that works in a rhythm of its own in the same phase for a whole run, and in another one in the next.
    fn due(&self, number: u32) -> Instant {
        let mixed = number.wrapping_mul(0x9e37_79b9) ^ (number.wrapping_mul(0x85eb_ca6b) >> 13);
        let share = f64::from(mixed >> 8) / f64::from(1 << 24);
        self.start + self.period * number + self.period.mul_f64(share)
    }
}

impl Client {
    pub fn start(ns: &Netns, to: Ipv4Addr, per_second: u32, keep_alive: bool) -> Result<Self> {
        let plan = Plan {
            to,
            period: Duration::from_secs(1) / per_second.max(1),
            keep_alive,
            start: Instant::now(),
        };
        let (stop, book) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Book::default())));
        let lanes = (0..LANES)
            .map(|lane| {
                let (ns, stop, book) = (ns.clone(), stop.clone(), book.clone());
                let name = format!("client-{lane}");
                std::thread::Builder::new()
                    .name(name)
                    .spawn(move || ask(&ns, plan, lane, &stop, &book))
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self { stop, book, lanes })
    }

    /// Answers so far.
    pub fn answers(&self) -> Vec<Answer> {
        self.book.lock().unwrap_or_else(|p| p.into_inner()).answers.clone()
    }

    /// Requests that got no answer, and the last reason.
    pub fn errors(&self) -> (u64, Option<String>) {
        let book = self.book.lock().unwrap_or_else(|p| p.into_inner());
        (book.errors, book.last_error.clone())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for lane in self.lanes.drain(..) {
            let _ = lane.join();
        }
    }
}

fn ask(ns: &Netns, plan: Plan, lane: u32, stop: &AtomicBool, book: &Mutex<Book>) {
    // A client has a machine of its own, and does not wait for the CPU of a host.
    if let Err(e) = sys::go_first() {
        eprintln!("the client shares its CPU with the hosts, and so do its figures: {e}");
    }
    let mut connection = None;
    let mut number = lane;
    while !stop.load(Ordering::Relaxed) {
        let due = plan.due(number);
        let left = due.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            std::thread::sleep(left.min(Duration::from_millis(200)));
            continue;
        }
        let result = ask_once(ns, plan, &mut connection);
        let mut book = book.lock().unwrap_or_else(|p| p.into_inner());
        match result {
            Ok(()) => {
                let at = Instant::now();
                book.answers.push(Answer { at, latency: at - due });
            }
            Err(e) => {
                connection = None;
                book.errors += 1;
                book.last_error = Some(format!("{e:#}"));
            }
        }
        number = number.wrapping_add(LANES);
    }
}

fn ask_once(ns: &Netns, plan: Plan, connection: &mut Option<Connection>) -> Result<()> {
    let mut c = match connection.take() {
        Some(c) => c,
        None => Connection::open(ns, (plan.to, HTTP), CONNECT, REPLY)?,
    };
    c.request("GET", "/", None, !plan.keep_alive)?.ok()?;
    if plan.keep_alive {
        *connection = Some(c);
    }
    Ok(())
}

/// What a client saw between two moments.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Quality {
    pub answers: usize,
    pub p50_ms: f64,
    pub p99_ms: f64,
    /// Longest time without any answer.
    pub gap_ms: f64,
}

impl Quality {
    pub fn of(answers: &[Answer], from: Instant, to: Instant) -> Self {
        let inside: Vec<&Answer> = answers.iter().filter(|a| a.at >= from && a.at < to).collect();
        let mut latencies: Vec<Duration> = inside.iter().map(|a| a.latency).collect();
        latencies.sort_unstable();
        let mut times: Vec<Instant> = inside.iter().map(|a| a.at).chain([from, to]).collect();
        times.sort_unstable();
        let gap = times.windows(2).map(|w| w[1] - w[0]).max().unwrap_or_default();
        Self {
            answers: latencies.len(),
            p50_ms: ms(quantile(&latencies, 0.5)),
            p99_ms: ms(quantile(&latencies, 0.99)),
            gap_ms: ms(gap),
        }
    }
}

/// The smallest value that at least this share is not above; zero of nothing.
fn quantile(sorted: &[Duration], share: f64) -> Duration {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_request_is_due_somewhere_in_its_own_period() {
        let (start, period) = (Instant::now(), Duration::from_millis(50));
        let plan = Plan {
            to: Ipv4Addr::LOCALHOST,
            period,
            keep_alive: true,
            start,
        };
        let offsets: Vec<Duration> = (0..2_000)
            .map(|n| plan.due(n).duration_since(start + period * n))
            .collect();
        assert!(offsets.iter().all(|o| *o < period), "an interval has one request");
        for tenth in 0..10 {
            let within = offsets.iter().filter(|o| o.as_millis() / 5 == tenth).count();
            assert!(
                (150..=250).contains(&within),
                "{within} of 2000 in tenth {tenth}: no phase is preferred"
            );
        }
    }

    #[test]
    fn quality_of_known_answers() {
        let t = Instant::now();
        let after = |n: u64| t + Duration::from_millis(n);
        let answers: Vec<Answer> = (1..=100)
            .map(|n| Answer {
                at: after(n * 10),
                latency: Duration::from_millis(n),
            })
            .collect();
        let q = Quality::of(&answers, t, after(1001));
        assert_eq!((q.answers, q.p50_ms, q.p99_ms, q.gap_ms), (100, 50.0, 99.0, 10.0));
        let silent = Quality::of(&answers, t, after(1500));
        assert_eq!(silent.gap_ms, 500.0, "silence at the end counts");
        assert_eq!(
            Quality::of(&[], t, after(70)),
            Quality {
                gap_ms: 70.0,
                ..Quality::default()
            }
        );
    }
}
