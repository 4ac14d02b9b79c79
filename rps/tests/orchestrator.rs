//! The orchestrator's core against replicators that are simulated: the straight road, every way to lose a message, a process
//! or a store on it, and at the end all of that at random.

mod common;

use common::fake::host;
use common::sim::{Faults, Sim, policy, timing, vm};
use proptest::prelude::*;
use umbra_api::UnixMs;
use umbra_api::lifecycle::Stage;
use umbra_api::order::{Lag, NotConverging, OrderKind, Pacing, RefusalCode, Tier};
use umbra_api::replica::{Phase, Promotion, Role, ShadowMemory};
use umbra_api::view::Mode;
use umbra_rps::orchestrator::{Denied, Request};
use umbra_rps::planner::Policy;
use umbra_rps::planner::policy::VmPolicy;

fn done(sim: &Sim) -> Vec<String> {
    let word = |(to, o): &(umbra_api::HostId, umbra_api::order::Order)| format!("{} {}@{}", o.kind.name(), to, o.epoch);
    sim.hosts.done.iter().map(word).collect()
}

/// Forth.
fn go_away(sim: &mut Sim) {
    sim.create().unwrap();
    sim.until(Stage::Standby);
    sim.request(Request::Switchover).unwrap();
    sim.until(Stage::Reverse);
}

/// And back.
fn go_home(sim: &mut Sim) {
    // The old primary has to be quit before.
    for _ in 0..40 {
        match sim.request(Request::Failback) {
            Err(Denied::Busy) => sim.tick(),
            other => {
                other.unwrap();
                break;
            }
        }
    }
    sim.until(Stage::Unprotected);
}

#[test]
fn the_straight_road_there_and_back() {
    use Stage as S;
    let mut sim = Sim::new(1);
    go_away(&mut sim);
    assert_eq!(sim.hosts.runs_on(vm()), Some(&host("b")));
    assert_eq!(sim.state().last_switchover.unwrap().guest_stopped_us, 9_000);
    go_home(&mut sim);
    sim.ticks(20);
    assert_eq!(
        sim.stages(),
        [
            S::Provisioning,
            S::Seeding,
            S::Standby,
            S::Switching,
            S::Active,
            S::Active,
            S::Reverse,
            S::FailingBack,
            S::Unprotected
        ]
    );
    assert_eq!(
        done(&sim),
        [
            "admit b@1",
            "protect a@1",
            "tier b@1",
            "tier b@1",
            "switchover a@2",
            "announce b@2",
            "admit a@3",
            "protect b@3",
            "tier a@3",
            "retire a@3",
            "tier a@3",
            "switchover b@4",
            "announce a@4",
            "retire b@4",
        ]
    );
    assert_eq!(sim.redirects, 2);
    assert!(sim.state().last_redirect.as_ref().unwrap().error.is_none());
    assert_eq!(sim.hosts.runs_on(vm()), Some(&host("a")));
    assert_eq!(sim.hosts.holding(), []);
    assert!(sim.core.busy().is_empty());
    // And once more, over what the first round left.
    go_away(&mut sim);
    go_home(&mut sim);
    assert_eq!(sim.hosts.runs_on(vm()), Some(&host("a")));
}

#[test]
fn a_restart_in_every_stage_changes_nothing() {
    // The tick at which the RPS dies; the road takes fewer than 60.
    for at in 0..60 {
        let mut sim = Sim::new(at);
        let mut asked = (false, false, false);
        for tick in 0..300 {
            if tick == at {
                sim.restart();
            }
            match sim.stage() {
                Stage::Unprotected if !asked.0 => asked.0 = sim.create().is_ok(),
                Stage::Standby if !asked.1 => asked.1 = sim.request(Request::Switchover).is_ok(),
                Stage::Reverse if !asked.2 => asked.2 = sim.request(Request::Failback).is_ok(),
                _ => {}
            }
            sim.tick();
        }
        assert_eq!(asked, (true, true, true), "restart at tick {at}: {}", sim.tale());
        assert!(
            !sim.stages().contains(&Stage::Failed),
            "restart at tick {at}: {}",
            sim.tale()
        );
        assert_eq!(
            (sim.stage(), sim.hosts.runs_on(vm())),
            (Stage::Unprotected, Some(&host("a")))
        );
        assert_eq!(sim.hosts.holding(), []);
    }
}

