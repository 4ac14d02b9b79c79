//! Pages into batches for the link, and back: [`Encoder`] on the source, [`Decoder`] on the target.
//!
//! ```text
//! a page that QEMU sends
//!   is zero                                       zero    a number in a run
//!   is a version kept here, as it was             same    nothing
//!   is a version kept here, and changed little    delta   the change
//!   has the hash that the target's page has       same    nothing
//!   has the hash of another page of the target    known   that page's number       (both are looked for by a sum that costs less)
//!   else                                          full    its bytes
//! ```
//! A batch holds pages of one block in the order they came. Its data, deltas and whole pages, is compressed as one zstd frame, so that
//! neighbours share their redundancy, at a level that follows the link ([`level`]), and left raw where that does not make it
//! smaller. The target's RAM is the other half of this state: it is as the source believes because there is one connection, in
//! order, and nobody else writes to it before the switchover; each batch's sum proves it. A connection that broke ends both.
//!
//! [`held`] is the source's table of what the target has, [`versions`] the cache that deltas are made against.

mod decode;
pub mod delta;
pub mod held;
pub mod level;
#[cfg(test)]
mod tests;
pub mod versions;

use std::io;
use std::time::{Duration, Instant};

use umbra_api::replica::PageKinds;
use umbra_api::wire::hashes::Sums;
use umbra_api::wire::pages::{BATCH_PAGES_MAX, DELTA_MAX, Encoding, HEAD_MAX, PageKind, Runs, encode_head, put_known};
use umbra_api::wire::setup::StreamSetup;
use xxhash_rust::xxh3::Xxh3;
use zstd::bulk::Compressor;

use self::held::{Held, Layout, MANY, PageHash, Spot};
use self::level::Level;
use self::versions::Versions;
use crate::resume::scrub::{Noted, Sent};
use crate::stream::Page;
use crate::stream::items::PAGE_SIZE;

pub use decode::{Applied, ApplyError, Decoder};

/// After so many incompressible batches in a row, some of a batch's pages are tried before all.
const GIVE_UP_AFTER: u32 = 4;
const SAMPLE_PAGES: usize = 4;

/// True if all bytes are zero. Most pages that are not differ early, so it looks a cache line at a time.
pub fn is_zero(page: &Page) -> bool {
    let or = |line: &[u8; 64]| line.as_chunks().0.iter().fold(0, |a, w| a | u64::from_ne_bytes(*w));
    page.as_chunks::<64>().0.iter().all(|line| or(line) == 0)
}

/// What an encoder may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// zstd's levels; a highest of 0 is no compression. Rounds have a lowest of their own, which may be below 0: zstd's fast ones.
    pub level_min: i32,
    pub level_rounds: i32,
    pub level_max: i32,
    /// For the versions that deltas are made against.
    pub delta_cache_bytes: usize,
}

/// Collects pages, and gives each full batch to a function.
pub struct Encoder {
    settings: Settings,
    compressor: Option<Compressor<'static>>,
    level: Level,
    layout: Layout,
    held: Held,
    /// Sums of all pages as they were sent.
    sums: Sent,
    /// Whole pages of this batch whose hash is not in `held` yet, and where in `raw` they are.
    unhashed: Vec<(Spot, usize)>,
    versions: Versions,
    block: u16,
    runs: Runs,
    /// Room for the head, then the data.
    raw: Vec<u8>,
    packed: Vec<u8>,
    head: Vec<u8>,
    /// Of the batch's whole pages.
    sum: Xxh3,
    /// Pages of this batch, with what they take in `raw`.
    batch: PageKinds,
    /// Batches in a row that did not get smaller.
    hard: u32,
    stats: PageKinds,
}

/// How a page will travel.
enum Told {
    Same,
    Known(u16, u64),
    /// It is in `raw` already.
    Delta,
    Full,
}

impl Encoder {
    pub fn new(settings: Settings) -> io::Result<Self> {
        let level = Level::new(settings.level_min, settings.level_max);
        let compressor = match settings.level_max {
            0 => None,
            _ => Some(Compressor::new(level.get())?),
        };
        Ok(Self {
            settings,
            compressor,
            level,
            layout: Layout::default(),
            held: Held::default(),
            sums: Sent::default(),
            unhashed: Vec::with_capacity(MANY),
            versions: Versions::new(settings.delta_cache_bytes),
            block: 0,
            runs: Runs::default(),
            raw: vec![0; HEAD_MAX],
            packed: Vec::new(),
            head: Vec::with_capacity(HEAD_MAX),
            sum: Xxh3::with_seed(0),
            batch: PageKinds::default(),
            hard: 0,
            stats: PageKinds::default(),
        })
    }

    /// The blocks that pages will be of. Before it every page is new.
    pub fn setup(&mut self, setup: &StreamSetup) {
        self.layout = Layout::new(setup);
        self.held = Held::new(self.layout.pages());
        self.sums.begin(setup);
    }

    /// The target has this page with these bytes already, from before: it travels only if it has others.
    pub fn target_holds(&mut self, block: u16, page: u64, hash: PageHash) {
        if let Some(spot) = self.layout.spot(block, page) {
            self.versions.forget(spot);
            self.held.set(spot, hash);
        }
    }

