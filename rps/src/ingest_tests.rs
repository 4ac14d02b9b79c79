use super::*;
use proptest::prelude::*;
use umbra_api::sample::{BlockSample, CpuSample, MemSample, NetSample, SAMPLE_VERSION};

const SHAPE: Shape = Shape {
    slot_ms: 1_000,
    keep_slots: 100,
    late_slots: 2,
};
const T0: i64 = 1_700_000_000_000;

fn params() -> WorldParams {
    WorldParams {
        shape: SHAPE,
        expire_ms: 30_000,
        future_ms: 2_000,
        hosts_max: 3,
    }
}

fn id(n: u128) -> VmId {
    VmId(uuid::Uuid::from_u128(n))
}

fn name(s: &str) -> HostId {
    s.parse().unwrap()
}

fn vm(n: u128, run_ms: u64, wait_ms: u64, incoming: bool) -> VmSample {
    VmSample {
        vm: id(n),
        name: format!("vm{n}"),
        pid: 7,
        incoming,
        vcpus: 2,
        cpu: CpuSample {
            vcpu_run_ns: run_ms * 1_000_000,
            vcpu_wait_ns: wait_ms * 1_000_000,
            ..CpuSample::default()
        },
        mem: MemSample {
            rss_bytes: 100,
            guest_bytes: 200,
        },
        block: BlockSample {
            read_bytes: 10,
            write_bytes: 20,
            ..BlockSample::default()
        },
        net: NetSample {
            rx_bytes: 1,
            tx_bytes: 2,
            ..NetSample::default()
        },
    }
}

fn batch(host: &str, seq: u64, second: i64, busy_ms: u64, vms: Vec<VmSample>) -> SampleBatch {
    SampleBatch {
        version: SAMPLE_VERSION,
        host: name(host),
        agent_start: UnixMs(1),
        seq,
        t: UnixMs(T0 + second * 1_000),
        interval_ms: 1_000,
        node: HostSample {
            cpus: 4.0,
            cpu_busy_ns: busy_ms * 1_000_000,
            ..HostSample::default()
        },
        vms,
    }
}

fn at(second: i64) -> UnixMs {
    UnixMs(T0 + second * 1_000)
}

fn told(world: &World, key: &str, second: i64) -> Option<f64> {
    let slot = SHAPE.slot_of(at(second)) - 1;
    let usage = match key.parse().unwrap() {
        SeriesKey::Vm(vm) => world.vm(vm)?.series().get(slot),
        SeriesKey::Host(host) => world.host(&host)?.own().get(slot),
    };
    usage.map(|u| (u.cpu_cores * 1000.0).round() / 1000.0)
}

fn vm_key(n: u128) -> String {
    SeriesKey::Vm(id(n)).to_string()
}

#[test]
fn demand_is_run_and_wait_and_the_rest_is_the_hosts_own() {
    let mut w = World::new(params());
    let got = w
        .apply(&batch("a", 1, 1, 900, vec![vm(1, 500, 200, false)]), at(1))
        .unwrap();
    assert_eq!(
        got,
        Ingested {
            duplicate: false,
            vms: 1,
            new_vms: 1,
            too_late_ms: 0
        }
    );
    assert_eq!(told(&w, &vm_key(1), 1), Some(0.7));
    assert_eq!(
        told(&w, "host/a", 1),
        Some(0.4),
        "busy minus what the VM ran; its wait was nobody's work"
    );
    let usage = w.vm(id(1)).unwrap().series().get(SHAPE.slot_of(at(1)) - 1).unwrap();
    assert_eq!(
        (usage.wait_ms_per_s, usage.net_bytes_per_s, usage.disk_bytes_per_s),
        (200.0, 3.0, 30.0)
    );
    assert_eq!(w.history(id(1), 10, at(1)).len(), 1);
}

#[test]
fn a_batch_counts_once() {
    let mut w = World::new(params());
    let b = batch("a", 5, 1, 0, vec![vm(1, 500, 0, false)]);
    w.apply(&b, at(1)).unwrap();
    assert!(w.apply(&b, at(1)).unwrap().duplicate);
    // The agent's second life starts to count anew, and its predecessor's backlog is still known.
    let mut again = batch("a", 5, 2, 0, vec![vm(1, 500, 0, false)]);
    again.agent_start = UnixMs(9);
    assert!(!w.apply(&again, at(2)).unwrap().duplicate);
    assert!(w.apply(&b, at(2)).unwrap().duplicate);
    assert!(
        !w.apply(&batch("a", 4, 2, 0, vec![]), at(2)).unwrap().duplicate,
        "late, but new"
    );
}

