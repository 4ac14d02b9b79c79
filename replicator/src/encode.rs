//! Pages into batches for the link, and back: [`Encoder`] on the source, [`Decoder`] on the target.
//!
//! A batch holds pages of one block in the order they came, zero pages as an entry only. Its data is compressed as one zstd
//! frame, so that neighbouring pages share their redundancy, and left raw where that does not make it smaller.

use std::io;

use umbra_api::wire::WireError;
use umbra_api::wire::pages::{BATCH_PAGES_MAX, Batch, Encoding, Entry, encode_head};
use zstd::bulk::{Compressor, Decompressor};

use crate::ram::{RamError, ShadowRam};
use crate::stream::Page;
use crate::stream::items::PAGE_SIZE;

/// Longest head of a batch: room for it is kept before the data, so that head and data are one piece without a copy.
const HEAD_MAX: usize = 12 + BATCH_PAGES_MAX * 8;

/// After this many incompressible batches in a row, compression is tried only now and then.
const GIVE_UP_AFTER: u32 = 4;
const TRY_EVERY: u32 = 16;

/// True if all bytes are zero. Most pages that are not differ early, so it looks a cache line at a time.
pub fn is_zero(page: &Page) -> bool {
    let or = |line: &[u8; 64]| line.as_chunks().0.iter().fold(0, |a, w| a | u64::from_ne_bytes(*w));
    page.as_chunks::<64>().0.iter().all(|line| or(line) == 0)
}

/// Collects pages, and gives each full batch to a function.
pub struct Encoder {
    compressor: Option<Compressor<'static>>,
    block: u16,
    entries: Vec<Entry>,
    /// Room for the head, then the pages' bytes.
    raw: Vec<u8>,
    packed: Vec<u8>,
    head: Vec<u8>,
    /// Batches in a row that did not get smaller.
    hard: u32,
    stats: EncoderStats,
}

/// What an encoder did so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EncoderStats {
    pub pages: u64,
    pub zeros: u64,
    pub batches: u64,
    pub payload_bytes: u64,
}

impl Encoder {
    /// `level` is zstd's, where 0 means no compression.
    pub fn new(level: i32) -> io::Result<Self> {
        let compressor = match level {
            0 => None,
            level => Some(Compressor::new(level)?),
        };
        Ok(Self {
            compressor,
            block: 0,
            entries: Vec::with_capacity(BATCH_PAGES_MAX),
            raw: vec![0; HEAD_MAX],
            packed: Vec::new(),
            head: Vec::with_capacity(HEAD_MAX),
            hard: 0,
            stats: EncoderStats::default(),
        })
    }

    pub fn stats(&self) -> EncoderStats {
        self.stats
    }

    /// Adds a page; `None` is one of zeros.
    pub fn page<F>(&mut self, block: u16, page: u64, data: Option<&Page>, out: &mut F) -> io::Result<()>
    where
        F: FnMut(&[u8]) -> io::Result<()> + ?Sized,
    {
        if block != self.block || self.entries.len() == BATCH_PAGES_MAX {
            self.flush(out)?;
            self.block = block;
        }
        match data.filter(|d| !is_zero(d)) {
            Some(data) => {
                self.entries.push(Entry::data(page));
                self.raw.extend_from_slice(data);
                self.stats.pages += 1;
            }
            None => {
                self.entries.push(Entry::zero(page));
                self.stats.zeros += 1;
            }
        }
        Ok(())
    }

    /// Gives away what was collected.
    pub fn flush<F>(&mut self, out: &mut F) -> io::Result<()>
    where
        F: FnMut(&[u8]) -> io::Result<()> + ?Sized,
    {
        if self.entries.is_empty() {
            return Ok(());
        }
        let packed = self.pack();
        let encoding = if packed.is_some() {
            Encoding::Zstd
        } else {
            Encoding::Raw
        };
        self.head.clear();
        encode_head(&mut self.head, self.block, encoding, &self.entries);
        let (buf, end) = match packed {
            Some(len) => (&mut self.packed, HEAD_MAX + len),
            None => (
                &mut self.raw,
                HEAD_MAX + self.entries.iter().filter(|e| !e.is_zero()).count() * PAGE_SIZE,
            ),
        };
        let from = HEAD_MAX - self.head.len();
        let payload = buf.get_mut(from..end).unwrap_or_default();
        if let Some(room) = payload.get_mut(..self.head.len()) {
            room.copy_from_slice(&self.head);
        }
        self.stats.batches += 1;
        self.stats.payload_bytes += payload.len() as u64;
        let sent = out(payload);
        self.entries.clear();
        self.raw.truncate(HEAD_MAX);
        sent
    }

