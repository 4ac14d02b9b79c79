//! How many slots in a row something has been so: the planner's hysteresis. Counted once a slot, kept in memory only: after a
//! restart a streak begins anew, which delays a decision by a few slots and never hastens one.

use std::collections::BTreeMap;

use umbra_api::VmId;
use umbra_api::lifecycle::Stage;

use super::Policy;
use crate::lifecycle::VmState;
use crate::outlook::{Outlook, VmOutlook};

/// Consecutive slots, up to and with the last one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Streak {
    /// CPS above the threshold.
    pub hot: u32,
    /// CPS below the release threshold.
    pub low: u32,
    /// Contention not expected within twice `arm_s`.
    pub receded: u32,
    /// Run-queue wait above the limit.
    pub measured: u32,
    /// Home would be calm with the VM back on it.
    pub calm: u32,
}

#[derive(Clone, Debug, Default)]
pub struct Streaks {
    slot: Option<i64>,
    vms: BTreeMap<VmId, Streak>,
}

impl Streaks {
    pub fn of(&self, vm: VmId) -> Streak {
        self.vms.get(&vm).copied().unwrap_or_default()
    }

    /// Counts a slot. The same slot again counts nothing; VMs that are gone are forgotten.
    pub fn observe(&mut self, f: &Outlook, states: &BTreeMap<VmId, VmState>, policy: &Policy, limit_ms_per_s: f64) {
        let slot = f.now.0.div_euclid(i64::try_from(f.slot_ms).unwrap_or(i64::MAX).max(1));
        if self.slot == Some(slot) {
            return;
        }
        self.slot = Some(slot);
        let counted = f.vms.iter().map(|v| {
            let old = self.of(v.vm);
            let calm = states.get(&v.vm).is_some_and(|s| home_is_calm(f, s, policy));
            (v.vm, count(old, v, f, policy, limit_ms_per_s, calm))
        });
        self.vms = counted.collect();
    }
}

fn count(old: Streak, v: &VmOutlook, f: &Outlook, policy: &Policy, limit_ms_per_s: f64, calm: bool) -> Streak {
    let step = |n: u32, so: bool| if so { n.saturating_add(1) } else { 0 };
    let far_ms = (policy.arm_s * 2000.0) as i64;
    let near = v.contention_at.is_some_and(|t| t.since(f.now) <= far_ms);
    Streak {
        hot: step(old.hot, v.cps > policy.threshold_of(v.vm, &v.name)),
        low: step(old.low, v.cps < policy.release_threshold),
        receded: step(old.receded, !near),
        measured: step(old.measured, v.wait_ms_per_s > limit_ms_per_s),
        calm: step(old.calm, calm),
    }
}

fn home_is_calm(f: &Outlook, s: &VmState, policy: &Policy) -> bool {
    s.stage == Stage::Reverse
        && f.what_if(s.vm, &s.home)
            .is_some_and(|w| w.peak_probability < policy.calm_probability)
}