    /// What the target's page must be, by all that was given away; `None` for pages that are zero or were never sent.
    pub fn sent(&self, block: u16, page: u64) -> Option<PageHash> {
        let spot = self.layout.spot(block, page)?;
        self.versions
            .peek(spot)
            .map(PageHash::of)
            .or_else(|| self.held.get(spot))
    }

    /// What became of the pages, those of finished batches, and the bytes that they took.
    pub fn stats(&self) -> PageKinds {
        self.stats
    }

    pub fn level(&self) -> i32 {
        self.level.get()
    }

    /// Sums of pages that the target is to look at; all that they were sent with must be given away before.
    pub fn due_sums(&mut self, now: Instant) -> Option<Sums> {
        self.sums.next(now)
    }

    /// A round has ended: what was not sent in it grows old.
    pub fn tick(&mut self) {
        self.versions.tick();
    }

    /// The first copy has been sent. From now on the host's CPU counts more than the link, as long as the link keeps up.
    pub fn begin_rounds(&mut self) -> io::Result<()> {
        let level = self.level.lower(self.settings.level_rounds);
        match (level, &mut self.compressor) {
            (Some(level), Some(compressor)) => compressor.set_compression_level(level),
            _ => Ok(()),
        }
    }

    /// Adds a page; `None` is one of zeros.
    pub fn page<F>(&mut self, block: u16, page: u64, data: Option<&Page>, out: &mut F) -> io::Result<()>
    where
        F: FnMut(&[u8]) -> io::Result<()> + ?Sized,
    {
        if block != self.block || self.runs.is_full() {
            self.flush(out)?;
            self.block = block;
            self.sum = Xxh3::with_seed(u64::from(block));
        }
        let spot = self.layout.spot(block, page);
        let noted = self.sums.note(block, page, data);
        let Some(data) = data.filter(|d| !is_zero(d)) else {
            if let Some(spot) = spot {
                self.hash_first(spot);
                self.versions.forget(spot);
                self.held.clear(spot);
            }
            self.runs.push(PageKind::Zero, page);
            self.batch.zero.add(1);
            return Ok(());
        };
        let before = self.raw.len();
        let (kind, count) = match spot.map_or(Told::Full, |s| self.tell(s, data, noted)) {
            Told::Same => {
                self.stats.same.add(0);
                return Ok(());
            }
            Told::Known(block, from) => {
                put_known(&mut self.raw, block, from);
                (PageKind::Known, &mut self.batch.known)
            }
            Told::Delta => (PageKind::Delta, &mut self.batch.delta),
            Told::Full => {
                self.raw.extend_from_slice(data);
                // Whether it can be packed is seen at the end of the batch.
                (PageKind::Full, &mut self.batch.zstd)
            }
        };
        count.add((self.raw.len() - before) as u64);
        self.runs.push(kind, page);
        self.sum.update(data);
        Ok(())
    }

    /// Finds the shortest way, and notes that the target will have the page so. A delta is appended to `raw` at once.
    fn tell(&mut self, spot: Spot, data: &Page, noted: Noted) -> Told {
        if let Some(old) = self.versions.get(spot) {
            if old == data {
                return Told::Same;
            }
            let delta = put_delta(&mut self.raw, old, data);
            *old = *data;
            return if delta { Told::Delta } else { Told::Full };
        }
        self.hash_first(spot);
        let before = self.held.get(spot);
        let twin = self.held.find(noted.now).and_then(|s| Some((s, self.layout.place(s)?)));
        let twin = twin.filter(|(_, (block, page))| self.sums.of(*block, *page) == noted.now);
        self.held.note(spot, noted.now);
        // Of pages that are held from before a break the sum is not known. All others are new if theirs is.
        let maybe_same = before.is_some() && (noted.before == 0 || noted.before == noted.now);
        let mut hash = None;
        if maybe_same || twin.is_some() {
            let this = PageHash::of(data);
            if before == Some(this) {
                return Told::Same;
            }
            if let Some((other, (block, page))) = twin {
                self.hash_first(other);
                if self.held.get(other) == Some(this) {
                    self.held.set(spot, this);
                    return Told::Known(block, page);
                }
            }
            hash = Some(this);
        }
        // Sent for the second time: it may well come a third time. The cache knows the bytes, and the hash only costs time.
        let held = &mut self.held;
        let kept = before.is_some()
            && self
                .versions
                .put(spot, data, |old, page| held.set(old, PageHash::of(page)));
        match hash {
            _ if kept => self.held.clear(spot),
            Some(hash) => self.held.set(spot, hash),
            None => self.unhashed.push((spot, self.raw.len())),
        }
        Told::Full
    }

    /// What `held` says of this page is true from now on.
    fn hash_first(&mut self, spot: Spot) {
        if self.unhashed.len() == MANY || self.unhashed.iter().any(|(s, _)| *s == spot) {
            self.hash_all();
        }
    }

