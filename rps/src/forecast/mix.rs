//! Many experts, one word: a series' forecast is the mean of what the experts say, each weighted by its record.
//!
//! A record is kept per series, expert, quantile level and part of the horizon: the pinball loss at past origins, older ones
//! discounted, over what the baseline lost at the same ones. Weights fall exponentially with how much worse than the best an
//! expert was; so who falls behind is out by himself, and a small share given back to all lets him return. Last, each level is
//! moved by what it covered too little or too much (conformal).
//!
//! ```text
//!  history ──> experts ──> said, waits until its horizon is over ──> judged ──> records, offsets
//!                 └──────────────── mixed by the records ──> forecast
//! ```
//! A series that comes with a past, after a restart or from a trace, is judged on that past first ([`Mix::replay`]): nothing needs
//! to be stored. Bounded: a record of 0.4 KiB an expert, and the words of at most three origins.

use std::collections::VecDeque;

use umbra_api::UnixMs;
use umbra_api::view::ModelScore;

use super::analog::{Analog, Setting};
use super::recent::{DAY_MS, DayProfile, Trailing};
use super::select::Selection;
use super::simple::{Rule, Simple};
use super::{Band, Forecaster, History, LEVELS, P50, Quantiles, pinball_at};

/// Parts of the horizon that are judged apart: who knows the next slots best is not who knows the later ones.
const PARTS: usize = 3;
/// What a record keeps of its past at each origin. Outer quantiles are about rare slots, but forgetting less did not help them.
const KEEP_MEDIAN: f64 = 0.98;
const KEEP_OUTER: f64 = 0.95;
/// How fast weights fall: for each 1/20 that an expert lost more than the best, by e.
const SHARPNESS: f64 = 20.0;
/// Origins after which half of a record is believed.
const HALF_BELIEVED: f64 = 6.0;
/// Share of the weight that all experts get, whatever they did.
const GIVEN_BACK: f64 = 0.005;
/// Weight of an expert that was never judged, beside the baseline's 1.
const UNKNOWN: f64 = 0.1;
/// Origins of its past that a new series is judged on.
const REPLAYED: usize = 16;
/// Step of a level's correction at each origin, in mean steps of the series.
const CONFORMAL: f64 = 0.02;

/// An expert, and its weight against others of the same record.
pub struct Member {
    pub expert: Box<dyn Forecaster>,
    prior: f64,
}

/// The experts of the mix, the baseline first. Settings and priors were chosen on `shared/data`; few matter much.
pub fn members() -> Vec<Member> {
    let member = |prior, expert| Member { expert, prior };
    let trailing = |prior, minutes| member(prior, Box::new(Trailing::minutes(minutes)));
    let analog = |prior, window, decay, nearest, shift, clock| {
        let setting = Setting {
            window,
            decay,
            nearest,
            shift,
            clock,
            bandwidth: 0.5,
        };
        member(prior, Box::new(Analog::new(setting)))
    };
    vec![
        member(0.5, Box::new(Simple::new(Rule::Last))),
        member(1.0, Box::new(Simple::new(Rule::Mean { slots: 10 }))),
        member(0.5, Box::new(Simple::new(Rule::Trend { slots: 24 }))),
        trailing(1.0, 30),
        trailing(1.0, 60),
        trailing(3.0, 120),
        trailing(4.0, 360),
        trailing(1.0, 1_440),
        member(1.0, Box::new(DayProfile)),
        member(0.5, Box::new(Simple::new(Rule::Ago { ms: DAY_MS }))),
        member(0.5, Box::new(Simple::new(Rule::Ago { ms: 7 * DAY_MS }))),
        analog(1.0, 3, 0.7, 50, 0.8, 0.05),
        analog(0.5, 6, 0.8, 14, 0.5, 0.1),
        analog(1.0, 12, 0.9, 30, 0.5, 0.2),
        analog(1.0, 12, 0.8, 50, 1.0, 0.5),
        analog(1.0, 12, 0.9, 80, 0.1, 0.0),
        analog(1.0, 24, 0.95, 40, 0.2, 0.2),
        analog(1.0, 36, 0.97, 30, 0.0, 0.2),
        analog(0.5, 72, 0.98, 20, 0.1, 0.0),
    ]
}

/// What an expert lost, and what the baseline lost meanwhile.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
struct Record {
    own: [Band; PARTS],
    baseline: [Band; PARTS],
    origins: f64,
    /// Mean loss over levels and slots, in the series' unit, to be shown: discounted sums of losses and of slots.
    shown: (f64, f64),
}

