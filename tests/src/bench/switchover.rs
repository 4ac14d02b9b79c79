//! How long a guest stands still when it changes hosts, and how long it takes from the command until it runs there.
//!
//! Two hosts of one core each; two equal VMs under the same load, of which only the one runs that hops: ours by our
//! replicators, stock by QEMU's own `migrate`, plain and with multifd, in turns.
//!
//! With `--disk` both write a journal on a virtio-blk disk, each record with `fdatasync`. Ours has an image a host, which is mirrored;
//! stock has its easiest case, one image that both hosts share, so that no disk has to move.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use umbra_api::replica::SwitchoverReport;

use super::Options;
use super::ours::Ours;
use super::probe::Seen;
use super::rows::{Row, median, percentile};
use super::stock::Stock;
use crate::lab::daemons::{Binaries, target_dir};
use crate::lab::disk::{Bus, DiskSpec};
use crate::lab::vm::VmSpec;

/// Before the command, until the prober is seen answering, and after it, until the guest answers again.
pub const SETTLE: Duration = Duration::from_millis(700);
pub const SWITCH: Duration = Duration::from_secs(60);
/// What the guest writes meanwhile, in pages a second.
const DIRTY: u32 = 2000;
const HOPS: usize = 15;
const QUICK_HOPS: usize = 5;

/// Half of its RAM is in use, and filled with what does not compress.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    mib: u32,
    vcpus: u32,
    disks: &'static [DiskSpec],
}

const fn case(name: &'static str, mib: u32, vcpus: u32, disks: &'static [DiskSpec]) -> Case {
    Case {
        name,
        mib,
        vcpus,
        disks,
    }
}

const CASES: [Case; 5] = [
    case("256MiB", 256, 1, &[]),
    case("1GiB", 1024, 1, &[]),
    case("4GiB", 4096, 1, &[]),
    case("256MiB-2vcpu", 256, 2, &[]),
    case("1GiB-2vcpu", 1024, 2, &[]),
];
const DISK_CASES: [Case; 3] = [
    case("256MiB-disk", 256, 2, &[DISK]),
    case("256MiB-3disks", 256, 2, &[DISK, RAW, DISK]),
    case("4GiB-disk", 4096, 2, &[DISK]),
];

/// How much longer the larger guest may take: it must not depend on its RAM.
const GROWTH_MAX: f64 = 1.3;
const GROWTH: [(&str, &str, &str); 2] = [
    ("4GiB over 256MiB", "256MiB", "4GiB"),
    ("4GiB-disk over 256MiB-disk", "256MiB-disk", "4GiB-disk"),
];
const DISK: DiskSpec = DiskSpec {
    bus: Bus::VirtioBlk,
    format: "qcow2",
    mib: 64,
};
const RAW: DiskSpec = DiskSpec { format: "raw", ..DISK };

/// One change of hosts, in milliseconds by the QEMUs' event times and the prober's clock.
#[derive(Clone, Copy, Debug)]
pub struct Hop {
    pub stopped_ms: f64,
    pub command_ms: f64,
    pub seen: Seen,
}

impl Hop {
    pub fn new(start_us: i64, stopped_us: i64, resumed_us: i64, seen: Seen) -> Self {
        let ms = |from: i64| (resumed_us - from) as f64 / 1e3;
        Self {
            stopped_ms: ms(stopped_us),
            command_ms: ms(start_us),
            seen,
        }
    }
}

/// Metric, and its value of a hop.
type OfHop = fn(&Hop) -> f64;
type OfReport = fn(&SwitchoverReport) -> u64;

const METRICS: [(&str, f64, OfHop); 5] = [
    ("guest_stopped_ms_p50", 0.5, |h| h.stopped_ms),
    ("guest_stopped_ms_p99", 0.99, |h| h.stopped_ms),
    ("command_to_running_ms_p50", 0.5, |h| h.command_ms),
    ("lost_run_ms_p50", 0.5, |h| h.seen.lost_ms),
    ("reply_gap_ms_p50", 0.5, |h| h.seen.reply_gap_ms),
];

/// Where the stopped time goes.
const PARTS: [(&str, OfReport); 7] = [
    ("last pass with disks", |r| r.last_pass_us),
    ("disks", |r| r.disks_us),
    ("device state", |r| r.device_state_us),
    ("load", |r| r.load_us),
    ("relinquish", |r| r.relinquish_us),
    ("shut", |r| r.shut_us),
    ("resume", |r| r.resume_us),
];

pub fn run(options: &Options) -> Result<Vec<Row>> {
    Binaries::find(&["umbra-replicator"])?;
    let hops = if options.quick { QUICK_HOPS } else { HOPS };
    let mut rows = Vec::new();
    let cases: &[Case] = if options.disk { &DISK_CASES } else { &CASES };
    for case in cases.iter().filter(|c| options.wants(c.name)) {
        rows.extend(measure(case, hops, options).with_context(|| format!("case {}", case.name))?);
    }
    let growth = growth(&rows);
    for row in growth.iter().filter(|r| r.metric == "guest_stopped_ms_p50") {
        let held = if row.ours <= GROWTH_MAX { "at most" } else { "missed:" };
        println!(
            "{}: the guest stands still {:.2} times as long, {held} {GROWTH_MAX}",
            row.case, row.ours
        );
    }
    rows.extend(growth);
    Ok(rows)
}

