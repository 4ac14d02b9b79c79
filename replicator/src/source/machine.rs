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
mod tests {
    use super::*;

    const E: Epoch = Epoch(7);

    fn standby() -> Machine {
        let mut m = Machine::new();
        assert!(m.apply(Input::Seeded).is_empty());
        m
    }

    fn run(m: &mut Machine, inputs: &[Input]) -> Vec<Action> {
        inputs.iter().flat_map(|i| m.apply(i.clone())).collect()
    }

    #[test]
    fn the_straight_way_gives_up_on_disk_before_qemu_and_commits_last() {
        let mut m = standby();
        let way = [
            Input::Switchover { epoch: E },
            Input::Written,
            Input::Streamed,
            Input::Written,
            Input::Prepared { epoch: E },
            Input::Completed,
            Input::Running { epoch: E },
        ];
        assert_eq!(
            run(&mut m, &way),
            [
                Action::Write(Durable::Preparing { epoch: E }),
                Action::Stop { epoch: E },
                Action::Write(Durable::Relinquished { epoch: E }),
                Action::Shut,
                Action::Commit { epoch: E },
                Action::Write(Durable::HandedOver { epoch: E }),
            ]
        );
        assert_eq!(m.phase(), Phase::Relinquished);
    }

    #[test]
    fn before_the_relinquishment_every_fault_lets_the_primary_run_on() {
        let faults = [
            Input::LinkLost("cut".into()),
            Input::Refused(Refusal::new(RefusalCode::Local, "disk full")),
            Input::TimedOut,
            Input::MigrationFailed("failed".into()),
            Input::Aborted { epoch: E },
        ];
        for before in 0..=4 {
            for fault in &faults {
                let mut m = standby();
                let way = [
                    Input::Switchover { epoch: E },
                    Input::Written,
                    Input::Streamed,
                    Input::Written,
                ];
                run(&mut m, &way[..before]);
                let actions = m.apply(fault.clone());
                assert!(
                    actions.contains(&Action::Abandon),
                    "{fault:?} after {before}: {actions:?}"
                );
                assert!(!actions.contains(&Action::Shut));
                assert_eq!(m.phase(), Phase::Released);
            }
        }
    }

    #[test]
    fn a_copy_that_breaks_off_is_begun_anew_until_it_is_released() {
        let breaks = [
            Input::LinkLost("cut".into()),
            Input::MigrationFailed("failed".into()),
            Input::Cancelled("cancelled".into()),
            Input::Damaged("page 7".into()),
        ];
        for fault in breaks {
            let mut m = Machine::new();
            assert!(
                m.apply(fault.clone()).contains(&Action::Write(Durable::Released)),
                "{fault:?}: never begun"
            );
            assert_eq!(m.phase(), Phase::Released);
            for seeded in [false, true] {
                let mut m = Machine::new();
                m.apply(Input::Begun);
                if seeded {
                    m.apply(Input::Seeded);
                }
                assert_eq!(m.apply(fault.clone()), [Action::Abandon, Action::HangUp], "{fault:?}");
                assert_eq!(m.phase(), Phase::Seeding);
                assert_eq!(m.apply(Input::LinkLost("still".into())), [], "{fault:?}");
                assert_eq!(m.apply(Input::Switchover { epoch: E }), [], "{fault:?}");
                assert_eq!(m.apply(Input::Again), [Action::Begin]);
                assert_eq!(
                    m.apply(Input::LinkLost("again".into())),
                    [Action::Abandon, Action::HangUp]
                );
                // Its own migration has not ended yet: later. One of somebody else: never.
                assert_eq!(m.apply(Input::Again), [Action::Begin]);
                let mut theirs = m.clone();
                let ours = Input::MigrationFailed("it is cancelling".into());
                assert_eq!(m.apply(ours), [Action::Abandon, Action::HangUp]);
                assert!(!m.is_over());
                theirs.apply(Input::Interfered("a migration was started".into()));
                assert!(theirs.is_over());
                let mut other = m.clone();
                assert_eq!(m.apply(Input::Release), [Action::Write(Durable::Released)]);
                assert_eq!((m.phase(), m.is_over()), (Phase::Released, true));
                other.apply(Input::PrimaryGone);
                assert_eq!((other.phase(), other.is_over()), (Phase::Failed, true));
            }
        }
    }

    #[test]
    fn after_the_commit_only_a_durable_abort_brings_the_primary_back() {
        let mut m = standby();
        run(
            &mut m,
            &[
                Input::Switchover { epoch: E },
                Input::Written,
                Input::Streamed,
                Input::Prepared { epoch: E },
            ],
        );
        assert_eq!(m.apply(Input::Written), [Action::Shut]);
        m.apply(Input::Completed);
        assert_eq!(m.apply(Input::LinkLost("cut".into())), [Action::Resolve { epoch: E }]);
        assert_eq!(m.apply(Input::Aborted { epoch: Epoch(3) }), []);
        assert_eq!(m.apply(Input::Prepared { epoch: E }), [Action::Commit { epoch: E }]);
        let taking_back = Durable::TakingBack { epoch: E };
        assert_eq!(
            m.apply(Input::Aborted { epoch: E }),
            [Action::Write(taking_back)],
            "the primary is stopped still"
        );
        assert_eq!(m.apply(Input::Written), [Action::TakeBack]);
        assert_eq!(m.apply(Input::TakenBack), [Action::Write(Durable::Released)]);
        assert_eq!(m.phase(), Phase::Released);
        assert_eq!(Machine::resume(taking_back, true, false).1, [Action::TakeBack]);
        assert_eq!(
            Machine::resume(taking_back, false, false).1,
            [Action::Write(Durable::Released)]
        );
    }

