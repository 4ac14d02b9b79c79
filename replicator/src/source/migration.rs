//! The primary's side of QEMU: starts a migration that is held open, watches it, and ends it one way or the other.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::machine::Input;
use super::session::Event;
use super::whose;
use crate::adopt::ability;
use crate::proc::ProcessId;
use crate::qmp::{Client, QmpError};
use crate::stream::return_path;
use crate::urgent;

/// With these QEMU converges at about a hundred pages instead of a guess from the measured bandwidth: 4 MiB/s for 100 ms.
const SWITCHOVER_BANDWIDTH: u64 = 4 << 20;
const DOWNTIME_LIMIT_MS: u64 = 100;
/// No limit in practice: the rounds are paced by reading.
const MAX_BANDWIDTH: u64 = 4 << 30;

/// Capabilities that change the stream's format, let the guest run ahead of it, or only go with others of these.
const OFF: [&str; 17] = [
    "auto-converge",
    "dirty-limit",
    "xbzrle",
    "multifd",
    "mapped-ram",
    "postcopy-ram",
    "x-ignore-shared",
    "background-snapshot",
    "x-colo",
    "pause-before-switchover",
    "validate-uuid",
    "dirty-bitmaps",
    "release-ram",
    "zero-copy-send",
    "postcopy-preempt",
    // In 8.2 and older.
    "compress",
    "block",
];

/// QEMU's auto-converge can't be switched on while a migration runs, and knows no 0: a guest that may be throttled loses this much.
const LEAST_THROTTLE: u8 = 1;

/// auto-converge with a percentage of ours: QEMU would raise its own in any held migration, where all that is dirtied is sent
/// and no more. It sets `initial` first, then adds up to the maximum, each time the guest has dirtied more than the trigger's share of
/// what was sent: nearly always, with 1 %.
fn throttle_parameters(percent: u8) -> Value {
    json!({
        "throttle-trigger-threshold": 1,
        "cpu-throttle-initial": percent,
        "cpu-throttle-increment": 99,
        "max-cpu-throttle": percent,
    })
}

/// How long a migration may take to end once it was told to.
const END_TIMEOUT: Duration = Duration::from_secs(10);

pub struct Migration {
    pub qmp: Client,
    /// Our end of the socket pair; QEMU writes its stream to the other one.
    socket: UnixStream,
    /// QEMU's main loop, and the threads that it started for the migration.
    threads: Vec<i32>,
    throttle: bool,
    /// When QEMU had taken it, see [`whose`].
    pub answered_ms: u64,
}

/// What QEMU tells of a guest that is too fast.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rates {
    pub dirty_pages_per_s: u64,
    pub throttle_pct: Option<u8>,
}

impl Migration {
    /// Starts the held migration. Its stream is read from the second value. `pause`: QEMU waits with the stopped guest, before
    /// it gives its disks away, until it is told to [`Migration::go_on`]. `throttle`: QEMU may be told to [`Migration::throttle`] the guest.
    pub fn start(
        qmp: &Client,
        qemu: ProcessId,
        events: &Sender<Event>,
        pause: bool,
        throttle: bool,
    ) -> Result<(Self, UnixStream), QmpError> {
        let set = |name: &str, on: bool| json!({"capability": name, "state": on});
        let off = off_capabilities(&ability::capabilities(qmp)?);
        if !off.is_empty() {
            qmp.execute("migrate-set-capabilities", json!({ "capabilities": off }))?;
        }
        let on = ["events", "return-path", "switchover-ack"].map(|c| set(c, true));
        qmp.execute("migrate-set-capabilities", json!({"capabilities": on}))?;
        if pause {
            let pause = json!({"capabilities": [set("pause-before-switchover", true)]});
            qmp.execute("migrate-set-capabilities", pause)?;
        }
        if throttle {
            let converge = json!({"capabilities": [set("auto-converge", true)]});
            qmp.execute("migrate-set-capabilities", converge)?;
            qmp.execute("migrate-set-parameters", throttle_parameters(LEAST_THROTTLE))?;
        }
        let told = ability::told_bandwidth(&ability::parameters(qmp)?);
        qmp.execute("migrate-set-parameters", switchover_parameters(told))?;
        let pair = |source| QmpError::Unavailable {
            path: "a socket pair for the migration".into(),
            source,
        };
        let (ours, theirs) = UnixStream::pair().map_err(pair)?;
        qmp.execute_with_fd("getfd", json!({"fdname": "umbra-migration"}), theirs.as_fd())?;
        drop(theirs);
        let reader = ours.try_clone().map_err(pair)?;
        watch(qmp, events.clone());
        let before = urgent::threads(qemu.pid);
        qmp.execute("migrate", json!({"uri": "fd:umbra-migration"}))?;
        let answered_ms = whose::now_ms();
        let mut threads = urgent::threads(qemu.pid);
        threads.retain(|t| *t == qemu.pid || !before.contains(t));
        Ok((
            Self {
                qmp: qmp.clone(),
                socket: ours,
                threads,
                throttle,
                answered_ms,
            },
            reader,
        ))
    }

