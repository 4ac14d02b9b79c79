//! Scenarios: what the planner sees, and what it makes of it.

use std::sync::Arc;

use umbra_api::Epoch;
use umbra_api::order::Tier;
use umbra_api::replica::{Phase, Progress, Promotion, ReplicaStatus, Role, ShadowMemory};

use super::*;
use crate::contention::Draws;
use crate::fleet::Report;
use crate::forecast::{NORMAL, Quantiles};
use crate::outlook::{HostInput, Params, VmInput};

const HORIZON: usize = 60;
const LIMIT: f64 = 50.0;

fn id(n: u128) -> VmId {
    VmId(uuid::Uuid::from_u128(n))
}

fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

/// `mean` cores from slot `from` on, `before` until then; nearly certain.
fn steps(before: f64, from: usize, mean: f64) -> Quantiles {
    let band = |h: usize| NORMAL.map(|z| if h >= from { mean } else { before } + 0.01 * z);
    Quantiles::new((0..HORIZON).map(band).collect(), 4.0)
}

struct Scene {
    now: UnixMs,
    vms: Vec<VmInput>,
    hosts: Vec<HostInput>,
    states: BTreeMap<VmId, VmState>,
    fleet: Fleet,
    busy: BTreeSet<VmId>,
    streaks: Streaks,
    policy: Policy,
    draws: Arc<Draws>,
}

impl Scene {
    /// One-core hosts.
    fn new(hosts: &[&str]) -> Self {
        let now = UnixMs(1_000_000);
        let up = Report {
            up: true,
            ..Report::default()
        };
        let policy = Policy {
            provision_slots: 2,
            mem_reserve_bytes: 64 << 20,
            ..Policy::default()
        };
        Self {
            now,
            vms: Vec::new(),
            hosts: hosts.iter().map(|h| host_input(h, now)).collect(),
            states: BTreeMap::new(),
            fleet: hosts.iter().map(|h| (host(h), up.clone())).collect(),
            busy: BTreeSet::new(),
            streaks: Streaks::default(),
            policy,
            draws: Arc::new(Draws::new(HORIZON, Params::default().dependence)),
        }
    }

    /// The demo: a web VM and a neighbour on A, whose demand swells in slot `from`; B is idle.
    fn demo(from: usize) -> Self {
        let mut s = Self::new(&["a", "b"]);
        s.vm(1, "web", "a", steps(0.2, 0, 0.2));
        s.vm(2, "neighbour", "a", steps(0.3, from, 1.0));
        s.policy.vms = vec![policy::VmPolicy {
            vm: "neighbour".into(),
            protect: false,
            ..Default::default()
        }];
        s
    }

    fn vm(&mut self, n: u128, name: &str, at: &str, bands: Quantiles) {
        self.states
            .insert(id(n), VmState::new(id(n), name, &host(at), self.now));
        self.vms.push(VmInput {
            vm: id(n),
            name: name.into(),
            host: host(at),
            vcpus: 1,
            cpu_demand: 0.2,
            wait_ms_per_s: 0.0,
            rss_bytes: 200 << 20,
            guest_bytes: 256 << 20,
            peak_mem_bytes: 256 << 20,
            history_slots: 100,
            model: Some(("ets".into(), Vec::new())),
            bands,
        });
    }

    fn state(&mut self, n: u128) -> &mut VmState {
        self.states.get_mut(&id(n)).unwrap()
    }

    /// A warm shadow of VM 1 on B.
    fn warm(mut self, stage: Stage) -> Self {
        let s = self.state(1);
        (s.stage, s.shadow, s.epoch, s.protection) = (stage, Some(host("b")), Epoch(1), Epoch(1));
        self
    }

    /// VM 1 was moved from A to B.
    fn moved(mut self) -> Self {
        let now = self.now;
        let s = self.state(1);
        (s.stage, s.host, s.shadow) = (Stage::Reverse, host("b"), Some(host("a")));
        s.moved_at = Some(now);
        self.vms[0].host = host("b");
        self
    }

