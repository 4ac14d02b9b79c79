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
