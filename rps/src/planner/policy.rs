//! What the operator can set about decisions: `[policy]` in the configuration.

use std::collections::BTreeSet;

use serde::Deserialize;
use umbra_api::order::{Lag, NotConverging, Pacing};
use umbra_api::{HostId, VmId};
use umbra_daemon::config::Invalid;

#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// A VM whose CPS is above this gets a shadow. Set as `contention.threshold`, which the forecasts use too.
    #[serde(skip)]
    pub threshold: f64,
    /// … once that was so in this many consecutive slots.
    pub provision_slots: u32,
    /// What to do when contention is expected before the shadow can be warm.
    pub late: Late,
    /// Added to the predicted copy time, seconds: launching QEMU, connecting, the last rounds.
    pub copy_margin_s: f64,
    /// Assumed speed of a first copy until one was measured.
    pub bandwidth_bytes_per_s: u64,
    /// First copies at once, per host (as source or target) and in all.
    pub seeds_per_host: u32,
    pub seeds_total: u32,
    /// Share of a host's RAM that shadows may take together.
    pub shadow_ram_share: f64,
    /// Memory that stays available on a target beside the shadow.
    pub mem_reserve_bytes: u64,
    /// A host has room if its contention probability, with the VM on it, stays at or below this over the whole horizon.
    pub room_probability: f64,
    /// A host whose agent told nothing for this many slots is not used.
    pub silent_after_slots: u32,
    /// The shadow is armed (tier 1) when contention is expected within this many seconds.
    pub arm_s: f64,
    /// The switchover is ordered this many seconds before contention is expected …
    pub switch_lead_s: f64,
    /// … plus the time that promotion to tier 2 takes: as the target measured it, and at least this.
    pub promotion_s: f64,
    /// A VM that waited longer than the contention limit in this many consecutive slots is switched at once.
    pub measured_slots: u32,
    /// A shadow is given up when the CPS stays below this …
    pub release_threshold: f64,
    /// … for this many consecutive slots …
    pub release_slots: u32,
    /// … and it has been warm for this many seconds.
    pub min_standby_s: f64,
    /// Bring a moved VM home by itself.
    pub failback: bool,
    /// Home is calm if its contention probability, with the VM back, stays below this over the whole horizon …
    pub calm_probability: f64,
    /// … in this many consecutive slots.
    pub calm_slots: u32,
    /// A moved VM stays at least this many seconds.
    pub min_stay_s: f64,
    /// Nothing is begun for this many seconds after a move or a failure; doubled with each further failure …
    pub cooldown_s: f64,
    /// … up to this.
    pub cooldown_max_s: f64,
    /// After a switchover, build a shadow on the old host as the way back.
    pub reverse_standby: bool,
    /// The stopped old primary is kept at least this long after a move.
    pub keep_old_s: f64,
    /// An unchanged decision is stored again after this many seconds.
    pub record_every_s: f64,
    /// Whether VMs that `vms` does not name are protected.
    pub protect: bool,
    /// Exceptions per VM.
    pub vms: Vec<VmPolicy>,
    /// VMs of one group never share a host, shadows included.
    pub anti_affinity: Vec<Group>,
    /// Hosts that take no shadows.
    pub maintenance: Vec<HostId>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Late {
    /// Make the shadow all the same: late help is help.
    Protect,
    /// Don't begin what will not be ready.
    Refuse,
}

/// What is not said here is as for all VMs.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmPolicy {
    /// UUID or name.
    pub vm: String,
    #[serde(default = "yes")]
    pub protect: bool,
    /// Instead of the common one.
    pub threshold: Option<f64>,
    /// How its copy keeps up, instead of what `[orders]` says: for the next protection, not for one that is under way.
    pub lag: Option<Lag>,
    pub max_downtime_ms: Option<u64>,
    pub not_converging: Option<NotConverging>,
    pub bandwidth_mbit: Option<u32>,
}

impl Default for VmPolicy {
    fn default() -> Self {
        Self {
            vm: String::new(),
            protect: yes(),
            threshold: None,
            lag: None,
            max_downtime_ms: None,
            not_converging: None,
            bandwidth_mbit: None,
        }
    }
}

impl VmPolicy {
    fn pacing(&self, common: Pacing) -> Pacing {
        Pacing {
            round_ms: common.round_ms,
            lag: self.lag.or(common.lag),
            max_downtime_ms: self.max_downtime_ms.unwrap_or(common.max_downtime_ms),
            not_converging: self.not_converging.unwrap_or(common.not_converging),
            bandwidth_mbit: self.bandwidth_mbit.or(common.bandwidth_mbit),
        }
    }

    fn check(&self, release_threshold: f64) -> Result<(), (&'static str, String)> {
        if self
            .threshold
            .is_some_and(|t| !(t.is_finite() && t > release_threshold))
        {
            return Err(("threshold", "expected a number above release_threshold".to_owned()));
        }
        self.pacing(Pacing::default()).check()
    }
}

#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// UUIDs or names.
    pub vms: Vec<String>,
}

