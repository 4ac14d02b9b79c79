//! Faults at a chosen step of a switchover, for the tests of whole systems: a side that comes to the step dies there, or waits
//! there until the test has done its harm and lets it go on.
//!
//! Off unless the configuration has `test_faults`, a file that the test writes; the daemon warns at each start with it. The file is
//! looked for at each step, so one daemon serves many tests:
//!
//! ```text
//! test_faults        "kill source after write.relinquished"     what is to happen, and where
//!                    "wait target before resume"
//! test_faults.hit    the same line: the step was reached. The order is used up; who waits goes on when this file is gone
//! ```
//! Steps are the actions of the two machines by their names, and a few of the drivers' own. They are reached by the driver's thread
//! alone: while it waits, pages travel on, and what the other side says is heard later.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{source, target};

/// A test that died lets nobody wait for ever.
const LONGEST: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Source,
    Target,
}

/// Where a driver can be stopped or killed. Does nothing in a daemon that was not configured for tests.
#[derive(Debug, Default)]
pub struct Faults {
    file: Option<PathBuf>,
}

impl Faults {
    pub fn new(file: Option<PathBuf>) -> Self {
        Self { file }
    }

    pub fn before(&self, side: Side, step: &str) {
        self.reached(side, "before", step);
    }

    pub fn after(&self, side: Side, step: &str) {
        self.reached(side, "after", step);
    }

    fn reached(&self, side: Side, moment: &str, step: &str) {
        let Some(file) = &self.file else { return };
        let place = format!("{} {moment} {step}", side.name());
        let Some(what) = ordered(file, &place) else { return };
        let hit = file.with_extension("hit");
        // Used up first: whoever restarts comes to the same step again.
        if let Err(e) = fs::rename(file, &hit) {
            return tracing::error!("test fault at {place}: {}: {e}", file.display());
        }
        tracing::warn!("test fault: {what} {place}");
        match what {
            What::Kill => {
                // Nothing of this process runs behind it: no destructor closes a socket in good order.
                let _ = kill(Pid::this(), Signal::SIGKILL);
            }
            What::Wait => {
                let deadline = Instant::now() + LONGEST;
                while hit.exists() && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    Kill,
    Wait,
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kill => "kill",
            Self::Wait => "wait",
        })
    }
}

/// What the file orders for this place.
fn ordered(file: &Path, place: &str) -> Option<What> {
    let text = fs::read_to_string(file).ok()?;
    let (what, wanted) = text.trim().split_once(' ')?;
    match what {
        _ if wanted != place => None,
        "kill" => Some(What::Kill),
        "wait" => Some(What::Wait),
        _ => None,
    }
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// The step's name.
pub fn source_step(action: &source::machine::Action) -> &'static str {
    use source::machine::{Action as A, Durable as D};
    match action {
        A::Write(D::Protecting) => "write.protecting",
        A::Write(D::Preparing { .. }) => "write.preparing",
        A::Write(D::Relinquished { .. }) => "write.relinquished",
        A::Write(D::Aborting { .. }) => "write.aborting",
        A::Write(D::TakingBack { .. }) => "write.taking_back",
        A::Write(D::HandedOver { .. }) => "write.handed_over",
        A::Write(D::Fenced { .. }) => "write.fenced",
        A::Write(D::Released) => "write.released",
        A::Write(D::Retired) => "write.retired",
        A::Stop { .. } => "stop",
        A::Shut => "shut",
        A::Commit { .. } => "commit",
        A::Abort { .. } => "abort",
        A::Abandon => "abandon",
        A::Resolve { .. } => "resolve",
        A::TakeBack => "take_back",
        A::Kill => "kill",
        A::Goodbye { .. } => "goodbye",
        A::HangUp => "hang_up",
        A::Begin => "begin",
    }
}

/// The step's name.
pub fn target_step(action: &target::machine::Action) -> &'static str {
    use target::machine::{Action as A, Durable as D};
    match action {
        A::Write(D::Admitted) => "write.admitted",
        A::Write(D::Shadow) => "write.shadow",
        A::Write(D::Prepared { .. }) => "write.prepared",
        A::Write(D::Running { .. }) => "write.running",
        A::Write(D::Aborted { .. }) => "write.aborted",
        A::Write(D::Fenced { .. }) => "write.fenced",
        A::Write(D::Exited { .. }) => "write.exited",
        A::Write(D::Discarded) => "write.discarded",
        A::Write(D::Held) => "write.held",
        A::SayPrepared { .. } => "say_prepared",
        A::SayRunning { .. } => "say_running",
        A::SayAborted { .. } => "say_aborted",
        A::Refuse(_) => "refuse",
        A::Resume => "resume",
        A::Discard => "discard",
        A::Hold => "hold",
        A::Kill => "kill",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_holds_once_at_its_own_place() {
        let dir = tempfile::tempdir().unwrap();
        let (file, hit) = (dir.path().join("fault"), dir.path().join("fault.hit"));
        let faults = Faults::new(Some(file.clone()));
        faults.before(Side::Source, "stop");
        fs::write(&file, "wait source before stop\n").unwrap();
        faults.after(Side::Source, "stop");
        faults.before(Side::Target, "stop");
        faults.before(Side::Source, "shut");
        assert!(file.exists() && !hit.exists(), "none of these was meant");
        std::thread::scope(|s| {
            let waits = s.spawn(|| faults.before(Side::Source, "stop"));
            while !hit.exists() {
                std::thread::yield_now();
            }
            assert!(!file.exists() && !waits.is_finished());
            fs::remove_file(&hit).unwrap();
        });
        faults.before(Side::Source, "stop");
    }

    #[test]
    fn nonsense_orders_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fault");
        for text in ["", "kill", "burn source before stop", "kill source before"] {
            fs::write(&file, text).unwrap();
            Faults::new(Some(file.clone())).before(Side::Source, "stop");
            assert!(file.exists(), "{text}");
        }
    }
}
