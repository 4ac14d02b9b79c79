//! A pattern over most of the guest's memory that checks itself.
//!
//! ```text
//! page, 512 words:  magic  page no  generation  checksum | filler | 0 | filler … | tag | … a tag each 32 words …
//! table, elsewhere: generation of each page              total: writes so far
//! ```
//! A lost, torn or misplaced page breaks its own words. A *stale* page is whole in itself, so its generation is compared with the
//! table, which lies on other pages: a page older (or newer) than its table entry is an error. Pages and table that went back in time
//! *together* are found by the table's sum, which must equal the number of writes ever made. Only a memory that is one moment
//! as a whole passes, and that is what a switchover promises.
//!
//! Half of the filler is noise and half zero, so that a page is neither free to send nor incompressible.

use std::ops::Range;

pub const PAGE_WORDS: usize = 512;
/// 'UMBRAPAT' as the page's first eight bytes in memory: tests find pattern pages in the host's RAM file by it.
pub const MAGIC: u64 = u64::from_le_bytes(*b"UMBRAPAT");
const TAG_STEP: usize = 32;
/// Each eighth write goes to one of the first pages, so that some pages change in every round of a standby.
const HOT_PAGES: usize = 256;
const HOT_EVERY: u64 = 8;

const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What is wrong with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Whole in itself, of another generation than the table says.
    Stale { page: usize, found: u64, wanted: u64 },
    /// Its words do not fit each other, or it is another page's content.
    Broken {
        page: usize,
        word: usize,
        found: u64,
        wanted: u64,
    },
    /// The table's sum is not the number of writes.
    Table { found: u64, wanted: u64 },
}

pub struct Pattern<'a> {
    memory: &'a mut [u64],
    generations: Vec<u32>,
    /// All generations added up, kept apart from the table.
    writes: u64,
    dirty_at: usize,
    hot_at: usize,
    scrub_at: usize,
}

impl<'a> Pattern<'a> {
    /// Fills `memory` (whole pages of it) with generation 0.
    pub fn fill(memory: &'a mut [u64]) -> Self {
        let pages = memory.len() / PAGE_WORDS;
        let mut pattern = Pattern {
            memory,
            generations: vec![0; pages],
            writes: 0,
            dirty_at: 0,
            hot_at: 0,
            scrub_at: 0,
        };
        for page in 0..pages {
            pattern.restore(page);
        }
        pattern
    }

    pub fn pages(&self) -> usize {
        self.generations.len()
    }

    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Verifies the next page to dirty, then gives it a new generation.
    pub fn dirty_next(&mut self) -> Option<Fault> {
        let pages = self.pages();
        let page = if self.writes.is_multiple_of(HOT_EVERY) {
            Self::advance(&mut self.hot_at, pages.min(HOT_PAGES))
        } else {
            Self::advance(&mut self.dirty_at, pages)
        };
        let fault = self.verify_tags(page);
        if fault.is_some() {
            self.restore(page);
        }
        let generation = self.generations.get_mut(page)?;
        *generation = generation.wrapping_add(1);
        self.writes += 1;
        self.write_tags(page);
        fault
    }

    /// Verifies the next page in full, and the table after the last. What is wrong is told once and put right, so that `err` counts
    /// faults and not looks at them.
    pub fn scrub_next(&mut self) -> Option<Fault> {
        let pages = self.pages();
        let page = Self::advance(&mut self.scrub_at, pages);
        let fault = self.verify_tags(page).or_else(|| self.verify_filler(page));
        if fault.is_some() {
            self.restore(page);
            return fault;
        }
        if self.scrub_at == 0 { self.verify_table() } else { None }
    }

    fn verify_table(&mut self) -> Option<Fault> {
        let found = self.generations.iter().map(|generation| u64::from(*generation)).sum();
        let wanted = std::mem::replace(&mut self.writes, found);
        (found != wanted).then_some(Fault::Table { found, wanted })
    }

    fn advance(at: &mut usize, pages: usize) -> usize {
        let page = *at;
        *at = if page + 1 >= pages { 0 } else { page + 1 };
        page
    }

    fn words(page: usize) -> Range<usize> {
        page * PAGE_WORDS..(page + 1) * PAGE_WORDS
    }

    fn verify_tags(&self, page: usize) -> Option<Fault> {
        let words = self.memory.get(Self::words(page))?;
        let generation = u64::from(*self.generations.get(page)?);
        // A page that is right in itself but for its generation is stale, and saying so tells more than a broken word.
        let found = *words.get(2)?;
        if found != generation && tags(page, found).all(|(at, wanted)| words.get(at) == Some(&wanted)) {
            return Some(Fault::Stale {
                page,
                found,
                wanted: generation,
            });
        }
        first_difference(page, words, tags(page, generation))
    }

    fn verify_filler(&self, page: usize) -> Option<Fault> {
        first_difference(page, self.memory.get(Self::words(page))?, filler(page))
    }

    fn write_tags(&mut self, page: usize) {
        let generation = self.generations.get(page).copied().unwrap_or(0);
        if let Some(words) = self.memory.get_mut(Self::words(page)) {
            put(words, tags(page, u64::from(generation)));
        }
    }

