//! The source's side of private disks: a mirror job of QEMU's a disk, into the target's image by NBD through the link.
//!
//! ```text
//!  blockdev-add (nbd, over our unix socket) ─> blockdev-mirror ─> READY ─> … writes follow …
//!     ─> the guest is stopped (pre-switchover), its writes drained ─> block-job-cancel: both sides equal ─> migrate-continue
//! ```
//! A mirror that is READY and is cancelled first copies what is left: then both images are equal, and the primary keeps its own.
//! The copy is a background one: a guest's write never waits for the link. Whatever fails ends the job, not the guest.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use serde_json::{Value, json};
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::replica::DiskProgress;
use umbra_api::wire::control::Disk;

use super::pump::{Shared, hold_back};
use super::session::Event;
use crate::engine::Core;
use crate::launch::disks::export;
use crate::launch::make_dir;
use crate::link::Link;
use crate::proc::ProcessId;
use crate::qmp::{self, Client};
use crate::tunnel::{self, Carrier};
use crate::urgent::Crew;

const JOB: &str = "umbra-mirror-";
const NODE: &str = "umbra-nbd-";
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(10);
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// What QEMU says of a mirror.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum News {
    Ready,
    /// Asked for or not: who knows that it was is who asked.
    Ended {
        error: Option<String>,
    },
}

struct Mirror {
    disk: Disk,
    /// QEMU's connection, to end it.
    local: UnixStream,
    progress: DiskProgress,
}

pub struct Mirrors {
    qmp: Client,
    mirrors: Vec<Mirror>,
    crew: Arc<Crew>,
    /// Their ends are expected from here on.
    finished: bool,
}

/// Where the mirrors of a protection go.
pub struct Way<'a> {
    /// For the sockets.
    pub dir: &'a Path,
    pub qemu: ProcessId,
    /// For the bandwidth limit, which ends with the switchover's hurry.
    pub core: &'a Arc<Core>,
    pub pace: &'a Arc<Shared>,
    /// Opens the connection of a disk.
    pub connect: &'a dyn Fn(usize) -> Result<Link, Refusal>,
}

impl Mirrors {
    /// Starts a mirror a disk. After a refusal none is left.
    pub fn start(qmp: &Client, disks: &[Disk], way: &Way<'_>, events: &Sender<Event>) -> Result<Self, Refusal> {
        let mut all = Self {
            qmp: qmp.clone(),
            mirrors: Vec::new(),
            crew: Arc::default(),
            finished: false,
        };
        if disks.is_empty() {
            return Ok(all);
        }
        // Of a replicator that died.
        sweep(qmp);
        watch(qmp, events.clone());
        for (n, disk) in disks.iter().enumerate() {
            match mirror(qmp, n, disk, way, &all.crew) {
                Ok(mirror) => all.mirrors.push(mirror),
                Err(refusal) => {
                    all.undo();
                    return Err(refusal);
                }
            }
        }
        Ok(all)
    }

    pub fn is_empty(&self) -> bool {
        self.mirrors.is_empty()
    }

    /// Threads that a stopped guest waits for.
    pub fn threads(&self) -> Vec<i32> {
        self.crew.of(0)
    }

    /// Every disk's first copy is complete.
    pub fn are_ready(&self) -> bool {
        self.mirrors.iter().all(|m| m.progress.ready)
    }

    /// Notes what QEMU says; an error is the end of the protection.
    pub fn heard(&mut self, disk: usize, news: News) -> Result<(), Refusal> {
        let Some(mirror) = self.mirrors.get_mut(disk) else {
            return Ok(());
        };
        match news {
            News::Ready => {
                mirror.progress.ready = true;
                tracing::info!(disk = mirror.disk.path, "the disk's first copy is complete");
                Ok(())
            }
            News::Ended { .. } if self.finished => Ok(()),
            News::Ended { error } => {
                let why = error.unwrap_or_else(|| "somebody ended the job".into());
                Err(failed(&mirror.disk, &why))
            }
        }
    }

    /// How far each disk is.
    pub fn progress(&mut self) -> Vec<DiskProgress> {
        let jobs = self.qmp.execute("query-block-jobs", Value::Null).unwrap_or_default();
        for (n, mirror) in self.mirrors.iter_mut().enumerate() {
            let name = format!("{JOB}{n}");
            let job = jobs
                .as_array()
                .and_then(|j| j.iter().find(|j| j["device"] == name.as_str()));
            if let Some((copied, total)) = job.and_then(|j| Some((j["offset"].as_u64()?, j["len"].as_u64()?))) {
                mirror.progress.copied_bytes = copied;
                mirror.progress.total_bytes = total;
            }
        }
        self.mirrors.iter().map(|m| m.progress.clone()).collect()
    }

