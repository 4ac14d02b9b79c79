//! Experts that are one line of arithmetic a step, with intervals from their own past errors: at every past slot the same
//! rule is applied to what was known then, and the errors it made at each distance are the spread around today's forecast.

use super::recent::DAY_MS;
use super::{Band, Forecaster, History, LEVELS, NORMAL, P50, Quantiles, weighted_quantile};

/// Past slots whose errors are looked at.
const ERRORS_MAX: usize = 360;
/// An error's weight halves with this many slots of age: spreads change.
const HALF_LIFE: f64 = 120.0;
/// Fewer errors than this at a distance, and the spread is scaled up from a shorter distance.
const ERRORS_MIN: usize = 8;
/// As many errors weigh as much as the normal distribution with their spread.
pub(super) const SHRINK: f64 = 20.0;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// The last value stays.
    Last,
    /// The mean of the last `slots` stays.
    Mean { slots: usize },
    /// The straight line through the last `slots` goes on.
    Trend { slots: usize },
    /// One period ago, plus half of what the last slot was above its own one.
    Seasonal,
    /// What was seen so long ago.
    Ago { ms: u64 },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Simple {
    rule: Rule,
    name: String,
}

impl Simple {
    pub fn new(rule: Rule) -> Self {
        let name = match rule {
            Rule::Last => "last".to_owned(),
            Rule::Mean { slots } => format!("mean{slots}"),
            Rule::Trend { slots } => format!("trend{slots}"),
            Rule::Seasonal => "seasonal-naive".to_owned(),
            Rule::Ago { ms } => format!("naive-{}d", ms / DAY_MS),
        };
        Self { rule, name }
    }
}

/// Sums from the start, so that a window's mean and slope cost O(1).
struct Prefix {
    x: Vec<f64>,
    tx: Vec<f64>,
}

impl Prefix {
    fn new(values: &[f64]) -> Self {
        let mut prefix = Self {
            x: vec![0.0],
            tx: vec![0.0],
        };
        let (mut x, mut tx) = (0.0, 0.0);
        for (t, v) in values.iter().enumerate() {
            x += v;
            tx += t as f64 * v;
            prefix.x.push(x);
            prefix.tx.push(tx);
        }
        prefix
    }

    fn mean(&self, end: usize, slots: usize) -> Option<f64> {
        let from = end.checked_sub(slots)?;
        Some((self.x.get(end)? - self.x.get(from)?) / slots as f64)
    }

    /// Level at the last slot before `end`, and slope, of the least-squares line through `slots`.
    fn line(&self, end: usize, slots: usize) -> Option<(f64, f64)> {
        let from = end.checked_sub(slots)?;
        let m = slots as f64;
        let x = self.x.get(end)? - self.x.get(from)?;
        // Times from 0 to m - 1 within the window.
        let tx = self.tx.get(end)? - self.tx.get(from)? - from as f64 * x;
        let mid = (m - 1.0) / 2.0;
        let slope = (tx - mid * x) / (m * (m * m - 1.0) / 12.0);
        slope.is_finite().then_some((x / m + slope * mid, slope))
    }
}

fn slots_of(ms: u64, history: &History) -> usize {
    usize::try_from(ms / history.slot_ms.max(1))
        .unwrap_or(usize::MAX)
        .max(1)
}

/// A rule over one history.
struct Applied<'a> {
    rule: Rule,
    history: &'a History,
    prefix: Prefix,
    /// Weight of an error by age in slots.
    weights: Vec<f64>,
}

impl<'a> Applied<'a> {
    fn new(rule: Rule, history: &'a History) -> Self {
        let n = history.len().min(ERRORS_MAX);
        let weights = (0..n).map(|age| 0.5f64.powf(age as f64 / HALF_LIFE)).collect();
        Self {
            rule,
            history,
            prefix: Prefix::new(history.values()),
            weights,
        }
    }
}

