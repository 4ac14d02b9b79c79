//! What travels again after a broken link: the same idle VM's first copy beside the pass that follows a cut.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use umbra_api::replica::{Phase, ReplicaStatus, Role};

use super::Options;
use super::rows::{Row, median};
use crate::lab::daemons::{Binaries, target_dir};
use crate::lab::pair::Pair;
use crate::lab::process::wait_for;
use crate::lab::vm::VmSpec;

const RUNS: usize = 5;
const QUICK_RUNS: usize = 2;
const NOTICED: Duration = Duration::from_secs(60);
const WARM: Duration = Duration::from_secs(120);
/// How long the link stays cut after that was noticed.
const AWAY: Duration = Duration::from_secs(5);
const PAGE: f64 = 4096.0;
const MIB: f64 = 1_048_576.0;

pub fn run(options: &Options) -> Result<Vec<Row>> {
    Binaries::find(&["umbra-replicator"])?;
    let runs = if options.quick { QUICK_RUNS } else { RUNS };
    let mut rows = Vec::new();
    for mem_mib in [256, 1024] {
        let case = format!("{mem_mib} MiB");
        if options.wants(&case) {
            let spec = VmSpec {
                dirty: 0,
                mem_mib,
                ..VmSpec::new("web", 10)
            };
            rows.extend(measure(&case, &spec, runs)?);
        }
    }
    Ok(rows)
}

fn measure(case: &str, spec: &VmSpec, runs: usize) -> Result<Vec<Row>> {
    let mut pair = Pair::start_unwatched(spec)?;
    let measured = in_one_protection(case, &mut pair, runs).and_then(|rows| {
        pair.verify().context("after all runs")?;
        Ok(rows)
    });
    if let Err(e) = measured {
        let kept = pair.lab.keep_logs(&target_dir()?.join("bench-logs"))?;
        bail!("{e:#}\nlogs are in {}", kept.display());
    }
    measured
}

fn source(pair: &Pair) -> Result<ReplicaStatus> {
    pair.replica("a", Role::Source)?.context("there is no replica")
}

fn in_one_protection(case: &str, pair: &mut Pair, runs: usize) -> Result<Vec<Row>> {
    pair.protect("a", "b")?;
    let first = pair.wait_standby("a")?.progress;
    let (mut pages, mut bytes, mut took) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..runs {
        let before = source(pair)?.progress;
        pair.lab.set_uplink("b", false)?;
        wait_for("the cut to be noticed", NOTICED, || {
            Ok((source(pair)?.phase == Phase::Seeding).then_some(()))
        })?;
        sleep(AWAY);
        pair.lab.set_uplink("b", true)?;
        let after = wait_for("the copy to be warm again", WARM, || {
            let r = source(pair)?;
            let again = r.progress.resume.passes > before.resume.passes;
            Ok((r.phase == Phase::Standby && again).then_some(r.progress))
        })?;
        println!("run {n}: {:?} after {:?}", after.resume, first.resume);
        pages.push(after.resume.sent_pages as f64 * PAGE);
        // What the target told of its pages is among it.
        bytes.push((after.wire_bytes - before.wire_bytes) as f64);
        took.push(after.seed_ms.unwrap_or(0) as f64);
    }
    let of_ram: Vec<f64> = pages.iter().map(|p| 100.0 * p / first.ram_bytes as f64).collect();
    let mib: Vec<f64> = bytes.iter().map(|b| b / MIB).collect();
    let first_pages = first.resume.sent_pages as f64 * PAGE;
    let seed = |v: f64| Some(v);
    let row = |metric, unit, values: &[f64], peer| {
        median(values).map(|v| Row::new(case, metric, unit, v, runs).beside("first copy", seed(peer)))
    };
    let share = 100.0 * first_pages / first.ram_bytes as f64;
    Ok([
        row("ram_again_pct", "%", &of_ram, share),
        row("link_mib", "MiB", &mib, first.wire_bytes as f64 / MIB),
        row("pass_ms", "ms", &took, first.seed_ms.unwrap_or(0) as f64),
    ]
    .into_iter()
    .flatten()
    .collect())
}
