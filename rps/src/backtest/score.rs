//! How good forecasts were: MAE, MASE, pinball loss and coverage, as the protocol defines them.
//!
//! A slot without a sample is not scored, nor is a VM whose mean step is next to nothing: its MASE would be noise over noise.

use std::ops::Range;

use crate::forecast::{LEVELS, P50, P90, P95, pinball_at};

/// Positions in [`LEVELS`] of the quantiles that are scored.
pub const AT: [usize; 3] = [P50, P90, P95];
/// A VM's origins are counted in two halves, for folds by time.
pub const HALVES: usize = 2;
pub const BOTH_HALVES: Range<usize> = 0..HALVES;
/// Below this mean step a VM is constant.
const SCALE_MIN: f64 = 0.02;

/// Sums over forecast slots.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Tally {
    points: usize,
    error: f64,
    pinball: [f64; AT.len()],
    covered: [usize; AT.len()],
}

impl Tally {
    /// `q` at the levels of [`AT`].
    pub fn add(&mut self, truth: f64, q: &[f64; AT.len()]) {
        self.points += 1;
        self.error += (truth - q[0]).abs();
        for (i, level) in AT.iter().map(|at| LEVELS[*at]).enumerate() {
            self.pinball[i] += pinball_at(level, q[i], truth);
            self.covered[i] += usize::from(truth <= q[i]);
        }
    }

    fn merge(&mut self, other: &Self) {
        self.points += other.points;
        self.error += other.error;
        for i in 0..AT.len() {
            self.pinball[i] += other.pinball[i];
            self.covered[i] += other.covered[i];
        }
    }
}

/// One VM's tallies: by forecaster, by half.
#[derive(Clone, PartialEq, Debug)]
pub struct Walked {
    /// Mean absolute step of the whole series.
    scale: f64,
    tallies: Vec<[Tally; HALVES]>,
}

impl Walked {
    /// `slots` of the whole trace, of which a VM may have fewer.
    pub fn new(values: &[Option<f64>], slots: usize, forecasters: usize) -> Self {
        Self {
            scale: mean_step(values, slots),
            tallies: vec![[Tally::default(); HALVES]; forecasters],
        }
    }

    pub fn tally(&mut self, forecaster: usize, half: usize) -> Option<&mut Tally> {
        self.tallies.get_mut(forecaster)?.get_mut(half)
    }
}

/// A missing slot repeats the one before it, a leading one the first that is there; so both step by nothing.
fn mean_step(values: &[Option<f64>], slots: usize) -> f64 {
    let mut seen = values.iter().flatten();
    let Some(mut last) = seen.next().copied() else {
        return 0.0;
    };
    let mut sum = 0.0;
    for v in seen {
        sum += (v - last).abs();
        last = *v;
    }
    sum / slots.saturating_sub(1).max(1) as f64
}

/// Over a set of VMs.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Score {
    pub vms: usize,
    pub points: usize,
    pub mae: f64,
    /// Mean over VMs of MAE by mean step.
    pub mase: f64,
    pub pinball: [f64; AT.len()],
    pub coverage: [f64; AT.len()],
}

impl Score {
    /// Of one forecaster, on the VMs at the positions that `takes` takes and in the given halves.
    pub fn of(walked: &[Walked], forecaster: usize, takes: impl Fn(usize) -> bool, halves: Range<usize>) -> Self {
        let mut all = Tally::default();
        let (mut vms, mut relative) = (0, 0.0);
        for (_, vm) in walked.iter().enumerate().filter(|(i, _)| takes(*i)) {
            let mut own = Tally::default();
            let halves = vm.tallies.get(forecaster).and_then(|t| t.get(halves.clone()));
            halves.into_iter().flatten().for_each(|t| own.merge(t));
            if vm.scale > SCALE_MIN && own.points > 0 {
                vms += 1;
                relative += own.error / own.points as f64 / vm.scale;
                all.merge(&own);
            }
        }
        let points = all.points.max(1) as f64;
        Self {
            vms,
            points: all.points,
            mae: all.error / points,
            mase: relative / vms.max(1) as f64,
            pinball: all.pinball.map(|p| p / points),
            coverage: all.covered.map(|c| c as f64 / points),
        }
    }

    /// Beneath [`heading`].
    pub fn row(&self, title: &str, who: &str) -> String {
        let ([_, p90, p95], [c50, c90, c95]) = (self.pinball, self.coverage);
        let Self {
            vms, points, mae, mase, ..
        } = self;
        format!(
            "{title:<24} {who:<22} {vms:>5} {points:>8} {mae:>11.4} {mase:>7.4} {p90:>10.4} {p95:>10.4} {c50:>6.4} {c90:>6.4} {c95:>6.4}"
        )
    }
}

pub fn heading() -> String {
    format!(
        "{:<24} {:<22} {:>5} {:>8} {:>11} {:>7} {:>10} {:>10} {:>6} {:>6} {:>6}",
        "trace", "forecast by", "VMs", "slots", "MAE", "MASE", "pinball.9", "pinball.95", "cov.5", "cov.9", "cov.95"
    )
}
