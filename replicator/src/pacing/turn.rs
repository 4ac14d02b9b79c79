//! How many pages QEMU sent while it looked through all of RAM once.
//!
//! ```text
//!                 begin      ┌────────── the last whole turn ─────────┐
//!  place ─────────┴──────────┴────────────────────────────────────────┴─> grows for ever
//!                        place - RAM                                place
//! ```
//! QEMU looks for dirty pages in the order of its blocks, from behind the last one and round again, through all of its
//! sections and dirty syncs. A page that lies before the last one, or is the same, thus begins a new turn, and the
//! pages of one whole turn are all that was dirty in it. That holds on any link, however QEMU cuts its sections. Pure.

use std::collections::VecDeque;

#[derive(Debug, Default)]
pub struct Turn {
    /// Where each block begins.
    starts: Vec<u64>,
    /// Pages of RAM.
    ram: u64,
    place: u64,
    /// Places of the last whole turn's pages, at most one more than is asked for.
    seen: VecDeque<u64>,
    begin: u64,
    most: usize,
}

impl Turn {
    /// For blocks of so many pages each; more than `most` pages are not counted.
    pub fn new(pages: impl IntoIterator<Item = u64>, most: u64) -> Self {
        let mut ram = 0u64;
        let starts = pages.into_iter().map(|n| {
            let start = ram;
            ram = ram.saturating_add(n);
            start
        });
        Self {
            starts: starts.collect(),
            ram,
            most: usize::try_from(most).unwrap_or(usize::MAX),
            ..Self::default()
        }
    }

    /// A page was sent. One that no block has is none.
    pub fn page(&mut self, block: u16, page: u64) {
        let Some(start) = self.starts.get(usize::from(block)) else {
            return;
        };
        let (at, here) = (
            start.saturating_add(page),
            self.place.checked_rem(self.ram).unwrap_or(0),
        );
        if at >= self.ram {
            return;
        }
        // The very first page may be the first of RAM.
        let again = at < here || (at == here && !self.seen.is_empty());
        self.place = self.place - here + at + if again { self.ram } else { 0 };
        self.forget();
        self.seen.push_back(self.place);
        if self.seen.len() > self.most.saturating_add(1) {
            self.seen.pop_front();
        }
    }

    /// A section without a page: QEMU went round once and found nothing.
    pub fn nothing(&mut self) {
        self.place = self.place.saturating_add(self.ram);
        self.forget();
    }

    fn forget(&mut self) {
        while self.seen.front().is_some_and(|p| p + self.ram <= self.place) {
            self.seen.pop_front();
        }
    }

    /// Only turns that begin from here on count.
    pub fn begin(&mut self) {
        self.begin = self.place;
    }

    /// Whole turns since then.
    pub fn turns(&self) -> u64 {
        (self.place - self.begin).checked_div(self.ram).unwrap_or(0)
    }

    /// Whether there was a whole turn since then, and the last one had few pages.
    pub fn is_small(&self) -> bool {
        self.turns() > 0 && self.seen.len() <= self.most
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn turn() -> Turn {
        Turn::new([100, 20], 5)
    }

    #[test]
    fn a_turn_is_whole_when_the_place_comes_again() {
        let mut t = turn();
        for page in 0..100 {
            t.page(0, page);
        }
        t.page(1, 19);
        t.begin();
        assert!(!t.is_small());
        // Of the next pass, all before the place where the turn began.
        for page in [3, 50] {
            t.page(0, page);
            assert!(!t.is_small());
        }
        t.page(1, 19);
        assert!(t.is_small(), "{t:?}");
        t.begin();
        t.page(1, 18);
        assert!(!t.is_small());
        t.page(1, 18);
        t.page(1, 18);
        assert!(t.is_small(), "the same page again is a turn");
        t.page(7, 0);
        t.page(1, 20);
        assert_eq!(t.seen.len(), 1, "pages of no block are none");
    }

    #[test]
    fn a_turn_without_pages_is_one() {
        let mut t = turn();
        t.page(0, 5);
        t.begin();
        t.nothing();
        assert!(t.is_small());
        let mut t = Turn::default();
        t.page(0, 0);
        t.nothing();
        assert!(!t.is_small(), "nothing is known");
    }

    #[test]
    fn more_pages_than_asked_for_are_not_few() {
        let mut t = turn();
        for _ in 0..4 {
            for page in 0..6 {
                t.page(0, page * 7);
                assert!(!t.is_small());
            }
        }
        for _ in 0..2 {
            for page in 0..5 {
                t.page(0, page * 7);
            }
        }
        assert!(t.is_small());
    }

    proptest! {
        #[test]
        fn it_counts_what_a_list_of_all_pages_counts(pages in prop::collection::vec(0u64..30, 1..200), most in 1u64..10) {
            let mut t = Turn::new([10, 20], most);
            let (mut all, mut place, mut before) = (Vec::new(), 0, None);
            for p in pages {
                let (block, page) = if p < 10 { (0, p) } else { (1, p - 10) };
                t.page(block, page);
                place += before.map_or(p, |b| if p > b { p - b } else { p + 30 - b });
                before = Some(p);
                all.push(place);
                let last = all.iter().filter(|a| **a + 30 > place).count() as u64;
                prop_assert_eq!(t.is_small(), place >= 30 && last <= most);
            }
        }
    }
}
