//! Compares the private disks of a VM with their images on the target in standby, and mends what differs.
//!
//! ```text
//!  pause the mirrors ─> read the primary's disk (an NBD export of its QEMU, for this moment) ─> resume ─> sums ──link──> the target
//!     reads its image, and says what differs ─> [`plan`]: only a suspicion, until it outlives the mirror's work
//!  damaged:  pause ─> read again, unchanged? ─> write it to the image, flushed ─> resume
//! ```
//! All of the VM's mirrors stand still while a disk is read, because an export comes and goes with the requests of all disks drained and
//! QEMU's main loop waiting for it: a link that stalls or is slow just then would hold up the guest, were a mirror's requests among
//! them. And they stand still while a range is mended, so that what is written is never older than what the mirror has written there: each write of the guest's since is in its bitmap, and follows. So a range
//! that only seemed to be damaged is written once more, and no harm is done.
//!
//! QEMU has one NBD server. It is taken for some milliseconds a second, and nothing is compared while somebody else has it.

pub mod plan;
mod reader;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use umbra_api::order::Refusal;
use umbra_api::replica::HeldBack;
use umbra_api::wire::disk::sums;

use self::plan::{EVERY, Part, Plan};
pub use self::reader::{Reader, close};
use super::park;
use super::pump::Shared;
use super::session::Event;
use crate::engine::Core;
use crate::launch::disks::export;
use crate::link::Link;
use crate::nbd;
use crate::tunnel::{self, Carrier};
use crate::urgent::Crew;

/// The target reads as much of its image.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Looks that fail one after the other until it is said aloud.
const MISSED: u32 = 30;
/// While somebody else has QEMU's NBD server.
const TAKEN_WAIT: Duration = Duration::from_secs(60);

/// What a scrub tells its session.
#[derive(Debug)]
pub enum News {
    /// To be said to the target.
    Ask {
        part: Part,
        sums: Vec<u64>,
    },
    Compared {
        disk: usize,
        bytes: u64,
    },
    /// A range differs, and does so for good.
    Differs {
        disk: usize,
        from: u64,
    },
    Mended {
        disk: usize,
        from: u64,
    },
    /// A write that is on its way may come too late to be harmless: the images need another daemon.
    Unsettled(String),
}

/// The target's answer: where it differs. `bytes`: how many it has compared.
#[derive(Debug)]
pub struct Looked {
    pub disk: usize,
    pub from: u64,
    pub bytes: u64,
    pub differing: Vec<u64>,
}

/// What a scrub needs of its session.
pub struct Way {
    pub source: Reader,
    pub core: Arc<Core>,
    pub pace: Arc<Shared>,
    pub silence: Duration,
    /// Opens another connection to a disk's image.
    pub connect: Box<dyn Fn(usize) -> Result<Link, Refusal> + Send>,
}

/// A scrub that goes on in a thread of its own, at nobody's cost, until it is stopped.
pub struct Scrub {
    leave: Arc<AtomicBool>,
    answers: Option<Sender<Looked>>,
    thread: Option<JoinHandle<bool>>,
}

impl Scrub {
    pub fn start(way: Way, events: Sender<Event>) -> io::Result<Self> {
        let leave = way.source.leave.clone();
        let (answers, heard) = channel();
        let worker = Worker { heard, events, way };
        let run = move || worker.run();
        let thread = std::thread::Builder::new().name("disk-scrub".into()).spawn(run)?;
        Ok(Self {
            leave,
            answers: Some(answers),
            thread: Some(thread),
        })
    }

    pub fn heard(&self, looked: Looked) {
        // One that has ended hears no more.
        let _ = self.answers.as_ref().map(|a| a.send(looked));
    }

    /// Waits until the mirrors are as if there were no scrub. `false`: they can't be gone on with, see [`News::Unsettled`].
    pub fn stop(mut self) -> bool {
        self.leave.store(true, Ordering::Relaxed);
        self.answers = None;
        self.thread.take().is_none_or(|t| t.join().unwrap_or(false))
    }
}

/// Why a look came to nothing.
enum Miss {
    /// Another time.
    Later(String),
    /// Somebody else has QEMU's NBD server.
    Taken,
    Unsettled(String),
}

impl From<String> for Miss {
    fn from(why: String) -> Self {
        Self::Later(why)
    }
}

struct Worker {
    heard: Receiver<Looked>,
    events: Sender<Event>,
    way: Way,
}