    /// QEMU's threads that a stopped guest waits for.
    pub fn threads(&self) -> &[i32] {
        &self.threads
    }

    /// Those of them that the migration alone costs.
    pub fn own_threads(&self, qemu: ProcessId) -> Vec<i32> {
        self.threads.iter().copied().filter(|t| *t != qemu.pid).collect()
    }

    /// Lets QEMU stop the guest as soon as it has converged.
    pub fn acknowledge(&self) -> io::Result<()> {
        (&self.socket).write_all(&return_path::switchover_ack())
    }

    /// The disks are equal on both sides: out with the device state.
    pub fn go_on(&self) -> Result<(), QmpError> {
        let state = json!({"state": "pre-switchover"});
        self.qmp.execute("migrate-continue", state).map(|_| ())
    }

    /// The other side has taken over: QEMU ends in `postmigrate`, and does not run the guest again by itself.
    pub fn shut(&self) -> io::Result<()> {
        (&self.socket).write_all(&return_path::shut(0))
    }

    /// Ends the migration so that the guest runs on here, and waits until QEMU says that it is over.
    pub fn abandon(&self) -> Result<(), String> {
        // Both may fail when QEMU is gone or ended it already, and that is what is asked below.
        let _ = (&self.socket).write_all(&return_path::shut(1));
        let _ = self.socket.shutdown(Shutdown::Both);
        let ended = wait_terminal(&self.qmp, END_TIMEOUT);
        if self.throttle {
            // QEMU has ended the throttle with the migration; these are for an operator's own.
            self.forget_throttle();
        }
        ended.map(|_| ()).map_err(|e| e.to_string())
    }

    fn forget_throttle(&self) {
        let defaults = json!({
            "throttle-trigger-threshold": 50,
            "cpu-throttle-initial": 20,
            "cpu-throttle-increment": 10,
            "max-cpu-throttle": 99,
        });
        let off = json!({"capabilities": [{"capability": "auto-converge", "state": false}]});
        for (command, arguments) in [("migrate-set-parameters", defaults), ("migrate-set-capabilities", off)] {
            if let Err(e) = self.qmp.execute(command, arguments) {
                tracing::warn!("auto-converge is left configured in QEMU: {e}");
            }
        }
    }

    /// Slows the guest down, if the migration was started so: QEMU does it at one of its next dirty syncs.
    pub fn throttle(&self, percent: u8) -> Result<(), QmpError> {
        let percent = percent.clamp(LEAST_THROTTLE, 99);
        self.qmp
            .execute("migrate-set-parameters", throttle_parameters(percent))
            .map(|_| ())
    }

