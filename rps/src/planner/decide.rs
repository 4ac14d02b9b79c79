//! What to do about one VM that has a shadow already, or may not get one. Provisioning, which weighs VMs against each
//! other, is in [`super::provision`].

use umbra_api::lifecycle::Stage;

use super::{Action, Input, Verdict, promotion_s, target};
use crate::lifecycle::{Reason, VmState};
use crate::outlook::VmOutlook;

/// Decides for every stage but `unprotected`.
pub fn decide(input: &Input<'_>, s: &VmState, v: &VmOutlook) -> Verdict {
    match s.stage {
        Stage::Unprotected => Verdict::nothing("unprotected", "it has no shadow"),
        Stage::Provisioning => Verdict::nothing("under_way", "its shadow is being provisioned"),
        Stage::Seeding => Verdict::nothing("under_way", "the first copy is under way"),
        Stage::Standby | Stage::Armed => warm(input, s, v),
        Stage::Switching => Verdict::nothing("under_way", "the switchover is under way"),
        Stage::FailingBack => Verdict::nothing("under_way", "the failback is under way"),
        Stage::Active => active(input, s),
        Stage::Reverse => reverse(input, s, v),
        Stage::Failed => {
            let why = s.last_error.as_deref().unwrap_or("unknown");
            Verdict::nothing("failed", format!("the last attempt is being cleared up: {why}"))
        }
    }
}

fn active(input: &Input<'_>, s: &VmState) -> Verdict {
    let home = &s.home;
    if let Some(ms) = s.cooling(input.now).filter(|_| s.failures > 0) {
        return Verdict::nothing(
            "cooldown",
            format!(
                "the way back to {home} failed, it is tried again in {:.0} s",
                ms as f64 / 1000.0
            ),
        );
    }
    Verdict::nothing(
        "under_way",
        format!("it was moved, the way back to {home} is being built"),
    )
}

/// A warm shadow: switch, arm, disarm, release, or wait.
fn warm(input: &Input<'_>, s: &VmState, v: &VmOutlook) -> Verdict {
    let policy = input.policy;
    let streak = input.streaks.of(v.vm);
    let in_s = v.contention_at.map(|t| t.since(input.now) as f64 / 1000.0);
    let threshold = policy.threshold_of(v.vm, &v.name);
    let due_s = policy.switch_lead_s + promotion_s(input, s, v, s.shadow.as_ref());
    let due = in_s.filter(|s| *s <= due_s && v.cps > threshold);
    let measured = streak.measured >= policy.measured_slots;
    if measured || due.is_some() {
        let reason = match due {
            Some(in_s) if !measured => Reason::Due { in_s },
            _ => Reason::Measured {
                wait_ms_per_s: v.wait_ms_per_s,
            },
        };
        return switch(input, s, v, reason);
    }
    match (s.stage, in_s) {
        (Stage::Standby, Some(in_s)) if in_s <= policy.arm_s && v.cps > threshold => {
            let because = format!(
                "contention is expected in {in_s:.1} s, the shadow is armed from {} s",
                policy.arm_s
            );
            return Verdict::act(Action::Arm, Reason::Nears { in_s }, "arm", because);
        }
        (Stage::Armed, _) if streak.receded >= policy.provision_slots => {
            let because = format!("contention has not been near for {} slots", streak.receded);
            return Verdict::act(Action::Disarm, Reason::Receded, "disarm", because);
        }
        _ => {}
    }
    let warm_s = input.now.since(s.since) as f64 / 1000.0;
    let long_low = streak.low >= policy.release_slots && warm_s >= policy.min_standby_s;
    if s.stage == Stage::Standby && long_low && !s.manual {
        let because = format!(
            "CPS has been below {} for {} slots",
            policy.release_threshold, streak.low
        );
        return Verdict::act(Action::Release, Reason::Quiet, "release", because);
    }
    Verdict::nothing("warm", wait_words(input, s, v, in_s, due_s))
}