#[test]
fn a_shadow_is_its_hosts_work_and_not_the_vms_demand() {
    let mut w = World::new(params());
    w.apply(&batch("b", 1, 1, 150, vec![vm(1, 100, 0, true)]), at(1))
        .unwrap();
    w.apply(&batch("a", 1, 1, 600, vec![vm(1, 600, 0, false)]), at(1))
        .unwrap();
    w.apply(&batch("a", 2, 2, 600, vec![vm(1, 600, 0, false)]), at(2))
        .unwrap();
    w.apply(&batch("b", 2, 2, 150, vec![vm(1, 100, 0, true)]), at(2))
        .unwrap();
    assert_eq!(told(&w, &vm_key(1), 2), Some(0.6));
    assert_eq!((told(&w, "host/a", 2), told(&w, "host/b", 2)), (Some(0.0), Some(0.15)));
    assert_eq!(w.vm(id(1)).unwrap().running(), Some(&name("a")));
    assert_eq!(w.vm(id(1)).unwrap().shadows().collect::<Vec<_>>(), [&name("b")]);
}

#[test]
fn a_vm_that_moved_keeps_its_series() {
    let mut w = World::new(params());
    w.apply(&batch("a", 1, 1, 600, vec![vm(1, 600, 0, false)]), at(1))
        .unwrap();
    w.apply(&batch("b", 1, 1, 0, vec![vm(1, 1, 0, true)]), at(1)).unwrap();
    w.set_running(id(1), name("b"));
    // The old primary is kept, stopped.
    w.apply(&batch("a", 2, 2, 0, vec![vm(1, 0, 0, false)]), at(2)).unwrap();
    w.apply(&batch("b", 2, 2, 800, vec![vm(1, 700, 0, true)]), at(2))
        .unwrap();
    assert_eq!(
        (told(&w, &vm_key(1), 1), told(&w, &vm_key(1), 2)),
        (Some(0.6), Some(0.7))
    );
    assert_eq!(told(&w, "host/b", 2), Some(0.1));
    // It goes home: the stopped process and the new shadow stand side by side on its host.
    w.set_running(id(1), name("a"));
    w.apply(
        &batch("a", 3, 3, 500, vec![vm(1, 0, 0, false), vm(1, 500, 0, true)]),
        at(3),
    )
    .unwrap();
    assert_eq!(told(&w, &vm_key(1), 3), Some(0.5));
}

#[test]
fn a_vm_that_was_moved_by_others_is_found_where_it_is_no_shadow() {
    let mut w = World::new(params());
    w.set_running(id(1), name("a"));
    w.apply(&batch("a", 1, 1, 0, vec![vm(1, 1, 0, false)]), at(1)).unwrap();
    w.apply(&batch("a", 2, 2, 0, vec![]), at(2)).unwrap();
    assert_eq!(w.vm(id(1)).unwrap().running(), None);
    w.apply(&batch("c", 1, 2, 0, vec![vm(1, 1, 0, true)]), at(2)).unwrap();
    assert_eq!(
        w.vm(id(1)).unwrap().running(),
        None,
        "a shadow does not run because its primary is gone"
    );
    w.apply(&batch("b", 1, 2, 0, vec![vm(1, 1, 0, false)]), at(2)).unwrap();
    assert_eq!(w.vm(id(1)).unwrap().running(), Some(&name("b")));
    let mut untold = World::new(params());
    untold
        .apply(&batch("c", 1, 2, 0, vec![vm(1, 1, 0, true)]), at(2))
        .unwrap();
    assert_eq!(
        untold.vm(id(1)).unwrap().running(),
        Some(&name("c")),
        "live-migrated before we came"
    );
}

#[test]
fn bad_clocks_and_strangers_are_refused_by_name() {
    let mut w = World::new(params());
    let future = w.apply(&batch("a", 1, 10, 0, vec![]), at(1)).unwrap_err();
    assert!(future.to_string().contains("9000 ms in the future"), "{future}");
    let old = w.apply(&batch("a", 1, 1, 0, vec![]), at(500)).unwrap_err();
    assert!(matches!(old, IngestError::TooOld { .. }), "{old}");
    let mut odd = batch("a", 1, 1, 0, vec![]);
    odd.version = 77;
    assert!(w.apply(&odd, at(1)).unwrap_err().to_string().contains("77"));
    for (i, host) in ["a", "b", "c"].into_iter().enumerate() {
        w.apply(&batch(host, i as u64, 1, 0, vec![]), at(1)).unwrap();
    }
    let many = w.apply(&batch("d", 1, 1, 0, vec![]), at(1)).unwrap_err();
    assert_eq!(
        many,
        IngestError::TooManyHosts {
            host: name("d"),
            max: 3
        }
    );
}

#[test]
fn the_silent_are_forgotten_but_for_the_protected() {
    let mut w = World::new(params());
    w.apply(
        &batch("a", 1, 1, 0, vec![vm(1, 1, 0, false), vm(2, 1, 0, false)]),
        at(1),
    )
    .unwrap();
    w.apply(&batch("b", 1, 1, 0, vec![]), at(1)).unwrap();
    w.set_running(id(2), name("a"));
    w.apply(&batch("b", 2, 30, 0, vec![]), at(30)).unwrap();
    assert_eq!(w.expire(at(31)), []);
    assert_eq!(w.expire(at(40)), [SeriesKey::Host(name("a")), SeriesKey::Vm(id(1))]);
    assert!(w.vm(id(2)).is_some_and(|v| v.running().is_none()));
    w.clear_running(id(2));
    assert_eq!(w.expire(at(40)), [SeriesKey::Vm(id(2))]);
}

