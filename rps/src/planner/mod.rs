//! What to do, decided purely: states, outlook, what the replicators told, policy and the time go in, one decision a VM
//! comes out, 'do nothing because …' included. The simulator, the tests and production run this code.
//!
//! In reading order: [`policy`], [`streaks`] (hysteresis), [`promotion`] (how long a shadow takes to wake), [`target`] (a
//! verdict on every host), `provision` (who gets a shadow), `decide` (arm, switch, release, fail back).

mod decide;
pub mod policy;
pub mod promotion;
mod provision;
pub mod streaks;
pub mod target;

use std::collections::{BTreeMap, BTreeSet};

use umbra_api::lifecycle::Stage;
use umbra_api::view::{DecisionInputs, HostVerdict};
use umbra_api::{HostId, UnixMs, VmId};

use crate::fleet::Fleet;
use crate::lifecycle::{Reason, VmState};
use crate::outlook::{Outlook, VmOutlook};

pub use policy::{Late, Policy};
pub use streaks::{Streak, Streaks};

/// All that a decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    pub now: UnixMs,
    pub outlook: &'a Outlook,
    pub states: &'a BTreeMap<VmId, VmState>,
    pub fleet: &'a Fleet,
    /// VMs with orders still out or leftovers to clear: nothing new is begun with them.
    pub busy: &'a BTreeSet<VmId>,
    pub streaks: &'a Streaks,
    pub policy: &'a Policy,
    /// How CPS is computed, for the explanation.
    pub method: &'a str,
    /// Speed of first copies, measured or assumed.
    pub seed_bytes_per_s: f64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    Nothing,
    Provision { target: HostId },
    Arm,
    Disarm,
    Switch,
    FailBack,
    Release,
}

impl Action {
    /// As in a decision's view.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Provision { .. } => "provision",
            Self::Arm => "arm",
            Self::Disarm => "disarm",
            Self::Switch => "switch",
            Self::FailBack => "fail_back",
            Self::Release => "release",
        }
    }
}

/// A decision before it is dressed with its inputs.
#[derive(Clone, PartialEq, Debug)]
struct Verdict {
    action: Action,
    reason: Option<Reason>,
    class: &'static str,
    because: String,
    hosts: Vec<HostVerdict>,
}

impl Verdict {
    fn nothing(class: &'static str, because: impl Into<String>) -> Self {
        let because = format!("nothing, because {}", because.into());
        Self {
            action: Action::Nothing,
            reason: None,
            class,
            because,
            hosts: Vec::new(),
        }
    }

    fn act(action: Action, reason: Reason, class: &'static str, because: impl Into<String>) -> Self {
        let because = format!("{}, because {}", action.name(), because.into());
        Self {
            action,
            reason: Some(reason),
            class,
            because,
            hosts: Vec::new(),
        }
    }

    fn with_hosts(self, hosts: Vec<HostVerdict>) -> Self {
        Self { hosts, ..self }
    }
}

/// What to do about one VM, and all that led there.
#[derive(Clone, PartialEq, Debug)]
pub struct Decision {
    pub vm: VmId,
    pub stage: Stage,
    pub action: Action,
    /// For the edge that the action takes; none for `Nothing`.
    pub reason: Option<Reason>,
    /// Stable word for the kind of reason: a decision is stored anew when it changes.
    pub class: &'static str,
    pub because: String,
    pub inputs: DecisionInputs,
    pub hosts: Vec<HostVerdict>,
}

/// Decides for every VM of the outlook that has a state.
pub fn plan(input: &Input<'_>) -> Vec<Decision> {
    let mut ledger = ledger_of(input);
    let known = input
        .outlook
        .vms
        .iter()
        .filter_map(|v| Some((input.states.get(&v.vm)?, v)));
    let (unprotected, others): (Vec<_>, Vec<_>) = known.partition(|(s, _)| s.stage == Stage::Unprotected);
    let mut out: Vec<Decision> = others
        .into_iter()
        .map(|(s, v)| dress(input, s, v, decide::decide(input, s, v)))
        .collect();
    let provisioned = provision::provision(input, &unprotected, &mut ledger);
    out.extend(
        provisioned
            .into_iter()
            .map(|(s, v, verdict)| dress(input, s, v, verdict)),
    );
    out.sort_by_key(|d| d.vm);
    out
}

