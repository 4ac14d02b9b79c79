//! What a warm shadow costs while it waits: the guest, and both hosts.
//!
//! One VM with a disk; each run measures it without a shadow and with one. The guest's own throughput is counted from outside, while
//! it changes 2,000 pages a second besides: rounds of a fixed loop and writes to a few pages (one web request each), records on its disk,
//! each with `fdatasync`, and small web requests, one after the other. One more row is another case than the aim's: pages that it
//! writes as fast as it can.
//! What the scrub costs of it both replicators count themselves: between on and off the difference is below what the loads differ
//! from run to run.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use umbra_api::replica::{Resumption, Role};
use umbra_replicator::resume::sum;
use umbra_replicator::stream::items::PAGE_SIZE;

use super::Options;
use super::rows::{Row, median};
use crate::lab::daemons::{Binaries, target_dir};
use crate::lab::disk::{Bus, DiskSpec};
use crate::lab::http::Connection;
use crate::lab::pair::Pair;
use crate::lab::process::wait_for;
use crate::lab::sched;
use crate::lab::vm::{self, HTTP, Stats, VmSpec};

const RUNS: usize = 5;
const QUICK_RUNS: usize = 2;
const WINDOW: Duration = Duration::from_secs(5);
const QUICK_WINDOW: Duration = Duration::from_secs(3);
/// The loop of one request: long enough that the request itself does not count.
const WORK_US: u32 = 5000;
/// Pages a second of the row `busy`.
const BUSY: u32 = 2000;
/// More than any guest can write, pages and records.
const FLAT_OUT: u32 = 100_000_000;
/// The least that the guest knows.
const RARELY: u32 = 1;
const DISK: DiskSpec = DiskSpec {
    bus: Bus::VirtioBlk,
    format: "qcow2",
    mib: 64,
};
const FLAT_OUT_CASE: &str = "memory, flat out";
const REPLY: Duration = Duration::from_secs(10);
const CALM: Duration = Duration::from_secs(60);

/// CPU time in percent of a core.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    qemu: f64,
    source: f64,
    target: f64,
}

/// What the scrub costs while the guest writes at the row `busy`'s rate.
#[derive(Clone, Copy, Debug)]
struct Scrub {
    source: f64,
    target: f64,
    source_s_per_gb: f64,
    target_s_per_gb: f64,
}

/// One run's figures: throughputs a second by case, loads by row.
#[derive(Default)]
struct Figures {
    rates: BTreeMap<&'static str, f64>,
    loads: BTreeMap<&'static str, Load>,
    scrub: Option<Scrub>,
}

pub fn run(options: &Options) -> Result<Vec<Row>> {
    Binaries::find(&["umbra-replicator"])?;
    let (runs, window) = match options.quick {
        true => (QUICK_RUNS, QUICK_WINDOW),
        false => (RUNS, WINDOW),
    };
    let spec = VmSpec {
        dirty: 0,
        work_us: WORK_US,
        pattern_mib: Some(128),
        disks: vec![DISK],
        ..VmSpec::new("web", 10)
    };
    let mut pair = Pair::start_unwatched(&spec)?;
    let measured = in_turns(&mut pair, runs, window).and_then(|rows| {
        pair.verify().context("after all runs")?;
        Ok(rows)
    });
    if let Err(e) = measured {
        let kept = pair.lab.keep_logs(&target_dir()?.join("bench-logs"))?;
        bail!("{e:#}\nlogs are in {}", kept.display());
    }
    measured
}

fn in_turns(pair: &mut Pair, runs: usize, window: Duration) -> Result<Vec<Row>> {
    let (mut alone, mut shadowed) = (Vec::new(), Vec::new());
    for n in 0..runs {
        let without = measure(pair, window).with_context(|| format!("run {n} without a shadow"))?;
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        let with = measure(pair, window).with_context(|| format!("run {n} with a shadow"))?;
        pair.release()?;
        pair.wait_alone()?;
        println!(
            "run {n}: a second without {:.0?}, with {:.0?}",
            without.rates, with.rates
        );
        alone.push(without);
        shadowed.push(with);
    }
    Ok(rows(&alone, &shadowed))
}

