//! Experts that say: it will be as it was lately, or as it was at this time of the day. Empirical quantiles, no error model.

use super::{Band, Forecaster, History, LEVELS, Quantiles, weighted_quantiles};

pub(super) const DAY_MS: u64 = 86_400_000;
/// Fewer values than this are no distribution.
const VALUES_MIN: usize = 6;
/// Days back that a profile of the day looks, and slots to either side of the same time.
const DAYS: usize = 7;
const AROUND: usize = 3;
/// A day's weight, each day back.
const DAY_WEIGHT: f64 = 0.85;

/// The same quantiles in every slot: those of the last `span_ms`, or of all there is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trailing {
    span_ms: u64,
    name: String,
}

impl Trailing {
    pub fn minutes(minutes: u64) -> Self {
        let name = match minutes % 60 {
            0 => format!("trailing-{}h", minutes / 60),
            _ => format!("trailing-{minutes}m"),
        };
        Self {
            span_ms: minutes * 60_000,
            name,
        }
    }

    fn slots(&self, history: &History) -> usize {
        usize::try_from(self.span_ms / history.slot_ms.max(1)).unwrap_or(usize::MAX)
    }
}

impl Forecaster for Trailing {
    fn name(&self) -> &str {
        &self.name
    }

    fn forecast(&self, history: &History, horizon: usize) -> Option<Quantiles> {
        let values = history.values();
        let span = self.slots(history).min(values.len());
        let mut lately: Vec<_> = values.iter().rev().take(span).map(|v| (*v, 1.0)).collect();
        if lately.len() < VALUES_MIN {
            return None;
        }
        let band = band_of(&mut lately)?;
        Some(Quantiles::new(vec![band; horizon], history.bound))
    }

    fn reach(&self, history: &History) -> usize {
        self.slots(history)
    }
}

/// What was seen around the same time on the days before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DayProfile;

impl Forecaster for DayProfile {
    fn name(&self) -> &str {
        "day-profile"
    }

    fn forecast(&self, history: &History, horizon: usize) -> Option<Quantiles> {
        let values = history.values();
        let day = slots_per_day(history)?;
        let n = values.len();
        // From two days on: one day is the naive season's, with its errors.
        if n < 2 * day || day < 2 * AROUND + 1 {
            return None;
        }
        let mut seen: Vec<(f64, f64)> = Vec::with_capacity(DAYS * (2 * AROUND + 1));
        let bands: Option<Vec<Band>> = (0..horizon)
            .map(|h| {
                seen.clear();
                for back in 1..=DAYS {
                    let Some(middle) = (n + h).checked_sub(back * day) else {
                        break;
                    };
                    let weight = DAY_WEIGHT.powi(back as i32 - 1);
                    let around = middle.saturating_sub(AROUND)..(middle + AROUND + 1).min(n);
                    seen.extend(values.get(around)?.iter().map(|v| (*v, weight)));
                }
                band_of(&mut seen)
            })
            .collect();
        Some(Quantiles::new(bands?, history.bound))
    }

    fn reach(&self, history: &History) -> usize {
        slots_per_day(history).map_or(0, |day| DAYS * day + AROUND)
    }
}

/// `None` where slots do not fill a day evenly.
pub(super) fn slots_per_day(history: &History) -> Option<usize> {
    let slot_ms = history.slot_ms.max(1);
    let whole = DAY_MS.is_multiple_of(slot_ms);
    whole.then(|| usize::try_from(DAY_MS / slot_ms).ok()).flatten()
}

/// Sorts `values` (with their weights) and reads them at [`LEVELS`].
pub(super) fn band_of(values: &mut [(f64, f64)]) -> Option<Band> {
    values.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    weighted_quantiles(values, &LEVELS)
}
