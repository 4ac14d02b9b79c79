//! The chosen expert against the last value on real traces, which lie beside a developer's checkout and are not part of
//! the project.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use umbra_api::UnixMs;
use umbra_rps::forecast::select::{Selector, experts};
use umbra_rps::forecast::{History, P50, P90, pinball};

const SLOT_MS: u64 = 300_000;
const HORIZON: usize = 12;
/// A day known before the first origin, as the traces' protocol has it.
const FIRST_ORIGIN: usize = 288;
/// Many VMs and few origins of each: VMs differ more than a VM's days do. Among sets of six VMs the ratio below went from
/// 0.89 to 1.02, so few would show luck.
const VM_STEP: usize = 7;
const ORIGIN_STEP: usize = 331;
/// What the choice may cost before it is called worse than the last value: the noise of so few forecasts.
const NOISE: f64 = 1.05;

/// CPU % by VM, 5-minute slots. `None`, said aloud, where the traces are absent.
fn bitbrains() -> Option<BTreeMap<u32, Vec<Option<f64>>>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/bitbrains_rnd_2013-08.csv.zst");
    let Ok(packed) = std::fs::read(&path) else {
        eprintln!("SKIPPED: no traces at {}", path.display());
        return None;
    };
    let text = String::from_utf8(zstd::decode_all(&packed[..]).unwrap()).unwrap();
    let mut series: BTreeMap<u32, Vec<Option<f64>>> = BTreeMap::new();
    for line in text.lines().skip(1) {
        let mut fields = line.split(',');
        let mut next = || fields.next().unwrap_or_default();
        let (vm, _, cpu) = (next(), next(), next());
        series.entry(vm.parse().unwrap()).or_default().push(cpu.parse().ok());
    }
    Some(series)
}

#[derive(Default)]
struct Score {
    chosen: f64,
    last: f64,
    chosen_abs: f64,
    last_abs: f64,
    targets: usize,
    covered: usize,
}

/// Sums of losses over origins `step` slots apart.
fn score(slots: &[Option<f64>], step: usize) -> Score {
    let mut selector = Selector::default();
    let baseline = experts().remove(0);
    let mut score = Score::default();
    for origin in (FIRST_ORIGIN..slots.len().saturating_sub(HORIZON)).step_by(step) {
        let end = UnixMs((origin as u64 * SLOT_MS) as i64);
        let history = History::new(&slots[..origin], end, SLOT_MS, 1000.0);
        let Some(chosen) = selector.forecast(&history, HORIZON, 12) else {
            continue;
        };
        let last = baseline.forecast(&history, HORIZON).unwrap();
        let pairs = chosen.quantiles.slots().iter().zip(last.slots());
        for ((ours, theirs), actual) in pairs.zip(&slots[origin..]) {
            let Some(actual) = actual else { continue };
            score.chosen += pinball(ours, *actual);
            score.last += pinball(theirs, *actual);
            score.chosen_abs += (ours[P50] - actual).abs();
            score.last_abs += (theirs[P50] - actual).abs();
            score.targets += 1;
            score.covered += usize::from(*actual <= ours[P90]);
        }
    }
    score
}

#[test]
fn the_chosen_expert_is_not_worse_than_the_last_value() {
    let Some(traces) = bitbrains() else { return };
    let started = Instant::now();
    let mut all = Score::default();
    let (mut pinballs, mut errors) = (Vec::new(), Vec::new());
    for slots in traces.values().step_by(VM_STEP) {
        let s = score(slots, ORIGIN_STEP);
        pinballs.push((s.chosen / s.last).ln());
        errors.push((s.chosen_abs / s.last_abs).ln());
        all.targets += s.targets;
        all.covered += s.covered;
    }
    // VMs differ by orders of magnitude: the mean of ratios must be geometric.
    let mean = |logs: &[f64]| (logs.iter().sum::<f64>() / logs.len() as f64).exp();
    let (pinball, mae) = (mean(&pinballs), mean(&errors));
    let forecasts = (all.targets / HORIZON).max(1);
    println!(
        "{} VMs, {forecasts} forecasts: pinball {pinball:.3} and MAE {mae:.3} of the last value's, {:.3} below the 0.9 \
         quantile, {:.1} ms a forecast",
        pinballs.len(),
        all.covered as f64 / all.targets as f64,
        started.elapsed().as_secs_f64() * 1e3 / forecasts as f64
    );
    assert!(pinball < NOISE, "the choice costs more than it brings: {pinball:.3}");
}