#[test]
fn closed_slots_come_back_after_a_restart() {
    let mut w = World::new(params());
    for s in 1..=10 {
        w.apply(
            &batch("a", s, s as i64, 500, vec![vm(1, 300 + s, 0, false)]),
            at(s as i64),
        )
        .unwrap();
    }
    let rows = w.closed_slots(UnixMs(0));
    assert_eq!(rows.len(), 14, "seven slots are closed, of a VM and a host");
    assert_eq!(w.closed_slots(at(5)).len(), 4);
    let mut restarted = World::new(params());
    restarted.load(rows.clone(), at(11));
    assert_eq!(told(&restarted, &vm_key(1), 3), Some(0.303));
    assert!(restarted.vm(id(1)).unwrap().running().is_none());
    restarted
        .apply(&batch("a", 11, 11, 500, vec![vm(1, 311, 0, false)]), at(11))
        .unwrap();
    assert_eq!(restarted.history(id(1), 100, at(11)).len(), 8);
    let text: String = rows[0].key.clone().into();
    assert_eq!(text.parse::<SeriesKey>().unwrap(), rows[0].key);
    assert!(
        "disk/1"
            .parse::<SeriesKey>()
            .unwrap_err()
            .to_string()
            .contains("disk/1")
    );
}

/// Slots of a minute; two VMs are copied, the longer copy of both is told of last; and the RPS restarts.
#[test]
fn slots_of_our_own_copies_stay_disturbed_whatever_the_order_and_over_a_restart() {
    let params = WorldParams {
        shape: Shape {
            slot_ms: 60_000,
            ..SHAPE
        },
        ..params()
    };
    let minute = |m: i64| at(m * 60 - T0 / 1_000 % 60);
    let mut w = World::new(params);
    for m in 1..=12 {
        let batch = SampleBatch {
            t: minute(m),
            interval_ms: 60_000,
            ..batch("a", m as u64, 0, 500, vec![vm(1, 300, 0, false), vm(2, 300, 0, false)])
        };
        w.apply(&batch, minute(m)).unwrap();
    }
    w.disturb(&name("a"), minute(7).plus_ms(50_000), minute(7).plus_ms(53_000));
    w.disturb(&name("a"), minute(4).plus_ms(58_000), minute(5).plus_ms(2_000));
    let disturbed = |w: &World| -> Vec<i64> {
        let (series, first) = (w.vm(id(2)).unwrap().series(), params.shape.slot_of(minute(0)));
        (0..12).filter(|m| series.is_disturbed(first + m)).collect()
    };
    assert_eq!(disturbed(&w), [4, 5, 7]);
    let mut restarted = World::new(params);
    restarted.load(w.closed_slots(UnixMs(0)), minute(12));
    assert_eq!(disturbed(&restarted), [4, 5, 7]);
}

proptest! {
    /// Each sequence number counts once, in whatever order batches come within the window of 64.
    #[test]
    fn any_order_counts_once(order in Just((1..60u64).collect::<Vec<_>>()).prop_shuffle(), twice in 1..60u64) {
        let mut w = World::new(params());
        for seq in &order {
            prop_assert!(!w.apply(&batch("a", *seq, 1, 0, vec![]), at(1)).unwrap().duplicate);
        }
        prop_assert!(w.apply(&batch("a", twice, 1, 0, vec![]), at(1)).unwrap().duplicate);
    }

    /// Whatever valid batches say, nothing panics and no rate is negative or infinite.
    #[test]
    fn extreme_figures_break_nothing(
        run in 0u64..=20_000_000_000_000,
        busy in any::<u64>(),
        bytes in any::<u64>(),
        second in -50i64..3,
        interval in 1u64..=3_600_000,
    ) {
        let mut w = World::new(params());
        let mut sample = vm(1, 0, 0, false);
        sample.cpu.vcpu_run_ns = run;
        sample.net = NetSample { rx_bytes: bytes, tx_bytes: bytes, ..NetSample::default() };
        sample.mem.rss_bytes = bytes;
        let mut b = batch("a", 1, second, 0, vec![sample]);
        b.node.cpu_busy_ns = busy;
        b.interval_ms = interval;
        if w.apply(&b, at(1)).is_ok() {
            let sane = |u: &Usage| u.cpu_cores >= 0.0 && u.cpu_cores.is_finite() && u.net_bytes_per_s.is_finite();
            prop_assert!(w.closed_slots(UnixMs(0)).iter().all(|r| sane(&r.usage)));
        }
    }
}
