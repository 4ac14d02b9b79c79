//! The source's side of private disks: a mirror job of QEMU's a disk, into the target's image by NBD through the link.
//!
//! ```text
//!  blockdev-add (nbd, over our unix socket) ─> blockdev-mirror ─> READY ─> … writes follow …
//!     ─> the guest is stopped (pre-switchover), its writes drained ─> block-job-cancel: both sides equal ─> migrate-continue
//! ```
//! A mirror that is READY and is cancelled first copies what is left: then both images are equal, and the primary keeps its own.
//! The copy is a background one: a guest's write never waits for the link. Whatever fails stops the job, not the guest.
//!
//! After a break the job waits in QEMU ([`super::park`]), whose dirty bitmap goes on: a new connection to the same image, and only what
//! was written meanwhile travels.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::replica::DiskProgress;
use umbra_api::wire::control::Disk;

use super::door::Door;
use super::park;
use super::pump::Shared;
use super::session::Event;
use crate::engine::Core;
use crate::launch::disks::export;
use crate::link::Link;
use crate::proc::ProcessId;
use crate::qmp::{self, Client};
use crate::urgent::Crew;

pub(super) const JOB: &str = "umbra-mirror-";
pub(super) const NODE: &str = "umbra-nbd-";
/// QEMU connects while it adds the node.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(10);
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// What QEMU says of a mirror.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum News {
    Ready,
    /// One that waited has a connection again, and goes on.
    Back,
    /// By what its target did. Its bitmap goes on.
    Stopped,
    /// Asked for or not: who knows that it was is who asked.
    Ended {
        error: Option<String>,
    },
}

struct Mirror {
    disk: Disk,
    door: Arc<Door>,
    /// It waits for a connection to the images that it had.
    waits: bool,
    /// Its first copy was complete before: QEMU says so once only.
    again: bool,
    /// What travelled over earlier connections.
    before: u64,
    progress: DiskProgress,
}

/// One that goes on is as good as one that is complete for the first time when so little is left, which a guest that writes
/// always leaves.
const NEARLY: u64 = 4 << 20;

pub struct Mirrors {
    qmp: Client,
    token: u64,
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
    /// Whose images they are: names nodes and jobs, so that it lives exactly as long as they do. On record before they are made.
    pub token: u64,
    /// Bytes that travelled of disks over earlier connections, by the primary's image.
    pub travelled: &'a BTreeMap<String, u64>,
    /// They wait in QEMU already.
    pub resumed: bool,
    /// Opens the connection of a disk.
    pub connect: &'a dyn Fn(usize) -> Result<Link, Refusal>,
}

impl Mirrors {
    /// Starts a mirror a disk. After a refusal none is left.
    pub fn start(qmp: &Client, disks: &[Disk], way: &Way<'_>, events: &Sender<Event>) -> Result<Self, Refusal> {
        let mut all = Self {
            qmp: qmp.clone(),
            token: way.token,
            mirrors: Vec::new(),
            crew: Arc::default(),
            finished: false,
        };
        if disks.is_empty() {
            return Ok(all);
        }
        watch(qmp, way.token, events.clone());
        for (n, disk) in disks.iter().enumerate() {
            match mirror(qmp, n, disk, way, &all.crew) {
                Ok(mirror) => all.mirrors.push(mirror),
                Err(refusal) => {
                    all.undo();
                    return Err(refusal);
                }
            }
        }
        if way.resumed {
            let doors = all.mirrors.iter().map(|m| m.door.clone()).collect();
            park::go_on(qmp, doors, way.token, events).inspect_err(|_| all.undo())?;
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
            News::Back => {
                mirror.waits = false;
                mirror.again = park::job(&self.qmp, self.token, disk).is_some_and(|j| j["ready"] == true);
                tracing::info!(disk = mirror.disk.path, "the disk's copy goes on where it was");
                Ok(())
            }
            News::Stopped | News::Ended { .. } if self.finished => Ok(()),
            // That is why it waits.
            News::Stopped if mirror.waits => Ok(()),
            News::Stopped => park::job(&self.qmp, self.token, disk).map_or(Ok(()), |job| stopped(&mirror.disk, &job)),
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
            mirror.progress.link_bytes = mirror.before + mirror.door.sent();
            let name = job(self.token, n);
            let job = jobs
                .as_array()
                .and_then(|j| j.iter().find(|j| j["device"] == name.as_str()));
            if let Some((copied, total)) = job.and_then(|j| Some((j["offset"].as_u64()?, j["len"].as_u64()?))) {
                mirror.progress.copied_bytes = copied;
                mirror.progress.total_bytes = total;
                mirror.progress.ready |= mirror.again && total.saturating_sub(copied) <= NEARLY;
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
                .execute("block-job-cancel", json!({"device": job(self.token, n)}))?;
        }
        for (n, mirror) in self.mirrors.iter_mut().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            let end = self
                .qmp
                .wait(mark, left, |e| ended(e, self.token).filter(|(disk, ..)| *disk == n));
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
            mirror.door.close();
        }
    }

