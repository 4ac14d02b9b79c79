//! A batch of guest pages.
//!
//! ```text
//! batch    block u16  encoding u8  zero u8  runs_len u32  raw_len u32  sum u64   runs[runs_len]   data
//! run      varint((count - 1) << 2 | kind)  varint(zigzag(first page - page behind the run before))
//! data     what each page of the runs needs, one after the other, as `encoding` has it: 0 raw, 1 one zstd frame
//!   kind 0 full    the page's 4096 bytes
//!   kind 1 zero    nothing
//!   kind 2 known   block u16 and page u48 of a page whose bytes it has, in the receiver's RAM as it is when this one's turn comes
//!   kind 3 delta   length u16, and what changes the receiver's bytes of this page into the new ones
//! ```
//! `raw_len` is the length of the decompressed data, so that a receiver can bound the decompression beforehand. `sum` is XXH3-64,
//! seeded with the block, of the whole bytes of all pages that are not zero, in their order: what the receiver has made of a
//! batch is compared with what the sender meant. This module frames only; compression, deltas and sums are the replicator's business.

use super::varint::{put_varint, unzigzag, zigzag};
use super::{Reader, WireError};

/// Guest pages are 4 KiB on the link, whatever backs them.
pub const PAGE_SIZE: usize = 4096;

/// Most pages a batch may carry that are not zero.
pub const BATCH_PAGES_MAX: usize = 256;

/// Most zero pages of a batch.
pub const BATCH_ZEROS_MAX: usize = 64 << 10;

/// Most runs of a batch.
pub const BATCH_RUNS_MAX: usize = 512;

/// Longest delta.
pub const DELTA_MAX: usize = 2048;

/// Pages have numbers below this: a block has less than 64 TiB.
const PAGE_MAX: u64 = 1 << 40;

const WHAT: &str = "page batch";
const FIXED_LEN: usize = 20;
/// A count has three bytes at most, a distance six.
const RUN_LEN_MAX: usize = 9;
const KNOWN_LEN: usize = 8;

/// Longest head of a batch, all before its data.
pub const HEAD_MAX: usize = FIXED_LEN + BATCH_RUNS_MAX * RUN_LEN_MAX;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    Raw,
    Zstd,
}

/// How a page's bytes are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageKind {
    Full,
    Zero,
    Known,
    Delta,
}

impl PageKind {
    fn from_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Full,
            1 => Self::Zero,
            2 => Self::Known,
            _ => Self::Delta,
        }
    }

    fn bits(self) -> u64 {
        match self {
            Self::Full => 0,
            Self::Zero => 1,
            Self::Known => 2,
            Self::Delta => 3,
        }
    }
}

/// Neighbouring pages of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    pub kind: PageKind,
    pub first: u64,
    pub count: u64,
}

/// The pages of a batch that is being made.
#[derive(Clone, Debug, Default)]
pub struct Runs {
    bytes: Vec<u8>,
    /// Where the run before ended, and the run that grows.
    behind: u64,
    open: Option<Run>,
    runs: usize,
    zeros: usize,
    others: usize,
}

impl Runs {
    pub fn push(&mut self, kind: PageKind, page: u64) {
        match kind {
            PageKind::Zero => self.zeros += 1,
            _ => self.others += 1,
        }
        if let Some(run) = self
            .open
            .as_mut()
            .filter(|r| r.kind == kind && r.first + r.count == page)
        {
            run.count += 1;
            return;
        }
        self.close();
        self.runs += 1;
        self.open = Some(Run {
            kind,
            first: page,
            count: 1,
        });
    }