    fn outlook(&self) -> Outlook {
        let params = Params {
            horizon: HORIZON,
            ..Params::default()
        };
        let hosts = self.hosts.iter().cloned().map(|mut h| {
            // An agent that speaks, spoke just now.
            h.last_sample = h.last_sample.map(|t| if t.0 == 0 { t } else { self.now });
            h
        });
        Outlook::assemble(
            self.now,
            1_000,
            &params,
            self.draws.clone(),
            self.vms.clone(),
            hosts.collect(),
        )
    }

    /// `n` slots go by in which nothing changes.
    fn slots(mut self, n: i64) -> Self {
        for _ in 0..n {
            self.now = self.now.plus_ms(1_000);
            let outlook = self.outlook();
            self.streaks.observe(&outlook, &self.states, &self.policy, LIMIT);
        }
        self
    }

    fn plan(&self) -> Vec<Decision> {
        let outlook = self.outlook();
        plan(&Input {
            now: self.now,
            outlook: &outlook,
            states: &self.states,
            fleet: &self.fleet,
            busy: &self.busy,
            streaks: &self.streaks,
            policy: &self.policy,
            method: "probability",
            seed_bytes_per_s: 100e6,
        })
    }

    fn of(&self, n: u128) -> Decision {
        self.plan().into_iter().find(|d| d.vm == id(n)).unwrap()
    }

    fn nothing(&self, n: u128, class: &str, word: &str) {
        let d = self.of(n);
        assert_eq!((&d.action, d.class), (&Action::Nothing, class), "{d:#?}");
        assert!(
            d.because.starts_with("nothing, because ") && d.because.contains(word),
            "{}",
            d.because
        );
    }
}

fn host_input(name: &str, now: UnixMs) -> HostInput {
    HostInput {
        host: host(name),
        cpus: 1.0,
        own_demand: 0.02,
        own: Quantiles::flat(0.02, 0.005, HORIZON, 1.0),
        mem_total_bytes: 4 << 30,
        mem_available_bytes: 2 << 30,
        shadows: Vec::new(),
        last_sample: Some(now),
    }
}

fn verdict<'a>(d: &'a Decision, name: &str) -> &'a str {
    d.hosts.iter().find(|v| v.host == host(name)).map_or("", |v| &v.reason)
}

#[test]
fn contention_in_sight_makes_a_shadow_and_says_why() {
    let d = Scene::demo(40).slots(2).of(1);
    assert_eq!(d.action, Action::Provision { target: host("b") });
    assert!(matches!(d.reason, Some(Reason::Predicted { .. })));
    assert!(
        d.because.contains("contention is expected in") && d.because.contains("b has room"),
        "{}",
        d.because
    );
    assert_eq!(verdict(&d, "a"), "the VM runs here");
    assert!(verdict(&d, "b").starts_with("room over the whole horizon"));
    let i = &d.inputs;
    assert!(i.cps > 0.9 && i.threshold == 0.5 && i.model == "ets" && i.method == "probability");
    assert!((39.0..41.0).contains(&i.contention_in_s.unwrap()), "{i:?}");
    // 200 MiB at 100 MB/s, and the margin.
    assert!((7.0..7.2).contains(&i.copy_s) && i.lead_s.unwrap() > 30.0, "{i:?}");
    assert_eq!(i.promotion_s, 1.0, "assumed: nobody has measured one");
}

#[test]
fn nothing_is_done_without_a_reason_that_is_told() {
    let calm = Scene::demo(999).slots(5);
    calm.nothing(1, "below_threshold", "is not above 0.50");
    calm.nothing(2, "not_protected", "the policy does not protect it");
    Scene::demo(40).slots(1).nothing(1, "hysteresis", "1 of 2 slots");

    let mut s = Scene::demo(40).slots(2);
    s.busy.insert(id(1));
    s.nothing(1, "busy", "leftovers");
    s.busy.clear();
    s.state(1).cooldown_until = Some(s.now.plus_ms(9_000));
    s.nothing(1, "cooldown", "another 9 s");

    let mut s = Scene::demo(40);
    s.vms[0].model = None;
    s.vms[0].history_slots = 7;
    s.slots(3).nothing(1, "no_history", "7 slots");

    let mut s = Scene::demo(3);
    s.policy.late = Late::Refuse;
    s.slots(2).nothing(1, "too_late", "the copy takes 7.");

    let mut s = Scene::demo(40).slots(2);
    s.fleet.get_mut(&host("a")).unwrap().up = false;
    s.nothing(
        1,
        "host_unfit",
        "its own host a can't send it: its replicator does not answer",
    );
}

