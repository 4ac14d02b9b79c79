//! The lifecycle of a protected VM: which event moves it from which stage to which, and what that does to its state.
//!
//! ```text
//!               Provision            SeedStarted          SeedDone            Arm
//!  unprotected ───────────> provisioning ─────> seeding ─────────> standby <──────────> armed
//!    ^  ^  ^                     │                 │                 │  │     Disarm      │ │
//!    │  │  └───── Release ───────┴─────────────────┴─────────────────┴──│─────────────────┘ │
//!    │  │                                                               └─────── Switch ────┤
//!    │  │                        BuildWayBack                                               v
//!    │  │                          ┌──────┐            Moved                            switching
//!    │  │                          └──> active <────────────────────────────────────────────┘
//!    │  └──── Release (settles) ──────┴──┬──────────┐
//!    │                                   │ WayBackReady
//!    │                                   v          │
//!    │        Moved (home)            reverse ──────┘ Release
//!    └───── failing_back <── FailBack ───┘
//!
//!  every stage with a shadow ── Fail ──> failed ── Cleaned ──> unprotected (at home) or active (away from home)
//!  any stage ── Found ──> unprotected or active: the replicators say that the VM runs elsewhere than the store thought
//!  unprotected ── Adopt ──> seeding, standby or reverse: a shadow lives that the store does not know
//! ```
//!
//! Two rules make it safe to cut the power anywhere. An edge is in the store before an order that follows from it
//! leaves the house. And each edge that could start, end or move a copy takes the next epoch, so that an order of
//! before the edge that is still on its way is refused where it arrives.
//!
//! Where the VM *runs* changes in three places only: `Moved`, `Found`, and a VM without a shadow that
//! somebody else moved (see [`VmState::relocate`]).

use serde::{Deserialize, Serialize};
use umbra_api::lifecycle::Stage;
use umbra_api::order::{Refusal, Tier};
use umbra_api::replica::SwitchoverReport;
use umbra_api::{Epoch, HostId, UnixMs, VmId};

use crate::redirect::RedirectReport;

/// Everything about one VM that a restart needs.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VmState {
    pub vm: VmId,
    pub name: String,
    pub stage: Stage,
    /// Where it belongs; failback goes here.
    pub home: HostId,
    /// Where it runs.
    pub host: HostId,
    /// Who holds its shadow, or is to.
    pub shadow: Option<HostId>,
    /// The highest epoch that was ordered or seen.
    pub epoch: Epoch,
    /// The epoch under which the present shadow was admitted. Reports below it are about an earlier one.
    pub protection: Epoch,
    /// The epoch under which it came to run where it runs; 0 if it was never moved.
    pub ran_since: Epoch,
    /// Hosts that keep its stopped primary of before a move, until they are told to quit it.
    #[serde(default)]
    pub kept: Vec<HostId>,
    pub tier: Option<Tier>,
    /// Since when in this stage.
    pub since: UnixMs,
    /// When the VM last changed hosts.
    pub moved_at: Option<UnixMs>,
    pub last_error: Option<String>,
    /// Attempts that failed since the last one that went well.
    pub failures: u32,
    /// The planner starts nothing before.
    pub cooldown_until: Option<UnixMs>,
    /// An operator asked for it: the planner neither releases it nor brings it home.
    pub manual: bool,
    pub last_switchover: Option<SwitchoverReport>,
    pub last_redirect: Option<RedirectReport>,
}

/// Why a VM went along an edge.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum Reason {
    #[error("contention is predicted: CPS {cps:.2} is above {threshold:.2}")]
    Predicted { cps: f64, threshold: f64 },
    #[error("contention nears: expected in {in_s:.1} s")]
    Nears { in_s: f64 },
    #[error("contention is no longer near")]
    Receded,
    #[error("it is time: contention is expected in {in_s:.1} s")]
    Due { in_s: f64 },
    #[error("contention is here: the VM waits {wait_ms_per_s:.0} ms per s for a CPU")]
    Measured { wait_ms_per_s: f64 },
    #[error("operator")]
    Operator,
    #[error("the first copy is under way")]
    SeedStarted,
    #[error("the shadow is warm")]
    SeedDone,
    #[error("the VM runs on {host}")]
    Moved { host: HostId },
    #[error("the VM is back home on {host}")]
    BackHome { host: HostId },
    #[error("a way back to {home} is being built")]
    BuildWayBack { home: HostId },
    #[error("the way back is ready")]
    WayBackReady,
    #[error("home is calm: contention probability {probability:.2}")]
    HomeCalm { probability: f64 },
    #[error("contention on this host (CPS {cps:.2}), and home is calm")]
    Fled { cps: f64 },
    #[error("CPS stayed low")]
    Quiet,
    #[error("policy: no way back is kept, the VM stays on {host}")]
    Settled { host: HostId },
    #[error("{0}")]
    Failure(Failure),
    #[error("cleared up, the VM runs on {host}")]
    Cleaned { host: HostId },
    #[error("the replicators say that the VM runs on {host} under epoch {epoch}")]
    Found { host: HostId, epoch: Epoch },
    #[error("a shadow on {shadow} was found that the store did not know")]
    Adopted { shadow: HostId },
}

