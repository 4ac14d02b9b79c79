//! What the replicas tell a scraper.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use umbra_api::replica::{Convergence, DiskProgress, ReplicaStatus, Role};

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Labels {
    vm: String,
    name: String,
    role: &'static str,
    peer: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct KindLabels {
    vm: String,
    name: String,
    kind: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct DiskLabels {
    vm: String,
    name: String,
    /// The primary's image.
    disk: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct PhaseLabels {
    vm: String,
    name: String,
    role: &'static str,
    phase: String,
}

type Float = Gauge<f64, AtomicU64>;
type Value = fn(&ReplicaStatus) -> Option<f64>;

/// What the target can't know.
fn source(r: &ReplicaStatus, value: f64) -> Option<f64> {
    (r.role == Role::Source).then_some(value)
}

/// Name, help, and where it comes from. All are gauges: a replica's counts begin again with each protection.
const GAUGES: [(&str, &str, Value); 30] = [
    ("umbra_replica_ram_bytes", "RAM of the VM, all blocks", |r| {
        Some(r.progress.ram_bytes as f64)
    }),
    ("umbra_replica_seeded_bytes", "RAM sent so far in the first pass", |r| {
        Some(r.progress.seeded_bytes as f64)
    }),
    ("umbra_replica_seed_seconds", "How long the first pass took", |r| {
        r.progress.seed_ms.map(|ms| ms as f64 / 1e3)
    }),
    (
        "umbra_replica_wire_bytes",
        "Bytes on the link since the protection began",
        |r| Some(r.progress.wire_bytes as f64),
    ),
    ("umbra_replica_rounds", "Rounds since the first pass", |r| {
        Some(r.progress.rounds as f64)
    }),
    ("umbra_replica_lag_pages", "Pages of the last round", |r| {
        Some(r.progress.lag_pages as f64)
    }),
    ("umbra_replica_lag_seconds", "Age of the last complete round", |r| {
        Some(r.progress.lag_ms as f64 / 1e3)
    }),
    (
        "umbra_replica_shadow_used_bytes",
        "What the shadow holds of the guest's RAM",
        |r| r.memory.as_ref().map(|m| m.used_bytes as f64),
    ),
    (
        "umbra_replica_shadow_resident_bytes",
        "Of it, what is in RAM; the rest waits in swap",
        |r| r.memory.as_ref().map(|m| m.resident_bytes as f64),
    ),
    (
        "umbra_replica_shadow_limit_bytes",
        "RAM that the tier leaves the shadow; absent: all",
        |r| Some(r.memory.as_ref()?.limit_bytes? as f64),
    ),
    (
        "umbra_replica_promotion_seconds",
        "From the order of the last rise to a higher tier until its RAM was there",
        |r| Some(r.memory.as_ref()?.promotion?.took_ms as f64 / 1e3),
    ),
    (
        "umbra_replica_dirty_pages_per_second",
        "Pages that the guest dirties a second",
        |r| source(r, r.progress.dirty_pages_per_s as f64),
    ),
    (
        "umbra_replica_working_set_pages",
        "Distinct pages of the last 20 rounds",
        |r| source(r, r.progress.pace.working_set_pages as f64),
    ),
    ("umbra_replica_lag_bytes", "Guest memory of the last round", |r| {
        source(r, r.progress.pace.lag_bytes as f64)
    }),
    (
        "umbra_replica_link_bytes_per_second",
        "What the link was seen to carry",
        |r| r.progress.pace.link_bytes_per_s.map(|b| b as f64),
    ),
    (
        "umbra_replica_estimated_downtime_seconds",
        "How long a switchover would stop the guest",
        |r| r.progress.estimated_downtime_ms.map(|ms| ms / 1e3),
    ),
    (
        "umbra_replica_converging",
        "1 if rounds end, 0 if the guest is too fast for the link",
        |r| match r.progress.pace.convergence {
            Convergence::Unknown => None,
            Convergence::Converging => Some(1.0),
            Convergence::NotConverging => Some(0.0),
        },
    ),
    ("umbra_replica_pause_seconds", "Pause before the next round", |r| {
        source(r, r.progress.pace.pause_ms as f64 / 1e3)
    }),
    (
        "umbra_replica_qemu_cpu_ratio",
        "Share of a CPU that QEMU's migration threads use",
        |r| source(r, r.progress.pace.qemu_cpu_pct / 100.0),
    ),
    (
        "umbra_replica_own_cpu_ratio",
        "Share of a CPU that the thread which carries the pages uses",
        |r| source(r, r.progress.pace.own_cpu_pct / 100.0),
    ),
    (
        "umbra_replica_host_wait_ratio",
        "Share of time in which somebody on this host waits for a CPU",
        |r| r.progress.pace.host_wait_pct.map(|p| p / 100.0),
    ),
    (
        "umbra_replica_throttle_ratio",
        "How much the guest is slowed down",
        |r| source(r, f64::from(r.progress.pace.throttle_pct.unwrap_or(0)) / 100.0),
    ),
    (
        "umbra_replica_resumptions",
        "Attempts at a new pass after the copy had broken off",
        |r| Some(r.progress.resume.passes as f64),
    ),
    (
        "umbra_replica_pass_sent_pages",
        "Pages of the latest first pass that travelled",
        |r| Some(r.progress.resume.sent_pages as f64),
    ),
    (
        "umbra_replica_pass_skipped_pages",
        "Pages of the latest first pass that the target had already",
        |r| Some(r.progress.resume.skipped_pages as f64),
    ),
    (
        "umbra_replica_scrubbed_pages",
        "Pages of the shadow that were compared with what was sent",
        |r| Some(r.progress.resume.scrubbed_pages as f64),
    ),
    (
        "umbra_replica_scrubbed_swap_pages",
        "Pages of them that were read back from swap for it, and pushed out again",
        |r| Some(r.progress.resume.scrubbed_swap_pages as f64),
    ),
    (
        "umbra_replica_scrub_cpu_seconds",
        "CPU time that the comparing has cost this side",
        |r| Some(r.progress.resume.scrub_cpu_us as f64 / 1e6),
    ),
    (
        "umbra_replica_differing_pages",
        "Pages of the shadow that were found damaged",
        |r| Some(r.progress.resume.differing_pages as f64),
    ),
    (
        "umbra_replica_guest_stopped_seconds",
        "STOP to RESUME of the last switchover",
        |r| r.report.map(|r| r.guest_stopped_us as f64 / 1e6),
    ),
];

type DiskGauge = (&'static str, &'static str, fn(&DiskProgress) -> u64);

const DISK_GAUGES: [DiskGauge; 7] = [
    (
        "umbra_replica_disk_total_bytes",
        "What is to be copied of a private disk by now, with what the guest wrote since",
        |d| d.total_bytes,
    ),
    ("umbra_replica_disk_copied_bytes", "Of it, what is copied", |d| {
        d.copied_bytes
    }),
    (
        "umbra_replica_disk_link_bytes",
        "What travelled of a private disk, also a second time after a break",
        |d| d.link_bytes,
    ),
    (
        "umbra_replica_disk_scrubbed_bytes",
        "Bytes of a private disk and of its image that were compared",
        |d| d.scrubbed_bytes,
    ),
    (
        "umbra_replica_disk_differing_ranges",
        "Ranges of 64 KiB of a disk's image that were found damaged",
        |d| d.differing_ranges,
    ),
    (
        "umbra_replica_disk_mended_ranges",
        "Those of them that were written anew",
        |d| d.mended_ranges,
    ),
    (
        "umbra_replica_disk_ready",
        "1 once a private disk's first copy is complete",
        |d| u64::from(d.ready),
    ),
];

/// A registry made for one scrape: replicas come and go, and one that is gone must not be told.
pub fn registry(replicas: &[ReplicaStatus]) -> Registry {
    let mut registry = Registry::default();
    let role = |r: &ReplicaStatus| match r.role {
        Role::Source => "source",
        Role::Target => "target",
    };
    for (name, help, value) in GAUGES {
        let family = Family::<Labels, Float>::default();
        for r in replicas {
            let labels = Labels {
                vm: r.vm.to_string(),
                name: r.name.clone(),
                role: role(r),
                peer: r.peer.to_string(),
            };
            if let Some(v) = value(r) {
                family.get_or_create(&labels).set(v);
            }
        }
        registry.register(name, help, family);
    }
    let phases = Family::<PhaseLabels, Gauge>::default();
    for r in replicas {
        let phase = format!("{:?}", r.phase).to_lowercase();
        phases
            .get_or_create(&PhaseLabels {
                vm: r.vm.to_string(),
                name: r.name.clone(),
                role: role(r),
                phase,
            })
            .set(1);
    }
    registry.register("umbra_replica_phase", "1 for the phase in which a replica is", phases);
    pages(&mut registry, replicas);
    disks(&mut registry, replicas);
    registry
}

/// How far the disks' copies are: the source knows.
fn disks(registry: &mut Registry, replicas: &[ReplicaStatus]) {
    for (name, help, value) in DISK_GAUGES {
        let family = Family::<DiskLabels, Gauge>::default();
        for (r, disk) in replicas.iter().flat_map(|r| r.disks.iter().map(move |d| (r, d))) {
            let labels = DiskLabels {
                vm: r.vm.to_string(),
                name: r.name.clone(),
                disk: disk.path.clone(),
            };
            family.get_or_create(&labels).set(value(disk) as i64);
        }
        registry.register(name, help, family);
    }
}

/// How pages travelled: the source knows.
fn pages(registry: &mut Registry, replicas: &[ReplicaStatus]) {
    let (pages, bytes) = (
        Family::<KindLabels, Gauge>::default(),
        Family::<KindLabels, Gauge>::default(),
    );
    for r in replicas.iter().filter(|r| r.role == Role::Source) {
        for (kind, count) in r.progress.pages.all() {
            let labels = KindLabels {
                vm: r.vm.to_string(),
                name: r.name.clone(),
                kind,
            };
            pages.get_or_create(&labels).set(count.pages as i64);
            bytes.get_or_create(&labels).set(count.bytes as i64);
        }
    }
    registry.register(
        "umbra_replica_sent_pages",
        "Pages of QEMU's stream by how they travelled: zero, same (not at all), known, delta, zstd, raw",
        pages,
    );
    registry.register(
        "umbra_replica_sent_page_bytes",
        "Their bytes on the link; those of a batch are shared out by what its pages took before compression",
        bytes,
    );
}

#[cfg(test)]
mod tests {
    use umbra_api::replica::{Phase, Progress};
    use umbra_api::{Epoch, VmId};

    use super::*;

    #[test]
    fn kinds_of_pages_are_told_for_the_source() {
        let mut progress = Progress::default();
        progress.pages.delta.add(40);
        progress.pages.delta.add(2);
        let status = |role| ReplicaStatus {
            vm: VmId(uuid::Uuid::nil()),
            name: "web".into(),
            role,
            peer: "b".parse().unwrap(),
            epoch: Epoch(1),
            seen: Epoch(1),
            phase: Phase::Standby,
            since: umbra_api::UnixMs(0),
            tier: None,
            memory: None,
            progress,
            report: None,
            disks: vec![DiskProgress {
                path: "/srv/web.img".into(),
                total_bytes: 4096,
                copied_bytes: 4096,
                link_bytes: 4170,
                ready: true,
                ..DiskProgress::default()
            }],
            error: None,
        };
        let mut text = String::new();
        let registry = registry(&[status(Role::Source), status(Role::Target)]);
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let told = |name: &str| -> Vec<&str> { text.lines().filter(|l| l.starts_with(name)).collect() };
        let disk = told("umbra_replica_disk_link_bytes{");
        assert!(
            disk.iter()
                .all(|l| l.contains("disk=\"/srv/web.img\"") && l.ends_with("} 4170")),
            "{disk:?}"
        );
        let pages = told("umbra_replica_sent_pages{");
        assert_eq!(pages.len(), 6);
        assert!(
            pages.iter().any(|l| l.contains("kind=\"delta\"") && l.ends_with("} 2")),
            "{pages:?}"
        );
        let bytes = told("umbra_replica_sent_page_bytes{");
        assert!(
            bytes
                .iter()
                .any(|l| l.contains("kind=\"delta\"") && l.ends_with("} 42")),
            "{bytes:?}"
        );
    }
}