#[test]
fn copies_that_began_and_ended_within_a_slot_are_known() {
    let mut sim = Sim::new(1);
    let begun = sim.now;
    go_away(&mut sim);
    let ended = sim.now;
    let told = |sim: &Sim, slot_ms| -> Vec<(String, UnixMs, UnixMs)> {
        let all = sim.core.copying(slot_ms, sim.now);
        all.map(|(host, since, until)| (host.to_string(), since, until))
            .collect()
    };
    // The first copy, the move and the way back, with slots of a minute: from the first order on, without a hole but the standby.
    let all = told(&sim, 60_000);
    for host in ["a", "b"] {
        let mine = all.iter().filter(|(h, since, until)| h == host && since < until);
        let spans: Vec<(UnixMs, UnixMs)> = mine.map(|(_, since, until)| (*since, *until)).collect();
        assert!(
            spans.iter().any(|(since, _)| *since <= begun.plus_ms(1_000)),
            "{spans:?}"
        );
        assert!(spans.iter().any(|(_, until)| ended.since(*until) < 1_000), "{spans:?}");
        assert!(spans.len() >= 4, "provisioning, seeding, switching, active: {spans:?}");
    }
    while sim.now.since(ended) < 120_500 {
        sim.tick();
    }
    assert!(told(&sim, 60_000).is_empty(), "of long ago");
}

/// 200 MiB in use, `resident` of it in RAM; 10 MiB/s were measured.
fn cold(resident_mib: u64) -> ShadowMemory {
    ShadowMemory {
        used_bytes: 200 << 20,
        resident_bytes: resident_mib << 20,
        promotion: Some(Promotion {
            at: UnixMs(1),
            tier: Tier::Armed,
            read_bytes: 100 << 20,
            took_ms: 10_000,
        }),
        ..ShadowMemory::default()
    }
}

#[test]
fn a_switchover_waits_until_the_shadow_is_promoted_but_not_for_ever() {
    let switched = |sim: &Sim| done(sim).iter().any(|o| o.starts_with("switchover"));
    for comes_back in [true, false] {
        let mut sim = Sim::new(3);
        sim.create().unwrap();
        sim.until(Stage::Standby);
        sim.hosts.memory = Some(cold(150));
        sim.ticks(5);
        sim.request(Request::Switchover).unwrap();
        // 50 MiB at 10 MiB/s are 5 s.
        let begun = sim.now;
        while sim.now.since(begun) < 4_000 {
            sim.tick();
            assert!(!switched(&sim), "switched to a cold shadow");
        }
        if comes_back {
            sim.hosts.memory = Some(cold(199));
        }
        while !switched(&sim) {
            sim.tick();
        }
        let waited_ms = sim.now.since(begun);
        // By the report that follows; else after the 5 s and `promote_wait_ms`.
        assert_eq!(waited_ms < 6_000, comes_back, "{waited_ms}");
        sim.until(Stage::Reverse);
    }
}

#[test]
fn lost_answers_cost_time_and_nothing_else() {
    let mut sim = Sim::new(7);
    sim.faults.lost = 0.4;
    go_away(&mut sim);
    go_home(&mut sim);
    sim.faults.lost = 0.0;
    sim.ticks(60);
    assert_eq!(sim.hosts.holding(), []);
    // Each order was carried out once, however often it was sent.
    assert!(sim.sent.len() > sim.hosts.done.len());
    let switchovers = done(&sim).iter().filter(|d| d.starts_with("switchover")).count();
    assert_eq!(switchovers, 2);
}

#[test]
fn a_shadow_that_fails_to_load_leaves_the_vm_where_it_runs() {
    let mut sim = Sim::new(3);
    sim.create().unwrap();
    sim.until(Stage::Standby);
    sim.hosts.fail_switch = Some(1);
    sim.request(Request::Switchover).unwrap();
    sim.until(Stage::Failed);
    sim.until(Stage::Unprotected);
    assert_eq!(sim.hosts.runs_on(vm()), Some(&host("a")));
    assert!(sim.state().last_error.as_ref().unwrap().contains("failed to load"));
    assert!(sim.state().cooling(sim.now).is_some());
    assert_eq!(sim.hosts.holding(), []);
    // It works again once the cause is gone.
    sim.hosts.fail_switch = None;
    sim.ticks(20);
    go_away(&mut sim);
}

#[test]
fn an_undecided_switchover_is_waited_for_and_never_released() {
    let mut sim = Sim::new(4);
    sim.create().unwrap();
    sim.until(Stage::Standby);
    sim.hosts.fail_switch = Some(2);
    sim.request(Request::Switchover).unwrap();
    // Given up by the source, and the target has not spoken: far beyond the time-out.
    sim.ticks(100);
    assert_eq!(sim.stage(), Stage::Failed);
    assert!(
        sim.hosts
            .holding()
            .iter()
            .any(|(h, r, p, _)| (h, *r, *p) == (&host("b"), Role::Target, Phase::Prepared))
    );
    assert!(!done(&sim).iter().any(|d| d.starts_with("release b")));
    sim.hosts.fail_switch = None;
    sim.until(Stage::Reverse);
    assert_eq!(sim.state().host, host("b"));
    assert_eq!(sim.redirects, 1, "the traffic was led over all the same");
}

