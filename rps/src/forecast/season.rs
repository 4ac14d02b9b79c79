//! The period of a series, by autocorrelation.

/// A period must explain this much of what the trend leaves.
const CORRELATION_MIN: f64 = 0.5;
/// Shorter ones are noise to a planner.
const PERIOD_MIN: usize = 6;
/// The longest looked for: a week of five-minute slots.
const PERIOD_MAX: usize = 2_016;
/// Periods that must have passed.
const REPEATS: usize = 2;

/// Slots of the strongest season, if there is one that was seen twice.
///
/// The correlation is taken after a straight line is removed, and only beyond the first dip below zero: a smooth series
/// is alike itself at short lags for no seasonal reason. Among nearly equal peaks (a period and its multiples) the
/// shortest wins.
pub fn period(values: &[f64]) -> Option<usize> {
    let n = values.len();
    let longest = (n / REPEATS).min(PERIOD_MAX);
    if longest < PERIOD_MIN {
        return None;
    }
    let rest = detrended(values);
    let energy: f64 = rest.iter().map(|v| v * v).sum();
    if !energy.is_finite() || energy / n as f64 <= 1e-12 {
        return None;
    }
    // Scaled by the overlap, so that long lags are not worn down by its shortness.
    let correlation: Vec<f64> = (0..=longest)
        .map(|lag| {
            let (early, late) = (&rest[..n - lag], &rest[lag..]);
            let product: f64 = early.iter().zip(late).map(|(a, b)| a * b).sum();
            let e: f64 = early.iter().map(|v| v * v).sum();
            let l: f64 = late.iter().map(|v| v * v).sum();
            product / (e * l).sqrt().max(1e-12)
        })
        .collect();
    let dip = correlation.iter().position(|c| *c <= 0.0)?;
    let peaks: Vec<usize> = (dip.max(PERIOD_MIN)..longest)
        .filter(|lag| {
            let c = correlation[*lag];
            c >= CORRELATION_MIN && c >= correlation[lag - 1] && c >= correlation[lag + 1]
        })
        .collect();
    let best = peaks.iter().map(|lag| correlation[*lag]).fold(f64::MIN, f64::max);
    peaks.into_iter().find(|lag| correlation[*lag] >= 0.9 * best)
}

fn detrended(values: &[f64]) -> Vec<f64> {
    let n = values.len() as f64;
    let mid = (n - 1.0) / 2.0;
    let mean = values.iter().sum::<f64>() / n;
    let (mut up, mut down) = (0.0, 0.0);
    for (t, v) in values.iter().enumerate() {
        up += (t as f64 - mid) * (v - mean);
        down += (t as f64 - mid).powi(2);
    }
    let slope = if down > 0.0 { up / down } else { 0.0 };
    values
        .iter()
        .enumerate()
        .map(|(t, v)| v - mean - slope * (t as f64 - mid))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize, period: f64, noise: f64) -> Vec<f64> {
        let hash = |i: usize| (i.wrapping_mul(2_654_435_761) >> 7) as f64 % 1000.0 / 1000.0 - 0.5;
        (0..n)
            .map(|i| 1.0 + (i as f64 * std::f64::consts::TAU / period).sin() + 0.003 * i as f64 + noise * hash(i))
            .collect()
    }

    #[test]
    fn finds_a_period_under_noise_and_trend() {
        let found = period(&wave(200, 24.0, 0.8)).unwrap();
        assert!((23..=25).contains(&found), "{found}");
    }

    #[test]
    fn finds_none_where_there_is_none() {
        assert_eq!(period(&[]), None);
        assert_eq!(period(&[1.0; 300]), None);
        let ramp: Vec<f64> = (0..300).map(f64::from).collect();
        assert_eq!(period(&ramp), None);
        assert_eq!(period(&wave(30, 24.0, 0.0)), None, "seen only once");
        assert_eq!(period(&[f64::NAN; 100]), None);
    }
}