impl Worker {
    /// Whether all is settled.
    fn run(self) -> bool {
        let mut plan = Plan::new(self.way.source.disks.iter().map(|d| d.bytes).collect());
        let (mut taken, mut missed) = (false, 0);
        let mut wait = EVERY;
        while self.rest(wait) {
            wait = EVERY;
            if self.way.pace.figures().pace.held_back_by == Some(HeldBack::HotHost) {
                continue;
            }
            match self.look(&mut plan) {
                Ok(()) => (taken, missed) = (false, 0),
                Err(Miss::Later(why)) => {
                    missed += 1;
                    match missed {
                        MISSED => tracing::warn!("disk scrub: the disks are not compared: {why}"),
                        _ => tracing::debug!("disk scrub: {why}"),
                    }
                }
                Err(Miss::Taken) => {
                    if !taken {
                        tracing::warn!(
                            "disk scrub: somebody else has QEMU's NBD server, the disks are not compared meanwhile"
                        );
                    }
                    (taken, wait) = (true, TAKEN_WAIT);
                }
                Err(Miss::Unsettled(why)) => {
                    self.tell(News::Unsettled(why));
                    return false;
                }
            }
        }
        true
    }

    fn tell(&self, news: News) {
        let _ = self.events.send(Event::Scrub(news));
    }

    /// Until it is time; `false`: not wanted any more.
    fn rest(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        loop {
            match self.heard.recv_timeout(until.saturating_duration_since(Instant::now())) {
                // An answer that is late is of no use.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return !self.way.source.leaves(),
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }

    fn look(&self, plan: &mut Plan) -> Result<(), Miss> {
        let now = Instant::now();
        for disk in plan.waits_for(now) {
            let job = park::job(&self.way.source.qmp, self.way.source.token, disk);
            if job.is_some_and(|j| j["io-status"] == "ok" && j["offset"].is_u64() && j["offset"] == j["len"]) {
                plan.caught_up(disk, now);
            }
        }
        let Some(part) = plan.next(now) else { return Ok(()) };
        let sums = sums(&self.way.source.reads(part.disk, |source| read(source, part))?);
        self.tell(News::Ask {
            part,
            sums: sums.clone(),
        });
        let looked = self.answer(part)?;
        self.tell(News::Compared {
            disk: part.disk,
            bytes: looked.bytes,
        });
        for (from, sum) in plan.looked(part, &sums, &looked.differing, Instant::now()) {
            let bytes = (part.from + part.bytes - from).min(umbra_api::wire::disk::RANGE_BYTES);
            let range = Part { from, bytes, ..part };
            self.mend(range, sum)?;
        }
        Ok(())
    }

    fn answer(&self, part: Part) -> Result<Looked, String> {
        let until = Instant::now() + ANSWER_TIMEOUT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let looked = self.heard.recv_timeout(left).map_err(|_| "no answer of the target's")?;
            if (looked.disk, looked.from) == (part.disk, part.from) {
                return Ok(looked);
            }
        }
    }

    /// Writes a range to the image, if the primary's is what it was.
    fn mend(&self, range: Part, sum: u64) -> Result<(), Miss> {
        let disk = range.disk;
        // All that may take its time comes before the mirror stands still.
        let link = (self.way.connect)(disk).map_err(|e| e.to_string())?;
        let (near, far) = UnixStream::pair().map_err(|e| e.to_string())?;
        let closer = link.closer().map_err(|e| crate::chain(&e))?;
        let crew = Crew::default();
        // Counted and not held back: the mirrors wait for it, and it is one range.
        let limits = [&self.way.core.throttle, &self.way.pace.limit];
        let sent = |bytes: usize| {
            for limit in limits {
                let _ = limit.spent(bytes);
            }
        };
        let carrier = Carrier {
            crew: &crew,
            what: 0,
            sent: &sent,
        };
        std::thread::scope(|s| {
            let carry = || {
                if let Err(why) = tunnel::carry(far, link, &carrier) {
                    tracing::debug!("disk scrub: {why}");
                }
            };
            let thread = std::thread::Builder::new().name("disk-mend".into());
            thread.spawn_scoped(s, carry).map_err(|e| e.to_string())?;
            let image = nbd::Client::over(near, &export(disk), self.way.silence);
            let mended = image.map_err(|e| Miss::Later(e.to_string())).and_then(|mut image| {
                self.way
                    .source
                    .reads(disk, |source| self.write(source, &mut image, range, sum))
            });
            closer.close();
            mended
        })?;
        self.tell(News::Mended { disk, from: range.from });
        Ok(())
    }

    fn write(&self, source: &mut nbd::Client, image: &mut nbd::Client, range: Part, sum: u64) -> Result<(), Miss> {
        let data = read(source, range)?;
        if sums(&data) != [sum] {
            return Err(Miss::Later("the range was written meanwhile".into()));
        }
        let (disk, from) = (range.disk, range.from);
        self.tell(News::Differs { disk, from });
        let written = image.write(from, &data).and_then(|()| image.flush());
        written.map_err(|e| match e.kind() {
            // The daemon's own word: nothing is on its way any more.
            io::ErrorKind::Other => Miss::Later(e.to_string()),
            _ => Miss::Unsettled(format!("a damaged range of a disk can't be mended: {e}")),
        })
    }
}

fn read(source: &mut nbd::Client, part: Part) -> Result<Vec<u8>, Miss> {
    let mut data = vec![0; part.bytes as usize];
    source
        .read(part.from, &mut data)
        .map_err(|e| Miss::Later(format!("the primary's disk: {e}")))?;
    Ok(data)
}
