//! Who gets a shadow. Each VM is asked what speaks against it alone; then, host by host, the one is picked whose leaving
//! helps the host enough and costs least; then it needs a target within the budgets.

use std::collections::BTreeMap;

use umbra_api::HostId;
use umbra_api::lifecycle::Stage;

use super::target::{Ledger, choose, usable};
use super::{Action, Input, Late, Verdict, copy_s, promotion_s, rejections};
use crate::lifecycle::{Reason, VmState};
use crate::outlook::VmOutlook;

type Candidate<'a> = (&'a VmState, &'a VmOutlook);

/// Decides for all unprotected VMs. Shadows that it decides on are booked.
pub fn provision<'a>(
    input: &Input<'_>,
    unprotected: &[Candidate<'a>],
    ledger: &mut Ledger,
) -> Vec<(&'a VmState, &'a VmOutlook, Verdict)> {
    let mut out = Vec::new();
    let mut by_host: BTreeMap<&HostId, Vec<Candidate<'a>>> = BTreeMap::new();
    for (s, v) in unprotected {
        match alone(input, s, v) {
            Some(verdict) => out.push((*s, *v, verdict)),
            None => by_host.entry(&s.host).or_default().push((s, v)),
        }
    }
    // The hosts with the least time left choose their targets first.
    let mut hosts: Vec<_> = by_host.into_iter().collect();
    hosts.sort_by_key(|(_, c)| {
        c.iter()
            .filter_map(|(_, v)| v.contention_at)
            .min()
            .map_or(i64::MAX, |t| t.0)
    });
    for (host, candidates) in hosts {
        if let Some(relief) = relief(input, host) {
            let because = format!("{relief}, which is enough for {host}");
            out.extend(
                candidates
                    .into_iter()
                    .map(|(s, v)| (s, v, Verdict::nothing("relief", because.clone()))),
            );
            continue;
        }
        let first = pick(input, host, &candidates);
        let first_name = first.map_or_else(String::new, |(_, v)| v.name.clone());
        for (s, v) in candidates {
            let verdict = match first {
                Some((f, _)) if f.vm == s.vm => place(input, s, v, ledger),
                _ => Verdict::nothing("after", format!("{first_name} is moved off {host} first")),
            };
            out.push((s, v, verdict));
        }
    }
    out
}

/// What speaks against a shadow of this VM, whatever the others do.
fn alone(input: &Input<'_>, s: &VmState, v: &VmOutlook) -> Option<Verdict> {
    let policy = input.policy;
    let streak = input.streaks.of(v.vm);
    let threshold = policy.threshold_of(v.vm, &v.name);
    let measured = streak.measured >= policy.measured_slots;
    let nothing = |class, because: String| Some(Verdict::nothing(class, because));
    if !policy.protects(v.vm, &v.name) {
        return nothing("not_protected", "the policy does not protect it".into());
    }
    if v.model.is_empty() && !measured {
        return nothing(
            "no_history",
            format!("its history is too short for a forecast: {} slots", v.history_slots),
        );
    }
    if v.cps <= threshold && !measured {
        return nothing(
            "below_threshold",
            format!("CPS {:.2} is not above {threshold:.2}", v.cps),
        );
    }
    if streak.hot < policy.provision_slots && !measured {
        let (n, of) = (streak.hot, policy.provision_slots);
        return nothing(
            "hysteresis",
            format!("CPS {:.2} has been above {threshold:.2} for {n} of {of} slots", v.cps),
        );
    }
    if let Some(ms) = s.cooling(input.now) {
        return nothing(
            "cooldown",
            format!("it cools down for another {:.0} s", ms as f64 / 1000.0),
        );
    }
    if input.busy.contains(&v.vm) {
        return nothing("busy", "leftovers of the last attempt are being cleared".into());
    }
    None
}

