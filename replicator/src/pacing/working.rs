//! The working set: distinct pages that the guest wrote in the last rounds.
//!
//! A stamp a page, the last round in which it was seen, and how many pages bear each of the last stamps: a page that is seen
//! again moves its count, a round that becomes old takes its count along. Two bytes a page of RAM, no pass over them.

/// Rounds that count.
pub const ROUNDS: u16 = 20;

#[derive(Debug)]
pub struct WorkingSet {
    blocks: Vec<Vec<u16>>,
    /// The present round's stamp; 0 is 'never'.
    now: u16,
    /// Pages by stamp, at stamp modulo its length.
    counts: [u64; ROUNDS as usize],
}

impl WorkingSet {
    /// For blocks of so many pages each.
    pub fn new(pages: impl IntoIterator<Item = u64>) -> Self {
        let blocks = pages.into_iter().map(|n| vec![0; usize::try_from(n).unwrap_or(0)]);
        Self {
            blocks: blocks.collect(),
            now: 1,
            counts: [0; ROUNDS as usize],
        }
    }

    fn count(&mut self, stamp: u16) -> &mut u64 {
        &mut self.counts[usize::from(stamp % ROUNDS)]
    }

    /// The page was written. One that no block has is not counted.
    pub fn seen(&mut self, block: u16, page: u64) {
        let now = self.now;
        let stamp = self.blocks.get_mut(usize::from(block)).zip(usize::try_from(page).ok());
        let Some(stamp) = stamp.and_then(|(b, page)| b.get_mut(page)) else {
            return;
        };
        let before = std::mem::replace(stamp, now);
        if before == now {
            return;
        }
        if before != 0 && now - before < ROUNDS {
            *self.count(before) -= 1;
        }
        *self.count(now) += 1;
    }

    /// A round has ended: the oldest is forgotten.
    pub fn end_round(&mut self) {
        if self.now == u16::MAX {
            self.renumber();
        }
        self.now += 1;
        *self.count(self.now) = 0;
    }

    /// Once in half a day: stamps that still count begin at 1 again.
    fn renumber(&mut self) {
        let base = self.now - ROUNDS;
        let mut counts = [0; ROUNDS as usize];
        for stamp in self.blocks.iter_mut().flatten() {
            *stamp = stamp.saturating_sub(base);
            if *stamp != 0 {
                counts[usize::from(*stamp % ROUNDS)] += 1;
            }
        }
        (self.now, self.counts) = (ROUNDS, counts);
    }

    pub fn pages(&self) -> u64 {
        self.counts.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_page_that_is_written_again_counts_once_and_one_that_is_not_is_forgotten() {
        let mut w = WorkingSet::new([100, 10]);
        for page in 0..50 {
            w.seen(0, page);
            w.seen(0, page);
        }
        w.seen(1, 3);
        w.seen(1, 10);
        w.seen(7, 0);
        assert_eq!(w.pages(), 51);
        for _ in 0..ROUNDS {
            w.end_round();
            w.seen(1, 3);
        }
        assert_eq!(w.pages(), 1);
    }

    proptest! {
        #[test]
        fn it_is_what_a_list_of_the_last_rounds_says(
            rounds in prop::collection::vec(prop::collection::vec(0u64..40, 0..30), 1..60), late in any::<bool>(),
        ) {
            let mut w = WorkingSet::new([40]);
            if late {
                w.now = u16::MAX - 30;
            }
            for (n, pages) in rounds.iter().enumerate() {
                pages.iter().for_each(|p| w.seen(0, *p));
                let from = (n + 1).saturating_sub(usize::from(ROUNDS));
                let want: HashSet<u64> = rounds[from..=n].iter().flatten().copied().collect();
                prop_assert_eq!(w.pages(), want.len() as u64, "after round {}", n);
                w.end_round();
            }
        }
    }
}