    fn close(&mut self) {
        if let Some(run) = self.open.take() {
            put_varint(&mut self.bytes, (run.count - 1) << 2 | run.kind.bits());
            put_varint(&mut self.bytes, zigzag(run.first.wrapping_sub(self.behind) as i64));
            self.behind = run.first + run.count;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.runs == 0
    }

    /// Another page may be one too many.
    pub fn is_full(&self) -> bool {
        self.others == BATCH_PAGES_MAX || self.zeros == BATCH_ZEROS_MAX || self.runs == BATCH_RUNS_MAX
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        *self = Self {
            bytes: std::mem::take(&mut self.bytes),
            ..Self::default()
        };
    }
}

/// Appends a batch's head to `out`; the encoded data follows it. Ends the last run.
pub fn encode_head(out: &mut Vec<u8>, block: u16, encoding: Encoding, runs: &mut Runs, raw_len: usize, sum: u64) {
    runs.close();
    out.reserve(FIXED_LEN + runs.bytes.len());
    out.extend_from_slice(&block.to_le_bytes());
    out.extend_from_slice(&[u8::from(encoding == Encoding::Zstd), 0]);
    out.extend_from_slice(&(runs.bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(&(raw_len as u32).to_le_bytes());
    out.extend_from_slice(&sum.to_le_bytes());
    out.extend_from_slice(&runs.bytes);
}

/// Appends what a page needs that has the bytes of another.
pub fn put_known(data: &mut Vec<u8>, block: u16, page: u64) {
    data.extend_from_slice(&(u64::from(block) | page << 16).to_le_bytes());
}

/// A batch as it was received: bounds are checked, data is still encoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Batch<'a> {
    /// Index of the RAM block in the order of the stream's block list.
    pub block: u16,
    pub encoding: Encoding,
    runs: &'a [u8],
    pub data: &'a [u8],
    /// Bytes that `data` decodes to.
    pub raw_len: usize,
    pub sum: u64,
}

impl<'a> Batch<'a> {
    pub fn decode(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut r = Reader::new(WHAT, payload);
        let block = r.u16()?;
        let [encoding, zero] = r.array()?;
        let runs_len = r.u32()? as usize;
        let raw_len = r.u32()? as usize;
        let sum = r.u64()?;
        if zero != 0 {
            return Err(WireError::Reserved(WHAT));
        }
        let encoding = match encoding {
            0 => Encoding::Raw,
            1 => Encoding::Zstd,
            other => return Err(range("encoding of a batch", other.into(), 1)),
        };
        let runs = r.take(runs_len)?;
        let batch = Self {
            block,
            encoding,
            runs,
            data: r.bytes,
            raw_len,
            sum,
        };
        batch.check()?;
        if encoding == Encoding::Raw && batch.data.len() != raw_len {
            return Err(WireError::Truncated {
                what: WHAT,
                need: raw_len,
                have: batch.data.len(),
            });
        }
        Ok(batch)
    }

    /// Counts the pages, and what they need, against all bounds.
    fn check(&self) -> Result<(), WireError> {
        let (mut runs, mut zeros, mut others) = (0u64, 0u64, 0u64);
        let (mut least, mut most) = (0u64, 0u64);
        let mut walk = self.runs();
        while let Some(run) = walk.next_run()? {
            runs += 1;
            let (low, high) = match run.kind {
                PageKind::Full => (PAGE_SIZE, PAGE_SIZE),
                PageKind::Zero => (0, 0),
                PageKind::Known => (KNOWN_LEN, KNOWN_LEN),
                PageKind::Delta => (2, 2 + DELTA_MAX),
            };
            match run.kind {
                PageKind::Zero => zeros += run.count,
                _ => others += run.count,
            }
            for (what, value, max) in [
                ("number of runs of a batch", runs, BATCH_RUNS_MAX),
                ("number of zero pages of a batch", zeros, BATCH_ZEROS_MAX),
                ("number of pages of a batch", others, BATCH_PAGES_MAX),
            ] {
                if value > max as u64 {
                    return Err(range(what, value, max as u64));
                }
            }
            least += low as u64 * run.count;
            most += high as u64 * run.count;
        }
        match self.raw_len as u64 {
            len if len > most => Err(range("raw length of a batch", len, most)),
            len if len < least => Err(WireError::Truncated {
                what: WHAT,
                need: least as usize,
                have: self.raw_len,
            }),
            _ => Ok(()),
        }
    }

    pub fn runs(&self) -> RunReader<'a> {
        RunReader {
            reader: Reader::new(WHAT, self.runs),
            behind: 0,
        }
    }

    /// The pages, with the decoded data.
    pub fn pages(&self, raw: &'a [u8]) -> Pages<'a> {
        Pages {
            runs: self.runs(),
            run: None,
            data: Reader::new(WHAT, raw),
        }
    }
}

/// Reads a batch's runs.
pub struct RunReader<'a> {
    reader: Reader<'a>,
    behind: u64,
}

impl RunReader<'_> {
    pub fn next_run(&mut self) -> Result<Option<Run>, WireError> {
        if self.reader.bytes.is_empty() {
            return Ok(None);
        }
        let head = self.reader.varint()?;
        let first = self.behind.wrapping_add(unzigzag(self.reader.varint()?) as u64);
        let count = (head >> 2) + 1;
        // `count` has 62 bits at most, and `first` is small when they are added.
        if first >= PAGE_MAX || count > PAGE_MAX || first + count > PAGE_MAX {
            return Err(range("page number of a batch", first.max(count), PAGE_MAX));
        }
        self.behind = first + count;
        let kind = PageKind::from_bits(head);
        Ok(Some(Run { kind, first, count }))
    }
}