    pub fn rates(&self) -> Result<Rates, QmpError> {
        let info = self.qmp.execute("query-migrate", Value::Null)?;
        let throttle = info["cpu-throttle-percentage"].as_u64();
        Ok(Rates {
            dirty_pages_per_s: info["ram"]["dirty-pages-rate"].as_u64().unwrap_or(0),
            throttle_pct: throttle
                .and_then(|p| u8::try_from(p).ok())
                .filter(|p| *p > LEAST_THROTTLE),
        })
    }

    pub fn dirty_sync_count(&self) -> Result<u64, QmpError> {
        let info = self.qmp.execute("query-migrate", Value::Null)?;
        Ok(info["ram"]["dirty-sync-count"].as_u64().unwrap_or(0))
    }
}

/// When QEMU may stop the guest. Before 8.2 it can't be told the bandwidth, and takes what it measured last: while the rounds are paced by
/// reading that is not much more.
fn switchover_parameters(told: bool) -> Value {
    let mut parameters = json!({"max-bandwidth": MAX_BANDWIDTH, "downtime-limit": DOWNTIME_LIMIT_MS});
    if told {
        parameters["avail-switchover-bandwidth"] = json!(SWITCHOVER_BANDWIDTH);
    }
    parameters
}

/// Capabilities that are on and must be off. Those that are off are not touched: QEMU may be told to refuse all that it deprecates.
fn off_capabilities(all: &[(String, bool)]) -> Vec<Value> {
    let wrong = all.iter().filter(|(name, on)| *on && OFF.contains(&name.as_str()));
    wrong
        .map(|(name, _)| json!({"capability": name, "state": false}))
        .collect()
}

