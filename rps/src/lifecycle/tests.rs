//! The whole table: every stage against every event.

use super::*;

const NOW: UnixMs = UnixMs(1_000);
const LATER: UnixMs = UnixMs(9_000);

fn host(s: &str) -> HostId {
    s.parse().unwrap()
}

fn vm() -> VmId {
    VmId(uuid::Uuid::from_u128(7))
}

/// A VM in `stage`, as the machine would have left it.
fn at(stage: Stage) -> VmState {
    let mut s = VmState::new(vm(), "web", &host("a"), NOW);
    s.stage = stage;
    s.epoch = Epoch(10);
    s.protection = Epoch(9);
    match stage {
        Stage::Unprotected => {}
        Stage::Active => s.host = host("b"),
        Stage::Reverse | Stage::FailingBack => {
            s.host = host("b");
            s.shadow = Some(host("a"));
        }
        _ => s.shadow = Some(host("b")),
    }
    s
}

fn operator() -> Reason {
    Reason::Operator
}

fn events() -> Vec<Event> {
    vec![
        Event::Provision {
            target: host("c"),
            reason: operator(),
        },
        Event::SeedStarted,
        Event::SeedDone,
        Event::Arm { reason: operator() },
        Event::Disarm,
        Event::Switch { reason: operator() },
        Event::Moved,
        Event::BuildWayBack,
        Event::WayBackReady,
        Event::FailBack { reason: operator() },
        Event::Release { reason: operator() },
        Event::Fail {
            failure: Failure::Lost { host: host("b") },
        },
        Event::Cleaned { cooldown_ms: 5_000 },
        Event::Found {
            host: host("b"),
            home: host("a"),
            epoch: Epoch(30),
        },
        Event::Adopt {
            shadow: host("c"),
            epoch: Epoch(30),
            warm: true,
        },
    ]
}

/// Where `event` leads from `stage`, written down once more and by hand.
fn expected(stage: Stage, event: &str) -> Option<Stage> {
    use Stage as S;
    let to = match (stage, event) {
        (S::Unprotected, "provision") => S::Provisioning,
        (S::Unprotected | S::Active, "adopt") => S::Standby,
        (S::Provisioning, "seed_started") => S::Seeding,
        (S::Provisioning | S::Seeding, "seed_done") => S::Standby,
        (S::Standby, "arm") => S::Armed,
        (S::Armed, "disarm") => S::Standby,
        (S::Standby | S::Armed, "switchover") => S::Switching,
        (S::Switching, "moved") => S::Active,
        (S::FailingBack, "moved") => S::Unprotected,
        (S::Active, "build_way_back") => S::Active,
        (S::Reverse, "failback") => S::FailingBack,
        (S::Provisioning | S::Seeding | S::Standby | S::Armed | S::Active | S::Reverse, "release") => S::Unprotected,
        (S::Unprotected | S::Failed | S::Active, "fail") => return None,
        (_, "fail") => S::Failed,
        (S::Failed, "cleaned") => S::Unprotected,
        (_, "found") => S::Active,
        _ => return None,
    };
    Some(to)
}

#[test]
fn every_stage_against_every_event() {
    for stage in Stage::ALL {
        for event in events() {
            let name = event.name();
            let got = apply(&at(stage), event, LATER);
            match (expected(stage, name), got) {
                (Some(to), Ok((next, edge))) => {
                    assert_eq!((edge.from, edge.to, next.stage), (stage, to, to), "{name} from {stage}");
                    assert!(next.epoch >= at(stage).epoch, "{name} from {stage} lowered the epoch");
                    assert_eq!(next.since, if to == stage { NOW } else { LATER });
                }
                (None, Err(e)) => assert!(e.to_string().contains(stage.name()), "{e}"),
                (want, got) => panic!("{name} from {stage}: wanted {want:?}, got {got:?}"),
            }
        }
    }
}

#[test]
fn what_can_start_move_or_end_a_copy_takes_a_new_epoch() {
    for stage in Stage::ALL {
        for event in events() {
            let name = event.name();
            let Ok((next, _)) = apply(&at(stage), event, LATER) else {
                continue;
            };
            let takes = matches!(
                name,
                "provision" | "switchover" | "build_way_back" | "failback" | "release" | "fail"
            );
            if takes {
                assert_eq!(next.epoch, Epoch(11), "{name} from {stage}");
            } else if !matches!(name, "found" | "adopt") {
                assert_eq!(next.epoch, Epoch(10), "{name} from {stage}");
            }
        }
    }
}

