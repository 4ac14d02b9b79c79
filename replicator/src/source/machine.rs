//! The source's side of a protection, as a pure machine: inputs go in, actions come out, nothing is opened here.
//!
//! ```text
//!            Seeded           Switchover(e)            Written              Streamed
//!  Seeding ─────────> Standby ─────────────> Noting ──────────> Stopping ─────────────> Relinquishing
//!     │                  │                     │                    │                      │ Written and Prepared(e): SHUT(0)
//!     │ lost, released   │                     │   refused, lost, too late, abort          v
//!     │                  │                     │                    │                  Shutting
//!     v                  v                     v                    v   runs again         │
//!   Ended <──────────────┴─────────────────────┴────────────────────┴──────────────────────┤
//!     ^                                                                                    │ Completed, or it is gone
//!     │ TakenBack                Aborted(e)             lost                               v       Running(e)
//!  TakingBack <───────────────── Resolving <─────────────────────────────────────────── Committing ─────────> HandedOver
//!                                    │  Prepared(e): commit again                          ^
//!                                    └─────────────────────────────────────────────────────┘
//!
//!  HandedOver, Resolving ── Fenced ──> TakingBack      an operator: the target's copy is proven never to run again
//!  Orphaned ── Ask ──> Resolving                       an operator: the primary died undecided, the shadow is to run
//!  any ── Yield(e) ──> Yielding ── Written: kill ──> Ended    this host was declared dead, and is back
//!  Seeding, Standby ── lost, damaged, or its migration ended, and the copy was begun ──> Broken ── Again ──> Seeding
//! ```
//! Rules that every edge keeps: the epoch of a switchover is on disk before the guest may stop for it (`Noting`); the
//! primary is given up on disk before QEMU is told so (SHUT(0) waits for `Written`); the commit is sent only when the
//! primary can't run again by itself (`Shutting` has ended); once it was sent, only the target's durable 'aborted' brings the
//! primary back. The record 'relinquished' is written while the shadow loads, to keep the disk out of the stopped time: it binds
//! nobody before SHUT(0), since QEMU itself lets the guest run on when the migration's socket closes earlier.

