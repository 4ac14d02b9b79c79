//! The statistical pair's better half: exponential smoothing by augurs, alone and on a series freed of its season (MSTL).
//!
//! Only additive errors are searched: demand touches zero, where multiplicative ones blow up. The trend is left to the
//! search, damped or not: a load that climbs steadily must be followed beyond what was seen.

use augurs::ets::AutoETS;
use augurs::mstl::MSTLModel;
use augurs::{Fit, Forecast, Predict};

use super::{Forecaster, History, NORMAL, P90, Quantiles};

/// Slots that the exponential smoothing sees; what is older has no weight left.
const ETS_SLOTS: usize = 192;
/// Periods that MSTL sees, and the longest such window: its cost grows with both.
const PERIODS: usize = 7;
const MSTL_SLOTS: usize = 2_016;
/// Of augurs' interval, which reaches from 0.1 to 0.9.
const INTERVAL: f64 = 0.8;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ets;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mstl;

/// `None` for a series that no model can be fitted to: constant, or not finite.
fn fit_for(values: &[f64]) -> Option<&[f64]> {
    let (low, high) = values
        .iter()
        .fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    let spread = high - low;
    (spread.is_finite() && spread > 1e-9).then_some(values)
}

fn search() -> Option<AutoETS> {
    AutoETS::new(1, "AZN").ok()
}

fn quantiles(forecast: &Forecast, horizon: usize, bound: f64) -> Option<Quantiles> {
    let intervals = forecast.intervals.as_ref()?;
    let bands: Vec<_> = forecast
        .point
        .iter()
        .zip(&intervals.upper)
        .map(|(point, upper)| {
            let sigma = (upper - point).max(0.0) / NORMAL[P90];
            NORMAL.map(|z| point + z * sigma)
        })
        .collect();
    let finite = bands.iter().flatten().all(|q| q.is_finite());
    (finite && bands.len() == horizon).then(|| Quantiles::new(bands, bound))
}

fn tail(values: &[f64], n: usize) -> &[f64] {
    values.get(values.len().saturating_sub(n)..).unwrap_or(values)
}

impl Forecaster for Ets {
    fn name(&self) -> &str {
        "ets"
    }

    fn forecast(&self, history: &History, horizon: usize) -> Option<Quantiles> {
        let values = fit_for(tail(history.values(), ETS_SLOTS))?;
        let forecast = search()?.fit(values).ok()?.predict(horizon, INTERVAL).ok()?;
        quantiles(&forecast, horizon, history.bound)
    }

    fn reach(&self, _: &History) -> usize {
        ETS_SLOTS
    }
}

impl Forecaster for Mstl {
    fn name(&self) -> &str {
        "mstl-ets"
    }

    fn forecast(&self, history: &History, horizon: usize) -> Option<Quantiles> {
        let period = history.period.filter(|p| *p >= 2 && 2 * p <= history.len())?;
        let values = fit_for(tail(history.values(), self.reach(history)))?;
        let model = MSTLModel::new(vec![period], search()?.into_trend_model());
        let forecast = model.fit(values).ok()?.predict(horizon, INTERVAL).ok()?;
        quantiles(&forecast, horizon, history.bound)
    }

    fn reach(&self, history: &History) -> usize {
        history.period.map_or(0, |p| (p * PERIODS).min(MSTL_SLOTS).max(2 * p))
    }
}
