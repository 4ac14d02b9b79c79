//! How hard pages are compressed: as hard as the link is slow.
//!
//! Packing and sending take turns in one thread. A higher level pays where sending takes the longer part, and a lower one where
//! packing does: on a busy host, where the same work takes longer, the level falls and leaves the CPU to the guests.
//! ```text
//!           sending > 3 × packing                      packing > sending
//! level + 1 <────────────────── each 4 MiB of pages ──────────────────> level - 1
//! ```
//! A level costs at most twice the one below, so one step up does not lead to a step down. There is no level 0: it is zstd's name for
//! its default. Rounds may go lower than the first copy: they are small, go on for days, and cost CPU that the guests want.

use std::time::Duration;

/// What is weighed together. Less would follow every hiccup of a scheduler.
const WINDOW: usize = 4 << 20;
const UP: u32 = 3;

/// zstd's levels, and the one in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Level {
    min: i32,
    max: i32,
    now: i32,
    raw: usize,
    packing: Duration,
    sending: Duration,
}

impl Level {
    pub fn new(min: i32, max: i32) -> Self {
        Self {
            min,
            max: max.max(min),
            now: min,
            raw: 0,
            packing: Duration::ZERO,
            sending: Duration::ZERO,
        }
    }

    pub fn get(&self) -> i32 {
        self.now
    }

    /// From now on it may be as low as this. Where the link has kept up, it is at once. Returns the level if it is another one now.
    pub fn lower(&mut self, min: i32) -> Option<i32> {
        let (before, was_least) = (self.now, self.now == self.min);
        *self = Self {
            now: if was_least { min.min(self.now) } else { self.now },
            ..Self::new(min.min(self.min), self.max)
        };
        (self.now != before).then_some(self.now)
    }

    /// So many bytes before compression were packed and sent, and how long each took. Returns the level if it is another one now.
    pub fn sent(&mut self, raw: usize, packing: Duration, sending: Duration) -> Option<i32> {
        self.raw += raw;
        self.packing += packing;
        self.sending += sending;
        if self.raw < WINDOW {
            return None;
        }
        let before = self.now;
        if self.sending > self.packing * UP {
            self.now = step(self.now, 1).min(self.max);
        } else if self.packing > self.sending {
            self.now = step(self.now, -1).max(self.min);
        }
        *self = Self {
            now: self.now,
            ..Self::new(self.min, self.max)
        };
        (self.now != before).then_some(self.now)
    }
}

/// To the next level, which 0 is not.
fn step(level: i32, by: i32) -> i32 {
    match level + by {
        0 => by,
        next => next,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packing of a MiB takes a millisecond at level 1 and 1.6 times as much with each level, which makes it 5 % smaller.
    fn settle(link_ms_per_mib: f64, slow_cpu: f64) -> (i32, usize) {
        let mut level = Level::new(1, 6);
        let (mut seen, mut changes) = (level.get(), 0);
        for n in 0..1000 {
            let l = level.get() - 1;
            let packing = 1.6f64.powi(l) * slow_cpu / 1e3;
            let sending = link_ms_per_mib * 0.4 * 0.95f64.powi(l) / 1e3;
            level.sent(
                1 << 20,
                Duration::from_secs_f64(packing),
                Duration::from_secs_f64(sending),
            );
            if n > 100 && level.get() != seen {
                changes += 1;
            }
            seen = level.get();
        }
        (seen, changes)
    }

    #[test]
    fn a_slow_link_gets_a_high_level_and_a_slow_cpu_a_low_one_and_both_settle() {
        assert_eq!(settle(0.5, 1.0), (1, 0), "10 Gbit/s and more");
        let (gigabit, changes) = settle(8.4, 1.0);
        assert!((2..5).contains(&gigabit) && changes == 0, "{gigabit}, {changes}");
        assert_eq!(settle(84.0, 1.0), (6, 0), "100 Mbit/s");
        assert_eq!(settle(8.4, 4.0), (1, 0), "1 Gbit/s and a busy host");
    }

    #[test]
    fn it_comes_down_again_and_stays_in_its_range() {
        let mut level = Level::new(2, 3);
        let (short, long) = (Duration::from_millis(1), Duration::from_millis(9));
        assert_eq!(level.sent(WINDOW - 1, short, long), None);
        assert_eq!(level.sent(1, short, long), Some(3));
        assert_eq!(level.sent(WINDOW, short, long), None);
        assert_eq!(level.sent(WINDOW, long, short), Some(2));
        assert_eq!(level.sent(WINDOW, long, short), None);
        assert_eq!(Level::new(5, 1).get(), 5);
    }

    #[test]
    fn rounds_begin_low_where_the_link_keeps_up_and_never_use_level_0() {
        let (short, long) = (Duration::from_millis(1), Duration::from_millis(9));
        let mut level = Level::new(1, 6);
        assert_eq!(level.lower(-3), Some(-3));
        let up: Vec<_> = (0..5).map(|_| level.sent(WINDOW, short, long)).collect();
        assert_eq!(up, [Some(-2), Some(-1), Some(1), Some(2), Some(3)]);
        let down: Vec<_> = (0..7).map(|_| level.sent(WINDOW, long, short)).collect();
        assert_eq!(down, [Some(2), Some(1), Some(-1), Some(-2), Some(-3), None, None]);
        let mut slow = Level::new(1, 6);
        slow.sent(WINDOW, short, long);
        assert_eq!(
            (slow.lower(-3), slow.get()),
            (None, 2),
            "the link was slower than packing"
        );
        assert_eq!(slow.sent(WINDOW, long, short), Some(1));
        let mut fixed = Level::new(9, 9);
        assert_eq!((fixed.lower(9), fixed.get()), (None, 9));
    }
}