use umbra_api::Epoch;
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::replica::Phase;

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum State {
    Seeding,
    Standby,
    /// The copy broke off and the VM runs on here. A new pass begins by itself, for as long as that makes sense.
    Broken {
        error: Refusal,
    },
    Noting {
        epoch: Epoch,
    },
    Stopping {
        epoch: Epoch,
    },
    Relinquishing {
        epoch: Epoch,
        written: bool,
        prepared: bool,
    },
    Shutting {
        epoch: Epoch,
    },
    Committing {
        epoch: Epoch,
    },
    Resolving {
        epoch: Epoch,
    },
    TakingBack {
        epoch: Epoch,
    },
    HandedOver {
        epoch: Epoch,
    },
    /// The primary's process is gone, and `epoch` was not decided: nobody knows how old the shadow is. It is kept, and only
    /// an operator has it run.
    Orphaned {
        epoch: Epoch,
    },
    /// The other side was told by an operator that this host is dead, and has the VM: the copy here goes.
    Yielding {
        epoch: Epoch,
    },
    /// The primary runs on here, or is gone.
    Ended {
        error: Option<Refusal>,
    },
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Input {
    /// The target took the copy: from now on it is not given up at the first trouble.
    Begun,
    /// The first full pass is in the shadow's RAM.
    Seeded,
    /// It is time for the next attempt after a break.
    Again,
    Switchover {
        epoch: Epoch,
    },
    Release,
    /// What the last [`Action::Write`] asked for is on the disk.
    Written,
    /// The guest is stopped, and all of its state is on the link.
    Streamed,
    Prepared {
        epoch: Epoch,
    },
    /// The primary's migration is complete: it will not run again unless it is told to.
    Completed,
    Running {
        epoch: Epoch,
    },
    Aborted {
        epoch: Epoch,
    },
    /// The target's words.
    Refused(Refusal),
    /// Something failed on this host.
    Failed(Refusal),
    LinkLost(String),
    /// QEMU ended the migration by itself, and the guest runs on.
    MigrationFailed(String),
    /// Somebody else cancelled the migration, and nothing more: the VM is as it was, and the copy is wanted still.
    Cancelled(String),
    /// The shadow's memory is not what was sent.
    Damaged(String),
    /// The primary's process is gone.
    PrimaryGone,
    /// The time for this switchover is up.
    TimedOut,
    /// The primary, told to go on, runs again.
    TakenBack,
    /// Somebody else stopped, changed or shut down the VM, or ended its migration: what happened, in words.
    Interfered(String),
    /// An operator's word, after the target has made durable that its copy never runs below `epoch`, or was declared dead.
    Fenced {
        epoch: Epoch,
    },
    /// An operator wants the target asked, and a prepared shadow run.
    Ask,
    /// The other side has the VM since this host was declared dead.
    Yield {
        epoch: Epoch,
    },
}

/// What the source keeps on disk about its part.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", tag = "phase")]
pub enum Durable {
    /// Copying. The primary runs; no shadow may.
    Protecting,
    /// A switchover to `epoch` began, and is not decided.
    Preparing {
        epoch: Epoch,
    },
    /// Given up for `epoch`: only a durable 'aborted' of the target brings the primary back.
    Relinquished {
        epoch: Epoch,
    },
    /// The primary runs on; the target was not heard to have given up `epoch`.
    Aborting {
        epoch: Epoch,
    },
    /// The target has given up `epoch`, and never runs its copy below it: the stopped primary is to run again, and may not do
    /// so yet.
    TakingBack {
        epoch: Epoch,
    },
    HandedOver {
        epoch: Epoch,
    },
    /// The copy here must go: the other side has the VM.
    Fenced {
        epoch: Epoch,
    },
    /// The primary is the VM again, or still.
    Released,
    /// The stopped primary was quit.
    Retired,
}

impl Durable {
    /// The switchover or order that it is about.
    pub fn epoch(self) -> Option<Epoch> {
        match self {
            Self::Preparing { epoch }
            | Self::Relinquished { epoch }
            | Self::Aborting { epoch }
            | Self::TakingBack { epoch }
            | Self::HandedOver { epoch }
            | Self::Fenced { epoch } => Some(epoch),
            Self::Protecting | Self::Released | Self::Retired => None,
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    Write(Durable),
    /// Tell the target to prepare, acknowledge the switchover to QEMU, and read what comes without pause.
    Stop {
        epoch: Epoch,
    },
    /// Tell QEMU that the other side has taken over: SHUT(0).
    Shut,
    Commit {
        epoch: Epoch,
    },
    /// Tell the target that `epoch` is off. Best effort: a target that does not hear it stays prepared, and asks nothing.
    Abort {
        epoch: Epoch,
    },
    /// End the migration before QEMU was told SHUT(0): the guest runs on.
    Abandon,
    /// Ask the target, until it answers, how `epoch` ended.
    Resolve {
        epoch: Epoch,
    },
    /// `cont` the stopped primary.
    TakeBack,
    /// End the primary's process, whether it runs or not.
    Kill,
    Goodbye {
        reason: String,
    },
    /// Close the connections without a word: the target keeps what it has for this source to come again.
    HangUp,
    /// Open a session and a migration anew.
    Begin,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Machine {
    pub state: State,
    primary_gone: bool,
    /// The target has taken the copy at least once.
    begun: bool,
}

impl Machine {
    pub fn new() -> Self {
        Self {
            state: State::Seeding,
            primary_gone: false,
            begun: false,
        }
    }

    /// After a restart, from what is on disk. `stopped`: the primary is alive and its migration is complete; `gone`: there is no such process any more.
    pub fn resume(durable: Durable, stopped: bool, gone: bool) -> (Self, Vec<Action>) {
        let ended = |error| State::Ended { error };
        let restarted = || {
            Some(Refusal::new(
                RefusalCode::Local,
                "the source's replicator was restarted",
            ))
        };
        let (state, actions) = match durable {
            Durable::Protecting if !stopped && !gone => {
                let why = "the source's replicator was restarted";
                let error = Refusal::new(RefusalCode::Local, why);
                (State::Broken { error }, Vec::new())
            }
            Durable::Protecting => (ended(restarted()), vec![Action::Write(Durable::Released)]),
            Durable::Preparing { epoch } | Durable::Aborting { epoch } => (
                ended(restarted()),
                vec![Action::Write(Durable::Aborting { epoch }), Action::Abort { epoch }],
            ),
            Durable::Relinquished { epoch } if stopped => (State::Resolving { epoch }, vec![Action::Resolve { epoch }]),
            // It may have died stopped, or after QEMU had let it run on for hours: nobody knows how old the shadow is, so
            // it is kept, and not run.
            Durable::Relinquished { epoch } if gone => (State::Orphaned { epoch }, Vec::new()),
            // SHUT(0) did not arrive, so the commit was never sent, and QEMU let the guest run on.
            Durable::Relinquished { epoch } => (
                ended(restarted()),
                vec![Action::Write(Durable::Aborting { epoch }), Action::Abort { epoch }],
            ),
            Durable::TakingBack { epoch } if stopped => (State::TakingBack { epoch }, vec![Action::TakeBack]),
            Durable::TakingBack { epoch } => (ended(Some(taken_back(epoch))), vec![Action::Write(Durable::Released)]),
            Durable::HandedOver { epoch } => (State::HandedOver { epoch }, Vec::new()),
            Durable::Fenced { .. } => (ended(Some(yielded())), vec![Action::Kill]),
            Durable::Released | Durable::Retired => (ended(None), Vec::new()),
        };
        (
            Self {
                state,
                primary_gone: gone,
                begun: true,
            },
            actions,
        )
    }

    pub fn phase(&self) -> Phase {
        match &self.state {
            State::Seeding | State::Broken { .. } => Phase::Seeding,
            State::Standby => Phase::Standby,
            State::Noting { .. }
            | State::Stopping { .. }
            | State::Relinquishing { .. }
            | State::Shutting { .. }
            | State::Committing { .. }
            | State::Resolving { .. }
            | State::TakingBack { .. }
            | State::Yielding { .. } => Phase::Switching,
            State::HandedOver { .. } => Phase::Relinquished,
            State::Orphaned { .. } => Phase::Failed,
            State::Ended { .. } if self.primary_gone => Phase::Failed,
            State::Ended { .. } => Phase::Released,
        }
    }

    pub fn is_over(&self) -> bool {
        matches!(
            self.state,
            State::HandedOver { .. } | State::Orphaned { .. } | State::Ended { .. }
        )
    }

    /// What stands in the way of going on by itself.
    pub fn error(&self) -> Option<Refusal> {
        match &self.state {
            State::Ended { error } => error.clone(),
            State::Orphaned { epoch } => {
                let detail = format!(
                    "the primary's QEMU is gone while epoch {epoch} was undecided: the target keeps the shadow as prepared; 'umbra recover' shows the way out"
                );
                Some(Refusal::new(RefusalCode::NoSuchVm, detail))
            }
            _ => None,
        }
    }

    /// An input that makes no sense in a state changes nothing: it was overtaken.
    pub fn apply(&mut self, input: Input) -> Vec<Action> {
        match input {
            Input::PrimaryGone => self.primary_gone = true,
            Input::Begun => self.begun = true,
            _ => {}
        }
        let (next, actions) = self.next(input);
        if let Some(state) = next {
            self.state = state;
        }
        actions
    }

    fn next(&self, input: Input) -> (Option<State>, Vec<Action>) {
        if let Input::Yield { epoch } = input {
            // Twice is once.
            return match self.state {
                State::Yielding { .. } => (None, Vec::new()),
                _ => (
                    Some(State::Yielding { epoch }),
                    vec![Action::Abandon, Action::Write(Durable::Fenced { epoch })],
                ),
            };
        }
        match &self.state {
            State::Seeding | State::Standby => self.copying(input),
            State::Broken { .. } => Self::broken(input),
            State::Noting { epoch } => Self::noting(*epoch, input),
            State::Stopping { epoch } => self.stopping(*epoch, input),
            State::Relinquishing {
                epoch,
                written,
                prepared,
            } => self.relinquishing(*epoch, *written, *prepared, input),
            State::Shutting { epoch } => Self::shutting(*epoch, input),
            State::Committing { epoch } | State::Resolving { epoch } => self.committing(*epoch, input),
            State::TakingBack { epoch } => Self::taking_back(*epoch, input),
            State::Ended { .. } => match input {
                Input::Aborted { .. } => (None, vec![Action::Write(Durable::Released)]),
                _ => (None, Vec::new()),
            },
            State::HandedOver { .. } => match input {
                Input::Fenced { epoch } if !self.primary_gone => Self::take_back(epoch),
                _ => (None, Vec::new()),
            },
            State::Orphaned { epoch } => match input {
                Input::Ask => {
                    let epoch = *epoch;
                    (Some(State::Resolving { epoch }), vec![Action::Resolve { epoch }])
                }
                _ => (None, Vec::new()),
            },
            State::Yielding { .. } => match input {
                Input::Written => (Some(State::Ended { error: Some(yielded()) }), vec![Action::Kill]),
                _ => (None, Vec::new()),
            },
        }
    }

    fn copying(&self, input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::Seeded => (Some(State::Standby), Vec::new()),
            Input::Switchover { epoch } if self.state == State::Standby => (
                Some(State::Noting { epoch }),
                vec![Action::Write(Durable::Preparing { epoch })],
            ),
            Input::Release => {
                let goodbye = Action::Goodbye {
                    reason: "released".into(),
                };
                (
                    Some(State::Ended { error: None }),
                    vec![goodbye, Action::Abandon, Action::Write(Durable::Released)],
                )
            }
            other => {
                let passes = self.begun
                    && matches!(
                        other,
                        Input::LinkLost(_) | Input::MigrationFailed(_) | Input::Cancelled(_) | Input::Damaged(_)
                    );
                match why_over(other) {
                    Some(error) if passes => (Some(State::Broken { error }), vec![Action::Abandon, Action::HangUp]),
                    Some(error) => Self::end(error, None),
                    None => (None, Vec::new()),
                }
            }
        }
    }

    /// There is no session, and no migration. On disk it still is a copy, so that a restart goes on as well.
    fn broken(input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::Again => (Some(State::Seeding), vec![Action::Begin]),
            Input::Release => (
                Some(State::Ended { error: None }),
                vec![Action::Write(Durable::Released)],
            ),
            // What the old session still had to say changes nothing.
            Input::LinkLost(_) | Input::MigrationFailed(_) | Input::Cancelled(_) | Input::Damaged(_) => {
                (None, Vec::new())
            }
            other => match why_over(other) {
                Some(error) => Self::end(error, None),
                None => (None, Vec::new()),
            },
        }
    }

    fn noting(epoch: Epoch, input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::Written => (Some(State::Stopping { epoch }), vec![Action::Stop { epoch }]),
            other => Self::undecided(epoch, other),
        }
    }

    fn stopping(&self, epoch: Epoch, input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::Streamed => (
                Some(State::Relinquishing {
                    epoch,
                    written: false,
                    prepared: false,
                }),
                vec![Action::Write(Durable::Relinquished { epoch })],
            ),
            other => Self::undecided(epoch, other),
        }
    }

    fn relinquishing(&self, epoch: Epoch, written: bool, prepared: bool, input: Input) -> (Option<State>, Vec<Action>) {
        let (written, prepared) = match input {
            Input::Written => (true, prepared),
            Input::Prepared { epoch: e } if e == epoch => (written, true),
            // All of its state is out: the shadow is what is left of the VM, and takes over as soon as it has loaded.
            Input::PrimaryGone => return (None, Vec::new()),
            Input::MigrationFailed(_) if self.primary_gone => return (None, Vec::new()),
            other => return Self::undecided(epoch, other),
        };
        match (written && prepared, self.primary_gone) {
            (true, false) => (Some(State::Shutting { epoch }), vec![Action::Shut]),
            (true, true) => (Some(State::Committing { epoch }), vec![Action::Commit { epoch }]),
            (false, _) => (
                Some(State::Relinquishing {
                    epoch,
                    written,
                    prepared,
                }),
                Vec::new(),
            ),
        }
    }

    /// The target was told of the epoch, and QEMU was not told SHUT(0): whatever goes wrong, the primary runs on.
    fn undecided(epoch: Epoch, input: Input) -> (Option<State>, Vec<Action>) {
        let error = match input {
            Input::Release => Some(Refusal::new(RefusalCode::WrongPhase, "released while switching")),
            other => why_over(other),
        };
        match error {
            Some(error) => Self::end(error, Some(epoch)),
            None => (None, Vec::new()),
        }
    }

    fn shutting(epoch: Epoch, input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::Completed | Input::PrimaryGone => {
                (Some(State::Committing { epoch }), vec![Action::Commit { epoch }])
            }
            Input::MigrationFailed(why) | Input::Cancelled(why) | Input::Interfered(why) => {
                Self::end(qemu_says(why), Some(epoch))
            }
            _ => (None, Vec::new()),
        }
    }

    fn committing(&self, epoch: Epoch, input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            Input::Running { epoch: e } if e == epoch => (
                Some(State::HandedOver { epoch }),
                vec![Action::Write(Durable::HandedOver { epoch })],
            ),
            Input::Prepared { epoch: e } if e == epoch => {
                (Some(State::Committing { epoch }), vec![Action::Commit { epoch }])
            }
            Input::Aborted { epoch: e } if e == epoch && self.primary_gone => {
                let lost = Refusal::new(
                    RefusalCode::PeerRefused,
                    "the primary's process is gone and the target has discarded the shadow",
                );
                (
                    Some(State::Ended { error: Some(lost) }),
                    vec![Action::Write(Durable::Released)],
                )
            }
            Input::Aborted { epoch: e } if e == epoch => Self::take_back(epoch),
            Input::Fenced { epoch } if !self.primary_gone => Self::take_back(epoch),
            Input::LinkLost(_) | Input::Refused(_) | Input::Failed(_) | Input::TimedOut => {
                (Some(State::Resolving { epoch }), vec![Action::Resolve { epoch }])
            }
            _ => (None, Vec::new()),
        }
    }

    /// On disk first: a restart between the two must not leave the VM stopped.
    fn take_back(epoch: Epoch) -> (Option<State>, Vec<Action>) {
        (
            Some(State::TakingBack { epoch }),
            vec![Action::Write(Durable::TakingBack { epoch })],
        )
    }

    fn taking_back(epoch: Epoch, input: Input) -> (Option<State>, Vec<Action>) {
        match input {
            // A disk that does not take it lets no VM stand still: the record before it leads here again.
            Input::Written | Input::Failed(_) => (None, vec![Action::TakeBack]),
            Input::TakenBack | Input::PrimaryGone => (
                Some(State::Ended {
                    error: Some(taken_back(epoch)),
                }),
                vec![Action::Write(Durable::Released)],
            ),
            _ => (None, Vec::new()),
        }
    }

    /// The primary runs on; the target, if it was told of an epoch, is told that it is off.
    fn end(error: Refusal, epoch: Option<Epoch>) -> (Option<State>, Vec<Action>) {
        let actions = match epoch {
            Some(epoch) => vec![
                Action::Abandon,
                Action::Write(Durable::Aborting { epoch }),
                Action::Abort { epoch },
            ],
            None => {
                let reason = error.to_string();
                vec![
                    Action::Abandon,
                    Action::Write(Durable::Released),
                    Action::Goodbye { reason },
                ]
            }
        };
        (Some(State::Ended { error: Some(error) }), actions)
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

fn taken_back(epoch: Epoch) -> Refusal {
    let detail =
        format!("the target aborted epoch {epoch} after the primary had been stopped; the primary was resumed");
    Refusal::new(RefusalCode::PeerRefused, detail)
}

fn qemu_says(why: String) -> Refusal {
    Refusal::new(RefusalCode::QmpUnavailable, why)
}

fn yielded() -> Refusal {
    let detail = "this host was declared dead, and the VM was given to the other one: the copy here was ended";
    Refusal::new(RefusalCode::PeerRefused, detail)
}

/// Inputs that end a protection whose primary still runs.
fn why_over(input: Input) -> Option<Refusal> {
    match input {
        Input::Refused(r) => Some(Refusal::new(RefusalCode::PeerRefused, r.to_string())),
        Input::Failed(r) => Some(r),
        Input::LinkLost(why) => Some(Refusal::new(RefusalCode::PeerUnreachable, why)),
        Input::MigrationFailed(why) => Some(qemu_says(why)),
        Input::Interfered(what) | Input::Cancelled(what) => Some(Refusal::new(RefusalCode::Interfered, what)),
        Input::Damaged(why) => Some(Refusal::new(RefusalCode::PeerRefused, why)),
        Input::PrimaryGone => Some(Refusal::new(RefusalCode::NoSuchVm, "the VM's QEMU has exited")),
        Input::TimedOut => Some(Refusal::new(
            RefusalCode::PeerUnreachable,
            "the switchover took too long",
        )),
        Input::Aborted { epoch } => Some(Refusal::new(
            RefusalCode::PeerRefused,
            format!("the target aborted epoch {epoch}"),
        )),
        _ => None,
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