    /// Compresses the pages into `packed`; `None` if that saves nothing. zstd gets no more room than a gain needs, and
    /// stops by itself when it runs out.
    fn pack(&mut self) -> Option<usize> {
        let compressor = self.compressor.as_mut()?;
        let raw = self.raw.get(HEAD_MAX..).filter(|r| !r.is_empty())?;
        if self.hard >= GIVE_UP_AFTER && !self.hard.is_multiple_of(TRY_EVERY) {
            self.hard += 1;
            return None;
        }
        self.packed.resize(HEAD_MAX + BATCH_PAGES_MAX * PAGE_SIZE, 0);
        let room = self.packed.get_mut(HEAD_MAX..HEAD_MAX + raw.len() - raw.len() / 16)?;
        match compressor.compress_to_buffer(raw, room) {
            Ok(len) => {
                self.hard = 0;
                Some(len)
            }
            Err(_) => {
                self.hard += 1;
                None
            }
        }
    }
}

/// Why a batch was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error("zstd frame of a page batch")]
    Zstd(#[source] io::Error),
    #[error("a page batch decompresses to {have} bytes, it said {want}")]
    Length { have: usize, want: usize },
}

/// What a batch held.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Applied {
    pub pages: u64,
    pub zeros: u64,
}

pub struct Decoder {
    decompressor: Decompressor<'static>,
    raw: Vec<u8>,
}

impl Decoder {
    pub fn new() -> io::Result<Self> {
        let raw = vec![0; BATCH_PAGES_MAX * PAGE_SIZE];
        Ok(Self {
            decompressor: Decompressor::new()?,
            raw,
        })
    }

    /// Writes a batch's pages into the shadow's RAM. After an error some of them may be written.
    pub fn apply(&mut self, payload: &[u8], ram: &mut ShadowRam) -> Result<Applied, ApplyError> {
        let batch = Batch::decode(payload)?;
        let data = self.unpack(&batch)?;
        let mut pages = data.as_chunks::<PAGE_SIZE>().0.iter();
        let mut done = Applied::default();
        for e in batch.entries() {
            // `Batch::decode` made sure that there is a page for each entry that needs one.
            match if e.is_zero() { None } else { pages.next() } {
                Some(data) => {
                    ram.write_page(batch.block, e.page(), data)?;
                    done.pages += 1;
                }
                None => {
                    ram.zero_page(batch.block, e.page())?;
                    done.zeros += 1;
                }
            }
        }
        Ok(done)
    }