fn rows(alone: &[Figures], shadowed: &[Figures]) -> Vec<Row> {
    let runs = alone.len();
    let mut rows = Vec::new();
    for case in ["cpu", "memory", "disk", "http", FLAT_OUT_CASE] {
        let pairs = alone.iter().zip(shadowed);
        let losses: Vec<f64> = pairs
            .filter_map(|(a, s)| Some(100.0 * (1.0 - s.rates.get(case)? / a.rates.get(case)?)))
            .collect();
        rows.extend(median(&losses).map(|loss| Row::new(case, "guest_loss_pct", "%", loss, runs)));
    }
    for case in ["idle", "busy"] {
        let mut row = |metric, of: fn(Load, Load) -> f64| {
            let pairs = alone.iter().zip(shadowed);
            let all: Vec<f64> = pairs
                .filter_map(|(a, s)| Some(of(*a.loads.get(case)?, *s.loads.get(case)?)))
                .collect();
            rows.extend(median(&all).map(|v| Row::new(case, metric, "%", v, runs)));
        };
        row("qemu_cpu_pct", |a, s| s.qemu - a.qemu);
        row("source_cpu_pct", |_, s| s.source);
        row("target_cpu_pct", |_, s| s.target);
    }
    let mut row = |metric, unit, of: fn(Scrub) -> f64| {
        let all: Vec<f64> = shadowed.iter().filter_map(|f| f.scrub.map(of)).collect();
        rows.extend(median(&all).map(|v| Row::new("scrub", metric, unit, v, runs)));
    };
    row("source_cpu_pct", "%", |s| s.source);
    row("target_cpu_pct", "%", |s| s.target);
    row("source_cpu_s_per_gb", "s/GB", |s| s.source_s_per_gb);
    row("target_cpu_s_per_gb", "s/GB", |s| s.target_s_per_gb);
    rows.push(Row::new("scrub", "sum_ns", "ns/page", sum_ns(), 1));
    rows
}

/// What noting a page's sum costs the source, for each page that it sends.
fn sum_ns() -> f64 {
    const PAGES: u32 = 200_000;
    let mut page = [0x5a; PAGE_SIZE];
    let start = Instant::now();
    for n in 0..PAGES {
        page[..4].copy_from_slice(&n.to_le_bytes());
        std::hint::black_box(sum(std::hint::black_box(&page)));
    }
    start.elapsed().as_nanos() as f64 / f64::from(PAGES)
}

/// What both sides count meanwhile; a shadow that is not there is not scrubbed.
fn scrub(pair: &Pair, window: Duration) -> Result<Option<Scrub>> {
    let look = || -> Result<Option<(Resumption, Resumption)>> {
        let of = |host, role| Ok::<_, anyhow::Error>(pair.replica(host, role)?.map(|r| r.progress.resume));
        Ok(of("a", Role::Source)?.zip(of("b", Role::Target)?))
    };
    let Some((source, target)) = look()? else {
        return Ok(None);
    };
    let start = Instant::now();
    sleep(window);
    let took = start.elapsed().as_secs_f64();
    let (source_then, target_then) = look()?.context("the shadow is gone")?;
    let cpu = |now: Resumption, then: Resumption| then.scrub_cpu_us.saturating_sub(now.scrub_cpu_us) as f64 / 1e6;
    let pages = target_then.scrubbed_pages.saturating_sub(target.scrubbed_pages);
    let gb = (pages * PAGE_SIZE as u64) as f64 / 1e9;
    let (source, target) = (cpu(source, source_then), cpu(target, target_then));
    Ok((pages > 0).then_some(Scrub {
        source: 100.0 * source / took,
        target: 100.0 * target / took,
        source_s_per_gb: source / gb,
        target_s_per_gb: target / gb,
    }))
}