impl Applied<'_> {
    /// What the rule says at `end` (that many slots known) for `h` slots on, `h` from 1.
    fn point(&self, end: usize, h: usize) -> Option<f64> {
        let values = self.history.values();
        let raw = match self.rule {
            Rule::Last => *values.get(end.checked_sub(1)?)?,
            Rule::Mean { slots } => self.prefix.mean(end, slots)?,
            Rule::Trend { slots } => {
                let (level, slope) = self.prefix.line(end, slots)?;
                level + slope * h as f64
            }
            Rule::Seasonal => {
                let period = self.history.period?;
                let back = (end + h - 1).checked_sub(period * h.div_ceil(period))?;
                let then = *values.get((end - 1).checked_sub(period)?)?;
                values.get(back)? + 0.5 * (values.get(end - 1)? - then)
            }
            Rule::Ago { ms } => {
                let ago = slots_of(ms, self.history);
                let back = (end + h - 1).checked_sub(ago * h.div_ceil(ago))?;
                *values.get(back)?
            }
        };
        Some(raw.clamp(0.0, self.history.bound))
    }

    /// Past errors at distance `h` with their weights, ascending.
    fn errors(&self, h: usize) -> Vec<(f64, f64)> {
        let n = self.history.len();
        let weighed = self.weights.iter().enumerate();
        let mut errors: Vec<_> = weighed
            .filter_map(|(age, weight)| {
                let target = n - 1 - age;
                let actual = self.history.actual(target)?;
                let point = self.point((target + 1).checked_sub(h)?, h)?;
                Some((actual - point, *weight))
            })
            .collect();
        errors.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        errors
    }

    /// Offsets from the point forecast at distances that grow, each with how many slots on it is.
    fn spreads(&self, horizon: usize) -> Vec<(usize, Band)> {
        let mut spreads: Vec<(usize, Band)> = Vec::new();
        for h in grid(horizon) {
            let errors = self.errors(h);
            let offsets = match spreads.last() {
                Some((shorter, band)) if errors.len() < ERRORS_MIN => {
                    let factor = (h as f64 / *shorter as f64).sqrt();
                    band.map(|o| o * factor)
                }
                _ => spread(&errors),
            };
            spreads.push((h, offsets));
        }
        spreads
    }
}

/// Distances at which spreads are computed; between them they are interpolated.
fn grid(horizon: usize) -> Vec<usize> {
    let mut out = Vec::new();
    let mut h = 1;
    while h < horizon {
        out.push(h);
        h += (h / 3).max(1);
    }
    out.push(horizon.max(1));
    out
}

/// Quantiles of errors, drawn towards a normal spread as they are few. The median stays 0: a rule's bias in the past is
/// in the outer quantiles, but the rule's word is its word.
pub(super) fn spread(sorted: &[(f64, f64)]) -> Band {
    let total: f64 = sorted.iter().map(|(_, w)| w).sum();
    if total <= 0.0 {
        return [0.0; LEVELS.len()];
    }
    let rms = (sorted.iter().map(|(e, w)| w * e * e).sum::<f64>() / total).sqrt();
    let trust = total / (total + SHRINK);
    let mut band = [0.0; LEVELS.len()];
    for (i, level) in LEVELS.iter().enumerate() {
        let seen = weighted_quantile(sorted, *level).unwrap_or(0.0);
        let offset = trust * seen + (1.0 - trust) * NORMAL[i] * rms;
        band[i] = match i.cmp(&P50) {
            std::cmp::Ordering::Less => offset.min(0.0),
            std::cmp::Ordering::Equal => 0.0,
            std::cmp::Ordering::Greater => offset.max(0.0),
        };
    }
    band
}

fn between(spreads: &[(usize, Band)], h: usize) -> Band {
    let i = spreads.partition_point(|(at, _)| *at < h);
    match (i.checked_sub(1).and_then(|j| spreads.get(j)), spreads.get(i)) {
        (_, Some((at, band))) if *at == h => *band,
        (Some((h0, b0)), Some((h1, b1))) => {
            let share = (h - h0) as f64 / (h1 - h0) as f64;
            std::array::from_fn(|i| b0[i] + share * (b1[i] - b0[i]))
        }
        (Some((_, band)), None) | (None, Some((_, band))) => *band,
        (None, None) => [0.0; LEVELS.len()],
    }
}

impl Forecaster for Simple {
    fn name(&self) -> &str {
        &self.name
    }

    fn forecast(&self, history: &History, horizon: usize) -> Option<Quantiles> {
        let rule = Applied::new(self.rule, history);
        let n = history.len();
        let points: Option<Vec<f64>> = (1..=horizon).map(|h| rule.point(n, h)).collect();
        let points = points?;
        let spreads = rule.spreads(horizon);
        let bands = points
            .into_iter()
            .enumerate()
            .map(|(i, p)| between(&spreads, i + 1).map(|o| p + o));
        Some(Quantiles::new(bands.collect(), history.bound))
    }

    fn reach(&self, history: &History) -> usize {
        let rule = match self.rule {
            Rule::Last => 1,
            Rule::Mean { slots } | Rule::Trend { slots } => slots,
            Rule::Seasonal => 2 * history.period.unwrap_or(0),
            Rule::Ago { ms } => slots_of(ms, history),
        };
        ERRORS_MAX + rule
    }
}