/// The VMs that are about to leave a host, if their leaving is enough.
fn relief(input: &Input<'_>, host: &HostId) -> Option<String> {
    let leaving = |s: &&VmState| {
        let stages = [
            Stage::Provisioning,
            Stage::Seeding,
            Stage::Standby,
            Stage::Armed,
            Stage::Switching,
        ];
        s.host == *host && stages.contains(&s.stage)
    };
    let leaving: Vec<&VmOutlook> = input
        .states
        .values()
        .filter(leaving)
        .filter_map(|s| input.outlook.vm(s.vm))
        .collect();
    let h = input.outlook.host(host)?;
    let demand_p90 = h.demand_p90.iter().copied().fold(0.0, f64::max);
    let together: f64 = leaving.iter().map(|v| v.peak_p50).sum();
    let enough = leaving.iter().any(|v| frees(input, v)) || demand_p90 - together <= h.usable_cpus;
    let names: Vec<&str> = leaving.iter().map(|v| v.name.as_str()).collect();
    (!leaving.is_empty() && enough).then(|| format!("{} is about to leave", names.join(", ")))
}

/// Without this VM its host would have room.
fn frees(input: &Input<'_>, v: &VmOutlook) -> bool {
    let without = input.outlook.what_if(v.vm, &v.host);
    without.is_some_and(|w| w.peak_probability <= input.policy.room_probability)
}

/// Of those whose leaving is enough the cheapest to copy; if none is enough alone, the one that frees most.
fn pick<'a>(input: &Input<'_>, host: &HostId, candidates: &[Candidate<'a>]) -> Option<Candidate<'a>> {
    let enough = candidates.iter().filter(|(_, v)| v.host == *host && frees(input, v));
    let cheapest = enough.min_by_key(|(s, v)| (v.rss_bytes, s.vm));
    let biggest = || {
        candidates
            .iter()
            .max_by(|(_, a), (_, b)| a.peak_p90.total_cmp(&b.peak_p90))
    };
    cheapest.or_else(biggest).copied()
}

/// Budgets, lead time and a target.
fn place(input: &Input<'_>, s: &VmState, v: &VmOutlook, ledger: &mut Ledger) -> Verdict {
    let policy = input.policy;
    let host = &s.host;
    if let Err(unfit) = usable(input, host) {
        return Verdict::nothing("host_unfit", format!("its own host {host} can't send it: {unfit}"));
    }
    if ledger.seeds_total >= policy.seeds_total || ledger.seeds(host) >= policy.seeds_per_host {
        let (n, all) = (ledger.seeds(host), ledger.seeds_total);
        let because = format!("{n} first copies are under way on {host} and {all} in all, the policy allows no more");
        return Verdict::nothing("budget", because);
    }
    let (target, hosts) = choose(input, v, ledger);
    let Some(target) = target else {
        return Verdict::nothing("no_target", format!("no host can take it: {}", rejections(&hosts))).with_hosts(hosts);
    };
    // The switchover is due that much before contention, and the copy must be there by then.
    let (copy_s, due_s) = (
        copy_s(input, v),
        policy.switch_lead_s + promotion_s(input, s, v, Some(&target)),
    );
    let in_s = v.contention_at.map(|t| t.since(input.now) as f64 / 1000.0);
    let late = in_s.filter(|s| *s < copy_s + due_s);
    if let (Some(in_s), Late::Refuse) = (late, policy.late) {
        let because = format!(
            "the copy takes {copy_s:.1} s, the switchover is due {due_s:.1} s before contention, and that is expected in {in_s:.1} s"
        );
        return Verdict::nothing("too_late", because).with_hosts(hosts);
    }
    ledger.book(host, &target, v.guest_bytes, true);
    let threshold = policy.threshold_of(v.vm, &v.name);
    let reason = match v.cps > threshold {
        true => Reason::Predicted { cps: v.cps, threshold },
        false => Reason::Measured {
            wait_ms_per_s: v.wait_ms_per_s,
        },
    };
    let when = match (in_s, late) {
        (_, Some(t)) => format!(
            "contention is expected in {t:.1} s, before the copy of {copy_s:.1} s is made and the switchover, due {due_s:.1} s ahead, done"
        ),
        (Some(t), _) => format!("contention is expected in {t:.1} s, the copy takes {copy_s:.1} s"),
        (None, _) => format!("the copy takes {copy_s:.1} s"),
    };
    let because = format!("{reason}; {when}; {target} has room");
    Verdict::act(Action::Provision { target }, reason, "provision", because).with_hosts(hosts)
}