fn measure(pair: &mut Pair, window: Duration) -> Result<Figures> {
    let mut f = Figures::default();
    order(pair, "/disk", RARELY)?;
    for (row, pages) in [("idle", 0), ("busy", BUSY)] {
        order(pair, "/dirty", pages)?;
        // The rate before is still in the first round.
        sleep(Duration::from_millis(600));
        f.loads.insert(row, load(pair, window)?);
    }
    f.scrub = scrub(pair, window)?;
    // What is translated and cached the first time is not the shadow's fault.
    for (case, path) in [("", "/stats"), ("cpu", "/"), ("memory", "/memory"), ("http", "/stats")] {
        f.rates.insert(case, requests(pair, path, window)?);
    }
    order(pair, "/disk", FLAT_OUT)?;
    f.rates
        .insert("disk", counted(pair, window, |s| s.disks.values().sum())?);
    order(pair, "/disk", RARELY)?;
    order(pair, "/dirty", FLAT_OUT)?;
    f.rates.insert(FLAT_OUT_CASE, counted(pair, window, |s| s.dirty_pages)?);
    order(pair, "/dirty", 0)?;
    Ok(f)
}

/// A second, of what the guest counts.
fn counted(pair: &Pair, window: Duration, of: fn(&Stats) -> u64) -> Result<f64> {
    let look = || vm::stats(&pair.lab.client, pair.vm.spec.ip).map(|s| of(&s));
    let (before, start) = (look()?, Instant::now());
    sleep(window);
    let after = look()?;
    Ok(after.saturating_sub(before) as f64 / start.elapsed().as_secs_f64())
}

/// Pages or records a second from now on.
fn order(pair: &Pair, path: &str, rate: u32) -> Result<()> {
    let ip = pair.vm.spec.ip;
    // A guest that writes flat out may be late.
    wait_for("the guest to write at another rate", CALM, || {
        let told = pair.lab.client.post((ip, HTTP), path, &rate.to_string());
        Ok(told.ok().filter(|r| r.status == 200).map(|_| ()))
    })
}

/// Requests a second on one connection, one after the other.
fn requests(pair: &Pair, path: &str, window: Duration) -> Result<f64> {
    let mut c = Connection::open(&pair.lab.client.ns, (pair.vm.spec.ip, HTTP), REPLY, REPLY)?;
    let (start, mut n) = (Instant::now(), 0u64);
    while start.elapsed() < window {
        c.request("GET", path, None, false)?.ok()?;
        n += 1;
    }
    Ok(n as f64 / start.elapsed().as_secs_f64())
}

fn load(pair: &mut Pair, window: Duration) -> Result<Load> {
    let id = pair.vm.spec.id;
    let (qemu, shadows) = (pair.vm.process.pid(), vm::qemus(pair.host("b")?, id));
    let (source, target) = (pair.replicator_process("a")?.pid(), pair.replicator_process("b")?.pid());
    let groups = [vec![qemu], vec![source], [vec![target], shadows].concat()];
    let mut readers: Vec<Vec<_>> = groups
        .iter()
        .map(|g| g.iter().map(|p| (*p, sched::Reader::default())).collect())
        .collect();
    let mut read = || -> Result<Vec<u64>> {
        let of = |group: &mut Vec<(i32, sched::Reader)>| {
            let each = group.iter_mut().map(|(pid, r)| Ok(r.read(*pid)?.run_ns));
            each.sum::<Result<u64>>()
        };
        readers.iter_mut().map(of).collect()
    };
    let (before, start) = (read()?, Instant::now());
    sleep(window);
    let (after, took) = (read()?, start.elapsed());
    let pct: Vec<f64> = before
        .iter()
        .zip(&after)
        .map(|(b, a)| 100.0 * a.saturating_sub(*b) as f64 / took.as_nanos() as f64)
        .collect();
    match pct.as_slice() {
        [qemu, source, target] => Ok(Load {
            qemu: *qemu,
            source: *source,
            target: *target,
        }),
        _ => bail!("three groups of processes were measured"),
    }
}