/// What went wrong with a protection.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum Failure {
    #[error("{host} refused {order}: {refusal}")]
    Refused {
        host: HostId,
        order: &'static str,
        refusal: Refusal,
    },
    #[error("{host} did not answer {order} within {after_s} s")]
    Unanswered {
        host: HostId,
        order: &'static str,
        after_s: u64,
    },
    #[error("{host} ended the replication: {words}")]
    Ended { host: HostId, words: String },
    #[error("{host} no longer knows of the replication")]
    Lost { host: HostId },
    #[error("{stage} took longer than {after_s} s")]
    TookTooLong { stage: Stage, after_s: u64 },
    #[error("redirect {adapter}: {words}")]
    Redirect { adapter: &'static str, words: String },
}

/// What can happen to a VM.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    Provision {
        target: HostId,
        reason: Reason,
    },
    SeedStarted,
    SeedDone,
    Arm {
        reason: Reason,
    },
    Disarm,
    Switch {
        reason: Reason,
    },
    /// The shadow runs. Ends a switchover and a failback.
    Moved,
    BuildWayBack,
    WayBackReady,
    FailBack {
        reason: Reason,
    },
    Release {
        reason: Reason,
    },
    Fail {
        failure: Failure,
    },
    /// Nothing of the failed attempt is left.
    Cleaned {
        cooldown_ms: u64,
    },
    /// The VM runs on `host`, by the word of those who run it.
    Found {
        host: HostId,
        home: HostId,
        epoch: Epoch,
    },
    /// A living shadow that the store does not know of.
    Adopt {
        shadow: HostId,
        epoch: Epoch,
        warm: bool,
    },
}

impl Event {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Provision { .. } => "provision",
            Self::SeedStarted => "seed_started",
            Self::SeedDone => "seed_done",
            Self::Arm { .. } => "arm",
            Self::Disarm => "disarm",
            Self::Switch { .. } => "switchover",
            Self::Moved => "moved",
            Self::BuildWayBack => "build_way_back",
            Self::WayBackReady => "way_back_ready",
            Self::FailBack { .. } => "failback",
            Self::Release { .. } => "release",
            Self::Fail { .. } => "fail",
            Self::Cleaned { .. } => "cleaned",
            Self::Found { .. } => "found",
            Self::Adopt { .. } => "adopt",
        }
    }
}

/// One step along the drawing above.
#[derive(Clone, PartialEq, Debug)]
pub struct Edge {
    pub t: UnixMs,
    pub from: Stage,
    pub to: Stage,
    pub reason: Reason,
}

/// The event has no edge that leaves this stage.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Illegal {
    #[error("{event} is not possible for a VM that is {stage}")]
    Stage { event: &'static str, stage: Stage },
    #[error("the VM runs on {0} already")]
    OwnHost(HostId),
    #[error("the VM is at home on {0}, there is no way back to build")]
    AtHome(HostId),
}

impl VmState {
    /// A VM that was just seen for the first time.
    pub fn new(vm: VmId, name: &str, host: &HostId, now: UnixMs) -> Self {
        Self {
            vm,
            name: name.to_owned(),
            stage: Stage::Unprotected,
            home: host.clone(),
            host: host.clone(),
            shadow: None,
            epoch: Epoch(0),
            protection: Epoch(0),
            ran_since: Epoch(0),
            kept: Vec::new(),
            tier: None,
            since: now,
            moved_at: None,
            last_error: None,
            failures: 0,
            cooldown_until: None,
            manual: false,
            last_switchover: None,
            last_redirect: None,
        }
    }