#[test]
fn late_protection_is_allowed_by_default_and_said() {
    let d = Scene::demo(3).slots(2).of(1);
    assert_eq!(d.action.name(), "provision");
    assert!(d.because.contains("before the copy of 7."), "{}", d.because);
    assert!(d.inputs.lead_s.unwrap() < 0.0);
}

#[test]
fn every_host_that_is_passed_over_has_its_reason() {
    let mut s = Scene::new(&["a", "b", "c", "d", "e", "f", "g", "h"]);
    s.vm(1, "web", "a", steps(0.2, 0, 0.2));
    s.vm(2, "neighbour", "a", steps(0.3, 40, 1.0));
    s.vm(3, "twin", "c", steps(0.1, 0, 0.1));
    s.vm(4, "heavy", "d", steps(0.95, 0, 0.95));
    s.policy.vms = Scene::demo(1).policy.vms;
    s.policy.anti_affinity = vec![policy::Group {
        vms: vec!["web".into(), "twin".into()],
    }];
    s.policy.maintenance = vec![host("h")];
    let set = |s: &mut Scene, name: &str, f: fn(&mut HostInput)| {
        f(s.hosts.iter_mut().find(|h| h.host == host(name)).unwrap());
    };
    set(&mut s, "e", |h| h.mem_available_bytes = 300 << 20);
    set(&mut s, "f", |h| h.last_sample = Some(UnixMs(0)));
    s.hosts.push(host_input("stranger", s.now));
    s.fleet.get_mut(&host("g")).unwrap().up = false;
    let s = s.slots(2);
    let d = s.of(1);
    assert_eq!(d.action, Action::Provision { target: host("b") });
    for (name, word) in [
        ("a", "the VM runs here"),
        ("b", "room over the whole horizon"),
        ("c", "twin is there and may not share a host"),
        ("d", "contention probability would be"),
        (
            "e",
            "300 MiB of memory available, the shadow takes 256 MiB and 64 MiB stay free",
        ),
        ("f", "its agent has been silent for"),
        ("g", "its replicator does not answer"),
        ("h", "it is under maintenance"),
        ("stranger", "no replicator is configured"),
    ] {
        assert!(verdict(&d, name).contains(word), "{name}: {}", verdict(&d, name));
    }
    assert_eq!(d.hosts.iter().filter(|v| v.chosen).count(), 1);

    let mut s = s;
    s.fleet.get_mut(&host("b")).unwrap().up = false;
    s.nothing(1, "no_target", "no host can take it");
    assert!(s.of(1).because.contains("d: contention probability would be"));
}

#[test]
fn a_host_that_keeps_the_old_primary_is_no_target() {
    let mut s = Scene::demo(40).slots(2);
    s.state(1).kept = vec![host("b")];
    s.nothing(1, "no_target", "stopped primary of an earlier move");
}

#[test]
fn the_one_is_moved_whose_leaving_is_enough_and_costs_least() {
    let mut s = Scene::new(&["a", "b"]);
    s.vm(1, "big", "a", steps(0.5, 40, 0.7));
    s.vm(2, "small", "a", steps(0.4, 0, 0.5));
    s.vm(3, "tiny", "a", steps(0.05, 0, 0.05));
    s.vms[0].rss_bytes = 250 << 20;
    s.vms[1].rss_bytes = 100 << 20;
    s.vms[2].rss_bytes = 10 << 20;
    let mut s = s.slots(2);
    // Without 'tiny' the host is as contended as with it.
    assert_eq!(s.of(2).action.name(), "provision");
    s.nothing(1, "after", "small is moved off a first");
    s.nothing(3, "after", "small is moved off a first");
    // Once its shadow is being made, nobody else has to go.
    let small = s.state(2);
    (small.stage, small.shadow) = (Stage::Seeding, Some(host("b")));
    s.nothing(1, "relief", "small is about to leave, which is enough for a");
}