    /// The guest is stopped: copies what is left, and ends each mirror with both sides equal.
    pub fn finish(&mut self, deadline: Instant) -> Result<(), Refusal> {
        self.finished = true;
        let mark = self.qmp.mark();
        for n in 0..self.mirrors.len() {
            self.qmp
                .execute("block-job-cancel", json!({"device": format!("{JOB}{n}")}))?;
        }
        for (n, mirror) in self.mirrors.iter_mut().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            let end = self.qmp.wait(mark, left, |e| ended(e).filter(|(disk, ..)| *disk == n));
            let (_, len, offset, error) = end.map_err(|e| failed(&mirror.disk, &e.to_string()))?;
            if let Some(why) = error {
                return Err(failed(&mirror.disk, &why));
            }
            if len != offset {
                return Err(failed(&mirror.disk, &format!("{offset} of {len} bytes were copied")));
            }
            mirror.progress.copied_bytes = offset;
            mirror.progress.total_bytes = len;
        }
        Ok(())
    }

    /// Ends QEMU's connections: requests on their way fail, and nothing in QEMU waits for the link any more.
    pub fn cut(&mut self) {
        self.finished = true;
        for mirror in &self.mirrors {
            end(&mirror.local);
        }
    }

    /// Leaves QEMU as if there had been no mirror.
    pub fn undo(&mut self) {
        if self.mirrors.is_empty() {
            return;
        }
        self.cut();
        sweep(&self.qmp);
    }
}

/// Ends a connection with QEMU, and empties it: a QEMU that waits for room in a full socket is not woken by its end.
fn end(mut local: &UnixStream) {
    let _ = local.shutdown(std::net::Shutdown::Both);
    let mut rest = [0; 64 << 10];
    while local.set_nonblocking(true).is_ok() && matches!(local.read(&mut rest), Ok(1..)) {}
}

fn failed(disk: &Disk, why: &str) -> Refusal {
    Refusal::new(
        RefusalCode::Local,
        format!("the mirror of the disk {}: {why}", disk.path),
    )
}

fn mirror(qmp: &Client, n: usize, disk: &Disk, way: &Way<'_>, crew: &Arc<Crew>) -> Result<Mirror, Refusal> {
    let local = |what: &str, e: &dyn std::fmt::Display| failed(disk, &format!("{what}: {e}"));
    let link = (way.connect)(n)?;
    let path = way.dir.join(format!("mirror-{}-{n}.sock", way.qemu.pid));
    make_dir(way.dir)?;
    // Of a replicator that died; a QEMU has one protection at a time.
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(|e| local("its socket", &e))?;
    let (hand, handed) = channel();
    let (qemu, shown) = (way.qemu.pid, disk.path.clone());
    let (core, pace, crew) = (way.core.clone(), way.pace.clone(), crew.clone());
    let serve = move || {
        let stream = match accept(&listener, &path, qemu) {
            Ok(stream) => stream,
            Err(why) => return tracing::warn!(disk = shown, "QEMU's NBD client: {why}"),
        };
        let Ok(other) = stream.try_clone() else { return };
        let sent = |bytes| hold_back(&core.throttle, &pace, bytes);
        let carrier = Carrier {
            crew: &crew,
            what: 0,
            sent: &sent,
        };
        if hand.send(other).is_ok()
            && let Err(why) = tunnel::carry(stream, link, &carrier)
        {
            tracing::warn!(disk = shown, "the disk's connection ends: {why}");
        }
    };
    let at = way.dir.join(format!("mirror-{qemu}-{n}.sock"));
    let thread = std::thread::Builder::new().name("disk".into()).spawn(serve);
    thread.map_err(|e| local("no thread for it", &e))?;
    let node = format!("{NODE}{n}");
    let nbd = json!({
        "driver": "nbd", "node-name": node, "export": export(n), "discard": "unmap",
        "server": {"type": "unix", "path": at.display().to_string()},
    });
    qmp.execute("blockdev-add", nbd).map_err(|e| local("its target", &e))?;
    let stream = handed
        .recv_timeout(ACCEPT_TIMEOUT)
        .map_err(|_| failed(disk, "QEMU's connection was not the one that was waited for"));
    let job = json!({
        "job-id": format!("{JOB}{n}"), "device": disk.node, "target": node, "sync": "full", "copy-mode": "background",
    });
    let begun = stream.and_then(|s| {
        let begun = qmp
            .execute("blockdev-mirror", job)
            .map_err(|e| local("blockdev-mirror", &e));
        begun.map(|_| s)
    });
    let begun = begun.inspect_err(|_| {
        let _ = qmp.execute("blockdev-del", json!({ "node-name": node }));
    })?;
    Ok(Mirror {
        progress: DiskProgress {
            path: disk.path.clone(),
            total_bytes: disk.bytes,
            copied_bytes: 0,
            ready: false,
        },
        disk: disk.clone(),
        local: begun,
    })
}