    pub fn cooling(&self, now: UnixMs) -> Option<i64> {
        self.cooldown_until.map(|t| t.since(now)).filter(|ms| *ms > 0)
    }

    /// Takes note of an epoch that a replicator has seen, so that no order goes out below it.
    pub fn saw_epoch(&mut self, seen: Epoch) {
        self.epoch = self.epoch.max(seen);
    }

    /// Somebody else moved a VM that has no shadow: its home is where it runs.
    pub fn relocate(&mut self, host: &HostId) {
        if self.stage == Stage::Unprotected {
            self.host = host.clone();
            self.home = host.clone();
        }
    }

    fn moves_to(&mut self, host: &HostId, epoch: Epoch, now: UnixMs) {
        let old = std::mem::replace(&mut self.host, host.clone());
        self.ran_since = epoch;
        self.moved_at = Some(now);
        self.kept.retain(|h| h != host);
        if old != *host {
            self.keeps_old(&old);
        }
    }

    /// `host` keeps a stopped primary.
    pub fn keeps_old(&mut self, host: &HostId) {
        if !self.kept.contains(host) {
            self.kept.push(host.clone());
        }
    }

    fn take_epoch(&mut self) {
        self.epoch = self.epoch.next();
    }

    fn begin(&mut self, shadow: &HostId) {
        self.take_epoch();
        self.protection = self.epoch;
        self.shadow = Some(shadow.clone());
    }

    fn drop_shadow(&mut self) {
        self.shadow = None;
        self.tier = None;
    }
}

/// Moves a VM along the edge that `event` names.
pub fn apply(state: &VmState, event: Event, now: UnixMs) -> Result<(VmState, Edge), Illegal> {
    let mut next = state.clone();
    let (to, reason) = match event {
        Event::Provision { target, reason } => provision(&mut next, target, reason)?,
        Event::Moved => moved(&mut next, now)?,
        Event::BuildWayBack => build_way_back(&mut next)?,
        Event::Release { reason } => release(&mut next, reason)?,
        Event::Fail { failure } => fail(&mut next, failure)?,
        Event::Cleaned { cooldown_ms } => cleaned(&mut next, cooldown_ms, now)?,
        Event::Found { host, home, epoch } => {
            next.saw_epoch(epoch);
            next.drop_shadow();
            next.moves_to(&host, epoch, now);
            next.home = home;
            (resting(&next), Reason::Found { host, epoch })
        }
        Event::Adopt { shadow, epoch, warm } => adopt(&mut next, shadow, epoch, warm)?,
        onward => step(&mut next, onward)?,
    };
    next.stage = to;
    if to != state.stage {
        next.since = now;
    }
    let from = state.stage;
    Ok((
        next,
        Edge {
            t: now,
            from,
            to,
            reason,
        },
    ))
}

type Step = Result<(Stage, Reason), Illegal>;

fn illegal(s: &VmState, event: &'static str) -> Illegal {
    Illegal::Stage { event, stage: s.stage }
}

/// The edges on the straight road that a warm shadow or a source's report opens.
fn step(next: &mut VmState, event: Event) -> Step {
    let name = event.name();
    let (tier, to, reason) = match (event, next.stage) {
        (Event::SeedStarted, Stage::Provisioning) => (None, Stage::Seeding, Reason::SeedStarted),
        (Event::SeedDone, Stage::Provisioning | Stage::Seeding) => {
            next.failures = 0;
            (Some(Tier::Standby), Stage::Standby, Reason::SeedDone)
        }
        (Event::Arm { reason }, Stage::Standby) => (Some(Tier::Armed), Stage::Armed, reason),
        (Event::Disarm, Stage::Armed) => (Some(Tier::Standby), Stage::Standby, Reason::Receded),
        (Event::Switch { reason }, Stage::Standby | Stage::Armed) => {
            next.take_epoch();
            next.manual |= reason == Reason::Operator;
            (Some(Tier::Active), Stage::Switching, reason)
        }
        (Event::WayBackReady, Stage::Active) if next.shadow.is_some() => {
            next.failures = 0;
            (Some(Tier::Standby), Stage::Reverse, Reason::WayBackReady)
        }
        (Event::FailBack { reason }, Stage::Reverse) => {
            next.take_epoch();
            (Some(Tier::Active), Stage::FailingBack, reason)
        }
        _ => return Err(illegal(next, name)),
    };
    next.tier = tier;
    Ok((to, reason))
}