#[test]
fn budgets_bound_copies_and_memory() {
    let mut s = Scene::new(&["a", "b", "c"]);
    s.vm(1, "web", "a", steps(0.3, 40, 1.2));
    s.vm(2, "other", "a", steps(0.2, 0, 0.2));
    s.vm(3, "db", "c", steps(0.3, 40, 1.2));
    s.vm(4, "cache", "c", steps(0.2, 0, 0.2));
    s.policy.vms = ["web", "db"]
        .map(|vm| policy::VmPolicy {
            vm: vm.into(),
            protect: false,
            ..Default::default()
        })
        .into();
    let mut s = s.slots(2);
    // Both could go to B, but one copy at a time is allowed there.
    let made: Vec<_> = s
        .plan()
        .into_iter()
        .filter(|d| d.action != Action::Nothing)
        .map(|d| d.vm)
        .collect();
    assert_eq!(made, [id(2)]);
    s.nothing(4, "no_target", "b: 1 first copies are under way there already");
    s.policy.seeds_per_host = 2;
    assert_eq!(s.plan().iter().filter(|d| d.action != Action::Nothing).count(), 2);
    s.policy.seeds_total = 1;
    s.nothing(4, "budget", "1 in all");
    s.policy.seeds_total = 9;
    s.policy.shadow_ram_share = 0.1;
    s.nothing(
        4,
        "no_target",
        "shadows there would take 512 MiB, the policy allows 409 MiB",
    );
}

#[test]
fn a_warm_shadow_waits_is_armed_and_switched_in_time() {
    let far = Scene::demo(59).warm(Stage::Standby);
    let far = Scene {
        policy: Policy {
            arm_s: 20.0,
            ..far.policy.clone()
        },
        ..far
    }
    .slots(2);
    far.nothing(1, "warm", "the switchover is due 6.0 s before");

    let mut near = Scene::demo(15).warm(Stage::Standby);
    near.policy.arm_s = 20.0;
    let d = near.slots(1).of(1);
    assert_eq!(d.action, Action::Arm);
    assert!(matches!(d.reason, Some(Reason::Nears { in_s }) if (14.0..16.0).contains(&in_s)));

    let d = Scene::demo(5).warm(Stage::Armed).slots(1).of(1);
    assert_eq!(d.action, Action::Switch);
    assert!(matches!(d.reason, Some(Reason::Due { .. })), "{d:?}");
    assert!(d.because.contains("b holds its shadow, armed"), "{}", d.because);
}

/// What host B tells of a shadow there: 200 MiB in use, of which its tier leaves 20; 50 MiB took 5 s to come back.
fn told(vm: u128, resident_mib: u64) -> ReplicaStatus {
    let memory = ShadowMemory {
        used_bytes: 200 << 20,
        resident_bytes: resident_mib << 20,
        limit_bytes: Some(20 << 20),
        not_shrunk: None,
        promotion: Some(Promotion {
            at: UnixMs(0),
            tier: Tier::Armed,
            read_bytes: 50 << 20,
            took_ms: 5_000,
        }),
    };
    ReplicaStatus {
        vm: id(vm),
        name: String::new(),
        role: Role::Target,
        peer: host("a"),
        epoch: Epoch(1),
        seen: Epoch(1),
        phase: Phase::Standby,
        since: UnixMs(0),
        tier: Some(Tier::Standby),
        memory: Some(memory),
        progress: Progress::default(),
        report: None,
        disks: Vec::new(),
        error: None,
    }
}

#[test]
fn a_measured_promotion_makes_the_switchover_due_earlier() {
    let tells = |s: &mut Scene, r: ReplicaStatus| s.fleet.get_mut(&host("b")).unwrap().replicas = vec![r];
    // 180 MiB at 10 MiB/s, though all of it happens to be in RAM still.
    let mut s = Scene::demo(22).warm(Stage::Armed).slots(1);
    tells(&mut s, told(1, 200));
    let d = s.of(1);
    assert_eq!(d.action, Action::Switch, "{}", d.because);
    assert_eq!(d.inputs.promotion_s, 18.0);
    let mut s = Scene::demo(25).warm(Stage::Armed).slots(1);
    tells(&mut s, told(1, 20));
    s.nothing(1, "warm", "the switchover is due 23.0 s before");
    // A host that can't shrink has it all; then the policy's assumption is left, as for one that tells of no speed.
    let mut whole = told(1, 200);
    whole.memory.as_mut().unwrap().not_shrunk = Some("this host has no swap".into());
    tells(&mut s, whole);
    s.nothing(1, "warm", "the switchover is due 6.0 s before");
    let mut unmeasured = told(1, 20);
    unmeasured.memory.as_mut().unwrap().promotion = None;
    tells(&mut s, unmeasured);
    s.nothing(1, "warm", "the switchover is due 6.0 s before");
}