/// `query-migrate`'s status once it says completed, failed or cancelled, or that there is no migration. One that waits in
/// `pre-switchover` would do so for ever, its socket closed or not, with the guest stopped: it is cancelled, and the guest runs on.
pub fn wait_terminal(qmp: &Client, timeout: Duration) -> Result<String, QmpError> {
    let deadline = Instant::now() + timeout;
    loop {
        let info = qmp.execute("query-migrate", Value::Null)?;
        let status = info["status"].as_str().unwrap_or("none").to_owned();
        if matches!(status.as_str(), "none" | "completed" | "failed" | "cancelled") {
            return Ok(status);
        }
        if status == "pre-switchover" {
            qmp.execute("migrate_cancel", Value::Null)?;
        }
        if Instant::now() > deadline {
            return Err(QmpError::Timeout {
                command: format!("the end of the migration, which is {status}"),
            });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Tells the driver what QEMU says of the migration and of the guest, until the migration is over.
fn watch(qmp: &Client, events: Sender<Event>) {
    let closed = events.clone();
    qmp.on_closed(move || {
        let _ = closed.send(Event::QmpClosed);
    });
    qmp.on_event(move |e| match told(&e.name, &e.data, e.unix_us) {
        Some((event, over)) => events.send(event).is_ok() && !over,
        None => true,
    });
}

/// What an event of QEMU means, and whether it is the migration's last.
fn told(name: &str, data: &Value, unix_us: i64) -> Option<(Event, bool)> {
    match name {
        "STOP" => Some((Event::Stopped { unix_us }, false)),
        "SHUTDOWN" => {
            let why = data["reason"].as_str().unwrap_or("no reason told");
            Some((Event::Interfered(format!("the guest shuts down ({why})")), false))
        }
        "RESET" => Some((Event::GuestReset, false)),
        // The shadow's command line would not fit any more.
        "DEVICE_DELETED" => {
            let what = data["device"].as_str().or(data["path"].as_str()).unwrap_or("a device");
            Some((Event::Interfered(format!("{what} was unplugged")), false))
        }
        "DEVICE_TRAY_MOVED" => {
            let what = data["id"].as_str().unwrap_or("a drive");
            Some((Event::Interfered(format!("the medium of {what} was changed")), false))
        }
        "MIGRATION" => match data["status"].as_str()? {
            "completed" => Some((Event::Input(Input::Completed), true)),
            status @ ("failed" | "cancelled") => Some((
                Event::Input(match status {
                    "cancelled" => {
                        Input::Cancelled("the migration that copies the VM was cancelled by somebody else".into())
                    }
                    _ => Input::MigrationFailed(format!("QEMU says that the migration {status}")),
                }),
                true,
            )),
            "pre-switchover" => Some((Event::PreSwitchover, false)),
            _ => None,
        },
        _ => None,
    }
}

/// Whether the primary runs, is stopped for good, or is gone, asked after a restart.
pub fn ask_primary(id: ProcessId, qmp: Option<&Client>) -> Result<Primary, QmpError> {
    let Some(qmp) = qmp.filter(|_| id.alive()) else {
        return match id.alive() {
            true => Err(QmpError::Closed),
            false => Ok(Primary::Gone),
        };
    };
    let status = wait_terminal(qmp, END_TIMEOUT)?;
    match (status.as_str(), settled(qmp, END_TIMEOUT)?.as_str()) {
        ("completed", "postmigrate") => Ok(Primary::Stopped),
        _ => Ok(Primary::Runs),
    }
}

/// The guest's run state. QEMU tells a migration's end a moment before the state that follows from it.
fn settled(qmp: &Client, within: Duration) -> Result<String, QmpError> {
    let late = Instant::now() + within;
    loop {
        let run = qmp.execute("query-status", Value::Null)?;
        let state = run["status"].as_str().unwrap_or_default();
        if state != "finish-migrate" || Instant::now() >= late {
            return Ok(state.to_owned());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Primary {
    Gone,
    /// Its migration is complete, and it is stopped.
    Stopped,
    Runs,
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::qmp::fake::{Fake, V8_1, V8_2, V10_0};

    /// What a QEMU is told, up to `migrate`.
    fn told(fake: Fake) -> Vec<(String, Value)> {
        let (_dir, qmp, heard) = fake.play();
        let this = ProcessId::of(std::process::id().cast_signed()).unwrap();
        let (events, _kept) = mpsc::channel();
        Migration::start(&qmp, this, &events, true, true).unwrap();
        let all = heard.lock().unwrap().clone();
        assert_eq!(all.last().unwrap().0, "migrate");
        all
    }

    fn capability(all: &[(String, Value)], name: &str) -> Option<bool> {
        let set = all.iter().filter(|(command, _)| command == "migrate-set-capabilities");
        let each = set.flat_map(|(_, arguments)| arguments["capabilities"].as_array().into_iter().flatten());
        each.filter(|c| c["capability"] == name)
            .filter_map(|c| c["state"].as_bool())
            .fold(None, |_, state| Some(state))
    }

    #[test]
    fn each_version_is_told_no_more_than_it_knows() {
        for fake in [V8_1, V8_2, V10_0] {
            // The monitor refuses what its version does not know, and the start with it.
            let all = told(fake);
            let bandwidth = all.iter().any(|(_, a)| a.get("avail-switchover-bandwidth").is_some());
            assert_eq!(bandwidth, fake.version >= (8, 2, 0), "{:?}", fake.version);
            for on in [
                "switchover-ack",
                "return-path",
                "pause-before-switchover",
                "auto-converge",
            ] {
                assert_eq!(capability(&all, on), Some(true), "{on}");
            }
            assert_eq!(capability(&all, "multifd"), None, "it is off");
        }
    }

    #[test]
    fn what_somebody_else_left_on_is_switched_off() {
        let all = told(Fake {
            on: &[
                "compress",
                "block",
                "multifd",
                "zero-copy-send",
                "dirty-bitmaps",
                "late-block-activate",
            ],
            ..V8_1
        });
        for off in ["compress", "block", "multifd", "zero-copy-send", "dirty-bitmaps"] {
            assert_eq!(capability(&all, off), Some(false), "{off}");
        }
        assert_eq!(capability(&all, "late-block-activate"), None, "it does no harm");
    }
}
