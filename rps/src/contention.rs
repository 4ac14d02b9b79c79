//! Will a host's VMs want more CPU than it has? The joint demand of all that runs on a host against its capacity.
//!
//! Each member (a VM, or the host's own work) has a quantile forecast a slot. A member's path through the horizon is its
//! quantile function read at normal scores that wander as an AR(1) (`persistence`: a forecast that is too low now is too low
//! in the next slot too) and share a common part (`correlation`: VMs of one host tend to err together). This is a Gaussian
//! copula, drawn [`PATHS`] times. Draws come from one fixed pool whose scores are exact normal quantiles in every slot,
//! and each member reads it in its own order. So the answer is deterministic, a larger demand can never lower a probability,
//! and 'what if this VM were here' is one addition per path.
//!
//! Moment matching would be cheaper, but demands are skewed and bounded, and the union over the horizon (is there *any*
//! contended slot?) needs paths.

use std::hash::Hasher;
use std::sync::Arc;

use crate::forecast::Quantiles;

/// Draws of the joint demand. A power of two, so that an odd step visits all.
pub const PATHS: usize = 512;

/// How errors hang together.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Dependence {
    /// Between two members of a host in one slot, 0 to 1.
    pub correlation: f64,
    /// Of one member between neighbouring slots, 0 to 1.
    pub persistence: f64,
}

impl Default for Dependence {
    fn default() -> Self {
        Self {
            correlation: 0.15,
            persistence: 0.9,
        }
    }
}

/// The pool of normal scores, `horizon` × [`PATHS`].
#[derive(Debug)]
pub struct Draws {
    horizon: usize,
    dependence: Dependence,
    scores: Vec<f32>,
}

impl Draws {
    pub fn new(horizon: usize, dependence: Dependence) -> Self {
        let dependence = Dependence {
            correlation: lawful(dependence.correlation),
            persistence: lawful(dependence.persistence),
        };
        let mut rng = SplitMix(0x0075_6d62_7261);
        let mut scores = Vec::with_capacity(horizon * PATHS);
        let mut path: Vec<f64> = Vec::new();
        let (keep, fresh) = (dependence.persistence, (1.0 - dependence.persistence.powi(2)).sqrt());
        for _ in 0..horizon {
            path = match path.is_empty() {
                true => (0..PATHS).map(|_| rng.normal()).collect(),
                false => path.iter().map(|z| keep * z + fresh * rng.normal()).collect(),
            };
            scores.extend(exact_scores(&path));
        }
        Self {
            horizon,
            dependence,
            scores,
        }
    }

    pub fn horizon(&self) -> usize {
        self.horizon
    }

    pub fn dependence(&self) -> Dependence {
        self.dependence
    }

    /// One member's demand in every slot and path, in cores, slot by slot.
    pub fn paths(&self, key: &[u8], demand: &Quantiles) -> Vec<f32> {
        let (step, start) = order_of(key);
        let common = self.dependence.correlation.sqrt();
        let own = (1.0 - self.dependence.correlation).sqrt();
        let mut out = Vec::with_capacity(self.scores.len());
        for (h, scores) in self.scores.chunks_exact(PATHS).enumerate() {
            out.extend(scores.iter().enumerate().map(|(p, c)| {
                let e = scores[(p.wrapping_mul(step).wrapping_add(start)) % PATHS];
                demand.at_score(h, common * f64::from(*c) + own * f64::from(e)) as f32
            }));
        }
        out
    }
}

fn lawful(share: f64) -> f64 {
    if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 }
}

/// The scores' ranks, as normal quantiles: every slot then has exactly the normal's distribution.
fn exact_scores(path: &[f64]) -> Vec<f32> {
    let mut by_rank: Vec<usize> = (0..path.len()).collect();
    by_rank.sort_by(|a, b| path[*a].total_cmp(&path[*b]));
    let mut out = vec![0.0; path.len()];
    for (rank, i) in by_rank.into_iter().enumerate() {
        out[i] = normal_quantile((rank as f64 + 0.5) / path.len() as f64) as f32;
    }
    out
}

/// Each member reads the pool as `(p * step + start) % PATHS`.
fn order_of(key: &[u8]) -> (usize, usize) {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(key);
    let h = hasher.finish() as usize;
    // Never 1: a member must not read the pool in the common part's order.
    (((h % PATHS) | 1).max(3), (h / PATHS) % PATHS)
}

/// The demand of a whole host, path by path.
#[derive(Clone, Debug, Default)]
pub struct Joint {
    sums: Vec<f32>,
    draws: Option<Arc<Draws>>,
}

/// What a joint demand means for a capacity.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Verdict {
    pub demand_p50: Vec<f64>,
    pub demand_p90: Vec<f64>,
    /// By slot: the probability that demand exceeds the capacity in it.
    pub probability: Vec<f64>,
    /// The probability that it does in any slot.
    pub peak_probability: f64,
}