    /// The guest was not stopped for them yet: they can wait for another connection.
    pub fn can_wait(&self) -> bool {
        !self.finished && !self.mirrors.is_empty()
    }

    /// Leaves QEMU as if there had been no mirror.
    pub fn undo(&mut self) {
        if self.mirrors.is_empty() {
            return;
        }
        self.cut();
        sweep(&self.qmp, &[self.token]);
    }

    /// Bytes that travelled, of all connections so far, by the primary's image.
    pub fn travelled(&self) -> impl Iterator<Item = (String, u64)> + '_ {
        self.mirrors
            .iter()
            .map(|m| (m.disk.path.clone(), m.before + m.door.sent()))
    }
}

fn failed(disk: &Disk, why: &str) -> Refusal {
    Refusal::new(
        RefusalCode::Local,
        format!("the mirror of the disk {}: {why}", disk.path),
    )
}

/// Why a job was stopped; a word that was late is none.
fn stopped(disk: &Disk, job: &Value) -> Result<(), Refusal> {
    let (code, why) = match job["io-status"].as_str() {
        Some("ok") | None => return Ok(()),
        Some("nospace") => (RefusalCode::TargetLacks, "the target's disk_dir has no space left"),
        // The link or the daemon: the image may be good to go on with.
        Some(_) => (RefusalCode::PeerUnreachable, "the target's image can't be written"),
    };
    Err(Refusal::new(
        code,
        format!("the mirror of the disk {}: {why}", disk.path),
    ))
}

/// Names a mirror's target.
pub(super) fn node(token: u64, disk: usize) -> String {
    format!("{NODE}{token:x}-{disk}")
}

/// Names a mirror.
pub(super) fn job(token: u64, disk: usize) -> String {
    format!("{JOB}{token:x}-{disk}")
}

/// Whose it is, and which disk's, by its name without the prefix.
fn parts(name: &str) -> Option<(u64, usize)> {
    let (token, disk) = name.split_once('-')?;
    Some((u64::from_str_radix(token, 16).ok()?, disk.parse().ok()?))
}

fn mirror(qmp: &Client, n: usize, disk: &Disk, way: &Way<'_>, crew: &Arc<Crew>) -> Result<Mirror, Refusal> {
    let local = |what: &str, e: &dyn std::fmt::Display| failed(disk, &format!("{what}: {e}"));
    let door = Door::open(n, way, crew).map_err(|e| local("its socket", &e))?;
    let link = (way.connect)(n)?;
    door.clone()
        .serve(link, disk.path.clone())
        .map_err(|e| local("no thread for it", &e))?;
    if !way.resumed {
        begin(qmp, n, disk, way.token, &door)?;
    }
    Ok(Mirror {
        progress: DiskProgress {
            path: disk.path.clone(),
            total_bytes: disk.bytes,
            ..DiskProgress::default()
        },
        disk: disk.clone(),
        door,
        waits: way.resumed,
        again: false,
        before: way.travelled.get(&disk.path).copied().unwrap_or(0),
    })
}

/// A new mirror.
fn begin(qmp: &Client, n: usize, disk: &Disk, token: u64, door: &Door) -> Result<(), Refusal> {
    let local = |what: &str, e: &dyn std::fmt::Display| failed(disk, &format!("{what}: {e}"));
    let node = node(token, n);
    let nbd = json!({
        "driver": "nbd", "node-name": node, "export": export(n), "discard": "unmap",
        "server": {"type": "unix", "path": door.path.display().to_string()},
    });
    qmp.execute("blockdev-add", nbd).map_err(|e| local("its target", &e))?;
    let came = match door.wait(ACCEPT_TIMEOUT) {
        true => Ok(()),
        false => Err(failed(disk, "QEMU's connection was not the one that was waited for")),
    };
    // Stopped by what the target does, not ended: its bitmap is what a later connection goes on from.
    let job = json!({
        "job-id": job(token, n), "device": disk.node, "target": node, "sync": "full", "copy-mode": "background",
        "on-target-error": "stop",
    });
    let begun = came.and_then(|()| {
        let begun = qmp.execute("blockdev-mirror", job);
        begun.map_err(|e| local("blockdev-mirror", &e))
    });
    begun.map(|_| ()).inspect_err(|_| {
        let _ = qmp.execute("blockdev-del", json!({ "node-name": node }));
    })
}

/// Tells the driver what QEMU says of our jobs.
fn watch(qmp: &Client, token: u64, events: Sender<Event>) {
    qmp.on_event(move |e| match told(e, token) {
        Some((disk, news)) => events.send(Event::Disk { disk, news }).is_ok(),
        None => true,
    });
}

fn told(e: &qmp::Event, token: u64) -> Option<(usize, News)> {
    match e.name.as_str() {
        "BLOCK_JOB_READY" => Some((number(&e.data, token)?, News::Ready)),
        "BLOCK_JOB_ERROR" if e.data["action"] == "stop" => Some((number(&e.data, token)?, News::Stopped)),
        _ => ended(e, token).map(|(disk, .., error)| (disk, News::Ended { error })),
    }
}