fn yes() -> bool {
    true
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            threshold: 0.5,
            provision_slots: 2,
            late: Late::Protect,
            copy_margin_s: 5.0,
            bandwidth_bytes_per_s: 110_000_000,
            seeds_per_host: 1,
            seeds_total: 8,
            shadow_ram_share: 0.5,
            mem_reserve_bytes: 512 << 20,
            room_probability: 0.2,
            silent_after_slots: 3,
            arm_s: 120.0,
            switch_lead_s: 5.0,
            promotion_s: 1.0,
            measured_slots: 2,
            release_threshold: 0.2,
            release_slots: 30,
            min_standby_s: 600.0,
            failback: true,
            calm_probability: 0.1,
            calm_slots: 5,
            min_stay_s: 600.0,
            cooldown_s: 60.0,
            cooldown_max_s: 3600.0,
            reverse_standby: true,
            keep_old_s: 5.0,
            record_every_s: 600.0,
            protect: true,
            vms: Vec::new(),
            anti_affinity: Vec::new(),
            maintenance: Vec::new(),
        }
    }
}

impl Policy {
    fn of(&self, vm: VmId, name: &str) -> Option<&VmPolicy> {
        self.vms.iter().find(|p| names(&p.vm, vm, name))
    }

    pub fn protects(&self, vm: VmId, name: &str) -> bool {
        self.of(vm, name).map_or(self.protect, |p| p.protect)
    }

    pub fn threshold_of(&self, vm: VmId, name: &str) -> f64 {
        self.of(vm, name).and_then(|p| p.threshold).unwrap_or(self.threshold)
    }

    /// What the VM's protection is ordered with, where `common` is for all.
    pub fn pacing_of(&self, vm: VmId, name: &str, common: Pacing) -> Pacing {
        self.of(vm, name).map_or(common, |p| p.pacing(common))
    }

    /// Whether the two may not share a host.
    pub fn apart(&self, one: (VmId, &str), other: (VmId, &str)) -> bool {
        let has = |g: &Group, (vm, name)| g.vms.iter().any(|s| names(s, vm, name));
        self.anti_affinity.iter().any(|g| has(g, one) && has(g, other))
    }

    /// The pause after `failures` failed attempts in a row; a move counts as none.
    pub fn cooldown_ms(&self, failures: u32) -> u64 {
        let doubled = self.cooldown_s * f64::powi(2.0, failures.saturating_sub(1).min(20) as i32);
        (doubled.min(self.cooldown_max_s).max(0.0) * 1000.0) as u64
    }

    pub fn check(&self) -> Result<(), Invalid> {
        let positive = [
            ("arm_s", self.arm_s),
            ("bandwidth_bytes_per_s", self.bandwidth_bytes_per_s as f64),
            ("record_every_s", self.record_every_s),
        ];
        let not_negative = [
            ("copy_margin_s", self.copy_margin_s),
            ("switch_lead_s", self.switch_lead_s),
            ("promotion_s", self.promotion_s),
            ("release_threshold", self.release_threshold),
            ("min_standby_s", self.min_standby_s),
            ("min_stay_s", self.min_stay_s),
            ("cooldown_s", self.cooldown_s),
            ("cooldown_max_s", self.cooldown_max_s),
            ("keep_old_s", self.keep_old_s),
        ];
        let shares = [
            ("shadow_ram_share", self.shadow_ram_share),
            ("room_probability", self.room_probability),
            ("calm_probability", self.calm_probability),
        ];
        let counts = [
            ("provision_slots", self.provision_slots),
            ("seeds_per_host", self.seeds_per_host),
            ("seeds_total", self.seeds_total),
            ("silent_after_slots", self.silent_after_slots),
            ("measured_slots", self.measured_slots),
            ("release_slots", self.release_slots),
            ("calm_slots", self.calm_slots),
        ];
        let bad = |key: &str, reason: String| Err(Invalid::new(format!("policy.{key}"), reason));
        for (key, v) in positive {
            if !(v.is_finite() && v > 0.0) {
                return bad(key, format!("{v} is not above 0"));
            }
        }
        for (key, v) in not_negative {
            if !(v.is_finite() && v >= 0.0) {
                return bad(key, format!("{v} is below 0"));
            }
        }
        for (key, v) in shares {
            if !(0.0..=1.0).contains(&v) {
                return bad(key, format!("{v} is not between 0 and 1"));
            }
        }
        for (key, v) in counts {
            if v == 0 {
                return bad(key, "0 is too few, at least 1".into());
            }
        }
        self.check_relations()
    }

    fn check_relations(&self) -> Result<(), Invalid> {
        let bad = |key: &str, reason: String| Err(Invalid::new(format!("policy.{key}"), reason));
        if self.release_threshold >= self.threshold {
            return bad(
                "release_threshold",
                format!(
                    "{} is not below contention.threshold, {}",
                    self.release_threshold, self.threshold
                ),
            );
        }
        if self.arm_s < self.switch_lead_s {
            return bad(
                "arm_s",
                format!("{} is below switch_lead_s, {}", self.arm_s, self.switch_lead_s),
            );
        }
        let mut words = BTreeSet::new();
        for (i, p) in self.vms.iter().enumerate() {
            // Only the first would count.
            if !words.insert(&p.vm) {
                return bad(&format!("vms[{i}].vm"), format!("{} is there twice", p.vm));
            }
            if let Err((key, reason)) = p.check(self.release_threshold) {
                return bad(&format!("vms[{i}].{key}"), reason);
            }
        }
        Ok(())
    }
}

/// Whether an operator's word for a VM means this one.
fn names(word: &str, vm: VmId, name: &str) -> bool {
    word == name || word.parse() == Ok(vm)
}