    fn restore(&mut self, page: usize) {
        if let Some(words) = self.memory.get_mut(Self::words(page)) {
            put(words, filler(page));
        }
        self.write_tags(page);
    }
}

/// The words that change with the generation: their place in the page and their value.
fn tags(page: usize, generation: u64) -> impl Iterator<Item = (usize, u64)> {
    let checksum = mix(mix(page as u64 ^ MAGIC).wrapping_add(generation));
    let head = [(0, MAGIC), (1, page as u64), (2, generation), (3, checksum)];
    let spread =
        (1..PAGE_WORDS / TAG_STEP).map(move |i| (i * TAG_STEP, checksum.wrapping_add(MIX.wrapping_mul(i as u64))));
    head.into_iter().chain(spread)
}

/// The words between the tags, which depend on the page alone.
fn filler(page: usize) -> impl Iterator<Item = (usize, u64)> {
    let mut x = mix(page as u64);
    (4..PAGE_WORDS).filter(|at| at % TAG_STEP != 0).map(move |at| {
        if at % 2 == 0 {
            return (at, 0);
        }
        x = (x ^ (x >> 29)).wrapping_mul(MIX);
        (at, x)
    })
}

fn put(words: &mut [u64], values: impl Iterator<Item = (usize, u64)>) {
    for (at, value) in values {
        if let Some(word) = words.get_mut(at) {
            *word = value;
        }
    }
}

fn first_difference(page: usize, words: &[u64], values: impl Iterator<Item = (usize, u64)>) -> Option<Fault> {
    for (at, wanted) in values {
        let found = words.get(at).copied().unwrap_or(0);
        if found != wanted {
            return Some(Fault::Broken {
                page,
                word: at,
                found,
                wanted,
            });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: usize = 600;

    fn scrub_all(pattern: &mut Pattern) -> Vec<Fault> {
        (0..pattern.pages()).filter_map(|_| pattern.scrub_next()).collect()
    }

    fn dirty(pattern: &mut Pattern, times: usize) -> Vec<Fault> {
        (0..times).filter_map(|_| pattern.dirty_next()).collect()
    }

    #[test]
    fn an_untouched_pattern_has_no_fault() {
        let mut memory = vec![0; PAGES * PAGE_WORDS];
        let mut pattern = Pattern::fill(&mut memory);
        assert_eq!(pattern.pages(), PAGES);
        assert!(dirty(&mut pattern, 2000).is_empty());
        assert!(scrub_all(&mut pattern).is_empty());
        assert_eq!(pattern.writes(), 2000);
    }

    #[test]
    fn every_changed_word_is_found_once() {
        let mut memory = vec![0; 4 * PAGE_WORDS];
        let mut pattern = Pattern::fill(&mut memory);
        for word in 0..PAGE_WORDS {
            pattern.memory[2 * PAGE_WORDS + word] ^= 1 << 17;
            let faults = scrub_all(&mut pattern);
            assert_eq!(faults.len(), 1, "word {word}: {faults:?}");
            assert!(
                matches!(faults[0], Fault::Broken { page: 2, word: at, .. } if at == word),
                "word {word}: {faults:?}"
            );
            assert!(scrub_all(&mut pattern).is_empty(), "told twice: word {word}");
        }
    }

    #[test]
    fn a_stale_page_is_found_by_the_scrubber_and_by_the_dirtier() {
        for by_scrub in [true, false] {
            let mut memory = vec![0; PAGES * PAGE_WORDS];
            let mut pattern = Pattern::fill(&mut memory);
            let old = pattern.memory[Pattern::words(5)].to_vec();
            dirty(&mut pattern, 3000);
            pattern.memory[Pattern::words(5)].copy_from_slice(&old);
            let faults = if by_scrub {
                scrub_all(&mut pattern)
            } else {
                dirty(&mut pattern, 1000)
            };
            assert_eq!(faults.len(), 1);
            assert!(
                matches!(faults[0], Fault::Stale { page: 5, found: 0, wanted } if wanted > 0),
                "{faults:?}"
            );
        }
    }

    #[test]
    fn a_page_in_another_ones_place_is_found() {
        let mut memory = vec![0; 8 * PAGE_WORDS];
        let mut pattern = Pattern::fill(&mut memory);
        let other = pattern.memory[Pattern::words(1)].to_vec();
        pattern.memory[Pattern::words(6)].copy_from_slice(&other);
        assert!(matches!(
            scrub_all(&mut pattern)[..],
            [Fault::Broken { page: 6, word: 1, .. }]
        ));
    }

    #[test]
    fn pages_and_table_that_went_back_together_are_found() {
        let mut memory = vec![0; 4 * PAGE_WORDS];
        let mut pattern = Pattern::fill(&mut memory);
        let (old, table) = (pattern.memory.to_vec(), pattern.generations.clone());
        dirty(&mut pattern, 50);
        pattern.memory.copy_from_slice(&old);
        pattern.generations = table;
        assert_eq!(scrub_all(&mut pattern), [Fault::Table { found: 0, wanted: 50 }]);
        assert!(scrub_all(&mut pattern).is_empty());
    }

    #[test]
    fn no_memory_is_no_trouble() {
        let mut memory = [];
        let mut pattern = Pattern::fill(&mut memory);
        assert_eq!((pattern.dirty_next(), pattern.scrub_next()), (None, None));
    }
}
