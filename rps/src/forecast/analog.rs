//! Analogs: when did this VM last behave as it does now, and what came then?
//!
//! The newest `window` slots are compared with every window of the past: the weighted sum of differences (newer slots weigh
//! more) over the VM's mean step, and a little for another time of the day. What followed the nearest ones, shifted by a
//! share of the difference in level, is the forecast: as a distribution, since they do not agree.
//!
//! Nothing is kept between calls. A distance that streams (`D[j] = decay · D[j-1] + |x - x_j|`, one step a slot) would save
//! arithmetic that costs little, for a number a slot of history, setting and series in memory, and would have to
//! be made anew whenever a late sample changes the past.

use super::recent::{band_of, slots_per_day};
use super::{Band, Forecaster, History, Quantiles};

/// Neighbouring windows are the same event: so many slots between two that count.
const APART: usize = 3;
/// Fewer than this are no distribution.
const NEAREST_MIN: usize = 6;

#[derive(Clone, PartialEq, Debug)]
pub struct Analog {
    name: String,
    setting: Setting,
}

/// What makes one expert of this kind differ from another.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Setting {
    /// Slots compared.
    pub window: usize,
    /// A slot's weight in the comparison, each slot back.
    pub decay: f32,
    /// Windows that count.
    pub nearest: usize,
    /// Share of (now − then) by which what followed is shifted.
    pub shift: f64,
    /// Distance, in mean steps, of a window half a day off.
    pub clock: f32,
    /// A window's weight falls by e when it is this much of the range of distances farther than the nearest.
    pub bandwidth: f32,
}

impl Analog {
    pub fn new(setting: Setting) -> Self {
        Self {
            name: format!("analog{}-{}", setting.window, setting.nearest),
            setting,
        }
    }

    /// Distance of each past window; position 0 is the oldest window, which ends at slot `window - 1`.
    fn distances(&self, x: &[f32], count: usize, day: Option<usize>) -> Vec<f32> {
        let Setting {
            window, decay, clock, ..
        } = self.setting;
        let steps: f32 = x.windows(2).map(|w| (w[1] - w[0]).abs()).sum();
        let step = (steps / x.len().max(1) as f32).max(f32::MIN_POSITIVE);
        let weights: Vec<f32> = (0..window).map(|k| decay.powi(k as i32)).collect();
        let total: f32 = weights.iter().sum::<f32>() * step;
        let mut distance = vec![0.0f32; count];
        for (k, weight) in weights.iter().enumerate() {
            let now = x[x.len() - 1 - k];
            let weight = weight / total;
            let then = &x[window - 1 - k..][..count];
            distance
                .iter_mut()
                .zip(then)
                .for_each(|(d, v)| *d += weight * (now - v).abs());
        }
        if let Some(day) = day.filter(|_| clock > 0.0) {
            let back = x.len() - window;
            for (c, d) in distance.iter_mut().enumerate() {
                let off = (back - c) % day;
                *d += clock * 2.0 * off.min(day - off) as f32 / day as f32;
            }
        }
        distance
    }

    /// Positions of the nearest windows with their weights.
    fn nearest(&self, distance: &[f32]) -> Vec<(usize, f64)> {
        let wanted = self.setting.nearest.min(distance.len() / APART);
        let mut order: Vec<usize> = (0..distance.len()).collect();
        // Of a chosen window's neighbours none counts: so many must be looked at, at most.
        let looked = (wanted * 2 * APART).min(order.len());
        let by_distance = |a: &usize, b: &usize| distance[*a].total_cmp(&distance[*b]).then(b.cmp(a));
        if looked < order.len() {
            order.select_nth_unstable_by(looked, by_distance);
            order.truncate(looked);
        }
        order.sort_unstable_by(by_distance);
        let mut chosen: Vec<usize> = Vec::with_capacity(wanted);
        for c in order {
            if chosen.len() == wanted {
                break;
            }
            if chosen.iter().all(|other| other.abs_diff(c) >= APART) {
                chosen.push(c);
            }
        }
        let first = chosen.first().map_or(0.0, |c| distance[*c]);
        let last = chosen.last().map_or(0.0, |c| distance[*c]);
        let bandwidth = (self.setting.bandwidth * (last - first)).max(1e-6);
        chosen
            .into_iter()
            .map(|c| (c, f64::from(((first - distance[c]) / bandwidth).exp())))
            .collect()
    }
}

impl Forecaster for Analog {
    fn name(&self) -> &str {
        &self.name
    }

    fn forecast(&self, history: &History, horizon: usize) -> Option<Quantiles> {
        let values = history.values();
        let n = values.len();
        let window = self.setting.window;
        // The youngest window that counts has been followed by a whole horizon.
        let count = (n + 1).checked_sub(window + horizon)?;
        let x: Vec<f32> = values.iter().map(|v| *v as f32).collect();
        let nearest = self.nearest(&self.distances(&x, count, slots_per_day(history)));
        if nearest.len() < NEAREST_MIN {
            return None;
        }
        let now = values[n - 1];
        let mut followed: Vec<(f64, f64)> = Vec::with_capacity(nearest.len());
        let bands: Option<Vec<Band>> = (1..=horizon)
            .map(|h| {
                followed.clear();
                followed.extend(nearest.iter().map(|(c, weight)| {
                    let end = window - 1 + c;
                    let shift = self.setting.shift * (now - values[end]);
                    (values[end + h] + shift, *weight)
                }));
                band_of(&mut followed)
            })
            .collect();
        Some(Quantiles::new(bands?, history.bound))
    }
}
