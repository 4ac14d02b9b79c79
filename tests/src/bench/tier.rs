//! What a shadow of 1 GiB keeps in RAM at tier 0, how long a promotion to tier 2 takes, and how long the guest stands still when it
//! is switched over straight from tier 0.
//!
//! Swap is this machine's, or a file on its disk for as long as this runs: the times are that disk's.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use umbra_api::order::Tier;

use super::Options;
use super::rows::{Row, median};
use crate::lab::daemons::{Binaries, target_dir};
use crate::lab::pair::Pair;
use crate::lab::sys;
use crate::lab::vm::VmSpec;

const CASE: &str = "1GiB";
const RUNS: usize = 5;
const QUICK_RUNS: usize = 2;
/// What the guest writes meanwhile, in pages a second.
const DIRTY: u32 = 2000;
const SWAP_MIB: u64 = 1536;
const HOSTS: [&str; 2] = ["a", "b"];
/// After the shadow was shrunk: rounds go on, and it is shrunk again.
const SETTLE: Duration = Duration::from_secs(20);
/// Each a reading of what is resident then.
const LOOKS: u32 = 10;

#[derive(Default)]
struct Figures {
    resident_pct: Vec<f64>,
    promote_s: Vec<f64>,
    read_mb: Vec<f64>,
    stopped_ms: Vec<f64>,
    back_s: Vec<f64>,
}

pub fn run(options: &Options) -> Result<Vec<Row>> {
    Binaries::find(&["umbra", "umbra-replicator"])?;
    let runs = if options.quick { QUICK_RUNS } else { RUNS };
    let spec = VmSpec {
        mem_mib: 1024,
        dirty: DIRTY,
        work_us: 200,
        pattern_mib: Some(768),
        ..VmSpec::new("web", 10)
    };
    let mut pair = Pair::start_unwatched(&spec)?;
    if let Err(why) = pair.lab.swap(SWAP_MIB)? {
        bail!("this machine can have no swap: {why}");
    }
    let measured = measure(&mut pair, runs).and_then(|figures| {
        pair.verify().context("after all runs")?;
        Ok(rows(&figures))
    });
    if let Err(e) = measured {
        let kept = pair.lab.keep_logs(&target_dir()?.join("bench-logs"))?;
        bail!("{e:#}\nlogs are in {}", kept.display());
    }
    measured
}

fn measure(pair: &mut Pair, runs: usize) -> Result<Figures> {
    let mut figures = Figures::default();
    for n in 0..runs {
        let (from, to) = (HOSTS[n % 2], HOSTS[(n + 1) % 2]);
        hop(pair, from, to, &mut figures).with_context(|| format!("run {n}, {from} to {to}"))?;
    }
    Ok(figures)
}

fn hop(pair: &mut Pair, from: &str, to: &str, figures: &mut Figures) -> Result<()> {
    pair.protect(from, to)?;
    pair.wait_standby(from)?;
    pair.shadow(to).order(Tier::Standby)?;
    pair.shadow(to).wait_shrunk()?;
    for _ in 0..LOOKS {
        std::thread::sleep(SETTLE / LOOKS);
        let used = pair
            .shadow(to)
            .memory()?
            .context("the target tells of no memory")?
            .used_bytes;
        figures
            .resident_pct
            .push(100.0 * pair.shadow(to).in_ram()? as f64 / used as f64);
    }
    pair.shadow(to).order(Tier::Active)?;
    let warm = pair
        .shadow(to)
        .wait("the promotion", |m| m.promotion.is_some_and(|p| p.tier == Tier::Active))?;
    let promotion = warm.promotion.context("no promotion")?;
    ensure!(
        warm.resident_bytes * 10 >= warm.used_bytes * 9,
        "not all came back: {warm:?}"
    );
    figures.promote_s.push(promotion.took_ms as f64 / 1e3);
    figures.read_mb.push(promotion.read_bytes as f64 / 1e6);

    pair.shadow(to).order(Tier::Standby)?;
    pair.shadow(to).wait_shrunk()?;
    let swapped = sys::own_swap_kib(pair.qemu(to)?);
    let report = pair.switchover(from)?;
    figures.stopped_ms.push(report.guest_stopped_us as f64 / 1e3);
    let back = pair.shadow(to).wait("the VM's RAM to be back", |m| {
        m.promotion.is_some_and(|p| p.at != promotion.at)
    })?;
    figures
        .back_s
        .push(back.promotion.context("no promotion")?.took_ms as f64 / 1e3);
    pair.retire(from)?;
    println!(
        "{from} to {to}: at tier 0 {:.1} % in RAM, tier 2 after {:.2} s, stopped from tier 0 {:.1} ms (last pass {:.1}, device state \
         {:.1}, load {:.1}), {swapped} KiB of QEMU's own in swap, all back {:.2} s later",
        figures.resident_pct.last().copied().unwrap_or_default(),
        figures.promote_s.last().copied().unwrap_or_default(),
        figures.stopped_ms.last().copied().unwrap_or_default(),
        report.last_pass_us as f64 / 1e3,
        report.device_state_us as f64 / 1e3,
        report.load_us as f64 / 1e3,
        figures.back_s.last().copied().unwrap_or_default(),
    );
    Ok(())
}

fn rows(f: &Figures) -> Vec<Row> {
    let row = |metric: &str, unit: &str, values: &[f64]| {
        median(values).map(|v| Row::new(CASE, metric, unit, v, values.len()))
    };
    [
        row("t0_resident_pct", "%", &f.resident_pct),
        row("promote_s", "s", &f.promote_s),
        row("promote_read_mb", "MB", &f.read_mb),
        row("switchover_from_t0_ms", "ms", &f.stopped_ms),
        row("back_after_switchover_s", "s", &f.back_s),
    ]
    .into_iter()
    .flatten()
    .collect()
}