#[test]
fn a_promotion_that_does_not_fit_beside_the_copy_makes_it_too_late() {
    // The copy takes 7.1 s, the switchover is due 5 s ahead. Another VM's shadow tells how fast B reads: 20 s for 200 MiB.
    let mut s = Scene::demo(30).slots(2);
    s.policy.late = Late::Refuse;
    let d = s.of(1);
    assert_eq!(d.action.name(), "provision", "{}", d.because);
    s.fleet.get_mut(&host("b")).unwrap().replicas = vec![told(7, 200)];
    s.nothing(1, "too_late", "the switchover is due 25.0 s before contention");
    s.policy.late = Late::Protect;
    let d = s.of(1);
    assert_eq!((d.action.name(), d.inputs.promotion_s), ("provision", 20.0));
    assert!(d.inputs.lead_s.unwrap() < 3.0, "{:?}", d.inputs);
    assert!(d.because.contains("due 25.0 s ahead"), "{}", d.because);
}

#[test]
fn measured_contention_switches_whatever_the_forecast_says() {
    let mut s = Scene::demo(999).warm(Stage::Standby);
    s.vms[0].wait_ms_per_s = 300.0;
    let s = s.slots(1);
    s.nothing(1, "warm", "the shadow is standby");
    let d = s.slots(1).of(1);
    assert_eq!(d.action, Action::Switch);
    assert!(d.because.contains("waits 300 ms per s"), "{}", d.because);
    // Without a shadow it gets one, by the same measure.
    let mut s = Scene::demo(999);
    s.vms[0].wait_ms_per_s = 300.0;
    let d = s.slots(2).of(1);
    assert_eq!(d.action.name(), "provision");
    assert!(matches!(d.reason, Some(Reason::Measured { .. })));
}

#[test]
fn no_switch_to_where_it_would_be_no_better() {
    let mut s = Scene::demo(5).warm(Stage::Armed);
    s.vm(9, "crowd", "b", steps(1.1, 0, 1.1));
    let mut s = s.slots(1);
    s.nothing(1, "no_better", "on b contention would be as probable");
    s.vms.pop();
    s.fleet.get_mut(&host("b")).unwrap().up = false;
    s.nothing(1, "host_unfit", "b: its replicator does not answer");
}

#[test]
fn an_armed_shadow_steps_down_and_a_quiet_one_goes() {
    let mut s = Scene::demo(999).warm(Stage::Armed);
    s.policy.release_slots = 3;
    s.policy.min_standby_s = 5.0;
    let s = s.slots(1);
    assert_eq!(s.of(1).action, Action::Nothing);
    let mut s = s.slots(1);
    assert_eq!(s.of(1).action, Action::Disarm);
    s.state(1).stage = Stage::Standby;
    s.nothing(1, "warm", "CPS has been low for 2 of 3 slots");
    let s = s.slots(1);
    s.nothing(1, "warm", "3 of 3");
    let mut s = s.slots(3);
    assert_eq!((s.of(1).action, s.of(1).class), (Action::Release, "release"));
    s.state(1).manual = true;
    s.nothing(1, "warm", "an operator asked for it");
}

