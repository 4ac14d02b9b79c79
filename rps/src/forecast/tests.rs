use super::auto::{Auto, Speaker};
use super::mix::members;
use super::select::{Selection, Selector, experts};
use super::simple::{Rule, Simple};
use super::*;
use proptest::prelude::*;

/// A small deterministic source of noise.
struct Noise(u64);

impl Noise {
    fn normal(&mut self, sigma: f64) -> f64 {
        let mut uniform = || {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        };
        sigma * ((0..12).map(|_| uniform()).sum::<f64>() - 6.0)
    }
}

fn history(values: &[f64]) -> History {
    let slots: Vec<_> = values.iter().map(|v| Some(*v)).collect();
    History::new(&slots, UnixMs(values.len() as i64 * 1_000), 1_000, 10.0)
}

/// Mean pinball of the chosen expert and of the last value, over origins 5 slots apart.
fn contest(values: &[f64], first: usize, horizon: usize) -> (f64, f64, Vec<String>) {
    let mut selector = Selector::default();
    contest_of(values, first, horizon, |known| selector.forecast(known, horizon, 4))
}

fn contest_of(
    values: &[f64],
    first: usize,
    horizon: usize,
    mut forecast: impl FnMut(&History) -> Option<Selection>,
) -> (f64, f64, Vec<String>) {
    let (mut chosen, mut last, mut names) = (0.0, 0.0, Vec::new());
    let baseline = Simple::new(Rule::Last);
    for origin in (first..values.len() - horizon).step_by(5) {
        let known = history(&values[..origin]);
        let selection = forecast(&known).unwrap();
        let theirs = baseline.forecast(&known, horizon).unwrap();
        for (h, actual) in values[origin..origin + horizon].iter().enumerate() {
            chosen += pinball(&selection.quantiles.slots()[h], *actual);
            last += pinball(&theirs.slots()[h], *actual);
        }
        names.push(selection.model);
    }
    (chosen, last, names)
}

#[test]
fn a_ramp_is_followed() {
    let mut noise = Noise(11);
    let values: Vec<f64> = (0..120)
        .map(|i| 0.1 + 0.015 * f64::from(i) + noise.normal(0.03))
        .collect();
    let (chosen, last, names) = contest(&values, 30, 20);
    assert!(chosen < 0.6 * last, "{chosen} against {last}: {names:?}");
}

#[test]
fn a_season_is_learnt() {
    let mut noise = Noise(12);
    let wave = |i: f64| 1.0 + 0.5 * (i * std::f64::consts::TAU / 30.0).sin();
    let values: Vec<f64> = (0..300).map(|i| wave(f64::from(i)) + noise.normal(0.05)).collect();
    let (chosen, last, names) = contest(&values, 120, 20);
    assert!(chosen < 0.4 * last, "{chosen} against {last}: {names:?}");
}

#[test]
fn noise_is_smoothed() {
    let mut noise = Noise(13);
    let values: Vec<f64> = (0..200).map(|_| 1.0 + noise.normal(0.2)).collect();
    let (chosen, last, names) = contest(&values, 40, 20);
    assert!(chosen < 0.9 * last, "{chosen} against {last}: {names:?}");
}

/// Nothing beats the last value here, so what is lost is the price of choosing. One walk shows mostly luck (up to 1.35).
#[test]
fn random_walks_cost_little_more_than_their_last_value() {
    let ratio = |seed: u64| {
        let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut x = 5.0;
        let mut step = |_| {
            x = (x + noise.normal(0.1)).clamp(0.0, 10.0);
            x
        };
        let values: Vec<f64> = (0..240).map(&mut step).collect();
        let (chosen, last, _) = contest(&values, 60, 20);
        (chosen / last).ln()
    };
    let mean = ((1..=12).map(ratio).sum::<f64>() / 12.0).exp();
    assert!(mean < 1.12, "{mean} of the last value's");
}

