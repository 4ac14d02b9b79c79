//! The target's side of a protection, as a pure machine.
//!
//! ```text
//!            Seeded            Prepare(e)              Streamed           Loaded and Written        Commit(e): cont
//!  Seeding ─────────> Standby ───────────> Preparing ──────────> Loading ────────────────> Prepared ────────────> Resuming
//!     │                  │                     │                    │                         │                      │ Resumed
//!     │   lost, goodbye, released, the shadow is gone               │ load failed   Abort(e), │                      v
//!     v                  v                     v                    v               it is gone│                   Running
//!  Discarded <───────────┴─────────────────────┘ <────────────── Aborting <───────────────────┴───── Resuming: it is gone, and never ran
//!                                                                Exited <─────────────────────────── Running: it is gone
//! ```
//! `Fence(e)` from the source takes the way of an abort, from a prepared shadow too; from `Running` only if this host was
//! declared dead by an operator, and then the running copy is killed (`Fencing`), since the source has the VM.
//!
//! A shadow that was undecided when its source was lost is discarded but for its RAM (`Held` on disk): the source may come again in the same epoch, with
//! a new session and a new shadow.
//!
//! Rules: 'prepared' is on disk before it is said (it is written while QEMU loads, to keep the disk out of the stopped
//! time: after a restart it counts only if QEMU says that it has loaded); a prepared shadow neither runs nor goes away by
//! itself, it waits for its source's word; 'aborted' is on disk before it is said, and then the shadow never runs under
//! that epoch; a VM that ran here and died is never 'aborted', or its source would bring back a primary that is older than
//! what the VM has promised since.

use umbra_api::Epoch;
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::replica::Phase;

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum State {
    Seeding,
    Standby,
    Preparing {
        epoch: Epoch,
    },
    Loading {
        epoch: Epoch,
        written: bool,
        loaded: bool,
    },
    Prepared {
        epoch: Epoch,
    },
    Resuming {
        epoch: Epoch,
    },
    Running {
        epoch: Epoch,
    },
    Aborting {
        epoch: Epoch,
    },
    Fencing {
        epoch: Epoch,
    },
    /// It was the VM, and its QEMU has exited.
    Exited {
        epoch: Epoch,
    },
    Discarded {
        error: Option<Refusal>,
    },
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Input {
    Seeded,
    Prepare {
        epoch: Epoch,
    },
    /// All of the stream was fed to the shadow's QEMU.
    Streamed,
    /// The shadow's QEMU has loaded it, and is paused.
    Loaded,
    LoadFailed(String),
    /// What the last [`Action::Write`] asked for is on the disk.
    Written,
    Commit {
        epoch: Epoch,
    },
    Abort {
        epoch: Epoch,
    },
    Resolve {
        epoch: Epoch,
    },
    /// The shadow runs.
    Resumed,
    LinkLost(String),
    Goodbye(String),
    Release,
    ShadowGone,
    /// The copy here must never run below `epoch`. `dead`: nor go on running, since an operator gave the VM to the other side.
    Fence {
        epoch: Epoch,
        dead: bool,
    },
}

/// What the target keeps on disk about its part.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", tag = "phase")]
pub enum Durable {
    /// A source may come; nothing was started.
    Admitted,
    /// A shadow's QEMU was started. After a restart it is discarded.
    Shadow,
    Prepared {
        epoch: Epoch,
    },
    Running {
        epoch: Epoch,
    },
    Aborted {
        epoch: Epoch,
    },
    /// It ran, and must go: the source has the VM, under `epoch`.
    Fenced {
        epoch: Epoch,
    },
    /// The VM ran here, and its QEMU has exited.
    Exited {
        epoch: Epoch,
    },
    /// Its source was lost before anything was decided, and may come again in this epoch.
    Held,
    Discarded,
}

impl Durable {
    /// The switchover or order that it is about.
    pub fn epoch(self) -> Option<Epoch> {
        match self {
            Self::Prepared { epoch }
            | Self::Running { epoch }
            | Self::Aborted { epoch }
            | Self::Fenced { epoch }
            | Self::Exited { epoch } => Some(epoch),
            Self::Admitted | Self::Shadow | Self::Held | Self::Discarded => None,
        }
    }
}

/// What QEMU says of the shadow, asked after a restart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Shadow {
    Gone,
    /// Its migration is not complete.
    Waits,
    /// Loaded and paused.
    Loaded,
    Runs,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    Write(Durable),
    SayPrepared {
        epoch: Epoch,
    },
    SayRunning {
        epoch: Epoch,
    },
    SayAborted {
        epoch: Epoch,
    },
    Refuse(Refusal),
    /// `cont` the shadow.
    Resume,
    /// Quit the shadow and remove its files. It has never run.
    Discard,
    /// End a copy that runs. Its images are kept.
    Kill,
    /// The same, but keep its RAM for the source to come again.
    Hold,
}

