//! Forecasts of one series: history in, quantiles out. Nothing here reads a clock or keeps state between calls but
//! [`auto::Auto`], which the caller owns.
//!
//! In reading order: the shapes ([`Quantiles`], [`History`], [`Forecaster`]) here; the experts ([`simple`], [`recent`],
//! [`analog`], [`smooth`]) and the period that some need ([`season`]); how an expert is judged ([`backtest`]) and chosen
//! ([`select`]); how all of them speak together ([`mix`]), and which of both ways it is ([`auto`]).

pub mod analog;
pub mod auto;
pub mod backtest;
pub mod mix;
pub mod recent;
pub mod season;
pub mod select;
pub mod simple;
pub mod smooth;

use umbra_api::UnixMs;

/// Quantile levels of every forecast, ascending.
pub const LEVELS: [f64; 7] = [0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99];

/// The standard normal's quantiles at [`LEVELS`].
pub const NORMAL: [f64; 7] = [-1.644_854, -0.674_490, 0.0, 0.674_490, 1.281_552, 1.644_854, 2.326_348];

/// Positions in [`LEVELS`].
pub const P50: usize = 2;
pub const P90: usize = 4;
pub const P95: usize = 5;
pub const P99: usize = 6;

/// A quantile a level.
pub type Band = [f64; LEVELS.len()];

/// A forecast: one [`Band`] a slot, each ascending, none below 0 nor above `bound`.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Quantiles {
    slots: Vec<Band>,
    bound: f64,
}

impl Quantiles {
    /// Takes any bands and makes them lawful: finite, within `0..=bound`, ascending. Whatever an expert computes passes
    /// here, so nothing behind a forecast needs to check again.
    pub fn new(mut slots: Vec<Band>, bound: f64) -> Self {
        let bound = if bound.is_finite() { bound.max(0.0) } else { f64::MAX };
        for band in &mut slots {
            let mid = if band[P50].is_finite() { band[P50] } else { 0.0 };
            band.iter_mut()
                .for_each(|q| *q = if q.is_finite() { *q } else { mid }.clamp(0.0, bound));
            // Sorting is the rearrangement that never worsens crossed quantiles' pinball loss.
            band.sort_by(f64::total_cmp);
        }
        Self { slots, bound }
    }

    /// The same normal band in every slot; for series too short to forecast, and for tests.
    pub fn flat(mean: f64, sigma: f64, horizon: usize, bound: f64) -> Self {
        Self::new(vec![NORMAL.map(|z| mean + z * sigma); horizon], bound)
    }

    pub fn slots(&self) -> &[Band] {
        &self.slots
    }

    pub fn horizon(&self) -> usize {
        self.slots.len()
    }

    pub fn bound(&self) -> f64 {
        self.bound
    }

    /// Highest value at level `LEVELS[i]` over the horizon.
    pub fn peak(&self, i: usize) -> f64 {
        self.slots.iter().filter_map(|b| b.get(i)).fold(0.0, |a, q| a.max(*q))
    }

    /// Without the first `n` slots.
    pub fn skip(mut self, n: usize) -> Self {
        self.slots.drain(..n.min(self.slots.len()));
        self
    }

    /// The value at standard normal score `z` in slot `h`: linear between the levels' scores, and beyond the outer ones
    /// on with the outer slope. Non-decreasing in `z`.
    pub fn at_score(&self, h: usize, z: f64) -> f64 {
        let Some(band) = self.slots.get(h) else { return 0.0 };
        score_value(band, z).clamp(0.0, self.bound)
    }
}

fn score_value(band: &Band, z: f64) -> f64 {
    let upper = NORMAL.iter().position(|n| z < *n).unwrap_or(NORMAL.len() - 1).max(1);
    let (z0, z1) = (NORMAL[upper - 1], NORMAL[upper]);
    let (q0, q1) = (band[upper - 1], band[upper]);
    q0 + (q1 - q0) * (z - z0) / (z1 - z0)
}

/// What an expert may look at: one value a slot, oldest first, gaps filled by the last value before them.
#[derive(Clone, PartialEq, Debug)]
pub struct History {
    values: Vec<f64>,
    measured: Vec<bool>,
    /// Start of the first slot to forecast.
    pub end: UnixMs,
    pub slot_ms: u64,
    /// What the series can't exceed.
    pub bound: f64,
    /// Slots of the season found, if one was.
    pub period: Option<usize>,
}

