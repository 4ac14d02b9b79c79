//! How fast the first copy of a whole guest is: ours through both replicators, over TLS, into the shadow's RAM; stock's through
//! both QEMUs, in clear.
//!
//! Most of the guest's RAM is in use, no page twice, and zstd halves it: the whole way of the pages is measured, QEMU's stream,
//! parsing, hashing, packing, the link, unpacking, writing. Both are told zstd's level 1. The guests are idle, run while
//! they are copied, and are paused while the other one is.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::Options;
use super::ours::{pause, resume};
use super::rows::{Row, median};
use super::stock::Stock;
use crate::lab::daemons::{Binaries, target_dir};
use crate::lab::pair::Pair;
use crate::lab::process::wait_for;
use crate::lab::qmp::Qmp;
use crate::lab::vm::VmSpec;

const RUNS: usize = 7;
const QUICK_RUNS: usize = 3;
const CASES: [(&str, u32); 2] = [("512MiB", 512), ("2GiB", 2048)];
/// The lowest, and the replicator's own default.
const ZSTD_LEVEL: u8 = 1;
/// Of stock's speed.
const SHARE_MIN: f64 = 0.7;
const CLEARED: Duration = Duration::from_secs(60);

const STOCK: [(&str, Option<u8>); 2] = [("multifd, zstd 1", Some(ZSTD_LEVEL)), ("migrate, plain", None)];

pub fn run(options: &Options) -> Result<Vec<Row>> {
    Binaries::find(&["umbra-replicator"])?;
    let runs = if options.quick { QUICK_RUNS } else { RUNS };
    let mut rows = Vec::new();
    let cases = CASES.iter().take(if options.quick { 1 } else { CASES.len() });
    for (case, mib) in cases.filter(|(case, _)| options.wants(case)) {
        rows.extend(measure(case, *mib, runs, options).with_context(|| format!("case {case}"))?);
    }
    Ok(rows)
}

fn spec(name: &str, n: u8, mib: u32) -> VmSpec {
    VmSpec {
        mem_mib: mib,
        dirty: 0,
        pattern_mib: Some(mib / 4 * 3),
        // Less often than it is copied.
        scrub_s: 3_600,
        ..VmSpec::new(name, n)
    }
}

fn measure(case: &str, mib: u32, runs: usize, options: &Options) -> Result<Vec<Row>> {
    let mut pair = Pair::start_unbound(&spec("web", 10, mib))?;
    let measured = in_turns(case, &mut pair, mib, runs, options);
    if let Err(e) = measured {
        let kept = pair.lab.keep_logs(&target_dir()?.join("bench-logs"))?;
        bail!("{e:#}\nlogs are in {}", kept.display());
    }
    measured
}

fn in_turns(case: &str, pair: &mut Pair, mib: u32, runs: usize, options: &Options) -> Result<Vec<Row>> {
    let qmp = pair.vm.watch()?;
    pause(&qmp)?;
    let mut stock = match options.alone {
        true => None,
        false => Some(Stock::start(&pair.lab, &spec("peer", 20, mib))?),
    };
    let mut ours = Vec::new();
    let mut peers = STOCK.map(|(name, _)| (name, Vec::new()));
    for n in 0..runs {
        let speed = seed(pair, &qmp).with_context(|| format!("our copy {n}"))?;
        println!("{case} copy {n}: {speed:.0} MB/s");
        ours.push(speed);
        let Some(stock) = &mut stock else { continue };
        for ((name, level), (_, speeds)) in STOCK.iter().zip(&mut peers) {
            let (bytes, seconds) = stock
                .copy(&pair.lab, *level)
                .with_context(|| format!("copy {n} of {name}"))?;
            println!("{case} copy {n} of {name}: {:.0} MB/s", bytes / 1e6 / seconds);
            speeds.push(bytes / 1e6 / seconds);
        }
    }
    Ok(rows(case, &ours, &peers))
}

/// One whole copy; MB of RAM that is in use, a second.
fn seed(pair: &mut Pair, qmp: &Qmp) -> Result<f64> {
    resume(qmp)?;
    let begun = Instant::now();
    pair.protect("a", "b")?;
    let progress = pair.wait_standby("a")?.progress;
    println!(
        "  {:?} from the order, of it the first pass {} ms; {} MB on the link; {}",
        begun.elapsed(),
        progress.seed_ms.unwrap_or_default(),
        progress.wire_bytes / 1_000_000,
        json!(progress.pages)
    );
    pair.release()?;
    wait_for("the shadow to be gone", CLEARED, || {
        let (replicas, files) = (pair.replicator("b")?.replicas()?, pair.ram_files("b")?);
        let over = replicas.iter().all(|r| !crate::lab::pair::waits(r));
        Ok((over && files.is_empty()).then_some(()))
    })?;
    pause(qmp)?;
    let ms = progress.seed_ms.context("no time of the first pass")?;
    let zero = progress.pages.zero.pages * 4096;
    Ok((progress.seeded_bytes.saturating_sub(zero)) as f64 / 1e3 / ms.max(1) as f64)
}

fn rows(case: &str, ours: &[f64], peers: &[(&str, Vec<f64>)]) -> Vec<Row> {
    let speed = median(ours).unwrap_or_default();
    let row = Row::new(case, "seed_mb_per_s", "MB/s", speed, ours.len());
    let measured: Vec<(&str, f64)> = peers
        .iter()
        .filter_map(|(name, all)| Some((*name, median(all)?)))
        .collect();
    if measured.is_empty() {
        return vec![row];
    }
    let mut rows = Vec::new();
    for (name, peer) in measured {
        println!(
            "{case}: {:.0} % of the speed of {name} (the bar, with the same compression, is {:.0} %)",
            speed / peer * 100.0,
            SHARE_MIN * 100.0
        );
        rows.push(row.clone().beside(name, Some(peer)));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_stand_beside_each_way_of_stock() {
        let peers = [("one", vec![10.0, 30.0, 20.0]), ("none", Vec::new())];
        let row = Row::new("512MiB", "seed_mb_per_s", "MB/s", 5.0, 3);
        assert_eq!(
            rows("512MiB", &[4.0, 5.0, 9.0], &peers),
            [row.beside("one", Some(20.0))]
        );
        assert_eq!(rows("512MiB", &[5.0], &[]).len(), 1);
    }
}
