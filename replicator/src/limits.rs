//! Bandwidth limits: one for all of this host's protections together, which can be changed while the daemon runs, and one a protection.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use umbra_api::replica::Limits;

use crate::bucket::Bucket;

/// No wait is longer without another look: a limit that is raised helps at once.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub struct Throttle {
    bucket: Mutex<Bucket>,
    /// The last pass of a switchover is slowed down too.
    pub in_switchover: bool,
}

/// As fast as it goes.
impl Default for Throttle {
    fn default() -> Self {
        Self::new(Limits::default(), false)
    }
}

impl Throttle {
    pub fn new(limits: Limits, in_switchover: bool) -> Self {
        Self {
            bucket: Mutex::new(Bucket::new(bytes_per_s(limits), Instant::now())),
            in_switchover,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set(&self, limits: Limits) {
        self.lock().set(bytes_per_s(limits), Instant::now());
    }

    pub fn limits(&self) -> Limits {
        Limits {
            bandwidth_mbit: self
                .lock()
                .rate()
                .map(|r| u32::try_from(r / 125_000).unwrap_or(u32::MAX)),
        }
    }

    /// These bytes were sent; the rest that is due, of which a part is enough for now.
    pub fn spent(&self, bytes: usize) -> Option<Duration> {
        let mut bucket = self.lock();
        // Most hosts have no limit.
        bucket.rate()?;
        bucket.spend(bytes, Instant::now());
        drop(bucket);
        self.due()
    }

    pub fn due(&self) -> Option<Duration> {
        let wait = self.lock().wait(Instant::now());
        Some(wait.min(LOOK)).filter(|w| !w.is_zero())
    }
}

fn bytes_per_s(limits: Limits) -> Option<u64> {
    limits.bandwidth_mbit.map(|m| u64::from(m) * 125_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raised_limit_ends_the_wait_and_none_costs_nothing() {
        let limit = |bandwidth_mbit| Limits { bandwidth_mbit };
        let throttle = Throttle::new(limit(Some(1)), false);
        assert_eq!(throttle.spent(100 << 20), Some(LOOK));
        assert_eq!(throttle.limits(), limit(Some(1)));
        throttle.set(limit(None));
        assert_eq!(throttle.due(), None);
        assert_eq!(throttle.spent(100 << 20), None);
        throttle.set(limit(Some(u32::MAX)));
        assert_eq!(throttle.limits(), limit(Some(u32::MAX)));
        assert_eq!(throttle.due(), None);
    }
}
