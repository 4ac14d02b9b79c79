//! When the scrub looks at pages that wait in swap: each once in a turn, a day by default, a few at a time.
//!
//! To be looked at, a page must be read back, and pushed out again, which writes it once more: the shadow would lose its tier, and a flash
//! disk its life, at the pace of pages in RAM. So a turn costs one read and one write of what waits, spread over it, and no more RAM than
//! [`AT_ONCE`] pages. A page that is not in swap when its turn comes is looked at with all the others.

use std::time::{Duration, Instant};

use crate::memory::heat::Bits;

/// Most pages that are brought back at a time: 256 KiB.
const AT_ONCE: usize = 64;
/// And how long that may take: rounds wait behind it.
pub const LONGEST: Duration = Duration::from_millis(50);
/// Faster than it takes, since pages come by when the link rests, and not evenly.
const HASTE: f64 = 2.0;

/// One turn after the other through a shadow's pages.
pub struct Turn {
    /// `None`: what waits in swap is never looked at.
    length: Option<Duration>,
    begun: Instant,
    /// By block: its pages, and those that were looked at in this turn.
    seen: Vec<(usize, Bits)>,
    pages: usize,
    /// Pages that may be read by now, and since when they are counted.
    due: f64,
    counted: Instant,
}

impl Turn {
    /// `blocks`: their pages.
    pub fn new(length: Option<Duration>, blocks: impl Iterator<Item = usize>, now: Instant) -> Self {
        let blocks: Vec<usize> = blocks.collect();
        Self {
            length,
            begun: now,
            seen: blocks.iter().map(|pages| (*pages, Bits::new(*pages))).collect(),
            pages: blocks.iter().sum(),
            due: 0.0,
            counted: now,
        }
    }

    /// How many pages may be read back now.
    pub fn allows(&mut self, now: Instant) -> usize {
        let Some(length) = self.length else { return 0 };
        if now.saturating_duration_since(self.begun) >= length {
            self.begun = now;
            self.seen.iter().for_each(|(_, seen)| seen.clear());
        }
        let rate = self.pages as f64 * HASTE / length.as_secs_f64();
        let waited = now.saturating_duration_since(self.counted).as_secs_f64();
        self.counted = now;
        self.due = (self.due + waited * rate).min(AT_ONCE as f64);
        self.due as usize
    }

    /// Whether it is this page's turn. It counts as looked at then.
    pub fn takes(&mut self, block: u16, page: u64) -> bool {
        let (Some((pages, seen)), Ok(page)) = (self.seen.get(usize::from(block)), usize::try_from(page)) else {
            return false;
        };
        if page >= *pages || seen.get(page) {
            return false;
        }
        seen.set(page, true);
        self.due -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);
    /// How often pages come by.
    const EVERY: Duration = Duration::from_millis(500);
    const BATCH: u64 = 512;

    /// Pages come by as the scrub sends them; how often each was looked at, and most at a time.
    fn run(turn: &mut Turn, pages: u64, start: Instant, time: Duration) -> (Vec<u32>, usize) {
        let (mut looked, mut most, mut at) = (vec![0; pages as usize], 0, 0);
        for n in 0..time.as_millis() / EVERY.as_millis() {
            let allowed = turn.allows(start + EVERY * n as u32);
            let mut taken = 0;
            for page in at..(at + BATCH).min(pages) {
                if taken < allowed && turn.takes(0, page) {
                    looked[page as usize] += 1;
                    taken += 1;
                }
            }
            most = most.max(taken);
            at = if at + BATCH >= pages { 0 } else { at + BATCH };
        }
        (looked, most)
    }

    #[test]
    fn each_page_has_one_look_a_turn_and_few_come_back_at_a_time() {
        // 1 GiB in a day, 256 MiB in half an hour, and 16 GiB in a day.
        for (pages, length, most) in [
            (1 << 18, DAY, 8),
            (1 << 16, Duration::from_secs(1800), 64),
            (1 << 22, DAY, 64),
        ] {
            let start = Instant::now();
            let mut turn = Turn::new(Some(length), [pages as usize].into_iter(), start);
            let (looked, at_once) = run(&mut turn, pages, start, length);
            assert!(looked.iter().all(|n| *n == 1), "{pages}");
            assert!(at_once <= most, "{pages}: {at_once}");
            let (looked, _) = run(&mut turn, pages, start + length, length);
            assert!(looked.iter().all(|n| *n == 1), "{pages}: and again");
        }
    }

    #[test]
    fn what_may_not_be_read_is_not() {
        let now = Instant::now();
        let mut never = Turn::new(None, [9].into_iter(), now);
        assert_eq!(never.allows(now + DAY), 0);
        let mut turn = Turn::new(Some(DAY), [9].into_iter(), now);
        assert_eq!(turn.allows(now), 0);
        assert!(!turn.takes(1, 0) && !turn.takes(0, u64::MAX), "no such page");
    }
}