/// Waits for one connection, and takes it only from this QEMU.
fn accept(listener: &UnixListener, path: &PathBuf, qemu: i32) -> Result<UnixStream, String> {
    let timeout = PollTimeout::try_from(ACCEPT_TIMEOUT).unwrap_or(PollTimeout::MAX);
    let came = poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], timeout);
    let stream = match came {
        Ok(0) => Err("it did not come".to_owned()),
        Ok(_) => listener.accept().map(|(s, _)| s).map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    let _ = fs::remove_file(path);
    let stream = stream?;
    let peer = getsockopt(&stream, sockopt::PeerCredentials).map_err(|e| e.to_string())?;
    match peer.pid() == qemu {
        true => Ok(stream),
        false => Err(format!("process {} connected instead of QEMU, {qemu}", peer.pid())),
    }
}

/// Tells the driver what QEMU says of our jobs.
fn watch(qmp: &Client, events: Sender<Event>) {
    qmp.on_event(move |e| match told(e) {
        Some((disk, news)) => events.send(Event::Disk { disk, news }).is_ok(),
        None => true,
    });
}

fn told(e: &qmp::Event) -> Option<(usize, News)> {
    match e.name.as_str() {
        "BLOCK_JOB_READY" => Some((number(&e.data)?, News::Ready)),
        _ => ended(e).map(|(disk, .., error)| (disk, News::Ended { error })),
    }
}

/// Disk, length, offset and error of a job's end.
fn ended(e: &qmp::Event) -> Option<(usize, u64, u64, Option<String>)> {
    let error = match e.name.as_str() {
        "BLOCK_JOB_COMPLETED" => e.data["error"].as_str().map(str::to_owned),
        // Cancelled before it was ready: not all was copied.
        "BLOCK_JOB_CANCELLED" => Some("it was cancelled".into()),
        _ => return None,
    };
    let n = |key: &str| e.data[key].as_u64().unwrap_or(0);
    Some((number(&e.data)?, n("len"), n("offset"), error))
}

fn number(data: &Value) -> Option<usize> {
    data["device"].as_str()?.strip_prefix(JOB)?.parse().ok()
}

/// Ends jobs and removes nodes of ours, whoever left them.
pub fn sweep(qmp: &Client) {
    let deadline = Instant::now() + END_TIMEOUT;
    loop {
        let jobs = ours(qmp, "query-block-jobs", "device", JOB);
        if jobs.is_empty() || Instant::now() > deadline {
            break;
        }
        for job in jobs {
            // It may be ending already.
            let _ = qmp.execute("block-job-cancel", json!({"device": job, "force": true}));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    for node in ours(qmp, "query-named-block-nodes", "node-name", NODE) {
        if let Err(e) = qmp.execute("blockdev-del", json!({ "node-name": node })) {
            tracing::warn!(node, "a mirror's target stays in QEMU: {e}");
        }
    }
}

fn ours(qmp: &Client, question: &str, key: &str, prefix: &str) -> Vec<String> {
    let answer = qmp.execute(question, Value::Null).unwrap_or_default();
    let names = answer.as_array().into_iter().flatten().filter_map(|v| v[key].as_str());
    names.filter(|n| n.starts_with(prefix)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: Value) -> qmp::Event {
        qmp::Event {
            name: name.into(),
            data,
            unix_us: 0,
            arrived: Instant::now(),
        }
    }

    #[test]
    fn ends_are_told_from_each_other() {
        let of = |name: &str, data: Value| told(&event(name, data));
        assert_eq!(
            of("BLOCK_JOB_READY", json!({"device": "umbra-mirror-1"})),
            Some((1, News::Ready))
        );
        assert_eq!(of("BLOCK_JOB_READY", json!({"device": "backup0"})), None);
        let whole = json!({"device": "umbra-mirror-0", "len": 7, "offset": 7});
        assert_eq!(
            ended(&event("BLOCK_JOB_COMPLETED", whole.clone())),
            Some((0, 7, 7, None))
        );
        let cancelled = ended(&event("BLOCK_JOB_CANCELLED", whole)).and_then(|(.., e)| e);
        assert!(cancelled.is_some_and(|e| e.contains("cancelled")));
        let broken = json!({"device": "umbra-mirror-0", "error": "No space left"});
        let news = of("BLOCK_JOB_COMPLETED", broken);
        assert_eq!(
            news,
            Some((
                0,
                News::Ended {
                    error: Some("No space left".into())
                }
            ))
        );
    }
}