impl Record {
    fn add(&mut self, own: &[Band; PARTS], baseline: &[Band; PARTS], measured: usize) {
        self.origins += 1.0;
        let loss = own.iter().flatten().sum::<f64>() / LEVELS.len() as f64;
        self.shown = (
            KEEP_OUTER * self.shown.0 + loss,
            KEEP_OUTER * self.shown.1 + measured as f64,
        );
        for part in 0..PARTS {
            for level in 0..LEVELS.len() {
                let keep = if level == P50 { KEEP_MEDIAN } else { KEEP_OUTER };
                self.own[part][level] = keep * self.own[part][level] + own[part][level];
                self.baseline[part][level] = keep * self.baseline[part][level] + baseline[part][level];
            }
        }
    }

    /// Its loss over the baseline's; where both lost nothing, it is as good.
    fn ratio(&self, part: usize, level: usize) -> f64 {
        (self.own[part][level] + 1e-9) / (self.baseline[part][level] + 1e-9)
    }
}

/// Said at an origin, not yet judged.
#[derive(Clone, Debug)]
struct Said {
    origin: UnixMs,
    experts: Vec<Option<Quantiles>>,
    mixed: Quantiles,
}

/// One series' mix, kept between slots.
#[derive(Clone, Debug, Default)]
pub struct Mix {
    records: Vec<Record>,
    said: VecDeque<Said>,
    /// Correction of each level, in mean steps.
    offset: Band,
    newest: Option<UnixMs>,
    last: Option<(UnixMs, usize, Selection)>,
}

impl Mix {
    /// The mean of `members`, of which at most every `every` slots what they say is kept to be judged.
    pub fn forecast(
        &mut self,
        members: &[Member],
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
        let every = every.max(horizon.div_ceil(2)).max(1);
        // Also after the clock was set back: what was said of times to come is void.
        if self.records.len() != members.len() || self.newest.is_some_and(|t| t > history.end) {
            *self = Self::default();
            self.records = vec![Record::default(); members.len()];
            self.replay(members, history, horizon, every);
        }
        let quantiles = self.at_origin(members, history, horizon, every)?;
        let selection = Selection {
            model: "mix".to_owned(),
            scores: self.scores(members),
            quantiles,
        };
        self.last = Some((history.end, horizon, selection.clone()));
        Some(selection)
    }

    /// As if it had been there before: origins as far apart as they will be, closer where the past is short.
    fn replay(&mut self, members: &[Member], history: &History, horizon: usize, every: usize) {
        let n = history.len();
        let past = n.saturating_sub(2 * horizon);
        let apart = (past / REPLAYED).clamp(1, every);
        let backs: Vec<_> = (1..=REPLAYED).map(|i| i * apart).take_while(|b| *b <= past).collect();
        for back in backs.into_iter().rev() {
            let known = history.before(n - back, n - back);
            self.at_origin(members, &known, horizon, apart);
        }
    }

    /// Judges what can be judged, says what is to be said, and keeps it if it is to be judged.
    fn at_origin(&mut self, members: &[Member], history: &History, horizon: usize, every: usize) -> Option<Quantiles> {
        self.settle(history);
        let experts: Vec<_> = members.iter().map(|m| m.expert.forecast(history, horizon)).collect();
        let mixed = self.mix(members, &experts, history, horizon)?;
        let pause = i64::try_from(every as u64 * history.slot_ms).unwrap_or(i64::MAX);
        if self.newest.is_none_or(|t| history.end.since(t) >= pause) {
            self.newest = Some(history.end);
            self.said.push_back(Said {
                origin: history.end,
                experts,
                mixed: mixed.clone(),
            });
        }
        Some(mixed)
    }

    /// Judges all whose horizon is over.
    fn settle(&mut self, history: &History) {
        let slot_ms = i64::try_from(history.slot_ms).unwrap_or(i64::MAX).max(1);
        while let Some(said) = self.said.front() {
            let passed = history.end.since(said.origin) / slot_ms;
            let passed = usize::try_from(passed).unwrap_or(0);
            if passed < said.mixed.horizon() {
                break;
            }
            // What is older than the history can't be judged any more.
            if let Some(said) = self.said.pop_front()
                && let Some(first) = history.len().checked_sub(passed)
            {
                let actual: Vec<_> = (0..said.mixed.horizon()).map(|h| history.actual(first + h)).collect();
                self.judge(&said, &actual);
            }
        }
    }