impl History {
    /// From slots with gaps. Leading gaps are dropped; a later gap carries the value before it, and is not scored.
    pub fn new(slots: &[Option<f64>], end: UnixMs, slot_ms: u64, bound: f64) -> Self {
        let mut values = Vec::with_capacity(slots.len());
        let mut measured = Vec::with_capacity(slots.len());
        for slot in slots {
            let value = slot.filter(|v| v.is_finite()).or(values.last().copied());
            if let Some(v) = value {
                values.push(v);
                measured.push(slot.is_some_and(f64::is_finite));
            }
        }
        Self {
            values,
            measured,
            end,
            slot_ms,
            bound,
            period: None,
        }
    }

    pub fn values(&self) -> &[f64] {
        &self.values
    }

    pub fn len(&self) -> usize {
        self.values.len()
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Slots that were measured, not carried.
    pub fn measured(&self) -> usize {
        self.measured.iter().filter(|m| **m).count()
    }

    /// The measured value at `i`.
    pub fn actual(&self, i: usize) -> Option<f64> {
        self.measured
            .get(i)
            .filter(|m| **m)
            .and_then(|_| self.values.get(i))
            .copied()
    }

    /// The newest `n` slots as they stood after the first `origin` ones.
    pub fn before(&self, origin: usize, n: usize) -> Self {
        let origin = origin.min(self.len());
        let from = origin.saturating_sub(n);
        let back = i64::try_from((self.len() - origin) as u64 * self.slot_ms).unwrap_or(i64::MAX);
        Self {
            values: self.values[from..origin].to_vec(),
            measured: self.measured[from..origin].to_vec(),
            end: self.end.plus_ms(-back),
            slot_ms: self.slot_ms,
            bound: self.bound,
            period: self.period,
        }
    }
}

/// An expert. `None` where it has nothing honest to say (too short a history, no season).
pub trait Forecaster: Send + Sync {
    fn name(&self) -> &str;
    /// Exactly `horizon` bands.
    fn forecast(&self, history: &History, horizon: usize) -> Option<Quantiles>;
    /// Slots of history beyond which more does not change the answer; bounds the cost of a backtest.
    fn reach(&self, history: &History) -> usize {
        history.len()
    }
}

/// Pinball loss of one quantile.
pub fn pinball_at(level: f64, quantile: f64, actual: f64) -> f64 {
    let e = actual - quantile;
    (level * e).max((level - 1.0) * e)
}

/// Mean pinball loss of a band over [`LEVELS`], in the series' unit.
pub fn pinball(band: &Band, actual: f64) -> f64 {
    let sum: f64 = LEVELS
        .iter()
        .zip(band)
        .map(|(level, q)| pinball_at(*level, *q, actual))
        .sum();
    sum / LEVELS.len() as f64
}

/// Quantile of weighted values by linear interpolation between the weights' midpoints; `sorted` ascends by value.
/// `None` without weight.
pub fn weighted_quantile(sorted: &[(f64, f64)], level: f64) -> Option<f64> {
    weighted_quantiles(sorted, &[level]).map(|[q]| q)
}

/// [`weighted_quantile`] at all of `levels`, which ascend, in one pass.
pub fn weighted_quantiles<const N: usize>(sorted: &[(f64, f64)], levels: &[f64; N]) -> Option<[f64; N]> {
    let total: f64 = sorted.iter().map(|(_, w)| w).sum();
    if total <= 0.0 || total.is_nan() {
        return None;
    }
    let mut out = [0.0; N];
    let (mut at, mut seen, mut previous) = (0, 0.0, None::<(f64, f64)>);
    for (value, weight) in sorted.iter().filter(|(_, w)| *w > 0.0) {
        let mid = seen + weight / 2.0;
        while let Some(level) = levels.get(at).filter(|l| mid >= **l * total) {
            out[at] = match previous {
                Some((v0, m0)) if mid > m0 => v0 + (value - v0) * (level * total - m0) / (mid - m0),
                _ => *value,
            };
            at += 1;
        }
        seen += weight;
        previous = Some((*value, mid));
    }
    let (highest, _) = previous?;
    out[at..].fill(highest);
    Some(out)
}

#[cfg(test)]
mod tests;