impl Joint {
    pub fn new(draws: Arc<Draws>) -> Self {
        Self {
            sums: vec![0.0; draws.horizon() * PATHS],
            draws: Some(draws),
        }
    }

    pub fn add(&mut self, key: &[u8], demand: &Quantiles) {
        self.combine(key, demand, 1.0);
    }

    /// Takes out what [`Joint::add`] put in.
    pub fn remove(&mut self, key: &[u8], demand: &Quantiles) {
        self.combine(key, demand, -1.0);
    }

    fn combine(&mut self, key: &[u8], demand: &Quantiles, sign: f32) {
        let Some(draws) = &self.draws else { return };
        let paths = draws.paths(key, demand);
        self.sums.iter_mut().zip(paths).for_each(|(s, x)| *s += sign * x);
    }

    pub fn verdict(&self, usable_cpus: f64) -> Verdict {
        let mut verdict = Verdict::default();
        let mut any = vec![false; PATHS];
        let mut sorted = Vec::with_capacity(PATHS);
        for slot in self.sums.chunks_exact(PATHS) {
            let mut over = 0;
            for (sum, any) in slot.iter().zip(&mut any) {
                let exceeds = f64::from(*sum) > usable_cpus;
                over += usize::from(exceeds);
                *any |= exceeds;
            }
            sorted.clear();
            sorted.extend_from_slice(slot);
            sorted.sort_by(f32::total_cmp);
            verdict.demand_p50.push(f64::from(sorted[PATHS / 2]).max(0.0));
            verdict.demand_p90.push(f64::from(sorted[PATHS * 9 / 10]).max(0.0));
            verdict.probability.push(over as f64 / PATHS as f64);
        }
        verdict.peak_probability = share(&any);
        verdict
    }

    /// For one member: by slot, the probability that it has met contention in that slot or an earlier one of the
    /// horizon. Ascends. A member suffers where the host is full while it wants at least `idle_cores` itself: who wants
    /// nothing waits for nothing.
    pub fn met_by(&self, key: &[u8], demand: &Quantiles, usable_cpus: f64, idle_cores: f64) -> Vec<f64> {
        let Some(draws) = &self.draws else { return Vec::new() };
        let own = draws.paths(key, demand);
        let mut any = vec![false; PATHS];
        let slots = self.sums.chunks_exact(PATHS).zip(own.chunks_exact(PATHS));
        slots
            .map(|(sums, own)| {
                for ((sum, own), any) in sums.iter().zip(own).zip(&mut any) {
                    *any |= f64::from(*sum) > usable_cpus && f64::from(*own) >= idle_cores;
                }
                share(&any)
            })
            .collect()
    }
}

fn share(flags: &[bool]) -> f64 {
    flags.iter().filter(|f| **f).count() as f64 / flags.len().max(1) as f64
}

/// `method = "ratio"`: by slot, the VM's demand at the wanted quantile over what the others' medians leave of the capacity.
/// 1 where nothing is left.
pub fn ratio(own: &Quantiles, level: usize, host_p50: &[f64], usable_cpus: f64) -> Vec<f64> {
    own.slots()
        .iter()
        .zip(host_p50)
        .map(|(band, host)| {
            let wanted = band.get(level).copied().unwrap_or(0.0);
            let others = (host - band[crate::forecast::P50]).max(0.0);
            let left = usable_cpus - others;
            if wanted <= 0.0 {
                0.0
            } else if left <= 0.0 {
                1.0
            } else {
                (wanted / left).min(1.0)
            }
        })
        .collect()
}

/// Steele, Lea and Flood's SplitMix64: a few lines instead of a crate, as only the one fixed pool is drawn from it.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn normal(&mut self) -> f64 {
        let u = ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        normal_quantile(u)
    }
}

/// Inverse of the normal distribution, by Winitzki's inverse of erf and two Newton steps on the distribution: its
/// error, below 1e-6 in between, is far below what [`PATHS`] draws resolve.
fn normal_quantile(p: f64) -> f64 {
    let x = 2.0 * p.clamp(1e-12, 1.0 - 1e-12) - 1.0;
    let a = 0.147;
    let ln = (1.0 - x * x).ln();
    let t = 2.0 / (std::f64::consts::PI * a) + ln / 2.0;
    let mut z = (((t * t - ln / a).sqrt() - t).sqrt() * std::f64::consts::SQRT_2).copysign(x);
    for _ in 0..2 {
        let density = (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        z -= (normal_cdf(z) - p) / density.max(1e-12);
    }
    z
}

/// Abramowitz and Stegun 26.2.17, error below 7.5e-8.
pub fn normal_cdf(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z.abs());
    let poly =
        t * (0.319_381_530 + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    let tail = (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt() * poly;
    if z >= 0.0 { 1.0 - tail } else { tail }
}

#[cfg(test)]
#[path = "contention_tests.rs"]
mod tests;