/// What a batch tells of a page, or of whole ones that are neighbours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageData<'a> {
    Full(&'a [[u8; PAGE_SIZE]]),
    Zero,
    Known { block: u16, page: u64 },
    Delta(&'a [u8]),
}

/// Reads a batch's pages.
pub struct Pages<'a> {
    runs: RunReader<'a>,
    run: Option<Run>,
    data: Reader<'a>,
}

impl<'a> Pages<'a> {
    /// With the number of the first. Whole pages come as many at once as follow each other.
    pub fn next_pages(&mut self) -> Result<Option<(u64, PageData<'a>)>, WireError> {
        let run = match self.run.take() {
            Some(run) => run,
            None => match self.runs.next_run()? {
                Some(run) => run,
                None if self.data.bytes.is_empty() => return Ok(None),
                None => {
                    return Err(WireError::Trailing {
                        what: WHAT,
                        extra: self.data.bytes.len(),
                    });
                }
            },
        };
        let told = match run.kind {
            PageKind::Full => run.count,
            _ => 1,
        };
        if run.count > told {
            self.run = Some(Run {
                first: run.first + told,
                count: run.count - told,
                ..run
            });
        }
        let data = match run.kind {
            PageKind::Full => {
                let bytes = self.data.take((told as usize).saturating_mul(PAGE_SIZE))?;
                PageData::Full(bytes.as_chunks().0)
            }
            PageKind::Zero => PageData::Zero,
            PageKind::Known => {
                let n = self.data.u64()?;
                PageData::Known {
                    block: n as u16,
                    page: n >> 16,
                }
            }
            PageKind::Delta => {
                let len = usize::from(self.data.u16()?);
                if len > DELTA_MAX {
                    return Err(range("length of a delta", len as u64, DELTA_MAX as u64));
                }
                PageData::Delta(self.data.take(len)?)
            }
        };
        Ok(Some((run.first, data)))
    }
}

