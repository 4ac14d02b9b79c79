//! Views for the tests of the drawings.

use jiff::tz::TimeZone;
use umbra_api::lifecycle::Stage;
use umbra_api::order::{Lag, NotConverging, Tier};
use umbra_api::replica::{
    Convergence, DiskProgress, Pace, PageKinds, Progress, Resumption, ShadowMemory, SwitchoverReport,
};
use umbra_api::view::*;
use umbra_api::{DecisionId, Epoch, UnixMs, VmId};

use super::Look;

/// 2025-11-25 09:13:20 UTC.
pub const NOW: UnixMs = UnixMs(1_764_062_000_000);

pub fn look() -> Look {
    Look {
        width: 80,
        colour: false,
        now: NOW,
        tz: TimeZone::UTC,
    }
}

pub fn id(n: u128) -> VmId {
    VmId(uuid::Uuid::from_u128(n << 96 | n))
}

pub fn summary(n: u128, name: &str) -> VmSummary {
    VmSummary {
        vm: id(n),
        name: name.to_owned(),
        host: "a".parse().unwrap(),
        home: "a".parse().unwrap(),
        stage: Stage::Standby,
        cpu_demand: 0.42,
        wait_ms_per_s: 3.6,
        cps: 0.91,
        threshold: 0.6,
        shadow: Some("b".parse().unwrap()),
        protect: true,
    }
}

pub fn host(name: &str) -> HostView {
    HostView {
        host: name.parse().unwrap(),
        cpus: 1.0,
        cpu_demand: 0.74,
        cpu_predicted_p50: 0.9,
        cpu_predicted_p90: 1.31,
        mem_total_bytes: 8 << 30,
        mem_available_bytes: 5 << 30,
        contention_probability: 0.83,
        vms: 2,
        shadows: 0,
        last_sample: Some(NOW.plus_ms(-1400)),
        replicator_up: true,
    }
}

pub fn status() -> StatusView {
    StatusView {
        version: "0.1.0".into(),
        mode: Mode::Act,
        now: NOW,
        started: NOW.plus_ms(-7_500_000),
        slot_ms: 2000,
        hosts: vec![
            host("a"),
            HostView {
                contention_probability: 0.0,
                vms: 0,
                shadows: 1,
                ..host("b")
            },
        ],
        vms: 2,
        shadows: 1,
    }
}

pub fn vm() -> VmView {
    VmView {
        summary: summary(1, "web"),
        epoch: Epoch(2),
        tier: Some(Tier::Standby),
        vcpus: 1,
        rss_bytes: 210 << 20,
        guest_bytes: 256 << 20,
        model: "ets".into(),
        scores: vec![
            ModelScore {
                model: "ets".into(),
                pinball: 0.031,
                chosen: true,
            },
            ModelScore {
                model: "last".into(),
                pinball: 0.052,
                chosen: false,
            },
        ],
        history: (0..60)
            .map(|i| HistoryPoint {
                t: NOW.plus_ms((i - 60) * 2000),
                cpu_cores: (i % 20) as f64 / 20.0,
                wait_ms_per_s: i as f64,
            })
            .collect(),
        forecast: Some(ForecastView {
            from: NOW,
            slot_ms: 2000,
            quantiles: vec![0.5, 0.9],
            cpu_cores: vec![vec![0.2, 0.4, 0.8], vec![0.3, 0.6, 1.1]],
        }),
        shadow_memory: Some(ShadowMemory {
            used_bytes: 201 << 20,
            resident_bytes: 22 << 20,
            limit_bytes: Some(20 << 20),
            ..ShadowMemory::default()
        }),
        progress: Some(Progress {
            ram_bytes: 256 << 20,
            seeded_bytes: 256 << 20,
            seed_ms: Some(1830),
            wire_bytes: 41 << 20,
            rounds: 17,
            lag_pages: 212,
            lag_ms: 340,
            dirty_pages_per_s: 424,
            estimated_downtime_ms: Some(9.4),
            pages: PageKinds::default(),
            pace: Pace {
                convergence: Convergence::Converging,
                lag_bytes: 212 * 4096,
                working_set_pages: 1_900,
                link_bytes_per_s: Some(118_000_000),
                pause_ms: 500,
                qemu_cpu_pct: 1.2,
                own_cpu_pct: 0.9,
                host_wait_pct: Some(12.5),
                max_downtime_ms: 1_000,
                max_lag: Some(Lag::Pages(500)),
                when_too_fast: NotConverging::Throttle,
                ..Pace::default()
            },
            resume: Resumption::default(),
        }),
        disks: vec![DiskProgress {
            path: "/srv/web.qcow2".into(),
            total_bytes: 3 << 30,
            copied_bytes: 3 << 30,
            link_bytes: 3221 << 20,
            scrubbed_bytes: 5 << 30,
            ready: true,
            ..DiskProgress::default()
        }],
        last_switchover: Some(SwitchoverReport {
            at: NOW.plus_ms(-60_000),
            epoch: Epoch(2),
            guest_stopped_us: 9_310,
            order_to_told_us: 21_400,
            last_pass_pages: 180,
            device_state_bytes: 61_000,
            wire_bytes: 44 << 20,
            ..SwitchoverReport::default()
        }),
        last_error: None,
        events: vec![event(Stage::Seeding, Stage::Standby, "the first copy is complete", 30)],
    }
}

pub fn event(from: Stage, to: Stage, reason: &str, ago_s: i64) -> LifecycleEvent {
    LifecycleEvent {
        t: NOW.plus_ms(-1000 * ago_s),
        vm: id(1),
        from,
        to,
        reason: reason.to_owned(),
        decision: Some(DecisionId(41)),
    }
}

pub fn decision() -> DecisionView {
    DecisionView {
        id: DecisionId(42),
        t: NOW.plus_ms(-12_000),
        vm: id(1),
        mode: Mode::Act,
        stage: Stage::Unprotected,
        action: "provision".into(),
        because: "provision, because contention is predicted: CPS 0.91 is above 0.60; the copy takes 4.2 s".into(),
        inputs: DecisionInputs {
            cps: 0.91,
            threshold: 0.6,
            method: "probability".into(),
            model: "ets".into(),
            contention_in_s: Some(18.0),
            copy_s: 4.2,
            promotion_s: 1.0,
            lead_s: Some(12.8),
            peak_cpu_p50: 0.8,
            peak_cpu_p90: 0.95,
            peak_cpu_p99: 1.1,
            host_capacity: 1.0,
            host_demand_p50: 1.2,
            host_demand_p90: 1.4,
        },
        hosts: vec![
            HostVerdict {
                host: "b".parse().unwrap(),
                chosen: true,
                reason: "0.85 cores stay free".into(),
            },
            HostVerdict {
                host: "c".parse().unwrap(),
                chosen: false,
                reason: "no room: its own VMs are expected to want 0.97 of its 1.00 cores within the horizon".into(),
            },
        ],
    }
}