#[test]
fn a_moved_vm_goes_home_when_home_is_calm_for_long_enough() {
    let mut s = Scene::demo(999).moved();
    s.policy.calm_slots = 3;
    s.policy.min_stay_s = 6.0;
    let s = s.slots(2);
    s.nothing(1, "home_not_calm", "calm for 2 of 3 slots");
    let s = s.slots(1);
    s.nothing(1, "min_stay", "moved 3 s ago and stays 6 s");
    let mut s = s.slots(3);
    let d = s.of(1);
    assert_eq!(d.action, Action::FailBack);
    assert!(matches!(d.reason, Some(Reason::HomeCalm { probability }) if probability < 0.1));

    s.state(1).kept = vec![host("a")];
    s.nothing(1, "keeps_old", "old primary on a is not quit yet");
    s.state(1).kept.clear();
    s.state(1).manual = true;
    s.nothing(1, "manual", "an operator brings it home");
    s.state(1).manual = false;
    s.policy.failback = false;
    s.nothing(1, "policy", "brings no VM home");
    s.policy.failback = true;
    s.hosts[0].last_sample = None;
    s.nothing(1, "host_unfit", "its agent has told nothing yet");
}

#[test]
fn home_that_swells_again_within_the_horizon_is_not_calm() {
    let mut s = Scene::demo(50).moved();
    s.policy.min_stay_s = 0.0;
    s.slots(20).nothing(1, "home_not_calm", "calm for 0 of 5 slots");
}

#[test]
fn a_host_that_gets_crowded_is_fled_before_the_stay_is_over() {
    let mut s = Scene::demo(999).moved();
    s.vm(9, "crowd", "b", steps(1.1, 0, 1.1));
    let d = s.slots(6).of(1);
    assert_eq!(d.action, Action::FailBack);
    assert!(matches!(d.reason, Some(Reason::Fled { .. })), "{d:?}");
}

#[test]
fn what_is_under_way_is_left_alone() {
    for stage in [
        Stage::Provisioning,
        Stage::Seeding,
        Stage::Switching,
        Stage::FailingBack,
        Stage::Active,
    ] {
        Scene::demo(2).warm(stage).slots(3).nothing(1, "under_way", "");
    }
    let mut s = Scene::demo(2).warm(Stage::Failed);
    s.state(1).last_error = Some("b refused admit".into());
    s.nothing(1, "failed", "b refused admit");
}

#[test]
fn an_operators_wish_is_taken_if_the_host_can_serve_at_all() {
    let mut s = Scene::demo(999);
    s.vm(9, "crowd", "b", steps(1.1, 0, 1.1));
    let wish = |s: &Scene, name: Option<&str>| {
        let outlook = s.outlook();
        let input = Input {
            now: s.now,
            outlook: &outlook,
            states: &s.states,
            fleet: &s.fleet,
            busy: &s.busy,
            streaks: &s.streaks,
            policy: &s.policy,
            method: "ratio",
            seed_bytes_per_s: 1e8,
        };
        target_for(&input, outlook.vm(id(1)).unwrap(), name.map(host).as_ref())
    };
    // Crowded is the operator's business.
    assert_eq!(wish(&s, Some("b")), Ok(host("b")));
    assert!(
        wish(&s, None)
            .unwrap_err()
            .contains("b: contention probability would be")
    );
    assert!(wish(&s, Some("a")).unwrap_err().contains("the VM runs here"));
    assert!(wish(&s, Some("z")).unwrap_err().contains("no replicator is configured"));
    s.fleet.get_mut(&host("b")).unwrap().up = false;
    assert!(wish(&s, Some("b")).unwrap_err().contains("does not answer"));
}

#[test]
fn a_streak_counts_a_slot_once_and_breaks() {
    let s = Scene::demo(40).slots(3);
    assert_eq!(s.streaks.of(id(1)).hot, 3);
    let mut s = s;
    let outlook = s.outlook();
    s.streaks.observe(&outlook, &s.states, &s.policy, LIMIT);
    assert_eq!(s.streaks.of(id(1)).hot, 3, "the same slot again");
    s.vms[1].bands = steps(0.1, 0, 0.1);
    let s = s.slots(1);
    let streak = s.streaks.of(id(1));
    assert_eq!((streak.hot, streak.low), (0, 1));
}

#[test]
fn cooldowns_double_and_end() {
    let p = Policy {
        cooldown_s: 10.0,
        cooldown_max_s: 65.0,
        ..Policy::default()
    };
    let all: Vec<u64> = [0, 1, 2, 3, 4, u32::MAX].map(|n| p.cooldown_ms(n)).into();
    assert_eq!(all, [10_000, 10_000, 20_000, 40_000, 65_000, 65_000]);
}