const FENCED: &str = "this host was declared dead, and the VM was given to the other one: the copy here was ended";

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Machine {
    pub state: State,
    /// The protection's epoch. A switchover's epoch is above it.
    epoch: Epoch,
}

impl Machine {
    pub fn new(epoch: Epoch) -> Self {
        Self {
            state: State::Seeding,
            epoch,
        }
    }

    /// After a restart, from what is on disk and what QEMU says of the shadow.
    pub fn resume(durable: Durable, epoch: Epoch, shadow: Shadow) -> (Self, Vec<Action>) {
        let gone = |why: &str| State::Discarded {
            error: Some(Refusal::new(RefusalCode::Local, why)),
        };
        let (state, actions) = match (durable, shadow) {
            (Durable::Admitted | Durable::Discarded, _) => (State::Discarded { error: None }, Vec::new()),
            (Durable::Shadow | Durable::Held, _) => (
                gone("the target's replicator was restarted"),
                vec![Action::Write(Durable::Held), Action::Hold],
            ),
            (Durable::Prepared { epoch }, Shadow::Loaded) => (State::Prepared { epoch }, Vec::new()),
            // The commit came, and the restart was faster than the record of it.
            (Durable::Prepared { epoch }, Shadow::Runs) => (
                State::Running { epoch },
                vec![Action::Write(Durable::Running { epoch })],
            ),
            (Durable::Prepared { epoch }, Shadow::Waits | Shadow::Gone) => (
                gone("the target's replicator was restarted before the shadow had loaded"),
                vec![Action::Write(Durable::Aborted { epoch }), Action::Discard],
            ),
            (Durable::Running { epoch }, Shadow::Gone) => (
                State::Exited { epoch },
                vec![Action::Write(Durable::Exited { epoch }), Action::Discard],
            ),
            (Durable::Exited { epoch }, _) => (State::Exited { epoch }, vec![Action::Discard]),
            (Durable::Running { epoch }, _) => (State::Running { epoch }, Vec::new()),
            (Durable::Fenced { .. }, _) => (gone(FENCED), vec![Action::Kill]),
            (Durable::Aborted { .. }, _) => (gone("aborted by the source"), vec![Action::Discard]),
        };
        (Self { state, epoch }, actions)
    }

    pub fn phase(&self) -> Phase {
        match &self.state {
            State::Seeding => Phase::Seeding,
            State::Standby => Phase::Standby,
            State::Preparing { .. } | State::Loading { .. } | State::Aborting { .. } => Phase::Switching,
            State::Fencing { .. } => Phase::Switching,
            State::Prepared { .. } | State::Resuming { .. } => Phase::Prepared,
            State::Running { .. } => Phase::Active,
            State::Exited { .. } | State::Discarded { .. } => Phase::Released,
        }
    }

    pub fn apply(&mut self, input: Input) -> Vec<Action> {
        let (next, actions) = self.next(input);
        if let Some(state) = next {
            self.state = state;
        }
        actions
    }

    fn next(&self, input: Input) -> (Option<State>, Vec<Action>) {
        if let Input::Fence { epoch, dead } = input {
            return self.fence(epoch, dead);
        }
        // A question or an abort about an epoch that was never prepared here, and never will be.
        let asked = match input {
            Input::Resolve { epoch } | Input::Abort { epoch } => Some(epoch),
            _ => None,
        };
        if let Some(epoch) = asked {
            return self.asked(epoch, matches!(input, Input::Abort { .. }));
        }
        match &self.state {
            State::Seeding | State::Standby => self.copying(input),
            State::Preparing { epoch } => Self::preparing(*epoch, input),
            State::Loading { epoch, written, loaded } => Self::loading(*epoch, *written, *loaded, input),
            State::Prepared { epoch } => Self::prepared(*epoch, input),
            State::Resuming { epoch } => Self::resuming(*epoch, input),
            State::Running { epoch } => Self::running(*epoch, input),
            State::Aborting { epoch } => Self::aborting(*epoch, input),
            State::Fencing { epoch } => match input {
                Input::Written => (
                    Some(State::Discarded {
                        error: Some(Refusal::new(RefusalCode::PeerRefused, FENCED)),
                    }),
                    vec![Action::Kill, Action::SayAborted { epoch: *epoch }],
                ),
                _ => (None, Vec::new()),
            },
            State::Exited { epoch } => match input {
                Input::Commit { epoch: e } if e == *epoch => (None, vec![Action::SayRunning { epoch: e }]),
                Input::Commit { epoch } => (None, vec![Action::SayAborted { epoch }]),
                _ => (None, Vec::new()),
            },
            State::Discarded { .. } => match input {
                Input::Commit { epoch } => (None, vec![Action::SayAborted { epoch }]),
                _ => (None, Vec::new()),
            },
        }
    }