/// Disk, length, offset and error of a job's end.
fn ended(e: &qmp::Event, token: u64) -> Option<(usize, u64, u64, Option<String>)> {
    let error = match e.name.as_str() {
        "BLOCK_JOB_COMPLETED" => e.data["error"].as_str().map(str::to_owned),
        // It is stopped, and would wait for ever.
        "BLOCK_JOB_ERROR" if e.data["action"] == "stop" => Some("the target's image can't be written".into()),
        // Cancelled before it was ready: not all was copied.
        "BLOCK_JOB_CANCELLED" => Some("it was cancelled".into()),
        _ => return None,
    };
    let n = |key: &str| e.data[key].as_u64().unwrap_or(0);
    Some((number(&e.data, token)?, n("len"), n("offset"), error))
}

fn number(data: &Value, token: u64) -> Option<usize> {
    let (whose, disk) = parts(data["device"].as_str()?.strip_prefix(JOB)?)?;
    (whose == token).then_some(disk)
}

/// Ends jobs and removes nodes under these numbers. Others are not touched, whatever they are called.
pub fn sweep(qmp: &Client, tokens: &[u64]) {
    if tokens.is_empty() {
        return;
    }
    super::scrub::close(qmp);
    let known = |prefix: &'static str| {
        move |name: &String| {
            let of = name.strip_prefix(prefix).and_then(parts);
            of.is_some_and(|(token, _)| tokens.contains(&token))
        }
    };
    let deadline = Instant::now() + END_TIMEOUT;
    loop {
        let mut jobs = named(qmp, "query-block-jobs", "device", JOB);
        jobs.retain(known(JOB));
        if jobs.is_empty() || Instant::now() > deadline {
            break;
        }
        for job in jobs {
            // It may be ending already.
            let _ = qmp.execute("block-job-cancel", json!({"device": job, "force": true}));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut nodes = named(qmp, "query-named-block-nodes", "node-name", NODE);
    nodes.retain(known(NODE));
    for node in nodes {
        if let Err(e) = qmp.execute("blockdev-del", json!({ "node-name": node })) {
            tracing::warn!(node, "a mirror's target stays in QEMU: {e}");
        }
    }
}

/// Jobs and nodes that a replicator made, with the numbers that they bear: none, if it was made by another kind.
pub fn found(qmp: &Client) -> Vec<(String, Option<u64>)> {
    let all = [
        ("query-block-jobs", "device", JOB),
        ("query-named-block-nodes", "node-name", NODE),
    ];
    let all = all
        .iter()
        .flat_map(|(question, key, prefix)| named(qmp, question, key, prefix).into_iter().map(move |n| (n, *prefix)));
    let token = |name: &str, prefix| name.strip_prefix(prefix).and_then(parts).map(|(token, _)| token);
    all.map(|(name, prefix)| (name.clone(), token(&name, prefix))).collect()
}

pub(super) fn named(qmp: &Client, question: &str, key: &str, prefix: &str) -> Vec<String> {
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
        let of = |name: &str, data: Value| told(&event(name, data), 0x19af);
        assert_eq!(
            of("BLOCK_JOB_READY", json!({"device": "umbra-mirror-19af-1"})),
            Some((1, News::Ready))
        );
        for other in ["backup0", "umbra-mirror-1", "umbra-mirror-19b0-1"] {
            assert_eq!(of("BLOCK_JOB_READY", json!({ "device": other })), None, "{other}");
        }
        let whole = json!({"device": "umbra-mirror-19af-0", "len": 7, "offset": 7});
        assert_eq!(
            ended(&event("BLOCK_JOB_COMPLETED", whole.clone()), 0x19af),
            Some((0, 7, 7, None))
        );
        let cancelled = ended(&event("BLOCK_JOB_CANCELLED", whole), 0x19af).and_then(|(.., e)| e);
        assert!(cancelled.is_some_and(|e| e.contains("cancelled")));
        let stopped = json!({"device": "umbra-mirror-19af-0", "operation": "write", "action": "stop"});
        assert!(matches!(of("BLOCK_JOB_ERROR", stopped), Some((0, News::Stopped))));
        let reported = json!({"device": "umbra-mirror-19af-0", "operation": "read", "action": "report"});
        assert_eq!(of("BLOCK_JOB_ERROR", reported), None);
        let broken = json!({"device": "umbra-mirror-19af-0", "error": "No space left"});
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
    #[test]
    fn a_stopped_mirror_says_whether_its_image_is_good_to_go_on_with() {
        let disk = Disk {
            node: "n".into(),
            device: "d".into(),
            path: "/x".into(),
            format: umbra_api::wire::control::DiskFormat::Raw,
            bytes: 512,
        };
        let code = |status: &str| stopped(&disk, &json!({"io-status": status})).err().map(|r| r.code);
        assert_eq!(code("ok"), None, "it goes on by now");
        assert_eq!(code("failed"), Some(RefusalCode::PeerUnreachable));
        assert_eq!(code("nospace"), Some(RefusalCode::TargetLacks));
    }
}