    /// The batch's bytes. The buffer's size bounds what a frame may grow to.
    fn unpack<'a>(&'a mut self, batch: &Batch<'a>) -> Result<&'a [u8], ApplyError> {
        if batch.encoding == Encoding::Raw {
            return Ok(batch.data);
        }
        let want = batch.raw_len;
        let room = self.raw.get_mut(..want).unwrap_or_default();
        let have = self
            .decompressor
            .decompress_to_buffer(batch.data, room)
            .map_err(ApplyError::Zstd)?;
        match self.raw.get(..want) {
            Some(raw) if have == want => Ok(raw),
            _ => Err(ApplyError::Length { have, want }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use umbra_api::wire::setup::{Block, StreamSetup};

    use super::*;

    const PAGES: u64 = 300;

    fn ram() -> ShadowRam {
        let block = |name: &str| Block {
            name: name.into(),
            bytes: PAGES << 12,
        };
        let blocks = vec![block("a"), block("b")];
        let setup = StreamSetup {
            version: 3,
            config: vec![7],
            ram_section: 2,
            ram_version: 4,
            blocks,
        };
        ShadowRam::new(&setup, vec![]).unwrap()
    }

    /// A page that compresses well, not at all, or is zero.
    fn page(fill: u8) -> Page {
        if fill < 128 {
            [fill; PAGE_SIZE]
        } else {
            noise(fill.into())
        }
    }

    fn noise(seed: u64) -> Page {
        let mut x = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        std::array::from_fn(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
    }

    fn encode(level: i32, pages: &[(u16, u64, u8)]) -> (Vec<Vec<u8>>, EncoderStats) {
        let mut e = Encoder::new(level).unwrap();
        let mut out = Vec::new();
        let mut sink = |p: &[u8]| {
            out.push(p.to_vec());
            Ok(())
        };
        for (block, n, fill) in pages {
            e.page(*block, *n, Some(&page(*fill)), &mut sink).unwrap();
        }
        e.flush(&mut sink).unwrap();
        e.flush(&mut sink).unwrap();
        (out, e.stats())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn pages_survive_in_their_order(
            pages in prop::collection::vec((0u16..2, 0..PAGES, any::<u8>()), 0..600),
            level in prop_oneof![Just(0), Just(1), Just(3), Just(-5)],
        ) {
            let (batches, stats) = encode(level, &pages);
            let (mut got, mut want) = (ram(), ram());
            let mut d = Decoder::new().unwrap();
            let mut sum = Applied::default();
            for b in &batches {
                let a = d.apply(b, &mut got).unwrap();
                sum = Applied { pages: sum.pages + a.pages, zeros: sum.zeros + a.zeros };
            }
            prop_assert_eq!((sum.pages, sum.zeros), (stats.pages, stats.zeros));
            prop_assert_eq!(sum.zeros as usize, pages.iter().filter(|p| p.2 == 0).count());
            prop_assert_eq!(stats.payload_bytes as usize, batches.iter().map(Vec::len).sum::<usize>());
            for (block, n, fill) in &pages {
                want.write_page(*block, *n, &page(*fill)).unwrap();
            }
            for (block, n, _) in &pages {
                let (mut a, mut b) = ([1; PAGE_SIZE], [2; PAGE_SIZE]);
                got.read_page(*block, *n, &mut a).unwrap();
                want.read_page(*block, *n, &mut b).unwrap();
                prop_assert!(a == b);
            }
        }

        #[test]
        fn damaged_batches_are_errors_or_other_pages(
            pages in prop::collection::vec((0u16..2, 0..PAGES, any::<u8>()), 1..20),
            hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
            cut in any::<prop::sample::Index>(),
        ) {
            let (mut batches, _) = encode(1, &pages);
            let mut d = Decoder::new().unwrap();
            for b in &mut batches {
                for (at, v) in &hits {
                    let at = at.index(b.len());
                    b[at] = *v;
                }
                let _ = d.apply(b, &mut ram());
                let _ = d.apply(&b[..cut.index(b.len())], &mut ram());
            }
        }
    }

    #[test]
    fn zeros_are_seen_wherever_the_one_byte_is() {
        assert!(is_zero(&[0; PAGE_SIZE]));
        for at in 0..PAGE_SIZE {
            let mut p = [0; PAGE_SIZE];
            p[at] = 1;
            assert!(!is_zero(&p), "{at}");
        }
    }

    #[test]
    fn compression_is_used_where_it_helps() {
        let alike: Vec<_> = (0..256).map(|n| (0, n, 3)).collect();
        let (batches, _) = encode(1, &alike);
        assert_eq!(batches.len(), 1);
        assert!(batches[0].len() < 8000, "{}", batches[0].len());
        let mut e = Encoder::new(1).unwrap();
        let mut raw = 0;
        let mut sink = |p: &[u8]| {
            assert_eq!(p.len(), 12 + 256 * 8 + 256 * 4096);
            raw += 1;
            Ok(())
        };
        for n in 0..20 * 256 {
            e.page(0, n % PAGES, Some(&noise(n)), &mut sink).unwrap();
        }
        e.flush(&mut sink).unwrap();
        assert_eq!(raw, 20);
    }

    #[test]
    fn a_zstd_frame_that_grows_beyond_its_word_is_refused() {
        let data = zstd::bulk::compress(&vec![0; 1 << 20], 1).unwrap();
        let mut payload = Vec::new();
        encode_head(&mut payload, 0, Encoding::Zstd, &[Entry::data(1)]);
        payload.extend_from_slice(&data);
        let mut d = Decoder::new().unwrap();
        assert!(matches!(d.apply(&payload, &mut ram()), Err(ApplyError::Zstd(_))));
        let small = zstd::bulk::compress(&[1; 100], 1).unwrap();
        let mut payload = Vec::new();
        encode_head(&mut payload, 0, Encoding::Zstd, &[Entry::data(1)]);
        payload.extend_from_slice(&small);
        assert!(matches!(
            d.apply(&payload, &mut ram()),
            Err(ApplyError::Length { have: 100, want: 4096 })
        ));
    }

    #[test]
    fn pages_beyond_their_block_are_refused() {
        let (batches, _) = encode(1, &[(0, PAGES, 1)]);
        let e = Decoder::new().unwrap().apply(&batches[0], &mut ram()).unwrap_err();
        assert!(matches!(e, ApplyError::Ram(RamError::OutOfBlock { .. })));
        let (batches, _) = encode(1, &[(7, 0, 0)]);
        let e = Decoder::new().unwrap().apply(&batches[0], &mut ram()).unwrap_err();
        assert!(matches!(e, ApplyError::Ram(RamError::UnknownBlock { block: 7, .. })));
    }
}