#[test]
fn a_target_that_is_down_fails_the_attempt_and_is_cleared_later() {
    let mut sim = Sim::new(5);
    sim.create().unwrap();
    sim.until(Stage::Seeding);
    sim.hosts.set_down(&host("b"), true);
    sim.faults.host_down = 1e-9;
    sim.until(Stage::Failed);
    assert_eq!(sim.hosts.runs_on(vm()), Some(&host("a")));
    sim.faults.host_down = 0.0;
    sim.until(Stage::Unprotected);
    sim.ticks(30);
    assert_eq!(sim.hosts.holding(), []);
}

#[test]
fn a_copy_that_broke_off_is_waited_for_and_not_for_ever() {
    let mut sim = Sim::new(5);
    sim.create().unwrap();
    sim.until(Stage::Standby);
    let (a, protection) = (host("a"), sim.state().protection);
    sim.hosts.break_copy(&a, vm());
    sim.ticks(40);
    assert_eq!(sim.stage(), Stage::Standby, "it goes on by itself");
    // A switchover that is wanted now waits for the shadow to be warm.
    sim.request(Request::Switchover).unwrap();
    sim.ticks(5);
    assert_eq!(sim.stage(), Stage::Switching);
    assert_eq!(sim.hosts.runs_on(vm()), Some(&a));
    sim.hosts.resume_copy(&a, vm());
    sim.until(Stage::Reverse);
    assert_eq!(sim.hosts.runs_on(vm()), Some(&host("b")));
    assert!(sim.state().protection > protection);

    sim.hosts.break_copy(&host("b"), vm());
    sim.until(Stage::Failed);
    assert!(
        sim.state()
            .last_error
            .as_deref()
            .is_some_and(|e| e.contains("broke off"))
    );
    assert_eq!(sim.hosts.runs_on(vm()), Some(&host("b")));
}

#[test]
fn a_store_older_than_the_world_finds_its_epoch() {
    let mut sim = Sim::new(6);
    for _ in 0..3 {
        go_away(&mut sim);
        go_home(&mut sim);
        sim.ticks(20);
    }
    let seen = sim.state().epoch;
    sim.forget();
    assert_eq!(sim.state().epoch.0, 0);
    sim.ticks(4);
    // What the replicators still tell of is taken over; what only their disks know costs attempts.
    for _ in 0..20 {
        let _ = sim.create();
        sim.ticks(30);
        if sim.stage() == Stage::Standby {
            break;
        }
    }
    assert_eq!(sim.stage(), Stage::Standby);
    assert!(sim.state().epoch > seen);
}

#[test]
fn a_lost_store_learns_where_the_vm_runs() {
    let mut sim = Sim::new(8);
    sim.create().unwrap();
    sim.until(Stage::Standby);
    let epoch = sim.state().epoch;
    sim.forget();
    sim.until(Stage::Standby);
    assert_eq!(
        (sim.state().shadow.clone(), sim.state().epoch),
        (Some(host("b")), epoch)
    );

    sim.request(Request::Switchover).unwrap();
    sim.until(Stage::Active);
    // The agents still saw it on A when the store was lost.
    let old = common::sim::outlook(&host("a"), sim.now);
    sim.disk = common::sim::Disk::default();
    sim.restart();
    sim.core.foreseen(&old, sim.now);
    assert_eq!(sim.state().host, host("a"));
    sim.until(Stage::Reverse);
    assert_eq!((&sim.state().host, &sim.state().home), (&host("b"), &host("a")));
}

#[test]
fn a_release_lets_go_of_both_sides() {
    let mut sim = Sim::new(9);
    sim.create().unwrap();
    sim.until(Stage::Standby);
    sim.request(Request::Release).unwrap();
    assert_eq!(sim.stage(), Stage::Unprotected);
    assert!(matches!(sim.create(), Err(Denied::Busy)));
    sim.ticks(20);
    assert_eq!(sim.hosts.holding(), []);
    // In the middle of a first copy, too.
    sim.create().unwrap();
    sim.until(Stage::Seeding);
    sim.request(Request::Release).unwrap();
    sim.ticks(20);
    assert_eq!(sim.hosts.holding(), []);
    assert_eq!(sim.hosts.runs_on(vm()), Some(&host("a")));
}