    /// Answers `Resolve` and `Abort`.
    fn asked(&self, epoch: Epoch, abort: bool) -> (Option<State>, Vec<Action>) {
        match &self.state {
            State::Prepared { epoch: e } if *e == epoch && !abort => (None, vec![Action::SayPrepared { epoch }]),
            State::Running { epoch: e } | State::Exited { epoch: e } if *e == epoch => {
                (None, vec![Action::SayRunning { epoch }])
            }
            // `cont` had no answer: once more.
            State::Resuming { epoch: e } if *e == epoch && !abort => (None, vec![Action::Resume]),
            State::Resuming { epoch: e } if *e == epoch => (None, Vec::new()),
            // 'Prepared' will be said as soon as it is so.
            State::Loading { epoch: e, .. } if *e == epoch && !abort => (None, Vec::new()),
            State::Aborting { .. } | State::Fencing { .. } => (None, Vec::new()),
            State::Discarded { .. } => (
                None,
                vec![Action::Write(Durable::Aborted { epoch }), Action::SayAborted { epoch }],
            ),
            State::Preparing { epoch: e } | State::Loading { epoch: e, .. } | State::Prepared { epoch: e }
                if *e == epoch =>
            {
                (
                    Some(State::Aborting { epoch }),
                    vec![Action::Write(Durable::Aborted { epoch })],
                )
            }
            // Standby and others: an epoch above the protection's means that the source is past this session.
            State::Seeding | State::Standby if epoch > self.epoch => (
                Some(State::Aborting { epoch }),
                vec![Action::Write(Durable::Aborted { epoch })],
            ),
            // An older epoch than the one at work here: over, and never run.
            _ => (None, vec![Action::SayAborted { epoch }]),
        }
    }

    fn fence(&self, fence: Epoch, dead: bool) -> (Option<State>, Vec<Action>) {
        let refuse = |why: String| (None, vec![Action::Refuse(Refusal::new(RefusalCode::WrongPhase, why))]);
        let epoch = match &self.state {
            State::Seeding | State::Standby => self.epoch,
            State::Preparing { epoch }
            | State::Loading { epoch, .. }
            | State::Prepared { epoch }
            | State::Resuming { epoch }
            | State::Running { epoch }
            | State::Exited { epoch } => *epoch,
            // Its end is said when it is reached.
            State::Aborting { .. } | State::Fencing { .. } => return (None, Vec::new()),
            State::Discarded { .. } => {
                let actions = vec![
                    Action::Write(Durable::Aborted { epoch: fence }),
                    Action::SayAborted { epoch: fence },
                ];
                return (None, actions);
            }
        };
        if fence <= epoch {
            return refuse(format!("a fence of epoch {fence}, epoch {epoch} is at work here"));
        }
        match &self.state {
            State::Resuming { .. } => refuse(format!("the shadow is told to run under epoch {epoch} in this moment")),
            State::Running { .. } if !dead => refuse(format!("the VM runs here since epoch {epoch}")),
            State::Running { .. } => (
                Some(State::Fencing { epoch: fence }),
                vec![Action::Write(Durable::Fenced { epoch: fence })],
            ),
            // One that ran and has exited too: its source gets the VM by an operator's word.
            _ => (
                Some(State::Aborting { epoch: fence }),
                vec![Action::Write(Durable::Aborted { epoch: fence })],
            ),
        }
    }