/// For an operator's request: the best target, or the one that was asked for if it can serve at all.
pub fn target_for(input: &Input<'_>, vm: &VmOutlook, wish: Option<&HostId>) -> Result<HostId, String> {
    let (best, verdicts) = target::choose(input, vm, &ledger_of(input));
    match (wish, best) {
        // Whether it has room is the operator's own business; whether it answers is not.
        (Some(host), _) if *host == vm.host => Err(format!("{host}: {}", target::Unfit::Present)),
        (Some(host), _) => target::usable(input, host)
            .map(|_| host.clone())
            .map_err(|unfit| format!("{host}: {unfit}")),
        (None, Some(best)) => Ok(best),
        (None, None) => Err(rejections(&verdicts)),
    }
}

/// `b: no room; c: silent`
fn rejections(verdicts: &[HostVerdict]) -> String {
    let all: Vec<String> = verdicts.iter().map(|v| format!("{}: {}", v.host, v.reason)).collect();
    if all.is_empty() {
        "no host is configured".into()
    } else {
        all.join("; ")
    }
}

/// Books the shadows that exist.
fn ledger_of(input: &Input<'_>) -> target::Ledger {
    let mut ledger = target::Ledger::default();
    for s in input.states.values() {
        let Some(shadow) = &s.shadow else { continue };
        let seeding = matches!(s.stage, Stage::Provisioning | Stage::Seeding | Stage::Active);
        let guest_bytes = input.outlook.vm(s.vm).map_or(0, |v| v.guest_bytes);
        ledger.book(&s.host, shadow, guest_bytes, seeding);
    }
    ledger
}

fn ram_in_use(v: &VmOutlook) -> u64 {
    if v.guest_bytes > 0 {
        v.rss_bytes.min(v.guest_bytes)
    } else {
        v.rss_bytes
    }
}

/// Seconds that a first copy of this VM will take.
fn copy_s(input: &Input<'_>, v: &VmOutlook) -> f64 {
    ram_in_use(v) as f64 / input.seed_bytes_per_s.max(1.0) + input.policy.copy_margin_s
}

/// Seconds that the promotion of its shadow will take, on the host that has it or is to get it.
fn promotion_s(input: &Input<'_>, s: &VmState, v: &VmOutlook, host: Option<&HostId>) -> f64 {
    host.map_or(input.policy.promotion_s, |h| {
        promotion::expected_s(input, s, h, ram_in_use(v))
    })
}

fn dress(input: &Input<'_>, s: &VmState, v: &VmOutlook, verdict: Verdict) -> Decision {
    let host = input.outlook.host(&v.host);
    let peak = |slots: Option<&Vec<f64>>| slots.map_or(0.0, |d| d.iter().copied().fold(0.0, f64::max));
    let contention_in_s = v.contention_at.map(|t| t.since(input.now) as f64 / 1000.0);
    let copy_s = copy_s(input, v);
    let shadow = match &verdict.action {
        Action::Provision { target } => Some(target),
        _ => s.shadow.as_ref(),
    };
    let promotion_s = promotion_s(input, s, v, shadow);
    let inputs = DecisionInputs {
        cps: v.cps,
        threshold: input.policy.threshold_of(v.vm, &v.name),
        method: input.method.to_owned(),
        model: v.model.clone(),
        contention_in_s,
        copy_s,
        promotion_s,
        lead_s: contention_in_s.map(|s| s - copy_s - promotion_s),
        peak_cpu_p50: v.peak_p50,
        peak_cpu_p90: v.peak_p90,
        peak_cpu_p99: v.peak.cpu_cores,
        host_capacity: host.map_or(0.0, |h| h.usable_cpus),
        host_demand_p50: peak(host.map(|h| &h.demand_p50)),
        host_demand_p90: peak(host.map(|h| &h.demand_p90)),
    };
    let Verdict {
        action,
        reason,
        class,
        because,
        hosts,
    } = verdict;
    Decision {
        vm: s.vm,
        stage: s.stage,
        action,
        reason,
        class,
        because,
        inputs,
        hosts,
    }
}

#[cfg(test)]
mod tests;
