use super::*;
use crate::UnixMs;
use crate::recover::QemuFacts;

fn vm() -> VmId {
    VmId(uuid::Uuid::from_u128(7))
}

fn id(h: &str) -> HostId {
    h.parse().unwrap()
}

fn side(peer: &str, epoch: u64, decided: Decided, copy: Copy) -> SideFacts {
    SideFacts {
        peer: id(peer),
        epoch: Epoch(epoch),
        decided,
        phase: None,
        since: UnixMs(0),
        copy,
    }
}

fn host(name: &str, source: Option<SideFacts>, target: Option<SideFacts>) -> HostFacts {
    let copies = source
        .iter()
        .chain(&target)
        .map(|s| s.copy)
        .filter(|c| *c != Copy::Gone);
    let qemus = copies
        .map(|copy| QemuFacts {
            pid: 1,
            copy,
            known: true,
            args: Vec::new(),
            qmp: Vec::new(),
        })
        .collect();
    HostFacts {
        host: id(name),
        vm: vm(),
        name: "web".into(),
        epoch: Epoch(2),
        source,
        target,
        qemus,
        leftovers: Vec::new(),
        belongings: Vec::new(),
        fence: None,
    }
}

fn dead(h: &str) -> Wishes {
    Wishes {
        dead: vec![id(h)],
        discard_shadow: false,
    }
}

/// Steps as `host way dead`.
fn steps(hosts: &[HostFacts], wishes: &Wishes) -> Vec<String> {
    let p = plan(vm(), hosts, &[], wishes);
    assert_eq!(p.epoch, Epoch(3));
    p.steps
        .iter()
        .map(|s| match &s.order {
            OrderKind::Recover { way, dead, .. } => {
                format!(
                    "{} {way:?}{}",
                    s.host,
                    dead.iter().map(|d| format!(" dead {d}")).collect::<String>()
                )
            }
            other => format!("{} {}", s.host, other.name()),
        })
        .collect()
}

#[test]
fn a_stopped_primary_runs_again_only_when_its_target_can_not() {
    for decided in [Decided::Ready, Decided::Done] {
        let a = host("a", Some(side("b", 2, decided, Copy::Stopped)), None);
        let none = Wishes::default();
        // Nobody knows what the target does.
        let p = plan(vm(), std::slice::from_ref(&a), &[], &none);
        assert!(p.steps.is_empty(), "{p:?}");
        assert!(p.by_hand[0].contains("--host-is-dead b"), "{p:?}");
        assert_eq!(steps(std::slice::from_ref(&a), &dead("b")), ["a TakeBack dead b"]);
        // It answers, and its copy is gone: it is made to write that down.
        let b = host("b", None, Some(side("a", 2, Decided::Over, Copy::Gone)));
        assert_eq!(steps(&[a.clone(), b], &none), ["a TakeBack"]);
        assert_eq!(steps(&[a.clone(), host("b", None, None)], &none), ["a TakeBack"]);
        // It runs there.
        let b = host("b", None, Some(side("a", 2, Decided::Done, Copy::Runs)));
        assert!(!steps(&[a.clone(), b], &none).iter().any(|s| s.contains("TakeBack")));
        // It is ready there: the two come to an end by themselves, unless the operator wants the primary.
        let b = host("b", None, Some(side("a", 2, Decided::Ready, Copy::Waits)));
        assert_eq!(steps(&[a.clone(), b.clone()], &none), [""; 0]);
        let discard = Wishes {
            discard_shadow: true,
            ..none
        };
        assert_eq!(steps(&[a, b], &discard), ["b Discard", "a TakeBack"]);
    }
}

#[test]
fn a_kept_shadow_runs_only_when_its_source_can_not() {
    let none = Wishes::default();
    let b = host("b", None, Some(side("a", 2, Decided::Ready, Copy::Waits)));
    let p = plan(vm(), std::slice::from_ref(&b), &[], &none);
    assert!(p.steps.is_empty() && p.by_hand[0].contains("--host-is-dead a"), "{p:?}");
    assert_eq!(steps(std::slice::from_ref(&b), &dead("a")), ["b RunShadow dead a"]);
    // The primary died undecided: its source still decides, and the age of the shadow is told.
    let a = host("a", Some(side("b", 2, Decided::Ready, Copy::Gone)), None);
    let hosts = [a, b.clone()];
    assert_eq!(steps(&hosts, &none), ["a Ask"]);
    let p = plan(vm(), &hosts, &[], &none);
    assert!(p.steps[0].risk.as_ref().unwrap().contains("as old as epoch 2"), "{p:?}");
    let discard = Wishes {
        discard_shadow: true,
        ..none.clone()
    };
    assert_eq!(steps(&hosts, &discard), ["b Discard", "a Ask"]);
    // A source that lost its records, and has no QEMU.
    assert_eq!(steps(&[host("a", None, None), b], &none), ["b RunShadow"]);
}