/// In slots of five minutes, so that the mix speaks.
fn by_five_minutes(known: &History) -> History {
    let slot_ms = 300_000;
    History {
        slot_ms,
        end: UnixMs(known.len() as i64 * slot_ms as i64),
        ..known.clone()
    }
}

/// So by default, and in any case with a short past. Every test of the demo, the lab and short series is of the chosen expert alone, and stays so.
#[test]
fn minutes_of_history_are_forecast_by_the_chosen_expert_alone() {
    let mut noise = Noise(20);
    let values: Vec<f64> = (0..300).map(|_| 1.0 + noise.normal(0.2)).collect();
    let (mut auto, mut selector) = (Auto::default(), Selector::default());
    for origin in (20..300).step_by(7) {
        let known = history(&values[..origin]);
        assert_eq!(
            auto.forecast(Speaker::Mix, &known, 12, 4),
            selector.forecast(&known, 12, 4)
        );
    }
}

#[test]
fn the_mix_beats_its_baseline_on_noise_and_on_a_wave() {
    let mut noise = Noise(21);
    let flat: Vec<f64> = (0..300).map(|_| 1.0 + noise.normal(0.2)).collect();
    let wave = |i: i32| 1.0 + 0.5 * (f64::from(i) * std::f64::consts::TAU / 30.0).sin();
    let wave: Vec<f64> = (0..300).map(|i| wave(i) + noise.normal(0.05)).collect();
    for values in [flat, wave] {
        let mut auto = Auto::default();
        let (mixed, last, names) = contest_of(&values, 100, 12, |h| {
            auto.forecast(Speaker::Mix, &by_five_minutes(h), 12, 4)
        });
        assert!(names.iter().all(|n| n == "mix"), "{names:?}");
        assert!(mixed < 0.9 * last, "{mixed} against {last}");
    }
}

/// After a restart there is only the series. What is learnt from it anew must be nearly as good as what had been learnt.
#[test]
fn a_mix_made_anew_from_the_past_forecasts_nearly_as_well() {
    let mut noise = Noise(22);
    let values: Vec<f64> = (0..300).map(|_| 1.0 + noise.normal(0.2)).collect();
    let mut lived = Auto::default();
    let (kept, ..) = contest_of(&values, 100, 12, |h| {
        lived.forecast(Speaker::Mix, &by_five_minutes(h), 12, 4)
    });
    let (anew, ..) = contest_of(&values, 100, 12, |h| {
        Auto::default().forecast(Speaker::Mix, &by_five_minutes(h), 12, 4)
    });
    assert!(anew < 1.1 * kept, "{anew}, without a restart {kept}");
}

#[test]
fn the_bands_hold_what_they_promise() {
    let mut noise = Noise(15);
    let values: Vec<f64> = (0..400).map(|_| 2.0 + noise.normal(0.3)).collect();
    let mut selector = Selector::default();
    let (mut below, mut all) = (0, 0);
    for origin in (60..380).step_by(3) {
        let selection = selector.forecast(&history(&values[..origin]), 10, 4).unwrap();
        for (band, actual) in selection.quantiles.slots().iter().zip(&values[origin..]) {
            below += usize::from(*actual <= band[P90]);
            all += 1;
        }
    }
    let coverage = below as f64 / all as f64;
    assert!(
        (0.84..=0.97).contains(&coverage),
        "{coverage} of actuals are below the 0.9 quantile"
    );
}

#[test]
fn one_expert_is_chosen_and_scores_are_ranked() {
    let mut noise = Noise(16);
    let values: Vec<f64> = (0..80).map(|_| 0.5 + noise.normal(0.1)).collect();
    let Selection { model, scores, .. } = Selector::default().forecast(&history(&values), 12, 4).unwrap();
    assert!(scores.windows(2).all(|w| w[0].pinball <= w[1].pinball));
    let chosen: Vec<_> = scores.iter().filter(|s| s.chosen).collect();
    assert!(chosen.len() == 1 && chosen[0].model == model);
    assert!(scores.iter().any(|s| s.model == "ets") && scores.iter().any(|s| s.model == "last"));
}

