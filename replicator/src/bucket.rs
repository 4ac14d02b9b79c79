//! How fast bytes may leave: a token bucket, as the one point in time at which it is level again.
//!
//! ```text
//!   level again at `due`
//!   ──────┬───────────────┬────────────┬──────> time
//!        now − burst     now          due        due > now: in debt, wait until then
//!         └── no further back: what was not used for longer than `BURST` is lost
//! ```
//! Sending moves `due` by the time that the bytes take at the rate. A frame is never cut, so the bucket may go into debt by one frame
//! a sender. Pure: `now` comes from outside.

use std::time::{Duration, Instant};

/// So much of the rate may be saved up by one who sends nothing, to be sent at once.
pub const BURST: Duration = Duration::from_millis(50);

/// A rate that is no rate would have frames wait for years; 1 Mbit/s is the least that can be configured.
const RATE_MIN: u64 = 125_000;

#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    /// Bytes a second; `None`: as fast as it goes.
    rate: Option<u64>,
    due: Instant,
}

impl Bucket {
    pub fn new(rate: Option<u64>, now: Instant) -> Self {
        Self {
            rate: rate.map(|r| r.max(RATE_MIN)),
            due: now,
        }
    }

    pub fn rate(&self) -> Option<u64> {
        self.rate
    }

    /// Another rate from now on. Debt stays debt in bytes: at a higher rate it is paid sooner.
    pub fn set(&mut self, rate: Option<u64>, now: Instant) {
        let rate = rate.map(|r| r.max(RATE_MIN));
        let debt = self.due.saturating_duration_since(now);
        self.due = match (self.rate, rate) {
            (Some(old), Some(new)) => now + debt.mul_f64(old as f64 / new as f64),
            _ => now,
        };
        self.rate = rate;
    }

    /// These bytes were sent.
    pub fn spend(&mut self, bytes: usize, now: Instant) {
        let Some(rate) = self.rate else { return };
        let saved = now.checked_sub(BURST).unwrap_or(now);
        self.due = self.due.max(saved) + Duration::from_secs_f64(bytes as f64 / rate as f64);
    }

    /// How long the next bytes have to wait.
    pub fn wait(&self, now: Instant) -> Duration {
        match self.rate {
            Some(_) => self.due.saturating_duration_since(now),
            None => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FRAME: usize = 256 << 10;

    proptest! {
        /// Whenever and whatever is sent by one who waits as told: no span of time carries more than rate × span, what was saved up, and
        /// one frame.
        #[test]
        fn no_span_carries_more_than_the_rate(
            rate in RATE_MIN..1_000_000_000,
            frames in prop::collection::vec((1..FRAME, 0u64..200_000), 1..100),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut bucket = Bucket::new(Some(rate), now);
            let mut sent: Vec<(Instant, usize)> = Vec::new();
            for (bytes, idle_us) in frames {
                now += Duration::from_micros(idle_us);
                now += bucket.wait(now);
                prop_assert!(bucket.wait(now).is_zero());
                bucket.spend(bytes, now);
                sent.push((now, bytes));
            }
            for i in 0..sent.len() {
                let mut sum = 0;
                for (at, bytes) in &sent[i..] {
                    sum += bytes;
                    let span = (*at - sent[i].0 + BURST).as_secs_f64();
                    prop_assert!(sum as f64 <= rate as f64 * span + FRAME as f64 + 1.0);
                }
            }
        }

        /// One who always has something to send gets the whole rate, although a sleeper wakes up a little late.
        #[test]
        fn the_rate_is_reached(rate in RATE_MIN..1_000_000_000, late_us in prop::collection::vec(0u64..40_000, 20..100)) {
            let start = Instant::now();
            let mut now = start;
            let mut bucket = Bucket::new(Some(rate), now);
            let mut sum = 0;
            for late in late_us {
                let wait = bucket.wait(now);
                if !wait.is_zero() {
                    now += wait + Duration::from_micros(late);
                }
                bucket.spend(FRAME, now);
                sum += FRAME;
            }
            let took = (now + bucket.wait(now) - start).as_secs_f64();
            prop_assert!(sum as f64 >= rate as f64 * (took - BURST.as_secs_f64()) * 0.999, "{sum} in {took} at {rate}");
        }

        #[test]
        fn a_new_rate_takes_the_debt_along(old in RATE_MIN..1 << 40, new in RATE_MIN..1 << 40, bytes in 0usize..1 << 31) {
            let now = Instant::now();
            let mut bucket = Bucket::new(Some(old), now);
            bucket.spend(bytes, now);
            let debt = bucket.wait(now).as_secs_f64() * old as f64;
            bucket.set(Some(new), now);
            let after = bucket.wait(now).as_secs_f64() * new as f64;
            prop_assert!((debt - after).abs() <= 1e-6 * debt + (old.max(new) as f64) * 2e-9, "{debt} {after}");
            bucket.set(None, now);
            prop_assert!(bucket.wait(now).is_zero());
        }
    }

    #[test]
    fn without_a_rate_nothing_waits_and_no_debt_is_made() {
        let now = Instant::now();
        let mut bucket = Bucket::new(None, now);
        bucket.spend(usize::MAX, now);
        assert!(bucket.wait(now).is_zero());
        bucket.set(Some(RATE_MIN), now);
        assert!(bucket.wait(now).is_zero());
        assert_eq!(Bucket::new(Some(0), now).rate(), Some(RATE_MIN));
    }
}