fn build_way_back(next: &mut VmState) -> Step {
    if !unbuilt(next) {
        return Err(illegal(next, "build_way_back"));
    }
    let home = next.home.clone();
    if next.host == home {
        return Err(Illegal::AtHome(home));
    }
    next.begin(&home);
    Ok((Stage::Active, Reason::BuildWayBack { home }))
}

fn fail(next: &mut VmState, failure: Failure) -> Step {
    if !can_fail(next) {
        return Err(illegal(next, "fail"));
    }
    next.take_epoch();
    next.failures = next.failures.saturating_add(1);
    next.last_error = Some(failure.to_string());
    Ok((Stage::Failed, Reason::Failure(failure)))
}

fn cleaned(next: &mut VmState, cooldown_ms: u64, now: UnixMs) -> Step {
    if next.stage != Stage::Failed {
        return Err(illegal(next, "cleaned"));
    }
    next.drop_shadow();
    next.cooldown_until = Some(now.plus_ms(i64::try_from(cooldown_ms).unwrap_or(i64::MAX)));
    let host = next.host.clone();
    Ok((resting(next), Reason::Cleaned { host }))
}

/// Where a VM rests that has no shadow.
fn resting(s: &VmState) -> Stage {
    if s.host == s.home {
        Stage::Unprotected
    } else {
        Stage::Active
    }
}

/// Away from home, and the way back not begun.
fn unbuilt(s: &VmState) -> bool {
    s.stage == Stage::Active && s.shadow.is_none()
}

fn can_fail(s: &VmState) -> bool {
    match s.stage {
        Stage::Unprotected | Stage::Failed => false,
        Stage::Active => s.shadow.is_some(),
        _ => true,
    }
}

fn provision(next: &mut VmState, target: HostId, reason: Reason) -> Step {
    if next.stage != Stage::Unprotected {
        return Err(illegal(next, "provision"));
    }
    if target == next.host {
        return Err(Illegal::OwnHost(target));
    }
    next.begin(&target);
    next.manual = reason == Reason::Operator;
    Ok((Stage::Provisioning, reason))
}

fn moved(next: &mut VmState, now: UnixMs) -> Step {
    let refusal = illegal(next, "moved");
    if !matches!(next.stage, Stage::Switching | Stage::FailingBack) {
        return Err(refusal);
    }
    let Some(host) = next.shadow.take() else {
        return Err(refusal);
    };
    next.moves_to(&host, next.epoch, now);
    next.last_error = None;
    match next.stage {
        Stage::Switching => {
            next.tier = Some(Tier::Active);
            Ok((Stage::Active, Reason::Moved { host }))
        }
        Stage::FailingBack => {
            next.tier = None;
            next.manual = false;
            Ok((Stage::Unprotected, Reason::BackHome { host }))
        }
        _ => Err(refusal),
    }
}

fn release(next: &mut VmState, reason: Reason) -> Step {
    match next.stage {
        Stage::Provisioning | Stage::Seeding | Stage::Standby | Stage::Armed => {}
        // Without a way back the VM belongs where it is.
        Stage::Active | Stage::Reverse => next.home = next.host.clone(),
        _ => return Err(illegal(next, "release")),
    }
    next.take_epoch();
    next.drop_shadow();
    next.manual = false;
    Ok((Stage::Unprotected, reason))
}

fn adopt(next: &mut VmState, shadow: HostId, epoch: Epoch, warm: bool) -> Step {
    if next.stage != Stage::Unprotected && !unbuilt(next) {
        return Err(illegal(next, "adopt"));
    }
    if shadow == next.host {
        return Err(Illegal::OwnHost(shadow));
    }
    next.saw_epoch(epoch);
    next.protection = epoch;
    next.shadow = Some(shadow.clone());
    let home = shadow == next.home;
    let stage = match (warm, home) {
        (true, false) => Stage::Standby,
        (true, true) => Stage::Reverse,
        (false, false) => Stage::Seeding,
        (false, true) => Stage::Active,
    };
    next.tier = Some(if stage == Stage::Active {
        Tier::Active
    } else {
        Tier::Standby
    });
    Ok((stage, Reason::Adopted { shadow }))
}

#[cfg(test)]
mod tests;