fn wait_words(input: &Input<'_>, s: &VmState, v: &VmOutlook, in_s: Option<f64>, due_s: f64) -> String {
    let low = input.streaks.of(v.vm).low;
    match in_s {
        Some(t) if v.cps > input.policy.threshold_of(v.vm, &v.name) => {
            format!(
                "the shadow is {}, contention is expected in {t:.1} s, the switchover is due {due_s:.1} s before",
                s.stage
            )
        }
        _ if s.manual => format!("the shadow is {}, an operator asked for it", s.stage),
        _ if low > 0 => {
            format!(
                "the shadow is {}, CPS has been low for {low} of {} slots",
                s.stage, input.policy.release_slots
            )
        }
        _ => format!("the shadow is {}, CPS is {:.2}", s.stage, v.cps),
    }
}

/// It is time: unless the shadow's host would be no better.
fn switch(input: &Input<'_>, s: &VmState, v: &VmOutlook, reason: Reason) -> Verdict {
    let Some(shadow) = &s.shadow else {
        return Verdict::nothing("no_shadow", "it is time, but there is no shadow");
    };
    for host in [&s.host, shadow] {
        // An agent's silence on the own host must not keep a VM where it suffers; a dead replicator can't be asked.
        let fit = target::usable(input, host);
        let blocks = match &fit {
            Err(target::Unfit::Silent { .. } | target::Unfit::NeverHeard) => host == shadow,
            Err(target::Unfit::Maintenance) => host == shadow,
            Err(_) => true,
            Ok(_) => false,
        };
        if let (true, Err(unfit)) = (blocks, fit) {
            return Verdict::nothing("host_unfit", format!("it is time, but {host}: {unfit}"));
        }
    }
    let there = input.outlook.what_if(v.vm, shadow).map(|w| w.peak_probability);
    let limit = input.policy.room_probability;
    match there {
        Some(p) if p > limit && p >= v.cps => Verdict::nothing(
            "no_better",
            format!(
                "it is time, but on {shadow} contention would be as probable: {p:.2} against {:.2}",
                v.cps
            ),
        ),
        _ => {
            let because = format!("{reason}; {shadow} holds its shadow, {}", s.stage);
            Verdict::act(Action::Switch, reason, "switch", because)
        }
    }
}

/// Away from home with a way back.
fn reverse(input: &Input<'_>, s: &VmState, v: &VmOutlook) -> Verdict {
    let policy = input.policy;
    let home = &s.home;
    if s.manual {
        return Verdict::nothing("manual", "an operator moved it, an operator brings it home");
    }
    if !policy.failback {
        return Verdict::nothing("policy", "the policy brings no VM home by itself");
    }
    if let Err(unfit) = target::usable(input, home) {
        return Verdict::nothing("host_unfit", format!("it can't go home, {home}: {unfit}"));
    }
    if s.kept.contains(home) {
        return Verdict::nothing("keeps_old", format!("its old primary on {home} is not quit yet"));
    }
    let Some(probability) = input.outlook.what_if(v.vm, home).map(|w| w.peak_probability) else {
        return Verdict::nothing("no_forecast", format!("there is no forecast of {home} with it"));
    };
    let streak = input.streaks.of(v.vm);
    if streak.calm < policy.calm_slots {
        return Verdict::nothing(
            "home_not_calm",
            format!(
                "home is not calm: contention probability {probability:.2} on {home} (limit {}), calm for {} of {} slots",
                policy.calm_probability, streak.calm, policy.calm_slots
            ),
        );
    }
    if streak.hot >= policy.provision_slots {
        let because = format!("CPS here is {:.2}, and {home} is calm ({probability:.2})", v.cps);
        return Verdict::act(Action::FailBack, Reason::Fled { cps: v.cps }, "fail_back", because);
    }
    let stayed_s = s.moved_at.map_or(f64::MAX, |t| input.now.since(t) as f64 / 1000.0);
    if stayed_s < policy.min_stay_s {
        return Verdict::nothing(
            "min_stay",
            format!("it moved {stayed_s:.0} s ago and stays {} s", policy.min_stay_s),
        );
    }
    let because = format!(
        "{home} has been calm for {} slots: contention probability {probability:.2}",
        streak.calm
    );
    Verdict::act(Action::FailBack, Reason::HomeCalm { probability }, "fail_back", because)
}
