//! Reads a disk of the primary's through its QEMU, for a moment in which the VM's mirrors stand still.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use umbra_api::wire::control::Disk;

use super::Miss;
use crate::launch::disks::export;
use crate::nbd;
use crate::qmp::Client;
use crate::source::mirror::{self, job};
use crate::source::park;

/// Names our exports in QEMU.
const EXPORT: &str = "umbra-scrub-";
/// For the mirrors' requests to come back over the link.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(1);
/// QEMU reads a few MiB of its own disk.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

pub struct Reader {
    pub qmp: Client,
    pub disks: Vec<Disk>,
    /// The mirrors' number.
    pub token: u64,
    /// For QEMU's NBD server.
    pub socket: PathBuf,
    /// Set: nobody is to wait for it any more.
    pub leave: Arc<AtomicBool>,
}

impl Reader {
    pub fn leaves(&self) -> bool {
        self.leave.load(Ordering::Relaxed)
    }

    /// Lets somebody read a disk of the primary's, while the mirrors stand still.
    pub(super) fn reads<T>(
        &self,
        disk: usize,
        work: impl FnOnce(&mut nbd::Client) -> Result<T, Miss>,
    ) -> Result<T, Miss> {
        let qmp = &self.qmp;
        if self.leaves() {
            return Err(Miss::Later("it is to leave".into()));
        }
        let every = 0..self.disks.len();
        let of = |disk| json!({"device": job(self.token, disk)});
        // One that stands still already is left so by a look that failed: it goes on below.
        let paused = every.clone().map(|d| ask(qmp, "block-job-pause", of(d)).err());
        let refused = paused.fold(None, Option::or);
        let done = match self.stand_still() {
            Ok(()) => self.served(disk, work),
            Err(why) => Err(Miss::Later(refused.unwrap_or(why))),
        };
        if let Err(Miss::Unsettled(_)) = done {
            return done;
        }
        let resumed = every.map(|d| ask(qmp, "block-job-resume", of(d)).map(|_| ()));
        resumed.fold(Ok(()), Result::and)?;
        done
    }

    fn stand_still(&self) -> Result<(), String> {
        let until = Instant::now() + PAUSE_TIMEOUT;
        for disk in 0..self.disks.len() {
            loop {
                let job = park::job(&self.qmp, self.token, disk).ok_or("a mirror has ended")?;
                if job["status"] == "standby" {
                    break;
                }
                if Instant::now() > until || self.leaves() {
                    return Err("the mirrors' requests do not come back".into());
                }
                std::thread::sleep(POLL);
            }
        }
        Ok(())
    }

    /// An export comes and goes while the mirrors stand still.
    fn served<T>(&self, disk: usize, work: impl FnOnce(&mut nbd::Client) -> Result<T, Miss>) -> Result<T, Miss> {
        self.serve()?;
        let done = self.exported(disk, work);
        let _ = ask(&self.qmp, "nbd-server-stop", Value::Null);
        done
    }

    fn exported<T>(&self, disk: usize, work: impl FnOnce(&mut nbd::Client) -> Result<T, Miss>) -> Result<T, Miss> {
        let node = self.disks.get(disk).map(|d| d.node.as_str());
        let id = format!("{EXPORT}{disk}");
        let it = json!({"type": "nbd", "id": id, "node-name": node, "name": export(disk), "writable": false});
        ask(&self.qmp, "block-export-add", it)?;
        let mut source = nbd::Client::connect(&self.socket, &export(disk), READ_TIMEOUT).map_err(|e| e.to_string())?;
        work(&mut source)
    }

    /// QEMU's NBD server, unless somebody else has it.
    fn serve(&self) -> Result<(), Miss> {
        let start = || {
            // Nobody else has this path: a replicator died between its start and its export, or QEMU was slow with it.
            match UnixStream::connect(&self.socket) {
                Ok(_) => drop(ask(&self.qmp, "nbd-server-stop", Value::Null)),
                Err(_) => drop(std::fs::remove_file(&self.socket)),
            }
            let path = self.socket.display().to_string();
            let at = json!({"addr": {"type": "unix", "data": {"path": path}}});
            ask(&self.qmp, "nbd-server-start", at)
        };
        let Err(why) = start() else { return Ok(()) };
        let exports = mirror::named(&self.qmp, "query-block-exports", "id", "");
        if exports.is_empty() || exports.iter().any(|e| !e.starts_with(EXPORT)) {
            return Err(match why.contains("already running") {
                true => Miss::Taken,
                false => Miss::Later(why),
            });
        }
        // Of a replicator that died in the middle.
        close(&self.qmp);
        start().map(|_| ()).map_err(Miss::Later)
    }
}

/// Ends what a replicator that died in the middle of a look has left open, if all of it is ours.
pub fn close(qmp: &Client) {
    let exports = mirror::named(qmp, "query-block-exports", "id", "");
    if !exports.is_empty()
        && exports.iter().all(|e| e.starts_with(EXPORT))
        && let Err(e) = ask(qmp, "nbd-server-stop", Value::Null)
    {
        tracing::warn!("an export of a disk stays in QEMU: {e}");
    }
}

fn ask(qmp: &Client, command: &str, arguments: Value) -> Result<Value, String> {
    qmp.execute_for(command, arguments, READ_TIMEOUT)
        .map_err(|e| format!("{command}: {e}"))
}

#[cfg(test)]
mod tests {
    use umbra_api::wire::control::DiskFormat;

    use super::*;
    use crate::qmp::client::tests::played;

    fn disk(n: usize) -> Disk {
        Disk {
            node: format!("d{n}"),
            device: format!("d{n}"),
            path: format!("/d{n}"),
            format: DiskFormat::Raw,
            bytes: 1 << 20,
        }
    }

    /// QEMU drains all disks for an export of one, and the guest waits for it.
    #[test]
    fn no_export_comes_or_goes_while_a_mirror_of_the_vm_is_at_work() {
        let (dir, qmp, peer) = played(|mut peer| {
            let mut paused = [false; 2];
            let mut said = Vec::new();
            while said.last().is_none_or(|(s, _)| s != "block-job-resume") || paused != [false; 2] {
                let (command, id) = peer.command();
                let name = command["execute"].as_str().unwrap().to_owned();
                let of = |n: usize| command["arguments"]["device"] == job(7, n).as_str();
                match name.as_str() {
                    "block-job-pause" => (0..2).for_each(|n| paused[n] |= of(n)),
                    "block-job-resume" => (0..2).for_each(|n| paused[n] &= !of(n)),
                    _ => {}
                }
                let status = |n: usize| if paused[n] { "standby" } else { "ready" };
                let jobs: Vec<_> = (0..2)
                    .map(|n| json!({"device": job(7, n), "status": status(n)}))
                    .collect();
                said.push((name, paused));
                peer.say(json!({"return": jobs, "id": id}));
            }
            for drains in ["block-export-add", "nbd-server-stop"] {
                let then: Vec<_> = said.iter().filter(|(s, _)| s == drains).map(|(_, p)| *p).collect();
                assert_eq!(then, [[true, true]], "{drains}");
            }
        });
        let reader = Reader {
            qmp,
            disks: vec![disk(0), disk(1)],
            token: 7,
            socket: dir.path().join("nbd"),
            leave: Arc::default(),
        };
        // The played QEMU has no NBD server: nothing is read.
        assert!(matches!(reader.reads(1, |_| Ok(())), Err(Miss::Later(_))));
        drop(reader);
        peer.join().unwrap();
    }
}
