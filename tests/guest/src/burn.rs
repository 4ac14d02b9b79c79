//! Load, of three kinds.
//!
//! [`Burner`] follows a schedule, on each vCPU one: each 20 ms it takes its share of CPU time, measured by the thread's own CPU clock, and
//! sleeps for the rest. [`Work`] is what one web request costs: a fixed number of loop rounds, calibrated at boot. It
//! must not be measured by a clock: without a steal clock (TCG has none) the guest's clock runs on while the host runs
//! somebody else, and a request that 'burns 2 ms' would look quick on a contended host. [`Rewrite`] is the same for memory.

use std::hint::black_box;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::schedule::Schedule;
use crate::sys;

const PERIOD: Duration = Duration::from_millis(20);
/// Loop rounds between two looks at the clock: tens of microseconds under TCG.
const CHUNK: u64 = 10_000;

fn spin(rounds: u64) {
    let mut x = 1u64;
    for _ in 0..rounds {
        x = black_box(x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407));
    }
}

struct Plan {
    schedule: Schedule,
    start: Instant,
}

pub struct Burner {
    plan: Mutex<Plan>,
    changed: Condvar,
}

impl Burner {
    pub fn new(schedule: Schedule) -> Self {
        Burner {
            plan: Mutex::new(Plan {
                schedule,
                start: Instant::now(),
            }),
            changed: Condvar::new(),
        }
    }

    /// Starts `schedule` at once, from its second 0.
    pub fn restart(&self, schedule: Schedule) {
        *self.lock() = Plan {
            schedule,
            start: Instant::now(),
        };
        self.changed.notify_all();
    }

    /// The share of each vCPU that is wanted now.
    pub fn share(&self) -> f64 {
        let plan = self.lock();
        plan.schedule.share_at(plan.start.elapsed().as_secs_f64())
    }

    pub fn run(&self) -> ! {
        let mut next = Instant::now();
        loop {
            let share = self.wait_for_demand();
            burn_cpu(PERIOD.mul_f64(share));
            // A period that was too short for its share is not made up for: demand is per period, not a debt.
            next = (next + PERIOD).max(Instant::now());
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }

    /// Sleeps, without waking up in between, while the schedule wants nothing.
    fn wait_for_demand(&self) -> f64 {
        let mut plan = self.lock();
        loop {
            let seconds = plan.start.elapsed().as_secs_f64();
            let share = plan.schedule.share_at(seconds);
            if share > 0.0 {
                return share;
            }
            plan = if plan.schedule.is_over_at(seconds) {
                self.changed.wait(plan).unwrap_or_else(PoisonError::into_inner)
            } else {
                self.changed
                    .wait_timeout(plan, Duration::from_millis(200))
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            };
        }
    }

    fn lock(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn burn_cpu(amount: Duration) {
    let end = sys::thread_cpu() + amount;
    while sys::thread_cpu() < end {
        spin(CHUNK);
    }
}

/// The cost of a web request.
pub struct Work {
    rounds: u64,
}

impl Work {
    /// Finds how many rounds take `work_us` on an undisturbed CPU: the quickest of many short trials, so that a neighbour
    /// that runs just now does not count.
    pub fn calibrate(work_us: u64) -> Self {
        spin(CHUNK);
        let quickest = (0..40).map(|_| {
            let start = Instant::now();
            spin(CHUNK);
            start.elapsed()
        });
        let nanos = quickest.min().map_or(1, |time| time.as_nanos().max(1));
        let rounds = u128::from(work_us) * 1000 * u128::from(CHUNK) / nanos;
        Work {
            rounds: u64::try_from(rounds).unwrap_or(u64::MAX),
        }
    }

    pub fn run(&self) {
        spin(self.rounds);
    }
}

/// Writes each word of a few pages, over and over: what it costs the guest that its writes are noted. The pages are few, so that
/// how many a second are changed is still said by the pattern's rate.
pub struct Rewrite(Mutex<Vec<u64>>);

/// 256 KiB.
const REWRITTEN_WORDS: usize = 32 << 10;
/// Some milliseconds under TCG.
const REWRITE_PASSES: u64 = 16;

impl Default for Rewrite {
    fn default() -> Self {
        Rewrite(Mutex::new(vec![0; REWRITTEN_WORDS]))
    }
}

impl Rewrite {
    pub fn run(&self) {
        let mut words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for pass in 0..REWRITE_PASSES {
            for word in words.iter_mut() {
                *word = word.wrapping_add(pass | 1);
            }
            black_box(words.as_mut_slice());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burns_what_it_is_told_of_its_own_cpu_time() {
        let before = sys::thread_cpu();
        burn_cpu(Duration::from_millis(30));
        assert!(sys::thread_cpu() - before >= Duration::from_millis(30));
    }

    #[test]
    fn a_new_schedule_starts_from_its_beginning() {
        let burner = Burner::new(Schedule::idle());
        assert_eq!(burner.share(), 0.0);
        burner.restart("0:0.25".parse().unwrap());
        assert_eq!(burner.share(), 0.25);
    }
}