#[test]
fn without_a_way_back_the_vm_settles() {
    let mut sim = Sim::with(
        10,
        Policy {
            reverse_standby: false,
            ..policy()
        },
        Mode::Act,
    );
    sim.create().unwrap();
    sim.until(Stage::Standby);
    sim.request(Request::Switchover).unwrap();
    sim.until(Stage::Active);
    sim.until(Stage::Unprotected);
    sim.ticks(20);
    assert_eq!((&sim.state().home, &sim.state().host), (&host("b"), &host("b")));
    assert_eq!(sim.hosts.holding(), []);
}

#[test]
fn observing_orders_nothing() {
    let mut sim = Sim::with(11, policy(), Mode::Observe);
    assert_eq!(sim.create(), Err(Denied::Observing));
    sim.ticks(20);
    assert!(sim.sent.is_empty());
}

#[test]
fn a_guest_that_is_too_fast_for_its_link_keeps_its_shadow_and_is_not_switched_over() {
    let mut sim = Sim::new(14);
    sim.create().unwrap();
    sim.until(Stage::Standby);
    sim.hosts.too_fast = true;
    sim.ticks(20);
    let denied = sim.request(Request::Switchover).unwrap_err();
    assert!(
        matches!(&denied, Denied::TooFast(r) if r.code == RefusalCode::NotConverging),
        "{denied}"
    );
    sim.ticks(20);
    assert_eq!(sim.stage(), Stage::Standby);
    sim.hosts.too_fast = false;
    sim.ticks(20);
    sim.request(Request::Switchover).unwrap();
    sim.until(Stage::Reverse);
}

#[test]
fn what_a_stage_does_not_have_is_denied_with_its_name() {
    let mut sim = Sim::new(12);
    for request in [Request::Switchover, Request::Failback, Request::Release] {
        let denied = sim.request(request).unwrap_err();
        assert!(
            denied.to_string().contains("not possible for a VM that is unprotected"),
            "{denied}"
        );
    }
    sim.create().unwrap();
    assert!(sim.create().unwrap_err().to_string().contains("provisioning"));
    let own = Request::Create { target: host("a") };
    let mut sim = Sim::new(13);
    assert!(sim.request(own).unwrap_err().to_string().contains("runs on a already"));
}

/// A story: faults, requests at random, and then peace.
fn story(seed: u64, faults: Faults) {
    let mut sim = Sim::new(seed);
    sim.faults = faults;
    for _ in 0..250 {
        let request = match sim.random() % 60 {
            0..=5 => Some(sim.create()),
            6..=9 => Some(sim.request(Request::Switchover)),
            10..=13 => Some(sim.request(Request::Failback)),
            14 => Some(sim.request(Request::Release)),
            15 => {
                sim.hosts.fail_switch = [None, None, Some(1), Some(2)][(sim.random() % 4) as usize];
                None
            }
            _ => None,
        };
        drop(request);
        // The model panics if two copies run, or the last way back is quit.
        sim.tick();
    }
    sim.faults = Faults::default();
    sim.hosts.fail_switch = None;
    sim.ticks(400);
    let rests = [Stage::Unprotected, Stage::Standby, Stage::Reverse];
    let tale = || sim.tale();
    assert!(rests.contains(&sim.stage()), "{}", tale());
    assert_eq!(sim.hosts.runs_on(vm()), Some(&sim.state().host), "{}", tale());
    let expected = if sim.state().shadow.is_some() { 2 } else { 0 };
    assert_eq!(sim.hosts.holding().len(), expected, "{}", tale());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is lost, late or dead: one copy runs, and in peace the RPS finds its way to rest.
    #[test]
    fn one_copy_runs_whatever_breaks(
        seed in any::<u64>(),
        lost in 0.0..0.3f64,
        late in 0.0..0.4f64,
        crash in 0.0..0.02f64,
        host_down in 0.0..0.03f64,
    ) {
        story(seed, Faults { lost, late, crash, host_down });
    }
}

#[test]
fn each_protection_is_ordered_with_its_vms_own_pacing_forth_and_back() {
    let own = VmPolicy {
        vm: vm().to_string(),
        lag: Some(Lag::Ms(200)),
        max_downtime_ms: Some(300),
        not_converging: Some(NotConverging::Throttle),
        ..VmPolicy::default()
    };
    let policy = Policy {
        vms: vec![own],
        ..policy()
    };
    let mut sim = Sim::with(1, policy, Mode::Act);
    go_away(&mut sim);
    let ordered = sim.hosts.done.iter().filter_map(|(_, o)| match &o.kind {
        OrderKind::Protect { pacing, .. } => Some(*pacing),
        _ => None,
    });
    let want = Pacing {
        lag: Some(Lag::Ms(200)),
        max_downtime_ms: 300,
        not_converging: NotConverging::Throttle,
        ..timing().pacing()
    };
    assert_eq!(ordered.collect::<Vec<_>>(), [want; 2]);
}
