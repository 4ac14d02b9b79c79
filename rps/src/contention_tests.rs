use super::*;
use proptest::prelude::*;

fn draws(correlation: f64, persistence: f64, horizon: usize) -> Arc<Draws> {
    Arc::new(Draws::new(
        horizon,
        Dependence {
            correlation,
            persistence,
        },
    ))
}

fn joint(draws: &Arc<Draws>, members: &[(u8, Quantiles)]) -> Joint {
    let mut joint = Joint::new(draws.clone());
    members.iter().for_each(|(key, q)| joint.add(&[*key], q));
    joint
}

#[test]
fn the_normal_distribution_and_its_inverse_agree() {
    for p in [0.001, 0.05, 0.3, 0.5, 0.9, 0.999] {
        assert!((normal_cdf(normal_quantile(p)) - p).abs() < 1e-6, "{p}");
    }
}

/// For normal demands the answer is known: mean and variance add, with the correlation's share.
#[test]
fn the_sum_of_normals_is_met() {
    for correlation in [0.0, 0.3, 0.8] {
        let d = draws(correlation, 0.9, 5);
        let members: Vec<_> = (0..6).map(|k| (k, Quantiles::flat(0.5, 0.1, 5, 9.0))).collect();
        let sigma = 0.1 * (6.0 + 30.0 * correlation).sqrt();
        for capacity in [2.8, 3.0, 3.2, 3.4] {
            let expected = 1.0 - normal_cdf((capacity - 3.0) / sigma);
            let verdict = joint(&d, &members).verdict(capacity);
            let mean = verdict.probability.iter().sum::<f64>() / 5.0;
            assert!(
                (mean - expected).abs() < 0.05,
                "ρ {correlation}, {capacity}: {mean} for {expected}"
            );
        }
    }
}

/// Skewed demands against a plain Monte Carlo with draws of its own.
#[test]
fn skewed_demands_agree_with_an_independent_simulation() {
    let skewed = Quantiles::new(vec![[0.05, 0.1, 0.15, 0.25, 0.5, 0.8, 1.5]; 3], 2.0);
    let d = draws(0.0, 0.0, 3);
    let members: Vec<_> = (0..4).map(|k| (k, skewed.clone())).collect();
    let mut rng = SplitMix(99);
    let mut over = 0;
    let rounds = 40_000;
    for _ in 0..rounds {
        let sum: f64 = (0..4).map(|_| skewed.at_score(0, rng.normal())).sum();
        over += usize::from(sum > 1.6);
    }
    let expected = f64::from(over as u32) / f64::from(rounds);
    let verdict = joint(&d, &members).verdict(1.6);
    let mean = verdict.probability.iter().sum::<f64>() / 3.0;
    assert!((mean - expected).abs() < 0.04, "{mean} for {expected}");
}

#[test]
fn an_error_that_persists_makes_fewer_chances() {
    let members = [
        (1, Quantiles::flat(0.5, 0.1, 30, 9.0)),
        (2, Quantiles::flat(0.3, 0.1, 30, 9.0)),
    ];
    let peak = |persistence| {
        joint(&draws(0.1, persistence, 30), &members)
            .verdict(1.05)
            .peak_probability
    };
    assert!(
        peak(0.0) > peak(0.9) && peak(0.9) > peak(0.999),
        "{} {} {}",
        peak(0.0),
        peak(0.9),
        peak(0.999)
    );
}

#[test]
fn adding_and_removing_leaves_what_was() {
    let d = draws(0.15, 0.9, 10);
    let (a, b) = (Quantiles::flat(0.5, 0.1, 10, 2.0), Quantiles::flat(0.3, 0.2, 10, 2.0));
    let before = joint(&d, &[(1, a.clone())]);
    let mut after = joint(&d, &[(1, a), (2, b.clone())]);
    after.remove(&[2], &b);
    assert!(before.sums.iter().zip(&after.sums).all(|(x, y)| (x - y).abs() < 1e-5));
}

#[test]
fn nothing_is_asked_of_an_empty_joint() {
    let none = Joint::default();
    assert_eq!(none.verdict(1.0), Verdict::default());
    assert!(none.met_by(&[1], &Quantiles::default(), 1.0, 0.0).is_empty());
    let short = Quantiles::flat(5.0, 0.0, 2, 9.0);
    let verdict = joint(&draws(0.1, 0.9, 4), &[(1, short)]).verdict(1.0);
    assert_eq!(
        verdict.probability,
        [1.0, 1.0, 0.0, 0.0],
        "bands that end early count as nothing after their end"
    );
}

#[test]
fn the_ratio_is_one_where_nothing_is_left() {
    let own = Quantiles::flat(0.3, 0.0, 2, 1.0);
    let by_slot = ratio(&own, 4, &[0.3 + 0.4, 0.3 + 1.2], 1.0);
    assert!(
        (by_slot[0] - 0.5).abs() < 1e-9 && by_slot[1] == 1.0,
        "0.3 of the 0.6 left, then nothing: {by_slot:?}"
    );
    assert_eq!(ratio(&Quantiles::flat(0.0, 0.0, 1, 1.0), 4, &[5.0], 1.0), [0.0]);
}

fn band() -> impl Strategy<Value = (f64, f64)> {
    (0.0f64..2.0, 0.0f64..0.5)
}

proptest! {
    /// More demand never lowers, more capacity never raises a probability; all are probabilities.
    #[test]
    fn monotone_in_demand_and_capacity(
        members in prop::collection::vec(band(), 1..6),
        more in 0.0f64..1.0,
        capacity in 0.1f64..6.0,
        correlation in -0.5f64..1.5,
    ) {
        let d = draws(correlation, 0.9, 6);
        let quantiles = |shift: f64| -> Vec<(u8, Quantiles)> {
            let each = members.iter().enumerate();
            each.map(|(k, (m, s))| (k as u8, Quantiles::flat(m + shift, *s, 6, 4.0))).collect()
        };
        let (base, raised) = (joint(&d, &quantiles(0.0)), joint(&d, &quantiles(more)));
        let (low, high, roomy) = (base.verdict(capacity), raised.verdict(capacity), base.verdict(capacity + more));
        for ((l, h), r) in low.probability.iter().zip(&high.probability).zip(&roomy.probability) {
            prop_assert!((0.0..=1.0).contains(l));
            prop_assert!(l <= h && r <= l);
        }
        prop_assert!(low.peak_probability <= high.peak_probability);
        let most = low.probability.iter().copied().fold(0.0, f64::max);
        prop_assert!(low.peak_probability >= most && low.peak_probability <= low.probability.iter().sum::<f64>() + 1e-9);
        let met = base.met_by(&[0], &quantiles(0.0)[0].1, capacity, 0.02);
        prop_assert!(met.windows(2).all(|w| w[0] <= w[1]));
        prop_assert!(met.iter().all(|p| (0.0..=1.0).contains(p)));
    }
}
