//! Where could a shadow of this VM live? Every host gets a verdict, so that an operator can read why one was passed over.

use std::collections::BTreeMap;

use umbra_api::view::HostVerdict;
use umbra_api::{HostId, VmId};

use super::Input;
use crate::outlook::{HostOutlook, VmOutlook, WhatIf};

/// Why a host takes no shadow of a VM.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum Unfit {
    #[error("the VM runs here")]
    Present,
    #[error("no replicator is configured for it")]
    NotConfigured,
    #[error("its replicator does not answer")]
    ReplicatorDown,
    #[error("it is under maintenance")]
    Maintenance,
    #[error("its agent has told nothing yet")]
    NeverHeard,
    #[error("its agent has been silent for {for_s:.0} s")]
    Silent { for_s: f64 },
    #[error("the stopped primary of an earlier move is still kept there")]
    KeepsOld,
    #[error("{other} is there and may not share a host with it")]
    AntiAffinity { other: String },
    #[error("{available} MiB of memory available, the shadow takes {needed} MiB and {reserve} MiB stay free")]
    Memory { available: u64, needed: u64, reserve: u64 },
    #[error("shadows there would take {would} MiB, the policy allows {allowed} MiB")]
    ShadowRam { would: u64, allowed: u64 },
    #[error("{0} first copies are under way there already")]
    Seeds(u32),
    #[error("no forecast of it with the VM")]
    NoForecast,
    #[error(
        "contention probability would be {probability:.2} there, above {limit:.2} (p90 {p90:.2} of {cpus:.2} CPUs)"
    )]
    NoRoom {
        probability: f64,
        limit: f64,
        p90: f64,
        cpus: f64,
    },
}

/// What is promised to shadows that are not there, or not there in full, yet.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    hosts: BTreeMap<HostId, Promised>,
    pub seeds_total: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Promised {
    seeds: u32,
    /// RAM of all shadows on the host.
    shadow_bytes: u64,
    /// … of those whose first copy is not complete: the agent doesn't see it as taken yet.
    unseen_bytes: u64,
}

impl Ledger {
    /// Books a shadow. `seeding` if its first copy is still to come.
    pub fn book(&mut self, source: &HostId, target: &HostId, guest_bytes: u64, seeding: bool) {
        let promised = self.hosts.entry(target.clone()).or_default();
        promised.shadow_bytes = promised.shadow_bytes.saturating_add(guest_bytes);
        if !seeding {
            return;
        }
        promised.unseen_bytes = promised.unseen_bytes.saturating_add(guest_bytes);
        promised.seeds += 1;
        self.hosts.entry(source.clone()).or_default().seeds += 1;
        self.seeds_total += 1;
    }

    pub fn seeds(&self, host: &HostId) -> u32 {
        self.hosts.get(host).map_or(0, |p| p.seeds)
    }

    fn on(&self, host: &HostId) -> Promised {
        self.hosts.get(host).copied().unwrap_or_default()
    }
}

/// A host that fits, with what it would look like.
struct Fit {
    host: HostId,
    what_if: WhatIf,
    cpus: f64,
    available: u64,
}

/// Judges all hosts and names the best: least probability of contention, then most memory, then by name.
pub fn choose(input: &Input<'_>, vm: &VmOutlook, ledger: &Ledger) -> (Option<HostId>, Vec<HostVerdict>) {
    let mut names: Vec<HostId> = input.fleet.keys().cloned().collect();
    names.extend(
        input
            .outlook
            .hosts
            .iter()
            .map(|h| h.host.clone())
            .filter(|h| !input.fleet.contains_key(h)),
    );
    let judged: Vec<(HostId, Result<Fit, Unfit>)> = names
        .into_iter()
        .map(|h| (h.clone(), judge(input, vm, &h, ledger)))
        .collect();
    let best = judged.iter().filter_map(|(_, r)| r.as_ref().ok()).min_by(|a, b| {
        (a.what_if.peak_probability.total_cmp(&b.what_if.peak_probability))
            .then(b.available.cmp(&a.available))
            .then(a.host.cmp(&b.host))
    });
    let best = best.map(|f| f.host.clone());
    let verdicts = judged.iter().map(|(host, r)| verdict(host, r, best.as_ref())).collect();
    (best, verdicts)
}

fn verdict(host: &HostId, judged: &Result<Fit, Unfit>, best: Option<&HostId>) -> HostVerdict {
    let chosen = best == Some(host);
    let reason = match (judged, best) {
        (Err(unfit), _) => unfit.to_string(),
        (Ok(fit), _) if chosen => format!("room over the whole horizon: {}", words(fit)),
        (Ok(fit), Some(b)) => format!("would do ({}), {b} is better", words(fit)),
        (Ok(fit), None) => words(fit),
    };
    HostVerdict {
        host: host.clone(),
        chosen,
        reason,
    }
}

