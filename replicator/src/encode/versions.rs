//! The last versions of pages that were sent more than once, within so many bytes: what deltas are made against.
//!
//! Eight pages share a set. A page that is new takes the place of the one that was not sent for the longest time, and only if
//! that was neither in this round nor in the last: a guest that rewrites more than fits then keeps what fits, where
//! a cache of the latest would lose each page just before it comes again. For the same reason only one in eight takes a place, since a guest
//! that goes through more than fits in many rounds would have none of its pages here when they come again. Which one is as good as random.

use super::held::Spot;
use crate::stream::Page;
use crate::stream::items::PAGE_SIZE;

const WAYS: usize = 8;
/// Rounds in which a page must be sent to keep its place.
const KEEP: u64 = 2;
/// Of so many pages that could take another one's place one does.
const ONE_IN: u64 = 8;

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    spot: Option<Spot>,
    used: u64,
}

#[derive(Debug)]
pub struct Versions {
    slots: Vec<Slot>,
    /// A page for each slot. Takes memory as it is used.
    bytes: Vec<u8>,
    round: u64,
    draws: u64,
}

impl Versions {
    pub fn new(bytes: usize) -> Self {
        let slots = bytes / PAGE_SIZE / WAYS * WAYS;
        Self {
            slots: vec![Slot::default(); slots],
            bytes: vec![0; slots * PAGE_SIZE],
            round: 0,
            draws: 0,
        }
    }

    /// Whether this one is let in. Not each eighth: pages come in an order, and the places' numbers follow it.
    fn draw(&mut self) -> bool {
        self.draws = self.draws.wrapping_add(1);
        let mixed = self.draws.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32).is_multiple_of(ONE_IN)
    }

    /// A round has ended.
    pub fn tick(&mut self) {
        self.round += 1;
    }

    fn set(&self, spot: Spot) -> std::ops::Range<usize> {
        let sets = (self.slots.len() / WAYS).max(1) as u64;
        // Neighbours are in different sets: a working set without gaps fits whole.
        let first = (spot.0 % sets) as usize * WAYS;
        first..first + WAYS
    }

    fn page(&mut self, slot: usize) -> Option<&mut Page> {
        self.bytes.as_chunks_mut().0.get_mut(slot)
    }

    fn find(&self, spot: Spot) -> Option<usize> {
        let mut set = self.set(spot);
        set.find(|s| self.slots.get(*s).is_some_and(|s| s.spot == Some(spot)))
    }

    /// The version sent last, which is sent again now; the caller writes the new one to it.
    pub fn get(&mut self, spot: Spot) -> Option<&mut Page> {
        let slot = self.find(spot)?;
        let round = self.round;
        self.slots.get_mut(slot)?.used = round;
        self.page(slot)
    }

    /// The same, without a use.
    pub fn peek(&self, spot: Spot) -> Option<&Page> {
        self.bytes.as_chunks().0.get(self.find(spot)?)
    }

    /// Keeps a page that is not here yet. `evicted` is given the page whose place it takes. False if there is no place.
    pub fn put(&mut self, spot: Spot, data: &Page, evicted: impl FnOnce(Spot, &Page)) -> bool {
        let oldest = self
            .set(spot)
            .filter_map(|s| Some((s, self.slots.get(s)?)))
            .min_by_key(|(_, slot)| slot.spot.map(|_| slot.used));
        let Some((at, slot)) = oldest.map(|(s, slot)| (s, *slot)) else {
            return false;
        };
        if slot.spot.is_some() && (slot.used + KEEP > self.round || !self.draw()) {
            return false;
        }
        let Some(page) = self.page(at) else { return false };
        if let Some(old) = slot.spot {
            evicted(old, page);
        }
        *page = *data;
        let used = self.round;
        if let Some(slot) = self.slots.get_mut(at) {
            *slot = Slot { spot: Some(spot), used };
        }
        true
    }

    pub fn forget(&mut self, spot: Spot) {
        if let Some(slot) = self.find(spot).and_then(|s| self.slots.get_mut(s)) {
            *slot = Slot::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(v: &mut Versions, spot: u64) -> (bool, Option<Spot>) {
        let mut gone = None;
        let kept = v.put(Spot(spot), &[spot as u8; PAGE_SIZE], |s, page| {
            assert_eq!(page[9], s.0 as u8);
            gone = Some(s);
        });
        (kept, gone)
    }

    /// Until it is let in, or is not at all.
    fn put_soon(v: &mut Versions, spot: u64) -> (bool, Option<Spot>) {
        let mut tries = (0..200).map(|_| put(v, spot));
        tries.find(|t| t.0).unwrap_or((false, None))
    }

    #[test]
    fn it_keeps_what_fits_and_lets_the_oldest_go() {
        let mut v = Versions::new(2 * WAYS * PAGE_SIZE + 100);
        for spot in 0..16 {
            assert_eq!(put(&mut v, spot), (true, None));
        }
        assert_eq!(
            put_soon(&mut v, 16),
            (false, None),
            "all others were sent in this round"
        );
        v.tick();
        assert_eq!(put_soon(&mut v, 16), (false, None), "or in the last");
        for spot in [0, 2, 6, 8, 10, 12, 14] {
            assert_eq!(v.get(Spot(spot)).unwrap()[0], spot as u8);
        }
        v.tick();
        assert_eq!(put_soon(&mut v, 16), (true, Some(Spot(4))));
        assert_eq!(put_soon(&mut v, 18), (false, None));
        assert!(v.get(Spot(4)).is_none());
        assert_eq!(v.peek(Spot(16)).unwrap()[0], 16);
        v.forget(Spot(6));
        assert!(v.peek(Spot(6)).is_none());
        assert_eq!(put(&mut v, 20), (true, None));
    }

    #[test]
    fn of_a_guest_that_goes_through_twice_as_much_some_pages_are_here_when_they_come_again() {
        let mut v = Versions::new(64 * WAYS * PAGE_SIZE);
        let mut found = 0;
        for n in 0..8 * 1024u64 {
            let spot = n % 1024;
            if v.get(Spot(spot)).is_some() {
                found += u64::from(n >= 4 * 1024);
            } else {
                put(&mut v, spot);
            }
            if n % 32 == 31 {
                v.tick();
            }
        }
        // Half would fit. A cache of the latest has none.
        assert!(found > 4 * 1024 * 4 / 10, "{found} of {}", 4 * 1024);
        // And when the guest turns to other pages, they are here soon.
        for n in 0..32 * 256u64 {
            let spot = 5_000 + n % 256;
            if v.get(Spot(spot)).is_none() {
                put(&mut v, spot);
            }
            if n % 32 == 31 {
                v.tick();
            }
        }
        let here = (5_000..5_256).filter(|s| v.peek(Spot(*s)).is_some()).count();
        assert!(here > 200, "{here}");
    }

    #[test]
    fn no_room_no_page() {
        let mut v = Versions::new(PAGE_SIZE);
        assert_eq!(put(&mut v, 0), (false, None));
        assert!(v.get(Spot(0)).is_none());
        v.forget(Spot(0));
    }
}