fn range(what: &'static str, value: u64, max: u64) -> WireError {
    WireError::OutOfRange { what, value, max }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A page and what is told of it.
    #[derive(Clone, PartialEq, Debug)]
    enum Told {
        Full(u8),
        Zero,
        Known(u16, u64),
        Delta(Vec<u8>),
    }

    fn told() -> impl Strategy<Value = Told> {
        prop_oneof![
            any::<u8>().prop_map(Told::Full),
            Just(Told::Zero),
            (any::<u16>(), 0u64..1 << 40).prop_map(|(b, p)| Told::Known(b, p)),
            prop::collection::vec(any::<u8>(), 0..40).prop_map(Told::Delta),
        ]
    }

    fn batch(block: u16, pages: &[(u64, Told)]) -> Vec<u8> {
        let (mut runs, mut data) = (Runs::default(), Vec::new());
        for (page, told) in pages {
            match told {
                Told::Full(fill) => {
                    runs.push(PageKind::Full, *page);
                    data.extend_from_slice(&[*fill; PAGE_SIZE]);
                }
                Told::Zero => runs.push(PageKind::Zero, *page),
                Told::Known(block, from) => {
                    runs.push(PageKind::Known, *page);
                    put_known(&mut data, *block, *from);
                }
                Told::Delta(d) => {
                    runs.push(PageKind::Delta, *page);
                    data.extend_from_slice(&(d.len() as u16).to_le_bytes());
                    data.extend_from_slice(d);
                }
            }
        }
        let mut out = Vec::new();
        encode_head(&mut out, block, Encoding::Raw, &mut runs, data.len(), 77);
        assert!(out.len() <= HEAD_MAX);
        out.extend_from_slice(&data);
        out
    }

    fn read(b: &Batch<'_>) -> Result<Vec<(u64, Told)>, WireError> {
        let (mut pages, mut out) = (b.pages(b.data), Vec::new());
        while let Some((page, data)) = pages.next_pages()? {
            let told = match data {
                PageData::Full(all) => {
                    out.extend((page..).zip(all).map(|(n, p)| (n, Told::Full(p[PAGE_SIZE - 1]))));
                    continue;
                }
                PageData::Zero => Told::Zero,
                PageData::Known { block, page } => Told::Known(block, page),
                PageData::Delta(d) => Told::Delta(d.to_vec()),
            };
            out.push((page, told));
        }
        Ok(out)
    }

    proptest! {
        #[test]
        fn batches_survive(block in any::<u16>(), pages in prop::collection::vec((prop_oneof![0u64..8, 0u64..1 << 39], told()), 0..40)) {
            let mut out = batch(block, &pages);
            let b = Batch::decode(&out).unwrap();
            prop_assert_eq!((b.block, b.sum), (block, 77));
            prop_assert_eq!(read(&b).unwrap(), pages);
            prop_assert!(Batch::decode(&out[..out.len() - 1]).is_err());
            out.push(0);
            prop_assert!(Batch::decode(&out).is_err());
        }

        #[test]
        fn hostile_batches_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..200), runs in 0u8..60) {
            let mut bytes = bytes;
            for (at, b) in [0, 0, 0, 0, runs, 0, 0, 0].into_iter().enumerate() {
                if let Some(x) = bytes.get_mut(at) {
                    *x = b;
                }
            }
            if let Ok(b) = Batch::decode(&bytes) {
                prop_assert!(b.raw_len <= BATCH_PAGES_MAX * PAGE_SIZE);
                if let Ok(pages) = read(&b) {
                    prop_assert!(pages.len() <= BATCH_PAGES_MAX + BATCH_ZEROS_MAX);
                }
            }
        }
    }

    #[test]
    fn neighbours_take_two_bytes_together() {
        let zeros: Vec<_> = (0..30).map(|p| (p, Told::Zero)).collect();
        assert_eq!(batch(0, &zeros).len(), FIXED_LEN + 2);
        let deltas: Vec<_> = (0..30).map(|p| (p * 20, Told::Delta(vec![]))).collect();
        assert_eq!(batch(0, &deltas).len(), FIXED_LEN + 30 * (2 + 2));
    }

    #[test]
    fn lies_about_lengths_are_refused() {
        let good = batch(0, &[(5, Told::Full(1))]);
        for len in [0, PAGE_SIZE as u32 - 1, PAGE_SIZE as u32 + 1, u32::MAX] {
            let mut out = good.clone();
            out[8..12].copy_from_slice(&len.to_le_bytes());
            assert!(Batch::decode(&out).is_err(), "{len}");
        }
        let with_runs = |kind: PageKind, count: u64, times: usize| {
            let mut runs = Vec::new();
            for _ in 0..times {
                put_varint(&mut runs, (count - 1) << 2 | kind.bits());
                put_varint(&mut runs, 0);
            }
            let mut out = vec![0; FIXED_LEN];
            out[4..8].copy_from_slice(&(runs.len() as u32).to_le_bytes());
            out.extend_from_slice(&runs);
            out
        };
        assert!(Batch::decode(&with_runs(PageKind::Zero, BATCH_ZEROS_MAX as u64, 1)).is_ok());
        for (kind, count, times) in [
            (PageKind::Zero, BATCH_ZEROS_MAX as u64 + 1, 1),
            (PageKind::Zero, 1, BATCH_RUNS_MAX + 1),
            (PageKind::Delta, BATCH_PAGES_MAX as u64 + 1, 1),
            (PageKind::Zero, 1 << 61, 1),
        ] {
            let e = Batch::decode(&with_runs(kind, count, times)).unwrap_err();
            assert!(matches!(e, WireError::OutOfRange { .. }), "{e}");
        }
    }

    #[test]
    fn the_fullest_batch_fits_its_frame() {
        let most = HEAD_MAX + BATCH_PAGES_MAX * PAGE_SIZE;
        assert!(most <= super::super::frame::Kind::Pages.max_len() as usize);
    }
}
