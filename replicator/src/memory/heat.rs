//! Which pages the rounds touch: a byte a page, by the aging algorithm of page replacement. A touch sets the highest bit, each
//! epoch shifts right, so a byte tells in which of the last eight epochs its page changed, the latest first.
//!
//! One thread marks pages, another ages them. Both are plain stores: a mark that is lost between costs a page a few places
//! in a queue.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

/// Touched in this epoch or the one before.
pub const HOT: u8 = 0x40;

pub struct Heat(Box<[AtomicU8]>);

impl Heat {
    pub fn new(pages: usize) -> Self {
        Self((0..pages).map(|_| AtomicU8::new(0)).collect())
    }

    pub fn touch(&self, page: usize) {
        if let Some(h) = self.0.get(page) {
            h.store(h.load(Relaxed) | 0x80, Relaxed);
        }
    }

    /// An epoch has passed.
    pub fn age(&self) {
        for h in &self.0 {
            let old = h.load(Relaxed);
            if old != 0 {
                h.store(old >> 1, Relaxed);
            }
        }
    }

    /// All pages are alike: the first pass touches each of them, and tells nothing.
    pub fn forget(&self) {
        for h in &self.0 {
            h.store(0, Relaxed);
        }
    }

    pub fn copy_to(&self, out: &mut Vec<u8>) {
        out.clear();
        out.extend(self.0.iter().map(|h| h.load(Relaxed)));
    }
}

/// A bit a page, written by one thread and read by others.
pub struct Bits {
    words: Box<[AtomicU64]>,
    ones: AtomicU64,
}

impl Bits {
    pub fn new(bits: usize) -> Self {
        Self {
            words: (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            ones: AtomicU64::new(0),
        }
    }

    pub fn get(&self, bit: usize) -> bool {
        self.words
            .get(bit / 64)
            .is_some_and(|w| w.load(Relaxed) >> (bit % 64) & 1 == 1)
    }

    pub fn set(&self, bit: usize, on: bool) {
        let Some(word) = self.words.get(bit / 64) else { return };
        let mask = 1 << (bit % 64);
        let old = match on {
            true => word.fetch_or(mask, Relaxed),
            false => word.fetch_and(!mask, Relaxed),
        };
        match (old & mask != 0, on) {
            (false, true) => self.ones.fetch_add(1, Relaxed),
            (true, false) => self.ones.fetch_sub(1, Relaxed),
            _ => 0,
        };
    }

    pub fn clear(&self) {
        self.words.iter().for_each(|w| w.store(0, Relaxed));
        self.ones.store(0, Relaxed);
    }

    pub fn ones(&self) -> u64 {
        self.ones.load(Relaxed)
    }

    /// 64 of them, as many as there are.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        self.words.iter().map(|w| w.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_touched_lately_and_often_is_hottest() {
        let heat = Heat::new(4);
        for epoch in 0..3 {
            heat.age();
            heat.touch(0);
            if epoch == 0 {
                heat.touch(1);
            }
            if epoch == 2 {
                heat.touch(2);
            }
        }
        heat.touch(99);
        let mut h = Vec::new();
        heat.copy_to(&mut h);
        assert!(h[0] > h[2] && h[2] > h[1] && h[1] > h[3], "{h:x?}");
        assert!(h[2] >= HOT && h[1] < HOT, "{h:x?}");
        (0..8).for_each(|_| heat.age());
        heat.copy_to(&mut h);
        assert_eq!(h, [0; 4]);
    }

    #[test]
    fn bits_count_themselves() {
        let b = Bits::new(70);
        for bit in [0, 69, 69, 1000] {
            b.set(bit, true);
        }
        assert!(b.get(0) && b.get(69) && !b.get(1) && !b.get(1000));
        b.set(1, false);
        assert_eq!(b.ones(), 2);
        b.set(69, false);
        assert_eq!((b.ones(), b.words().collect::<Vec<_>>()), (1, vec![1, 0]));
    }
}
