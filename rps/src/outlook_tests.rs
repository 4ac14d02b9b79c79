use super::*;
use crate::ingest::WorldParams;
use crate::series::Shape;
use umbra_api::sample::{
    BlockSample, CpuSample, HostSample, MemSample, NetSample, SAMPLE_VERSION, SampleBatch, VmSample,
};

const WEB: u128 = 1;
const NEIGHBOUR: u128 = 2;
const SLOT_MS: i64 = 1_000;
/// Agents don't sample on the slots' edges.
const PHASE_MS: i64 = 370;

fn id(n: u128) -> VmId {
    VmId(uuid::Uuid::from_u128(n))
}

fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

/// A small deterministic source of noise.
struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Bell-shaped, mean 0, of this standard deviation.
    fn normal(&mut self, sigma: f64) -> f64 {
        sigma * ((0..12).map(|_| self.uniform()).sum::<f64>() - 6.0)
    }
}

fn sample(n: u128, cores: f64, incoming: bool) -> VmSample {
    let ns = (cores.max(0.0) * 1e9) as u64;
    VmSample {
        vm: id(n),
        name: format!("vm{n}"),
        pid: 1,
        incoming,
        vcpus: 1,
        cpu: CpuSample {
            vcpu_run_ns: ns / 2,
            vcpu_wait_ns: ns - ns / 2,
            ..CpuSample::default()
        },
        mem: MemSample {
            rss_bytes: 200 << 20,
            guest_bytes: 256 << 20,
        },
        block: BlockSample::default(),
        net: NetSample::default(),
    }
}

/// One-core hosts, one sample a second.
struct Scene {
    world: World,
    cache: ForecastCache,
    params: Params,
    seq: u64,
}

impl Scene {
    fn new() -> Self {
        let shape = Shape {
            slot_ms: SLOT_MS as u64,
            keep_slots: 600,
            late_slots: 2,
        };
        Self {
            world: World::new(WorldParams {
                shape,
                ..WorldParams::default()
            }),
            cache: ForecastCache::default(),
            params: Params::default(),
            seq: 0,
        }
    }

    fn time(second: i64) -> UnixMs {
        UnixMs(1_700_000_000_000 + second * SLOT_MS + PHASE_MS)
    }

    fn tell(&mut self, name: &str, second: i64, vms: Vec<VmSample>) {
        self.seq += 1;
        let busy: u64 = vms.iter().map(|v| v.cpu.run_ns()).sum();
        let batch = SampleBatch {
            version: SAMPLE_VERSION,
            host: host(name),
            agent_start: UnixMs(1),
            seq: self.seq,
            t: Self::time(second),
            interval_ms: SLOT_MS as u64,
            node: HostSample {
                cpus: 1.0,
                cpu_busy_ns: busy + 10_000_000,
                mem_total_bytes: 4 << 30,
                mem_available_bytes: 3 << 30,
                ..HostSample::default()
            },
            vms,
        };
        self.world.apply(&batch, Self::time(second)).unwrap();
    }

    fn look(&mut self, second: i64) -> Outlook {
        outlook(
            &self.world,
            &mut self.cache,
            &self.params,
            Self::time(second).plus_ms(30),
        )
    }
}

/// The demo's neighbour: flat at first, then a climb that takes sixty slots.
fn neighbour(second: i64, flat: i64) -> f64 {
    0.1 + 0.85 * (second - flat).clamp(0, 60) as f64 / 60.0
}

/// Slots that are flat before the climb, and the one in which the true sum exceeds the one core.
const FLAT: i64 = 20;

fn crossing() -> i64 {
    (0..).find(|s| 0.35 + neighbour(*s, FLAT) > 1.0).unwrap()
}

/// What was seen of the web VM's CPS.
#[derive(Default, Debug)]
struct Seen {
    highest_while_flat: f64,
    /// First slot with a CPS of at least one half, and the start of contention told then.
    first: Option<(i64, i64)>,
    at_crossing: f64,
}

