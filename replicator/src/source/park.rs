//! Mirrors that wait for another connection, in QEMU itself.
//!
//! ```text
//!  mirror ─link lost, replicator dead─> its next write fails: the job is stopped, its dirty bitmap goes on
//!     ─> protected anew, and the target kept these very images: reconnect ─> block-job-resume ─> only what changed travels
//!     └─> the target has not, or nobody comes in time: the job is cancelled, its node removed
//! ```
//! QEMU 10 has no mirror from a bitmap of our own (`sync=incremental` is refused), and a backup job from one fails the guest's
//! writes when its target fails. The bitmap of the mirror is as good, and it lives as long as the QEMU, not as long as a replicator.
//! The number of the images is part of the node's name: a job can't be taken for one of other images.

use std::collections::HashMap;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use umbra_api::VmId;
use umbra_api::order::{Refusal, RefusalCode};

use super::door::Door;
use super::mirror::{self, NODE, News, named, node};
use super::session::Event;
use crate::qmp::Client;

/// Longer than the longest wait of QEMU's client between two attempts.
const RECONNECT_FOR: Duration = Duration::from_secs(40);
/// A request that fails for want of a connection is a line on QEMU's output: not too often.
const ASK_EVERY: Duration = Duration::from_secs(2);
/// So long a link that stalls just then may hold QEMU up.
const READ_TIMEOUT: Duration = Duration::from_secs(1);
const SETTLE: Duration = Duration::from_millis(100);

/// The number of the images that mirrors of exactly these disks wait for. Only what is on this replicator's record (`known`) is its own:
/// another one's mirrors, whose number it does not have, are nothing to go on with.
pub fn waiting(qmp: &Client, disks: usize, known: &[u64]) -> Option<u64> {
    let nodes = named(qmp, "query-named-block-nodes", "node-name", NODE);
    let token = token(&nodes, disks).filter(|t| known.contains(t))?;
    (0..disks).all(|n| job(qmp, token, n).is_some()).then_some(token)
}

/// One number in the names of all nodes, each disk's once.
fn token(nodes: &[String], disks: usize) -> Option<u64> {
    let mut all = nodes.iter().map(|n| {
        let (token, disk) = n.strip_prefix(NODE)?.split_once('-')?;
        Some((u64::from_str_radix(token, 16).ok()?, disk.parse::<usize>().ok()?))
    });
    let mut found = all.by_ref().collect::<Option<Vec<_>>>()?;
    found.sort_unstable();
    let (first, _) = *found.first()?;
    let expected = (0..disks).map(|n| (first, n));
    found.iter().copied().eq(expected).then_some(first)
}

/// What QEMU says of a disk's mirror.
pub fn job(qmp: &Client, token: u64, disk: usize) -> Option<Value> {
    let name = mirror::job(token, disk);
    let jobs = qmp.execute("query-block-jobs", Value::Null).ok()?;
    jobs.as_array()?.iter().find(|j| j["device"] == name.as_str()).cloned()
}