    #[test]
    fn a_primary_that_dies_while_stopped_is_replaced_by_the_prepared_shadow() {
        let mut m = standby();
        run(
            &mut m,
            &[
                Input::Switchover { epoch: E },
                Input::Written,
                Input::Streamed,
                Input::Written,
            ],
        );
        assert_eq!(
            run(&mut m, &[Input::PrimaryGone, Input::MigrationFailed("closed".into())]),
            []
        );
        assert_eq!(m.apply(Input::Prepared { epoch: E }), [Action::Commit { epoch: E }]);

        let mut m = standby();
        run(&mut m, &[Input::Switchover { epoch: E }, Input::Written]);
        assert!(m.apply(Input::PrimaryGone).contains(&Action::Abort { epoch: E }));
        assert_eq!(m.phase(), Phase::Failed);
    }

    #[test]
    fn a_restart_follows_the_disk_and_the_primary() {
        let (mut m, a) = Machine::resume(Durable::Protecting, false, false);
        assert_eq!((m.phase(), a), (Phase::Seeding, vec![]));
        assert_eq!(m.apply(Input::Again), [Action::Begin]);
        for (stopped, gone) in [(true, false), (false, true)] {
            let (m, a) = Machine::resume(Durable::Protecting, stopped, gone);
            assert_eq!((m.is_over(), a), (true, vec![Action::Write(Durable::Released)]));
        }
        let (m, a) = Machine::resume(Durable::Preparing { epoch: E }, false, false);
        assert_eq!(
            a,
            [
                Action::Write(Durable::Aborting { epoch: E }),
                Action::Abort { epoch: E }
            ]
        );
        assert_eq!(m.phase(), Phase::Released);
        let (m, a) = Machine::resume(Durable::Relinquished { epoch: E }, true, false);
        assert_eq!(
            (m.state, a),
            (State::Resolving { epoch: E }, vec![Action::Resolve { epoch: E }])
        );
        let (_, a) = Machine::resume(Durable::Relinquished { epoch: E }, false, false);
        assert!(a.contains(&Action::Abort { epoch: E }));
        // A shadow of unknown age is neither run nor thrown away, until somebody asks for it.
        let (mut m, a) = Machine::resume(Durable::Relinquished { epoch: E }, false, true);
        assert_eq!((m.phase(), a), (Phase::Failed, vec![]));
        assert_eq!(m.apply(Input::Ask), [Action::Resolve { epoch: E }]);
        assert_eq!(m.apply(Input::Prepared { epoch: E }), [Action::Commit { epoch: E }]);
        let (m, a) = Machine::resume(Durable::TakingBack { epoch: E }, true, false);
        assert_eq!((m.phase(), a), (Phase::Switching, vec![Action::TakeBack]));
    }

    #[test]
    fn a_kept_primary_runs_again_only_when_the_other_copy_never_will() {
        let fence = Epoch(9);
        for durable in [Durable::HandedOver { epoch: E }, Durable::Relinquished { epoch: E }] {
            let (mut m, _) = Machine::resume(durable, true, false);
            assert_eq!(m.apply(Input::Aborted { epoch: Epoch(3) }), []);
            let fenced = m.apply(Input::Fenced { epoch: fence });
            assert_eq!(
                fenced,
                [Action::Write(Durable::TakingBack { epoch: fence })],
                "{durable:?}"
            );
            assert_eq!(m.apply(Input::Running { epoch: E }), [], "its word came too late");
            assert_eq!(m.apply(Input::Written), [Action::TakeBack]);
        }
        let (mut m, _) = Machine::resume(Durable::HandedOver { epoch: E }, false, true);
        assert_eq!(m.apply(Input::Fenced { epoch: fence }), [], "there is nothing to run");
    }

    #[test]
    fn a_host_that_was_declared_dead_ends_its_copy_when_it_is_back() {
        let (mut m, _) = Machine::resume(Durable::Relinquished { epoch: E }, true, false);
        let y = Epoch(9);
        let actions = m.apply(Input::Yield { epoch: y });
        assert!(actions.contains(&Action::Write(Durable::Fenced { epoch: y })) && !actions.contains(&Action::Kill));
        assert_eq!(m.apply(Input::Aborted { epoch: E }), []);
        assert_eq!(m.apply(Input::Written), [Action::Kill]);
        let (m, a) = Machine::resume(Durable::Fenced { epoch: y }, false, false);
        assert_eq!((m.phase(), a), (Phase::Released, vec![Action::Kill]));
    }

    #[test]
    fn what_somebody_else_does_to_the_vm_ends_the_copy_with_its_name() {
        let mut m = standby();
        let actions = m.apply(Input::Interfered("somebody stopped it".into()));
        assert!(actions.contains(&Action::Abandon), "{actions:?}");
        assert_eq!(m.error().map(|e| e.code), Some(RefusalCode::Interfered));
    }
}
