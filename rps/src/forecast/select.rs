//! Which expert speaks for a series, and how far its word is corrected by its record.

use umbra_api::UnixMs;
use umbra_api::view::ModelScore;

use super::backtest::{self, Record};
use super::simple::{Rule, SHRINK, Simple, spread};
use super::smooth::{Ets, Mstl};
use super::{Band, Forecaster, History, P50, Quantiles, season};

/// A newcomer must be this much better than the expert that speaks now. A backtest has few origins and is noisy: on random
/// walks, where nothing beats the last value, a hurdle of 0.97 cost 6 to 10 % of its pinball loss and this one 3 to 7 %;
/// ramps, seasons and noise were forecast equally well.
const BETTER_BY: f64 = 0.9;

/// All experts, the baseline first.
pub fn experts() -> Vec<Box<dyn Forecaster>> {
    vec![
        Box::new(Simple::new(Rule::Last)),
        Box::new(Simple::new(Rule::Mean { slots: 10 })),
        Box::new(Simple::new(Rule::Trend { slots: 10 })),
        Box::new(Simple::new(Rule::Trend { slots: 24 })),
        Box::new(Simple::new(Rule::Seasonal)),
        Box::new(Ets),
        Box::new(Mstl),
    ]
}

/// What a selector says.
#[derive(Clone, PartialEq, Debug)]
pub struct Selection {
    pub model: String,
    /// Best first.
    pub scores: Vec<ModelScore>,
    pub quantiles: Quantiles,
}

/// One series' choice, kept between slots.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    /// End of the history of the last backtest.
    judged: Option<UnixMs>,
    period: Option<usize>,
    /// Best first.
    ranking: Vec<(String, Record)>,
    /// The expert that speaks.
    chosen: String,
    last: Option<(UnixMs, usize, Selection)>,
}

impl Selector {
    /// The forecast of the expert that did best in a backtest, which is done again after `every` slots, and more seldom
    /// on long histories: they are slow to change their minds.
    pub fn forecast(&mut self, history: &History, horizon: usize, every: usize) -> Option<Selection> {
        self.forecast_by(&experts(), history, horizon, every)
    }

    /// The same with other experts; names must differ.
    pub fn forecast_by(
        &mut self,
        experts: &[Box<dyn Forecaster>],
        history: &History,
        horizon: usize,
        every: usize,
    ) -> Option<Selection> {
        if let Some((end, slots, selection)) = &self.last
            && *end == history.end
            && *slots == horizon
        {
            return Some(selection.clone());
        }
        let every = every.max(history.len() / 50).max(1);
        let due_after = i64::try_from(every as u64 * history.slot_ms).unwrap_or(i64::MAX);
        // A clock that was set back makes it due, too.
        if self
            .judged
            .is_none_or(|t| !(0..due_after).contains(&history.end.since(t)))
        {
            self.judge(experts, history, horizon);
        }
        let history = History {
            period: self.period,
            ..history.clone()
        };
        let (name, quantiles) = self.speak(experts, &history, horizon)?;
        let selection = Selection {
            scores: self.scores(&name),
            model: name,
            quantiles,
        };
        self.last = Some((history.end, horizon, selection.clone()));
        Some(selection)
    }

    fn judge(&mut self, experts: &[Box<dyn Forecaster>], history: &History, horizon: usize) {
        self.judged = Some(history.end);
        self.period = season::period(history.values());
        let history = History {
            period: self.period,
            ..history.clone()
        };
        let judged = experts.iter().filter_map(|expert| {
            let record = backtest::judge(expert.as_ref(), &history, horizon)?;
            Some((expert.name().to_owned(), record))
        });
        self.ranking = judged.collect();
        self.ranking.sort_by(|a, b| a.1.pinball.total_cmp(&b.1.pinball));
        if let Some((best, record)) = self.ranking.first()
            && self
                .pinball(&self.chosen)
                .is_none_or(|old| record.pinball < BETTER_BY * old)
        {
            self.chosen.clone_from(best);
        }
    }

    fn pinball(&self, name: &str) -> Option<f64> {
        self.ranking.iter().find(|(n, _)| n == name).map(|(_, r)| r.pinball)
    }

    /// The chosen expert, or else the best that has something to say; the baseline always has.
    fn speak(&self, experts: &[Box<dyn Forecaster>], history: &History, horizon: usize) -> Option<(String, Quantiles)> {
        let ranked = self.ranking.iter().map(|(name, _)| name.as_str());
        let baseline = experts.first().map(|e| e.name());
        std::iter::once(self.chosen.as_str())
            .chain(ranked)
            .chain(baseline)
            .find_map(|name| {
                let expert = experts.iter().find(|e| e.name() == name)?;
                let own = expert.forecast(history, horizon)?;
                let record = self.ranking.iter().find(|(n, _)| n == name).map(|(_, r)| r);
                Some((
                    name.to_owned(),
                    record.map_or_else(|| own.clone(), |r| corrected(&own, r)),
                ))
            })
    }

    fn scores(&self, speaks: &str) -> Vec<ModelScore> {
        let score = |(name, record): &(String, Record)| ModelScore {
            model: name.clone(),
            pinball: record.pinball,
            chosen: name == speaks,
        };
        self.ranking.iter().map(score).collect()
    }
}

/// An expert's band drawn towards the errors it made in the backtest, the more the more origins there were. Errors of
/// neighbouring distances count too, but one origin's errors hang together: trust counts origins.
fn corrected(own: &Quantiles, record: &Record) -> Quantiles {
    let slots = own.slots().iter().enumerate().map(|(h, band)| {
        let origins = record.errors.get(h).map_or(0, Vec::len) as f64;
        let trust = origins / (origins + SHRINK);
        let reach = h / 4;
        let from = h.saturating_sub(reach).min(record.errors.len());
        let to = (h + reach + 1).min(record.errors.len());
        let mut errors: Vec<_> = record.errors[from..to].iter().flatten().copied().collect();
        if errors.is_empty() {
            return *band;
        }
        errors.sort_by(|a, b| a.0.total_cmp(&b.0));
        let seen: Band = spread(&errors);
        let mid = band[P50];
        std::array::from_fn(|i| mid + (1.0 - trust) * (band[i] - mid) + trust * seen[i])
    });
    Quantiles::new(slots.collect(), own.bound())
}
