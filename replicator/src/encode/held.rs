//! What the target holds, by hash: the source's word on which pages need not travel.
//!
//! The hash is BLAKE3, cut to 128 bits. Page contents come from outside (whoever sends a guest a file chooses bytes of its page
//! cache), and a page that is not sent since its hash is known is a wrong page if two contents share it: a fast checksum like
//! XXH3 can be made to collide at will, this one can't. It costs 1.5 µs a page, a fifth of what zstd takes.

use umbra_api::wire::setup::StreamSetup;

use crate::stream::Page;

/// Hash of a page's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageHash(u128);

/// No page has it, but for one in 2¹²⁸, which is then never known.
const NONE: u128 = 0;

impl PageHash {
    pub fn of(page: &Page) -> Self {
        let hash = blake3::hash(page);
        Self(u128::from_le_bytes(
            hash.as_bytes().first_chunk().copied().unwrap_or_default(),
        ))
    }

    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_le_bytes(bytes))
    }

    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }
}

/// Number of a page among all of a VM's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Spot(pub u64);

/// How the pages of all blocks are numbered through.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// Where each block begins; the last entry is where the last one ends.
    starts: Vec<u64>,
}

impl Layout {
    pub fn new(setup: &StreamSetup) -> Self {
        let mut starts = vec![0];
        let mut end = 0u64;
        for b in &setup.blocks {
            end = end.saturating_add(b.pages());
            starts.push(end);
        }
        Self { starts }
    }

    pub fn pages(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    pub fn spot(&self, block: u16, page: u64) -> Option<Spot> {
        let block = usize::from(block);
        let (start, end) = (self.starts.get(block)?, self.starts.get(block + 1)?);
        Some(Spot(start.checked_add(page)?)).filter(|s| s.0 < *end)
    }

    /// Block and page.
    pub fn place(&self, spot: Spot) -> Option<(u16, u64)> {
        // Empty blocks begin where the next one does: the last that begins at or before it is the one.
        let block = self.starts.partition_point(|s| *s <= spot.0).checked_sub(1)?;
        (spot.0 < self.pages()).then_some(())?;
        Some((u16::try_from(block).ok()?, spot.0 - self.starts.get(block)?))
    }
}

/// Pages of guests up to 4 TiB are known, of larger ones the first so many.
const PAGES_MAX: u64 = 1 << 30;
/// Contents that can be found again: 4 bytes each.
const INDEX_MAX: u64 = 1 << 20;

/// A hash for each page that the target has with these bytes, and where to find one by its hash.
///
/// Costs 16 bytes for each page that is not zero, 0.4 % of what the guest uses, and at most 4 MiB for the index. The index is
/// only a hint: what it finds is believed if the page has that hash still.
#[derive(Clone, Debug, Default)]
pub struct Held {
    hashes: Vec<u128>,
    /// By the hash's low bits, the page that had it last, counted from 1.
    index: Vec<u32>,
}

impl Held {
    pub fn new(pages: u64) -> Self {
        let pages = pages.min(PAGES_MAX);
        Self {
            // Zeroed by the kernel page by page as they are used.
            hashes: vec![NONE; pages as usize],
            index: vec![0; pages.next_power_of_two().min(INDEX_MAX) as usize],
        }
    }

    pub fn get(&self, spot: Spot) -> Option<PageHash> {
        self.hashes
            .get(usize::try_from(spot.0).ok()?)
            .filter(|h| **h != NONE)
            .map(|h| PageHash(*h))
    }

    pub fn set(&mut self, spot: Spot, hash: PageHash) {
        let Some(held) = usize::try_from(spot.0).ok().and_then(|s| self.hashes.get_mut(s)) else {
            return;
        };
        *held = hash.0;
        let at = self.slot(hash);
        if let Some(entry) = self.index.get_mut(at) {
            *entry = spot.0 as u32 + 1;
        }
    }

    /// The page is zero now, or its hash is kept elsewhere.
    pub fn clear(&mut self, spot: Spot) {
        // Looked at first: a table of zeros takes no memory as long as nobody writes to it.
        if let Some(held) = usize::try_from(spot.0)
            .ok()
            .and_then(|s| self.hashes.get_mut(s))
            .filter(|h| **h != NONE)
        {
            *held = NONE;
        }
    }

    /// A page that has these bytes.
    pub fn find(&self, hash: PageHash) -> Option<Spot> {
        let spot = Spot(u64::from(*self.index.get(self.slot(hash))?).checked_sub(1)?);
        (self.get(spot) == Some(hash)).then_some(spot)
    }

    fn slot(&self, hash: PageHash) -> usize {
        hash.0 as usize & self.index.len().wrapping_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use umbra_api::wire::setup::Block;

    use super::*;

    fn hash(n: u8) -> PageHash {
        PageHash::of(&[n; 4096])
    }

    #[test]
    fn a_hash_is_found_as_long_as_a_page_has_it() {
        let mut h = Held::new(100);
        assert_eq!((h.find(hash(1)), h.get(Spot(5))), (None, None));
        h.set(Spot(5), hash(1));
        assert_eq!((h.find(hash(1)), h.get(Spot(5))), (Some(Spot(5)), Some(hash(1))));
        h.set(Spot(6), hash(1));
        h.set(Spot(5), hash(2));
        assert_eq!((h.find(hash(1)), h.find(hash(2))), (Some(Spot(6)), Some(Spot(5))));
        h.set(Spot(6), hash(3));
        assert_eq!(h.find(hash(1)), None);
        h.clear(Spot(6));
        assert_eq!((h.find(hash(3)), h.get(Spot(6))), (None, None));
        h.set(Spot(100), hash(4));
        assert_eq!((h.find(hash(4)), h.get(Spot(100))), (None, None));
        assert_eq!(PageHash::from_bytes(hash(9).to_bytes()), hash(9));
    }

    #[test]
    fn no_pages_no_table() {
        let mut h = Held::new(0);
        h.set(Spot(0), hash(1));
        h.clear(Spot(0));
        assert_eq!(h.find(hash(1)), None);
        assert_eq!(Held::default().find(hash(1)), None);
    }

    #[test]
    fn pages_are_numbered_through() {
        let block = |name: &str, pages: u64| Block {
            name: name.into(),
            bytes: pages << 12,
        };
        let setup = StreamSetup {
            version: 3,
            config: vec![],
            ram_section: 2,
            ram_version: 4,
            blocks: vec![block("a", 3), block("none", 0), block("b", 2)],
        };
        let l = Layout::new(&setup);
        assert_eq!(l.pages(), 5);
        for (block, page, spot) in [(0, 0, 0), (0, 2, 2), (2, 0, 3), (2, 1, 4)] {
            assert_eq!(l.spot(block, page), Some(Spot(spot)));
            assert_eq!(l.place(Spot(spot)), Some((block, page)));
        }
        for (block, page) in [(0, 3), (1, 0), (2, 2), (3, 0), (2, u64::MAX)] {
            assert_eq!(l.spot(block, page), None);
        }
        assert_eq!((l.place(Spot(5)), Layout::default().place(Spot(0))), (None, None));
    }
}