/// The larger guest's times as multiples of the smaller one's, where both were measured.
fn growth(rows: &[Row]) -> Vec<Row> {
    let mut out = Vec::new();
    for (name, small, large) in GROWTH {
        let of = |case: &'static str| {
            let timed = move |r: &&Row| r.case == case && r.metric.ends_with("_ms_p50");
            rows.iter().filter(timed)
        };
        for l in of(large) {
            let Some(s) = of(small).find(|s| s.metric == l.metric && s.peer_name == l.peer_name) else {
                continue;
            };
            let row = Row::new(name, &l.metric, "times", l.ours / s.ours, l.runs.min(s.runs));
            out.push(match &l.peer_name {
                Some(peer) => row.beside(peer, l.peer.zip(s.peer).map(|(l, s)| l / s)),
                None => row,
            });
        }
    }
    out
}

fn spec(name: &str, n: u8, case: &Case) -> VmSpec {
    VmSpec {
        mem_mib: case.mib,
        vcpus: case.vcpus,
        disks: case.disks.to_vec(),
        dirty: DIRTY,
        work_us: 200,
        pattern_mib: Some(case.mib / 2),
        ..VmSpec::new(name, n)
    }
}

fn measure(case: &Case, hops: usize, options: &Options) -> Result<Vec<Row>> {
    let mut ours = Ours::start(&spec("web", 10, case))?;
    let measured = hop_in_turns(case, &mut ours, hops, options).and_then(|rows| {
        ours.verify().context("after all hops")?;
        Ok(rows)
    });
    if let Err(e) = measured {
        let kept = ours.pair.lab.keep_logs(&target_dir()?.join("bench-logs"))?;
        bail!("{e:#}\nlogs are in {}", kept.display());
    }
    measured
}

/// Its hosts share its disks.
fn peer(ours: &Ours, case: &Case) -> Result<VmSpec> {
    let images = (!case.disks.is_empty())
        .then(|| ours.pair.host("a")?.folder("shared"))
        .transpose()?;
    Ok(VmSpec {
        images,
        ..spec("peer", 20, case)
    })
}

fn hop_in_turns(case: &Case, ours: &mut Ours, hops: usize, options: &Options) -> Result<Vec<Row>> {
    let mut stock = match options.alone {
        true => None,
        false => Some(Stock::start(&ours.pair.lab, &peer(ours, case)?)?),
    };
    let case = case.name;
    let (mut us, mut reports) = (Vec::new(), Vec::new());
    let mut peers: BTreeMap<&str, Vec<Hop>> = BTreeMap::new();
    for n in 0..hops {
        let (hop, report) = ours.hop().with_context(|| format!("our hop {n}"))?;
        println!(
            "{case} hop {n}: stopped {:.1} ms, command to running {:.1} ms, {}",
            hop.stopped_ms,
            hop.command_ms,
            parts(&[report])
        );
        us.push(hop);
        reports.push(report);
        let Some(stock) = &mut stock else { continue };
        for (name, multifd) in [("stock migrate", false), ("migrate-multifd", true)] {
            let hop = stock
                .hop(&ours.pair.lab, multifd)
                .with_context(|| format!("hop {n} of {name}"))?;
            println!(
                "{case} hop {n} of {name}: stopped {:.1} ms, command to running {:.1} ms",
                hop.stopped_ms, hop.command_ms
            );
            peers.entry(name).or_default().push(hop);
        }
    }
    tell(case, &us, &reports);
    Ok(rows(case, &us, &peers))
}

fn rows(case: &str, ours: &[Hop], peers: &BTreeMap<&str, Vec<Hop>>) -> Vec<Row> {
    let value = |hops: &[Hop], p: f64, of: fn(&Hop) -> f64| percentile(&hops.iter().map(of).collect::<Vec<_>>(), p);
    let mut rows = Vec::new();
    for (metric, p, of) in METRICS {
        let row = Row::new(case, metric, "ms", value(ours, p, of).unwrap_or_default(), ours.len());
        if peers.is_empty() {
            rows.push(row);
            continue;
        }
        for (name, hops) in peers.iter().rev() {
            rows.push(row.clone().beside(name, value(hops, p, of)));
        }
    }
    rows
}

fn parts(reports: &[SwitchoverReport]) -> String {
    let of = |part: fn(&SwitchoverReport) -> u64| {
        let all: Vec<f64> = reports.iter().map(|r| part(r) as f64 / 1e3).collect();
        median(&all).unwrap_or_default()
    };
    let all: Vec<String> = PARTS
        .iter()
        .map(|(name, part)| format!("{name} {:.1}", of(*part)))
        .collect();
    all.join(", ")
}

/// What no row holds: where the time goes, and how much of the longest wait for an answer is not the switchover's.
fn tell(case: &str, hops: &[Hop], reports: &[SwitchoverReport]) {
    println!("{case}, medians of our hops' parts in ms: {}", parts(reports));
    let after: Vec<f64> = hops
        .iter()
        .map(|h| (h.seen.reply_gap_ms - h.stopped_ms).max(0.0))
        .collect();
    println!(
        "{case}: {:.0} ms (median) of our longest gap between replies lie outside of the stopped time; under TCG the new QEMU \
         also has to translate the guest's code anew; how much that is was not told apart",
        median(&after).unwrap_or_default()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_guest_is_told_in_multiples_of_the_smaller() {
        let row = |case: &str, ours, peer| {
            Row::new(case, "guest_stopped_ms_p50", "ms", ours, 5).beside("stock migrate", Some(peer))
        };
        let rows = [row("256MiB", 4.0, 10.0), row("1GiB", 4.0, 20.0), row("4GiB", 5.0, 40.0)];
        let all = growth(&rows);
        assert_eq!(
            all,
            [
                Row::new("4GiB over 256MiB", "guest_stopped_ms_p50", "times", 1.25, 5)
                    .beside("stock migrate", Some(4.0))
            ]
        );
        assert!(growth(&rows[..2]).is_empty(), "only what was measured");
    }
}