    fn hash_all(&mut self) {
        let mut pages = [&[0; PAGE_SIZE]; MANY];
        for (page, (_, at)) in pages.iter_mut().zip(&self.unhashed) {
            *page = self.raw.get(*at..).and_then(|b| b.first_chunk()).unwrap_or(page);
        }
        let n = self.unhashed.len();
        if n == 0 {
            return;
        }
        let hashes = PageHash::of_many(pages.get(..n).unwrap_or_default());
        for ((spot, _), hash) in self.unhashed.drain(..).zip(hashes) {
            self.held.set(spot, hash);
        }
    }

    /// Gives away what was collected.
    pub fn flush<F>(&mut self, out: &mut F) -> io::Result<()>
    where
        F: FnMut(&[u8]) -> io::Result<()> + ?Sized,
    {
        if self.runs.is_empty() {
            return Ok(());
        }
        self.hash_all();
        let started = Instant::now();
        let packed = self.pack();
        let packing = started.elapsed();
        let raw_len = self.raw.len() - HEAD_MAX;
        let encoding = match packed {
            Some(_) => Encoding::Zstd,
            None => Encoding::Raw,
        };
        let sum = self.sum.digest();
        self.head.clear();
        encode_head(&mut self.head, self.block, encoding, &mut self.runs, raw_len, sum);
        let (buf, end) = match packed {
            Some(len) => (&mut self.packed, HEAD_MAX + len),
            None => (&mut self.raw, HEAD_MAX + raw_len),
        };
        let from = HEAD_MAX - self.head.len();
        let payload = buf.get_mut(from..end).unwrap_or_default();
        if let Some(room) = payload.get_mut(..self.head.len()) {
            room.copy_from_slice(&self.head);
        }
        let len = payload.len();
        let started = Instant::now();
        let sent = out(payload);
        let sending = started.elapsed();
        self.account(encoding, len as u64);
        self.runs.clear();
        self.raw.truncate(HEAD_MAX);
        self.sum = Xxh3::with_seed(u64::from(self.block));
        self.adapt(raw_len, packing, sending)?;
        sent
    }

    fn adapt(&mut self, raw_len: usize, packing: Duration, sending: Duration) -> io::Result<()> {
        match (self.level.sent(raw_len, packing, sending), &mut self.compressor) {
            (Some(level), Some(compressor)) => compressor.set_compression_level(level),
            _ => Ok(()),
        }
    }

    /// Adds a batch to the statistics: the bytes that it took are shared out by what each kind had before compression.
    fn account(&mut self, encoding: Encoding, len: u64) {
        let mut batch = std::mem::take(&mut self.batch);
        if encoding == Encoding::Raw {
            batch.raw = std::mem::take(&mut batch.zstd);
        }
        // Zero pages have none: what is left of the batch, its head among it, is theirs if nobody else is there.
        let before = batch.bytes();
        if before == 0 {
            batch.zero.bytes = len;
        }
        for kind in batch.all_mut().into_iter().filter(|_| before > 0) {
            // Both are lengths of a batch: small.
            kind.bytes = kind.bytes * len / before;
        }
        self.stats += batch;
    }

    /// Compresses the data into `packed`; `None` if that saves nothing. zstd gets no more room than a gain needs, and
    /// stops by itself when it runs out.
    fn pack(&mut self) -> Option<usize> {
        let compressor = self.compressor.as_mut()?;
        let raw = self.raw.get(HEAD_MAX..).filter(|r| !r.is_empty())?;
        self.packed.resize(HEAD_MAX + BATCH_PAGES_MAX * PAGE_SIZE, 0);
        let room = self.packed.get_mut(HEAD_MAX..)?;
        if self.hard >= GIVE_UP_AFTER && !sample_shrinks(compressor, raw, room) {
            return None;
        }
        let packed = shrink(compressor, raw, room);
        self.hard = if packed.is_some() { 0 } else { self.hard + 1 };
        packed
    }
}

/// Compresses into `room`; `None` if it would not get a sixteenth smaller.
fn shrink(compressor: &mut Compressor<'_>, raw: &[u8], room: &mut [u8]) -> Option<usize> {
    let room = room.get_mut(..raw.len() - raw.len().div_ceil(16))?;
    compressor.compress_to_buffer(raw, room).ok()
}

/// A few pages' worth, from all over the data, gets smaller.
fn sample_shrinks(compressor: &mut Compressor<'_>, raw: &[u8], room: &mut [u8]) -> bool {
    let step = (raw.len() / SAMPLE_PAGES).max(PAGE_SIZE);
    let mut pieces = raw.chunks(step).map(|c| c.get(..PAGE_SIZE).unwrap_or(c));
    pieces.any(|piece| shrink(compressor, piece, room).is_some())
}

/// Appends a delta with its length. False, and nothing appended, if there is none that is worth it.
fn put_delta(raw: &mut Vec<u8>, old: &Page, new: &Page) -> bool {
    let at = raw.len();
    raw.extend_from_slice(&[0, 0]);
    if !delta::encode(old, new, raw, DELTA_MAX) {
        raw.truncate(at);
        return false;
    }
    let len = (raw.len() - at - 2) as u16;
    if let Some(room) = raw.get_mut(at..at + 2) {
        room.copy_from_slice(&len.to_le_bytes());
    }
    true
}