/// Has mirrors that wait go on over their new connections, in a thread of its own: QEMU's client tries again by itself after a second,
/// then two, at last each 16.
pub fn go_on(qmp: &Client, doors: Vec<Arc<Door>>, token: u64, events: &Sender<Event>) -> Result<(), Refusal> {
    let (qmp, events) = (qmp.clone(), events.clone());
    let run = move || {
        let deadline = Instant::now() + RECONNECT_FOR;
        for (disk, door) in doors.iter().enumerate() {
            let news =
                match reconnect(&qmp, &node(token, disk), door, deadline).and_then(|()| resume(&qmp, token, disk)) {
                    Ok(()) => News::Back,
                    Err(_) if door.is_closed() => return,
                    Err(why) => {
                        // QEMU's main loop may wait for it.
                        door.close();
                        News::Ended { error: Some(why) }
                    }
                };
            if events.send(Event::Disk { disk, news }).is_err() {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("disks-again".into()).spawn(run);
    thread
        .map(|_| ())
        .map_err(|e| Refusal::new(RefusalCode::Local, format!("no thread for the disks: {e}")))
}

/// Has QEMU connect anew, and waits until it uses the connection. It does both only for a request, which a guest that writes nothing
/// never makes: a read is one. Only over a connection that is there it is waited for, with QEMU's main loop held up, as in `blockdev-add`.
fn reconnect(qmp: &Client, node: &str, door: &Door, deadline: Instant) -> Result<(), String> {
    let read = || {
        let line = format!("qemu-io {node} \"read -q 0 512\"");
        qmp.execute_for("human-monitor-command", json!({ "command-line": line }), READ_TIMEOUT)
            .map_err(|e| e.to_string())
    };
    while Instant::now() < deadline && !door.is_closed() {
        read()?;
        if !door.wait(ASK_EVERY) {
            continue;
        }
        // First come the words of NBD's beginning. QEMU's client takes the connection up with a request behind them.
        while Instant::now() < deadline && !door.is_closed() {
            let before = door.sent();
            std::thread::sleep(SETTLE);
            let settled = door.sent();
            read()?;
            if settled == before && door.sent() > settled {
                return Ok(());
            }
        }
    }
    Err("QEMU does not connect anew, the disk has to be copied whole".into())
}

/// Ends the pause of a mirror that a failure stopped.
fn resume(qmp: &Client, token: u64, disk: usize) -> Result<(), String> {
    let job = job(qmp, token, disk).ok_or("its mirror has ended")?;
    if job["io-status"] == "ok" && job["paused"] != true {
        return Ok(());
    }
    let resumed = qmp.execute("block-job-resume", json!({"device": mirror::job(token, disk)}));
    resumed
        .map(|_| ())
        .map_err(|e| format!("its mirror does not go on: {e}"))
}

/// VMs whose mirrors were left waiting, and since when; `None`: too long.
#[derive(Debug, Default)]
pub struct Parked(Mutex<HashMap<VmId, Option<Instant>>>);

impl Parked {
    fn lock(&self) -> MutexGuard<'_, HashMap<VmId, Option<Instant>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn note(&self, vm: VmId) {
        self.lock().insert(vm, Some(Instant::now()));
    }

    /// One that waits is due at the next look.
    pub fn hurry(&self, vm: VmId) {
        self.lock().entry(vm).and_modify(|since| *since = None);
    }

    /// Takes out those that wait for so long.
    pub fn due(&self, age: Duration) -> Vec<VmId> {
        self.lock()
            .extract_if(|_, since| since.is_none_or(|t| t.elapsed() >= age))
            .map(|(vm, _)| vm)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_is_told_once() {
        let parked = Parked::default();
        let vm = VmId(Default::default());
        parked.note(vm);
        assert!(parked.due(Duration::from_secs(600)).is_empty());
        parked.hurry(vm);
        assert_eq!(parked.due(Duration::from_secs(600)), [vm]);
        parked.hurry(vm);
        assert!(parked.due(Duration::ZERO).is_empty(), "it does not wait any more");
        parked.note(vm);
        assert_eq!(parked.due(Duration::ZERO), [vm]);
        assert!(parked.due(Duration::ZERO).is_empty());
    }

    #[test]
    fn only_one_set_of_images_is_gone_on_with() {
        let names = |all: &[&str]| all.iter().map(|n| format!("{NODE}{n}")).collect::<Vec<_>>();
        assert_eq!(token(&names(&["19af-1", "19af-0"]), 2), Some(0x19af));
        for wrong in [
            &["19af-0"][..],
            &["19af-0", "19b0-1"],
            &["19af-0", "19af-0"],
            &["0", "1"],
            &["x-0", "x-1"],
            &[],
        ] {
            assert_eq!(token(&names(wrong), 2), None, "{wrong:?}");
        }
    }
}