    fn copying(&self, input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::Seeded => (Some(State::Standby), Vec::new()),
            Input::Prepare { epoch } if self.state == State::Standby && epoch > self.epoch => {
                (Some(State::Preparing { epoch }), Vec::new())
            }
            Input::Prepare { epoch } => {
                let detail = format!("prepare for epoch {epoch} in {:?} of epoch {}", self.state, self.epoch);
                (
                    None,
                    vec![Action::Refuse(Refusal::new(RefusalCode::WrongPhase, detail))],
                )
            }
            Input::Loaded => Self::discard(Some(Refusal::new(RefusalCode::PeerRefused, "the stream ended unasked"))),
            other => Self::undecided(other),
        }
    }

    fn preparing(epoch: Epoch, input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::Streamed => (
                Some(State::Loading {
                    epoch,
                    written: false,
                    loaded: false,
                }),
                vec![Action::Write(Durable::Prepared { epoch })],
            ),
            other => Self::undecided(other),
        }
    }

    /// From here on only the source's word counts; a lost link changes nothing.
    fn loading(epoch: Epoch, written: bool, loaded: bool, input: Input) -> (Option<State>, Vec<Action>) {
        let (written, loaded) = match input {
            Input::Written => (true, loaded),
            Input::Loaded => (written, true),
            Input::LoadFailed(why) => return Self::abort(epoch, Refusal::new(RefusalCode::Local, why)),
            Input::ShadowGone => {
                return Self::abort(epoch, Refusal::new(RefusalCode::Local, "the shadow's QEMU has exited"));
            }
            Input::Commit { epoch: e } if e != epoch => return (None, vec![Action::SayAborted { epoch: e }]),
            _ => return (None, Vec::new()),
        };
        match written && loaded {
            true => (Some(State::Prepared { epoch }), vec![Action::SayPrepared { epoch }]),
            false => (Some(State::Loading { epoch, written, loaded }), Vec::new()),
        }
    }

    fn abort(epoch: Epoch, why: Refusal) -> (Option<State>, Vec<Action>) {
        let actions = vec![Action::Refuse(why), Action::Write(Durable::Aborted { epoch })];
        (Some(State::Aborting { epoch }), actions)
    }

    fn prepared(epoch: Epoch, input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::Commit { epoch: e } if e == epoch => (Some(State::Resuming { epoch }), vec![Action::Resume]),
            Input::Commit { epoch: e } => (None, vec![Action::SayAborted { epoch: e }]),
            Input::ShadowGone => (
                Some(State::Aborting { epoch }),
                vec![Action::Write(Durable::Aborted { epoch })],
            ),
            Input::Release => {
                let detail = format!("the shadow is prepared for epoch {epoch}: only its source decides now");
                (
                    None,
                    vec![Action::Refuse(Refusal::new(RefusalCode::WrongPhase, detail))],
                )
            }
            _ => (None, Vec::new()),
        }
    }

    fn resuming(epoch: Epoch, input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::Resumed => (
                Some(State::Running { epoch }),
                vec![Action::SayRunning { epoch }, Action::Write(Durable::Running { epoch })],
            ),
            // It never ran, or 'resumed' would have come first.
            Input::ShadowGone => (
                Some(State::Aborting { epoch }),
                vec![Action::Write(Durable::Aborted { epoch })],
            ),
            _ => (None, Vec::new()),
        }
    }

    fn running(epoch: Epoch, input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::Commit { epoch: e } if e == epoch => (None, vec![Action::SayRunning { epoch }]),
            Input::ShadowGone => (
                Some(State::Exited { epoch }),
                vec![Action::Write(Durable::Exited { epoch }), Action::Discard],
            ),
            Input::Release => {
                let detail =
                    format!("the shadow is the VM since epoch {epoch}: it runs, and a release never stops a VM");
                (
                    None,
                    vec![Action::Refuse(Refusal::new(RefusalCode::WrongPhase, detail))],
                )
            }
            _ => (None, Vec::new()),
        }
    }

    fn aborting(epoch: Epoch, input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::Written => {
                let error = Refusal::new(RefusalCode::PeerRefused, format!("epoch {epoch} was aborted"));
                (
                    Some(State::Discarded { error: Some(error) }),
                    vec![Action::Discard, Action::SayAborted { epoch }],
                )
            }
            _ => (None, Vec::new()),
        }
    }

    /// Before 'prepared' is on disk, all that ends the session discards the shadow: the primary runs.
    fn undecided(input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::LinkLost(why) => (
                Some(State::Discarded {
                    error: Some(Refusal::new(RefusalCode::PeerUnreachable, why)),
                }),
                vec![Action::Write(Durable::Held), Action::Hold],
            ),
            Input::Goodbye(why) => match why.as_str() {
                "released" => Self::discard(None),
                _ => Self::discard(Some(Refusal::new(RefusalCode::PeerRefused, why))),
            },
            Input::Release => Self::discard(None),
            Input::LoadFailed(why) => {
                let error = Refusal::new(RefusalCode::Local, why);
                let (next, mut actions) = Self::discard(Some(error.clone()));
                actions.insert(0, Action::Refuse(error));
                (next, actions)
            }
            Input::ShadowGone => {
                let error = Refusal::new(RefusalCode::Local, "the shadow's QEMU has exited");
                let (next, mut actions) = Self::discard(Some(error.clone()));
                actions.insert(0, Action::Refuse(error));
                (next, actions)
            }
            Input::Commit { epoch } => (None, vec![Action::SayAborted { epoch }]),
            _ => (None, Vec::new()),
        }
    }

    fn discard(error: Option<Refusal>) -> (Option<State>, Vec<Action>) {
        (
            Some(State::Discarded { error }),
            vec![Action::Write(Durable::Discarded), Action::Discard],
        )
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