fn play(seed: u64) -> Seen {
    let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut scene = Scene::new();
    let mut seen = Seen::default();
    for second in 1..=crossing() {
        let web = 0.35 + 0.1 * (noise.uniform() - 0.5);
        let other = neighbour(second, FLAT) + noise.normal(0.03);
        scene.tell(
            "a",
            second,
            vec![sample(WEB, web, false), sample(NEIGHBOUR, other, false)],
        );
        let outlook = scene.look(second);
        let vm = outlook.vm(id(WEB)).unwrap();
        if second <= FLAT {
            seen.highest_while_flat = seen.highest_while_flat.max(vm.cps);
        }
        assert_eq!(
            vm.cps >= 0.5,
            vm.contention_at.is_some(),
            "a CPS at the threshold has its time"
        );
        if let (None, Some(at)) = (seen.first, vm.contention_at) {
            seen.first = Some((second, at.since(Scene::time(0)).div_euclid(SLOT_MS) + 1));
        }
        seen.at_crossing = vm.cps;
    }
    seen
}

#[test]
fn the_demo_is_seen_coming() {
    let crossing = crossing();
    for seed in 1..=12 {
        let seen = play(seed);
        assert!(seen.highest_while_flat < 0.2, "seed {seed}: {seen:?}");
        assert!(
            seen.first.is_some_and(|(s, _)| s > FLAT && s + 8 <= crossing),
            "seed {seed}, due {crossing}: {seen:?}"
        );
        assert!(seen.at_crossing > 0.9, "seed {seed}: {seen:?}");
    }
}

#[test]
fn calm_and_crowded_hosts_are_told_apart_by_what_if() {
    let mut noise = Noise(77);
    let mut scene = Scene::new();
    for second in 1..=60 {
        let busy = 0.9 + noise.normal(0.02);
        scene.tell("a", second, vec![sample(NEIGHBOUR, busy, false)]);
        scene.tell(
            "b",
            second,
            vec![sample(WEB, 0.35 + noise.normal(0.03), false), sample(3, 0.1, true)],
        );
        scene.tell("c", second, vec![sample(3, 0.2, false)]);
    }
    let outlook = scene.look(60);
    let crowded = outlook.what_if(id(WEB), &host("a")).unwrap();
    assert!(crowded.peak_probability > 0.95, "{crowded:?}");
    let calm = outlook.what_if(id(WEB), &host("c")).unwrap();
    assert!(calm.peak_probability < 0.05, "{calm:?}");
    assert_eq!(calm.probability.len(), 30);
    let without = outlook.what_if(id(WEB), &host("b")).unwrap();
    assert!(without.demand_p50[0] < outlook.host(&host("b")).unwrap().demand_p50[0] - 0.3);
    assert_eq!(outlook.what_if(id(99), &host("a")), None);
    assert_eq!(outlook.what_if(id(WEB), &host("z")), None);
    let b = outlook.host(&host("b")).unwrap();
    assert_eq!((b.vms.as_slice(), b.shadows.as_slice()), (&[id(WEB)][..], &[id(3)][..]));
}

#[test]
fn after_the_neighbour_is_gone_its_host_is_calm_again() {
    let mut noise = Noise(5);
    let mut scene = Scene::new();
    scene.world.set_running(id(WEB), host("b"));
    let mut calm_at = None;
    for second in 1..=120 {
        let other = if second <= 60 { 0.95 } else { 0.1 } + noise.normal(0.02);
        scene.tell("a", second, vec![sample(NEIGHBOUR, other, false)]);
        scene.tell("b", second, vec![sample(WEB, 0.35 + noise.normal(0.03), true)]);
        let what_if = scene.look(second).what_if(id(WEB), &host("a"));
        match what_if {
            Some(w) if second <= 60 && second > 14 => assert!(w.peak_probability > 0.9, "{second}"),
            Some(w) if second > 60 && w.peak_probability < 0.1 => calm_at = calm_at.or(Some(second)),
            _ => {}
        }
    }
    let calm_at = calm_at.unwrap();
    assert!(calm_at <= 90, "calm was seen at {calm_at}, 60 would be at once");
}

#[test]
fn a_short_history_has_no_forecast_and_still_counts() {
    let mut scene = Scene::new();
    for second in 1..=5 {
        scene.tell(
            "a",
            second,
            vec![sample(WEB, 0.6, false), sample(NEIGHBOUR, 0.6, false)],
        );
    }
    let outlook = scene.look(5);
    let vm = outlook.vm(id(WEB)).unwrap();
    assert_eq!(
        (vm.forecast.as_ref(), vm.model.as_str(), vm.scores.len()),
        (None, "", 0)
    );
    assert!(vm.history_slots < 12);
    assert!(vm.cps > 0.9, "both want more than there is: {}", vm.cps);
}

