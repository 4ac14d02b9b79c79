//! How long a shadow takes to get back the RAM that its tier took: what it will lack, at the speed that its host has shown.

use umbra_api::HostId;
use umbra_api::replica::{ReplicaStatus, Role, ShadowMemory};

use super::Input;
use crate::fleet::{self, Fleet};
use crate::lifecycle::VmState;

/// A promotion that read less tells nothing of the speed.
const TELLING_BYTES: u64 = 16 << 20;
/// Pages that come and go while one looks.
const SLACK_SHARE: u64 = 50;
const SLACK_BYTES: u64 = 4 << 20;

/// Seconds that a promotion to tier 2 on `host` will take, and at least what the policy assumes. `ram_bytes` is what the
/// guest uses: as much as that a shadow lacks at worst, which is made only now.
pub fn expected_s(input: &Input<'_>, s: &VmState, host: &HostId, ram_bytes: u64) -> f64 {
    let lacks = shadow_on(input.fleet, s, host).map_or(ram_bytes, |r| r.memory.as_ref().map_or(0, lacks));
    wait_s(input.fleet, host, lacks).max(input.policy.promotion_s)
}

/// Seconds until the shadow's RAM is back; `None` if all of it is, or if its host does not tell.
pub fn remaining_s(fleet: &Fleet, s: &VmState, host: &HostId) -> Option<f64> {
    let memory = shadow_on(fleet, s, host)?.memory.as_ref()?;
    let slack = (memory.used_bytes / SLACK_SHARE).max(SLACK_BYTES);
    let missing = memory.used_bytes.saturating_sub(memory.resident_bytes);
    (missing > slack).then(|| wait_s(fleet, host, missing))
}

fn shadow_on<'a>(fleet: &'a Fleet, s: &VmState, host: &HostId) -> Option<&'a ReplicaStatus> {
    let r = fleet::replica(fleet, host, s.vm, Role::Target)?;
    (s.shadow.as_ref() == Some(host) && r.epoch >= s.protection).then_some(r)
}

/// What waits in swap, or will once the tier has taken it.
fn lacks(m: &ShadowMemory) -> u64 {
    let left = match (&m.not_shrunk, m.limit_bytes) {
        (None, Some(limit)) => m.resident_bytes.min(limit),
        _ => m.resident_bytes,
    };
    m.used_bytes.saturating_sub(left)
}

/// At the speed of the slowest promotion that the host tells of; 0 if none was measured there yet.
fn wait_s(fleet: &Fleet, host: &HostId, bytes: u64) -> f64 {
    let told = fleet.get(host).into_iter().flat_map(|r| &r.replicas);
    let promotions = told.filter_map(|r| r.memory.as_ref()?.promotion);
    let measured = promotions.filter(|p| p.read_bytes >= TELLING_BYTES && p.took_ms > 0);
    let s_per_byte = measured.map(|p| p.took_ms as f64 / 1000.0 / p.read_bytes as f64);
    s_per_byte.fold(0.0, f64::max) * bytes as f64
}