#[test]
fn gaps_are_carried_and_not_scored() {
    let slots = [None, Some(1.0), None, Some(f64::NAN), Some(3.0)];
    let h = History::new(&slots, UnixMs(5_000), 1_000, 10.0);
    assert_eq!(h.values(), [1.0, 1.0, 1.0, 3.0]);
    assert_eq!(
        (h.measured(), h.actual(1), h.actual(3), h.actual(9)),
        (2, None, Some(3.0), None)
    );
    let before = h.before(3, 2);
    assert_eq!((before.values(), before.end), (&[1.0, 1.0][..], UnixMs(4_000)));
}

#[test]
fn weighted_quantiles_are_the_plain_ones_for_equal_weights() {
    let v: Vec<_> = (1..=9).map(|i| (f64::from(i), 1.0)).collect();
    assert_eq!(weighted_quantile(&v, 0.5), Some(5.0));
    assert_eq!(
        (weighted_quantile(&v, 0.0), weighted_quantile(&v, 1.0)),
        (Some(1.0), Some(9.0))
    );
    assert_eq!(weighted_quantile(&[], 0.5), None);
    assert_eq!(weighted_quantile(&[(2.0, 3.0), (9.0, 0.0)], 0.9), Some(2.0));
}

#[test]
fn a_constant_series_is_forecast_by_the_simple_ones() {
    let selection = Selector::default().forecast(&history(&[0.25; 100]), 10, 4).unwrap();
    assert!(
        selection
            .quantiles
            .slots()
            .iter()
            .flatten()
            .all(|q| (q - 0.25).abs() < 1e-9)
    );
    assert_eq!(Selector::default().forecast(&history(&[]), 10, 4), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the history: every expert's bands are whole, ascending, and within bounds.
    #[test]
    fn bands_are_lawful(
        slots in prop::collection::vec(prop::option::weighted(0.9, 0.0f64..50.0), 0..90),
        horizon in 1usize..40,
        period in prop::option::of(1usize..60),
    ) {
        let mut h = History::new(&slots, UnixMs(0), 1_000, 10.0);
        h.period = period;
        for expert in experts().into_iter().chain(members().into_iter().map(|m| m.expert)) {
            if let Some(q) = expert.forecast(&h, horizon) {
                prop_assert_eq!(q.horizon(), horizon, "{}", expert.name());
                for band in q.slots() {
                    prop_assert!(band.windows(2).all(|w| w[0] <= w[1]), "{}: {:?}", expert.name(), band);
                    prop_assert!(band.iter().all(|v| (0.0..=10.0).contains(v)), "{}: {:?}", expert.name(), band);
                }
            }
        }
    }

    #[test]
    fn any_band_is_made_lawful(raw in prop::array::uniform7(prop::num::f64::ANY), bound in prop::num::f64::ANY, z in -9.0f64..9.0) {
        let q = Quantiles::new(vec![raw], bound);
        let band = q.slots()[0];
        prop_assert!(band.windows(2).all(|w| w[0] <= w[1]) && band.iter().all(|v| v.is_finite() && *v >= 0.0));
        prop_assert!(q.at_score(0, z) <= q.at_score(0, z + 0.1));
    }
}

#[test]
fn the_chosen_expert_speaks_unless_the_mix_is_configured() {
    let mut noise = Noise(23);
    let values: Vec<f64> = (0..200).map(|_| 1.0 + noise.normal(0.2)).collect();
    let known = by_five_minutes(&history(&values));
    let by = |speaker| Auto::default().forecast(speaker, &known, 12, 4).map(|s| s.model);
    assert_ne!(by(Speaker::default()).as_deref(), Some("mix"));
    assert_eq!(by(Speaker::Mix).as_deref(), Some("mix"));
}