#[test]
fn only_moved_and_found_change_where_the_vm_runs() {
    for stage in Stage::ALL {
        for event in events() {
            let name = event.name();
            let Ok((next, _)) = apply(&at(stage), event, LATER) else {
                continue;
            };
            if !matches!(name, "moved" | "found") {
                assert_eq!(next.host, at(stage).host, "{name} from {stage}");
            }
        }
    }
    let (next, _) = apply(&at(Stage::Switching), Event::Moved, LATER).unwrap();
    assert_eq!((next.host, next.home, next.shadow), (host("b"), host("a"), None));
    let (next, _) = apply(&at(Stage::FailingBack), Event::Moved, LATER).unwrap();
    assert_eq!(
        (next.host, next.home, next.shadow, next.tier),
        (host("a"), host("a"), None, None)
    );
}

#[test]
fn a_failure_away_from_home_leaves_the_vm_active_there() {
    let mut s = at(Stage::Failed);
    s.host = host("b");
    s.shadow = Some(host("a"));
    let (next, _) = apply(&s, Event::Cleaned { cooldown_ms: 5_000 }, LATER).unwrap();
    assert_eq!((next.stage, next.shadow.clone()), (Stage::Active, None));
    assert_eq!(next.cooling(LATER), Some(5_000));
    assert_eq!(next.cooling(LATER.plus_ms(5_000)), None);
}

#[test]
fn a_way_back_that_fails_can_be_built_again() {
    let (s, edge) = apply(&at(Stage::Active), Event::BuildWayBack, LATER).unwrap();
    assert_eq!((s.shadow.clone(), s.protection), (Some(host("a")), Epoch(11)));
    assert!(edge.reason.to_string().contains("way back to a"));
    let failure = Failure::Lost { host: host("a") };
    let (s, _) = apply(&s, Event::Fail { failure }, LATER).unwrap();
    assert_eq!((s.stage, s.failures), (Stage::Failed, 1));
    let (s, _) = apply(&s, Event::Cleaned { cooldown_ms: 1 }, LATER).unwrap();
    let (s, _) = apply(&s, Event::BuildWayBack, LATER).unwrap();
    let (s, _) = apply(&s, Event::WayBackReady, LATER).unwrap();
    assert_eq!((s.stage, s.failures), (Stage::Reverse, 0));
}

#[test]
fn a_release_away_from_home_settles_the_vm() {
    for stage in [Stage::Active, Stage::Reverse] {
        let (s, _) = apply(&at(stage), Event::Release { reason: operator() }, LATER).unwrap();
        assert_eq!((s.home, s.host, s.shadow), (host("b"), host("b"), None));
    }
}

#[test]
fn a_shadow_on_the_vms_own_host_is_refused() {
    let e = Event::Provision {
        target: host("a"),
        reason: operator(),
    };
    assert_eq!(
        apply(&at(Stage::Unprotected), e, NOW).unwrap_err(),
        Illegal::OwnHost(host("a"))
    );
    let mut s = at(Stage::Active);
    s.home = host("b");
    assert_eq!(
        apply(&s, Event::BuildWayBack, NOW).unwrap_err(),
        Illegal::AtHome(host("b"))
    );
}

#[test]
fn a_found_shadow_is_adopted_in_the_stage_that_fits() {
    let adopt = |s: &VmState, shadow: &str, warm| {
        apply(
            s,
            Event::Adopt {
                shadow: host(shadow),
                epoch: Epoch(44),
                warm,
            },
            NOW,
        )
        .map(|(s, _)| s)
    };
    let s = adopt(&at(Stage::Unprotected), "b", false).unwrap();
    assert_eq!((s.stage, s.epoch, s.protection), (Stage::Seeding, Epoch(44), Epoch(44)));
    let away = at(Stage::Active);
    assert_eq!(adopt(&away, "a", true).unwrap().stage, Stage::Reverse);
    assert_eq!(adopt(&away, "a", false).unwrap().stage, Stage::Active);
    assert_eq!(adopt(&away, "b", true).unwrap_err(), Illegal::OwnHost(host("b")));
}

#[test]
fn states_survive_the_store() {
    for stage in Stage::ALL {
        let s = at(stage);
        let text = serde_json::to_string(&s).unwrap();
        assert_eq!(serde_json::from_str::<VmState>(&text).unwrap(), s);
    }
}