#[test]
fn what_lies_about_goes_when_the_vm_runs() {
    let none = Wishes::default();
    let b = host("b", None, Some(side("a", 2, Decided::Done, Copy::Runs)));
    let a = host("a", Some(side("b", 2, Decided::Done, Copy::Stopped)), None);
    assert_eq!(steps(&[a, b], &none), ["a retire"]);
    // The switchover was taken back long ago, and the target never heard of it.
    let a = host("a", Some(side("b", 2, Decided::Begun, Copy::Runs)), None);
    let mut b = host("b", None, Some(side("a", 2, Decided::Ready, Copy::Waits)));
    b.leftovers = vec!["/dev/shm/x.ram".into()];
    assert_eq!(steps(&[a.clone(), b.clone()], &none), ["b Discard", "b Clean"]);
    // A shadow that its source feeds is nobody's leftover.
    b.leftovers.clear();
    b.target.as_mut().unwrap().decided = Decided::Nothing;
    let mut fed = a;
    fed.source.as_mut().unwrap().phase = Some(Phase::Standby);
    assert_eq!(steps(&[fed, b], &none), [""; 0]);
}

#[test]
fn two_copies_are_nobodys_but_the_operators() {
    let a = host("a", Some(side("b", 2, Decided::Over, Copy::Runs)), None);
    let b = host("b", None, Some(side("a", 2, Decided::Done, Copy::Runs)));
    let p = plan(vm(), &[a, b], &[], &dead("a"));
    assert!(p.steps.is_empty() && p.by_hand[0].contains("a and b"), "{p:?}");
}

#[test]
fn the_newest_stop_counts_after_a_journey_there_and_back() {
    // a -> b under 2, b -> a under 4; then the copy on a was lost.
    let mut a = host(
        "a",
        Some(side("b", 2, Decided::Over, Copy::Gone)),
        Some(side("b", 4, Decided::Over, Copy::Gone)),
    );
    a.epoch = Epoch(1);
    let b = host("b", Some(side("a", 4, Decided::Done, Copy::Stopped)), None);
    assert_eq!(steps(&[a, b], &Wishes::default()), ["b TakeBack"]);
}

/// Every pair of sides that two hosts can tell of: a copy is only started where the other one is gone, waits on disk for the
/// word, or was declared dead.
#[test]
fn no_facts_lead_to_two_copies() {
    let decided = [
        Decided::Nothing,
        Decided::Begun,
        Decided::Ready,
        Decided::Done,
        Decided::TakingBack,
        Decided::Over,
        Decided::Fenced,
    ];
    let copies = [
        Copy::Gone,
        Copy::Runs,
        Copy::Stopped,
        Copy::Paused,
        Copy::Waits,
        Copy::Switching,
        Copy::Silent,
    ];
    let all = |peer: &'static str| {
        decided
            .into_iter()
            .flat_map(move |d| copies.into_iter().map(move |c| Some(side(peer, 2, d, c))))
            .chain([None])
    };
    let mut cases = 0;
    for source in all("b") {
        for target in all("a") {
            for discard_shadow in [false, true] {
                let hosts = [host("a", source.clone(), None), host("b", None, target.clone())];
                let wishes = Wishes {
                    dead: Vec::new(),
                    discard_shadow,
                };
                let p = plan(vm(), &hosts, &[], &wishes);
                let ways = p.steps.iter().map(|s| match s.order {
                    OrderKind::Recover { way, .. } => Some(way),
                    _ => None,
                });
                let starts = |w: &Option<Way>| matches!(w, Some(Way::TakeBack | Way::Ask | Way::RunShadow));
                let started = ways.filter(starts).count();
                assert!(started <= 1, "{hosts:?}: {p:?}");
                let runs = hosts.iter().any(HostFacts::runs);
                let noted = p.steps.iter().all(|s| s.does.contains("take note") || s.risk.is_some());
                assert!(started == 0 || !runs || noted, "{hosts:?}: {p:?}");
                cases += 1;
            }
        }
    }
    assert!(cases > 4000);
}
