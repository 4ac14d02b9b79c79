//! How would each expert have done lately? Rolling origins: forget the newest slots, forecast, compare.
//!
//! Origins lie 1, 3, 6, 10, … slots back, close together where it matters most, far enough for whole horizons. A loss
//! weighs less the older its slot is, so that an expert that follows a new regime wins soon after it began. All experts
//! are judged on the same origins and slots; who can't forecast all of them is not in the race.

use super::{Forecaster, History, P50, pinball};

/// Origins looked at; with each expert's cost they bound a backtest's.
pub const ORIGINS: usize = 10;
/// Slots that an origin must have before it.
const KNOWN_MIN: usize = 8;

/// One expert's record.
#[derive(Clone, PartialEq, Debug)]
pub struct Record {
    /// Weighted mean pinball loss over all levels and slots, in the series' unit.
    pub pinball: f64,
    /// By distance, 0 for the first slot ahead: errors of the median, each with its weight.
    pub errors: Vec<Vec<(f64, f64)>>,
}

/// Origins, newest first, as counts of known slots.
fn origins(n: usize) -> impl Iterator<Item = usize> {
    (1..=ORIGINS)
        .map(|i| i * (i + 1) / 2)
        .map_while(move |back| n.checked_sub(back))
        .take_while(|o| *o >= KNOWN_MIN)
}

/// `None` if the expert could not forecast from every origin, or nothing measured was there to compare with.
pub fn judge(expert: &dyn Forecaster, history: &History, horizon: usize) -> Option<Record> {
    let n = history.len();
    let half_life = horizon.max(8) as f64;
    let mut record = Record {
        pinball: 0.0,
        errors: vec![Vec::new(); horizon],
    };
    let mut total = 0.0;
    for origin in origins(n) {
        let known = history.before(origin, expert.reach(history));
        let ahead = horizon.min(n - origin);
        let forecast = expert.forecast(&known, ahead)?;
        for (h, band) in forecast.slots().iter().enumerate() {
            let Some(actual) = history.actual(origin + h) else {
                continue;
            };
            let weight = 0.5f64.powf((n - 1 - origin - h) as f64 / half_life);
            record.pinball += weight * pinball(band, actual);
            total += weight;
            if let Some(errors) = record.errors.get_mut(h) {
                errors.push((actual - band[P50], weight));
            }
        }
    }
    record.pinball /= total;
    record.pinball.is_finite().then_some(record)
}