#[test]
fn a_silent_host_is_looked_past_and_then_given_up() {
    let mut scene = Scene::new();
    let mut noise = Noise(8);
    for second in 1..=40 {
        scene.tell("a", second, vec![sample(WEB, 0.4 + noise.normal(0.02), false)]);
    }
    let soon = scene.look(45);
    let forecast = soon.vm(id(WEB)).unwrap().forecast.clone().unwrap();
    assert_eq!(
        forecast.cpu_cores[P50].len(),
        30,
        "the horizon starts now, not at the last sample"
    );
    assert_eq!(forecast.from, UnixMs(1_700_000_000_000 + 45 * SLOT_MS));
    assert_eq!(scene.look(200).vm(id(WEB)).unwrap().forecast, None);
    // A clock that was set back: nothing of the future is used, nothing breaks.
    assert_eq!(scene.look(-1000).vm(id(WEB)).unwrap().history_slots, 0);
}

#[test]
fn the_ratio_method_compares_with_what_the_others_leave() {
    let mut scene = Scene::new();
    scene.params.method = Method::Ratio;
    let mut noise = Noise(3);
    for second in 1..=40 {
        let vms = vec![
            sample(WEB, 0.3 + noise.normal(0.01), false),
            sample(NEIGHBOUR, 0.4 + noise.normal(0.01), false),
        ];
        scene.tell("a", second, vms);
    }
    let cps = scene.look(40).vm(id(WEB)).unwrap().cps;
    assert!(
        (0.48..0.7).contains(&cps),
        "0.3 of the 0.6 that are left, and its spread: {cps}"
    );
    scene.params.weight = 10.0;
    assert_eq!(scene.look(41).vm(id(WEB)).unwrap().cps, 1.0, "cut to 1");
}

#[test]
fn an_idle_vm_does_not_suffer_on_a_full_host() {
    let params = Params::default();
    let vm = |n, cores: f64| VmInput {
        vm: id(n),
        name: String::new(),
        host: host("a"),
        vcpus: 1,
        cpu_demand: cores,
        wait_ms_per_s: 0.0,
        rss_bytes: 0,
        guest_bytes: 0,
        peak_mem_bytes: 0,
        history_slots: 100,
        model: None,
        bands: Quantiles::flat(cores, 0.001, params.horizon, 2.0),
    };
    let machine = HostInput {
        host: host("a"),
        cpus: 1.0,
        own_demand: 0.0,
        own: Quantiles::flat(0.0, 0.0, params.horizon, 1.0),
        mem_total_bytes: 0,
        mem_available_bytes: 0,
        shadows: Vec::new(),
        last_sample: None,
    };
    let draws = Arc::new(Draws::new(params.horizon, params.dependence));
    let vms = vec![vm(2, 0.7), vm(1, 0.7), vm(3, 0.005)];
    let outlook = Outlook::assemble(UnixMs(0), 1000, &params, draws, vms, vec![machine]);
    let cps: Vec<_> = outlook.vms.iter().map(|v| v.cps).collect();
    assert_eq!(cps, [1.0, 1.0, 0.0]);
    assert_eq!(outlook.vms[0].contention_at, Some(UnixMs(0)));
}

/// The copy of a VM costs its host CPU: for a second or two everything there wants and waits more.
#[test]
fn a_copy_of_our_own_is_not_taken_for_demand() {
    let play = |told: bool| {
        let mut scene = Scene::new();
        for second in 1..=40 {
            let copying = second > 38;
            let web = if copying { 0.9 } else { 0.3 };
            scene.tell("a", second, vec![sample(WEB, web, false)]);
            if copying && told {
                scene.world.disturb(&host("a"), Scene::time(38), Scene::time(second));
            }
        }
        let outlook = scene.look(40);
        let web = outlook.vm(id(WEB)).unwrap();
        (web.cpu_demand, web.peak_p50)
    };
    let (told, untold) = (play(true), play(false));
    assert!(told.0 > 0.8, "what is measured is shown: {told:?}");
    assert!(told.1 < 0.4 && untold.1 > told.1, "{told:?}, if nobody told {untold:?}");
}

#[test]
fn a_long_copy_is_load_like_any_other() {
    let mut scene = Scene::new();
    for second in 1..=60 {
        let web = if second > 40 { 0.9 } else { 0.3 };
        scene.tell("a", second, vec![sample(WEB, web, false)]);
        if second > 40 {
            scene.world.disturb(&host("a"), Scene::time(40), Scene::time(second));
        }
    }
    let peak = scene.look(60).vm(id(WEB)).unwrap().peak_p50;
    assert!(peak > 0.7, "{peak}");
}