    fn judge(&mut self, said: &Said, actual: &[Option<f64>]) {
        let measured = actual.iter().flatten().count();
        let losses: Vec<_> = said.experts.iter().map(|q| Some(losses(q.as_ref()?, actual))).collect();
        let Some(Some(baseline)) = losses.first().copied().filter(|_| measured > 0) else {
            return;
        };
        for (record, loss) in self.records.iter_mut().zip(&losses) {
            if let Some(loss) = loss {
                record.add(loss, &baseline, measured);
            }
        }
        for (level, promised) in LEVELS.iter().enumerate().filter(|(level, _)| *level != P50) {
            let pairs = said.mixed.slots().iter().zip(actual);
            let covered = pairs.filter(|(band, a)| a.is_some_and(|a| a <= band[level])).count();
            self.offset[level] += CONFORMAL * (promised - covered as f64 / measured as f64);
        }
    }

    /// Of each member, 0 for one that said nothing; they sum to 1.
    fn weights(&self, members: &[Member], said: &[Option<Quantiles>], part: usize, level: usize) -> Vec<f64> {
        let speaking = || self.records.iter().zip(said).filter(|(_, q)| q.is_some());
        let judged = speaking().filter(|(r, _)| r.origins > 0.0);
        let best = judged.map(|(r, _)| r.ratio(part, level)).fold(f64::MAX, f64::min);
        let weight = |(i, (record, q)): (usize, (&Record, &Option<Quantiles>))| {
            let prior = members.get(i).map_or(0.0, |m| m.prior);
            if q.is_none() {
                0.0
            } else if record.origins == 0.0 {
                prior * if i == 0 { 1.0 } else { UNKNOWN }
            } else {
                let believed = record.origins / (record.origins + HALF_BELIEVED);
                prior * (-SHARPNESS * believed * (record.ratio(part, level) / best - 1.0)).exp()
            }
        };
        let raw: Vec<f64> = self.records.iter().zip(said).enumerate().map(weight).collect();
        let total = raw.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let speakers = said.iter().flatten().count().max(1) as f64;
        raw.iter()
            .zip(said)
            .map(|(w, q)| (1.0 - GIVEN_BACK) * w / total + if q.is_some() { GIVEN_BACK / speakers } else { 0.0 })
            .collect()
    }

    fn mix(
        &self,
        members: &[Member],
        said: &[Option<Quantiles>],
        history: &History,
        horizon: usize,
    ) -> Option<Quantiles> {
        said.iter().flatten().next()?;
        let values = history.values();
        let step = values.windows(2).map(|w| (w[1] - w[0]).abs()).sum::<f64>() / values.len().max(1) as f64;
        let mut bands = vec![[0.0; LEVELS.len()]; horizon];
        for part in 0..PARTS {
            for level in 0..LEVELS.len() {
                let weights = self.weights(members, said, part, level);
                for (h, band) in bands
                    .iter_mut()
                    .enumerate()
                    .filter(|(h, _)| part_of(*h, horizon) == part)
                {
                    let shares = said.iter().zip(&weights);
                    let sum: f64 = shares
                        .filter_map(|(q, w)| Some(w * q.as_ref()?.slots().get(h)?[level]))
                        .sum();
                    band[level] = sum + self.offset[level] * step;
                }
            }
        }
        Some(Quantiles::new(bands, history.bound))
    }

    /// Best first; the best is the one called chosen, though all count.
    fn scores(&self, members: &[Member]) -> Vec<ModelScore> {
        let judged = members.iter().zip(&self.records).filter(|(_, r)| r.origins > 0.0);
        let mut scores: Vec<_> = judged
            .map(|(member, record)| ModelScore {
                model: member.expert.name().to_owned(),
                pinball: record.shown.0 / record.shown.1.max(1.0),
                chosen: false,
            })
            .collect();
        scores.sort_by(|a, b| a.pinball.total_cmp(&b.pinball));
        if let Some(best) = scores.first_mut() {
            best.chosen = true;
        }
        scores
    }
}

fn part_of(h: usize, horizon: usize) -> usize {
    // The first slots differ most from each other.
    let ends = [horizon.div_ceil(6), horizon.div_ceil(2)];
    ends.iter().position(|end| h < *end).unwrap_or(PARTS - 1)
}

/// Pinball losses summed by part of the horizon and level.
fn losses(said: &Quantiles, actual: &[Option<f64>]) -> [Band; PARTS] {
    let mut out = [[0.0; LEVELS.len()]; PARTS];
    for (h, (band, actual)) in said.slots().iter().zip(actual).enumerate() {
        let Some(actual) = actual else { continue };
        let sums = &mut out[part_of(h, said.horizon())];
        for (i, level) in LEVELS.iter().enumerate() {
            sums[i] += pinball_at(*level, band[i], *actual);
        }
    }
    out
}
