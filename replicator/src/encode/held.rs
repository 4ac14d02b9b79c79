//! What the target holds, by hash: the source's word on which pages need not travel.
//!
//! The hash is BLAKE3, cut to 128 bits. Page contents come from outside (whoever sends a guest a file chooses bytes of its page
//! cache), and a page that is not sent since its hash is known is a wrong page if two contents share it: a fast checksum like
//! XXH3 can be made to collide at will, this one can't. It costs 1.5 µs a page, a fifth of what zstd takes, and less than half of that
//! where sixteen pages are hashed side by side. So a page is looked for by its XXH3 first, which is known anyway ([`crate::resume::scrub`]):
//! only if that is found, BLAKE3 decides at once. All others are hashed together, a little later.

use blake3::IncrementCounter::No as SameCounter;
use blake3::platform::Platform;
use umbra_api::wire::setup::StreamSetup;

use crate::stream::Page;
use crate::stream::items::PAGE_SIZE;

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

    /// The same of several pages, at most [`MANY`].
    pub fn of_many(pages: &[&Page]) -> [Self; MANY] {
        let (all, n) = (Platform::detect(), pages.len().min(MANY));
        let mut chained = [[0; CHAINED]; MANY * CHUNKS];
        for at in 0..CHUNKS {
            let mut chunks = [&[0; CHUNK]; MANY];
            for (chunk, page) in chunks.iter_mut().zip(pages) {
                *chunk = page.as_chunks().0.get(at).unwrap_or(*chunk);
            }
            let mut out = [0; MANY * CHAINED];
            let chunks = chunks.get(..n).unwrap_or_default();
            all.hash_many(chunks, &IV, at as u64, SameCounter, 0, CHUNK_START, CHUNK_END, &mut out);
            for (to, from) in chained.iter_mut().skip(at).step_by(CHUNKS).zip(out.as_chunks().0) {
                *to = *from;
            }
        }
        let mut pairs = [0; MANY * CHUNKS / 2 * CHAINED];
        parents(all, chained.as_flattened(), n * CHUNKS / 2, PARENT, &mut pairs);
        let mut roots = [0; MANY * CHAINED];
        parents(all, &pairs, n, PARENT | ROOT, &mut roots);
        let mut hashes = [Self(NONE); MANY];
        for (hash, root) in hashes.iter_mut().zip(roots.as_chunks::<CHAINED>().0).take(n) {
            *hash = Self(u128::from_le_bytes(root.first_chunk().copied().unwrap_or_default()));
        }
        hashes
    }

    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_le_bytes(bytes))
    }

    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }
}

/// Pages that are hashed side by side: as many as AVX-512 has lanes.
pub const MANY: usize = 16;

// BLAKE3's tree over a page, as its paper has it: four chunks, two parents, the root. Its library hashes one input at a time, of which a page
// fills a quarter of a wide vector's lanes; what it is made of takes many inputs (a module that it does not document: the test below says
// whether it does as before).
const CHUNK: usize = 1024;
const CHUNKS: usize = PAGE_SIZE / CHUNK;
/// Bytes of a chaining value.
const CHAINED: usize = 32;
const IV: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;

/// Of each two neighbouring chaining values one, `n` in all.
fn parents(platform: Platform, children: &[u8], n: usize, flags: u8, out: &mut [u8]) {
    let mut pairs = [&[0; 2 * CHAINED]; MANY * CHUNKS / 2];
    for (pair, of) in pairs.iter_mut().zip(children.as_chunks().0) {
        *pair = of;
    }
    let pairs = pairs.get(..n).unwrap_or_default();
    platform.hash_many(pairs, &IV, 0, SameCounter, flags, 0, 0, out);
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

/// A hash for each page that the target has with these bytes, and where to find one by its sum.
///
/// Costs 16 bytes for each page that is not zero, 0.4 % of what the guest uses, and at most 4 MiB for the index. The index is
/// only a hint: what it finds is believed if the page has the same hash.
#[derive(Clone, Debug, Default)]
pub struct Held {
    hashes: Vec<u128>,
    /// By the sum's low bits, the page that had it last, counted from 1.
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
        if let Some(held) = usize::try_from(spot.0).ok().and_then(|s| self.hashes.get_mut(s)) {
            *held = hash.0;
        }
    }

    /// The page has this sum, whatever its hash will be.
    pub fn note(&mut self, spot: Spot, sum: u64) {
        let at = self.slot(sum);
        if let Some(entry) = self.index.get_mut(at).filter(|_| spot.0 < self.hashes.len() as u64) {
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

    /// A page that may have had this sum.
    pub fn find(&self, sum: u64) -> Option<Spot> {
        u64::from(*self.index.get(self.slot(sum))?).checked_sub(1).map(Spot)
    }

    fn slot(&self, sum: u64) -> usize {
        sum as usize & self.index.len().wrapping_sub(1)
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
    fn many_hashes_are_those_of_the_library() {
        let page = |seed: usize| -> Page { std::array::from_fn(|i| (i * (seed + 3) + i / 256 * seed) as u8) };
        let pages: Vec<Page> = (0..MANY).map(page).collect();
        for n in 0..=MANY {
            let some: Vec<&Page> = pages.iter().take(n).collect();
            let many = PageHash::of_many(&some);
            let each: Vec<PageHash> = some.iter().map(|p| PageHash::of(p)).collect();
            assert_eq!(many[..n], each, "{n} pages");
            assert!(many[n..].iter().all(|h| h.0 == NONE));
        }
    }

    #[test]
    fn a_page_has_its_hash_and_is_found_by_the_sum_that_was_noted_last() {
        let mut h = Held::new(100);
        assert_eq!((h.find(1), h.get(Spot(5))), (None, None));
        h.set(Spot(5), hash(1));
        h.note(Spot(5), 1);
        assert_eq!((h.find(1), h.get(Spot(5))), (Some(Spot(5)), Some(hash(1))));
        h.note(Spot(6), 1);
        assert_eq!(h.find(1), Some(Spot(6)));
        h.clear(Spot(5));
        assert_eq!(h.get(Spot(5)), None);
        h.set(Spot(100), hash(4));
        h.note(Spot(100), 4);
        assert_eq!((h.find(4), h.get(Spot(100))), (None, None));
        assert_eq!(PageHash::from_bytes(hash(9).to_bytes()), hash(9));
    }

    #[test]
    fn no_pages_no_table() {
        let mut h = Held::new(0);
        h.set(Spot(0), hash(1));
        h.note(Spot(0), 1);
        h.clear(Spot(0));
        assert_eq!((h.find(1), h.get(Spot(0))), (None, None));
        assert_eq!(Held::default().find(1), None);
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