fn words(fit: &Fit) -> String {
    let p90 = peak(&fit.what_if.demand_p90);
    let (p, cpus) = (fit.what_if.peak_probability, fit.cpus);
    format!("contention probability {p:.2}, p90 {p90:.2} of {cpus:.2} CPUs")
}

fn peak(slots: &[f64]) -> f64 {
    slots.iter().copied().fold(0.0, f64::max)
}

fn judge(input: &Input<'_>, vm: &VmOutlook, host: &HostId, ledger: &Ledger) -> Result<Fit, Unfit> {
    if *host == vm.host {
        return Err(Unfit::Present);
    }
    let outlook = usable(input, host)?;
    if input.states.get(&vm.vm).is_some_and(|s| s.kept.contains(host)) {
        return Err(Unfit::KeepsOld);
    }
    apart(input, vm, host)?;
    memory(input, vm, outlook, ledger)?;
    let what_if = input.outlook.what_if(vm.vm, host).ok_or(Unfit::NoForecast)?;
    let (probability, limit) = (what_if.peak_probability, input.policy.room_probability);
    if probability > limit {
        let p90 = peak(&what_if.demand_p90);
        return Err(Unfit::NoRoom {
            probability,
            limit,
            p90,
            cpus: outlook.cpus,
        });
    }
    Ok(Fit {
        host: host.clone(),
        what_if,
        cpus: outlook.cpus,
        available: outlook.mem_available_bytes,
    })
}

/// Whether a host can take part in anything now: it is ours, its replicator answers, its agent speaks.
pub fn usable<'a>(input: &Input<'a>, host: &HostId) -> Result<&'a HostOutlook, Unfit> {
    let report = input.fleet.get(host).ok_or(Unfit::NotConfigured)?;
    if input.policy.maintenance.contains(host) {
        return Err(Unfit::Maintenance);
    }
    if !report.up {
        return Err(Unfit::ReplicatorDown);
    }
    let outlook = input
        .outlook
        .hosts
        .iter()
        .find(|h| h.host == *host)
        .ok_or(Unfit::NeverHeard)?;
    let last = outlook.last_sample.ok_or(Unfit::NeverHeard)?;
    let silent_ms = input.now.since(last);
    // The slot under way and the agent's own interval are no silence.
    let allowed_ms = input
        .outlook
        .slot_ms
        .saturating_mul(u64::from(input.policy.silent_after_slots))
        .max(3_000);
    if silent_ms > i64::try_from(allowed_ms).unwrap_or(i64::MAX) {
        return Err(Unfit::Silent {
            for_s: silent_ms as f64 / 1000.0,
        });
    }
    Ok(outlook)
}

fn apart(input: &Input<'_>, vm: &VmOutlook, host: &HostId) -> Result<(), Unfit> {
    let here = |other: VmId, runs_on: &HostId| {
        runs_on == host
            || input
                .states
                .get(&other)
                .is_some_and(|s| s.shadow.as_ref() == Some(host))
    };
    let clash = input
        .outlook
        .vms
        .iter()
        .find(|o| o.vm != vm.vm && here(o.vm, &o.host) && input.policy.apart((vm.vm, &vm.name), (o.vm, &o.name)));
    clash.map_or(Ok(()), |o| Err(Unfit::AntiAffinity { other: o.name.clone() }))
}

fn memory(input: &Input<'_>, vm: &VmOutlook, host: &HostOutlook, ledger: &Ledger) -> Result<(), Unfit> {
    let mib = |bytes: u64| bytes >> 20;
    let promised = ledger.on(&host.host);
    if promised.seeds >= input.policy.seeds_per_host {
        return Err(Unfit::Seeds(promised.seeds));
    }
    let available = host.mem_available_bytes.saturating_sub(promised.unseen_bytes);
    let reserve = input.policy.mem_reserve_bytes;
    if vm.guest_bytes.saturating_add(reserve) > available {
        let (available, needed, reserve) = (mib(available), mib(vm.guest_bytes), mib(reserve));
        return Err(Unfit::Memory {
            available,
            needed,
            reserve,
        });
    }
    let allowed = (host.mem_total_bytes as f64 * input.policy.shadow_ram_share) as u64;
    let would = promised.shadow_bytes.saturating_add(vm.guest_bytes);
    if would > allowed {
        return Err(Unfit::ShadowRam {
            would: mib(would),
            allowed: mib(allowed),
        });
    }
    Ok(())
}
