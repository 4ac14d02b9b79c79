//! A batch of guest pages.
//!
//! ```text
//! batch    block u16  encoding u8  zero u8  count u32  raw_len u32   count × entry u64   data
//! entry    page number << 1 | is_zero          (a zero page has no data)
//! data     the other pages' 4096 bytes each, one after the other, as `encoding` has them: 0 raw, 1 one zstd frame
//! ```
//! `raw_len` is the length of the decompressed data, so that a receiver can bound the decompression beforehand. This module
//! frames only; compression is the replicator's business.

use super::{Reader, WireError};

/// Guest pages are 4 KiB on the link, whatever backs them.
pub const PAGE_SIZE: usize = 4096;

/// Most pages a batch may carry.
pub const BATCH_PAGES_MAX: usize = 256;

const FIXED_LEN: usize = 12;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    Raw,
    Zstd,
}

/// One page of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry(u64);

impl Entry {
    pub fn data(page: u64) -> Self {
        Self(page << 1)
    }

    pub fn zero(page: u64) -> Self {
        Self(page << 1 | 1)
    }

    /// Number of the page in its block.
    pub fn page(self) -> u64 {
        self.0 >> 1
    }

    pub fn is_zero(self) -> bool {
        self.0 & 1 == 1
    }
}

/// A batch as it was received: bounds are checked, data is still encoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Batch<'a> {
    /// Index of the RAM block in the order of the stream's block list.
    pub block: u16,
    pub encoding: Encoding,
    entries: &'a [u8],
    pub data: &'a [u8],
    /// Bytes that `data` decodes to: 4096 for every entry that is not zero.
    pub raw_len: usize,
}

impl<'a> Batch<'a> {
    pub fn entries(&self) -> impl Iterator<Item = Entry> + 'a {
        self.entries
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| Entry(u64::from_le_bytes(*b)))
    }

    pub fn decode(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut r = Reader::new("page batch", payload);
        let block = r.u16()?;
        let [encoding, zero] = r.array()?;
        let count = r.u32()?;
        let raw_len = r.u32()? as usize;
        if zero != 0 {
            return Err(WireError::Reserved("page batch"));
        }
        if count as usize > BATCH_PAGES_MAX {
            return Err(WireError::OutOfRange {
                what: "page count of a batch",
                value: count.into(),
                max: BATCH_PAGES_MAX as u64,
            });
        }
        let encoding = match encoding {
            0 => Encoding::Raw,
            1 => Encoding::Zstd,
            other => {
                return Err(WireError::OutOfRange {
                    what: "encoding of a batch",
                    value: other.into(),
                    max: 1,
                });
            }
        };
        let entries = r.take(count as usize * 8)?;
        let batch = Self {
            block,
            encoding,
            entries,
            data: r.bytes,
            raw_len,
        };
        let need = batch.entries().filter(|e| !e.is_zero()).count() * PAGE_SIZE;
        if raw_len != need {
            return Err(WireError::OutOfRange {
                what: "raw length of a batch",
                value: raw_len as u64,
                max: need as u64,
            });
        }
        if encoding == Encoding::Raw && batch.data.len() != need {
            return Err(WireError::Truncated {
                what: "page batch",
                need,
                have: batch.data.len(),
            });
        }
        Ok(batch)
    }
}

/// Appends a batch's head to `out`; the encoded data follows it.
pub fn encode_head(out: &mut Vec<u8>, block: u16, encoding: Encoding, entries: &[Entry]) {
    let raw_len = entries.iter().filter(|e| !e.is_zero()).count() * PAGE_SIZE;
    out.reserve(FIXED_LEN + entries.len() * 8);
    out.extend_from_slice(&block.to_le_bytes());
    out.extend_from_slice(&[u8::from(encoding == Encoding::Zstd), 0]);
    out.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    out.extend_from_slice(&(raw_len as u32).to_le_bytes());
    for e in entries {
        out.extend_from_slice(&e.0.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn raw_batches_survive(block in any::<u16>(), pages in prop::collection::vec((0u64..1 << 40, any::<bool>()), 0..20)) {
            let entries: Vec<_> = pages.iter().map(|(p, z)| if *z { Entry::zero(*p) } else { Entry::data(*p) }).collect();
            let mut out = Vec::new();
            encode_head(&mut out, block, Encoding::Raw, &entries);
            let data = vec![3; entries.iter().filter(|e| !e.is_zero()).count() * PAGE_SIZE];
            out.extend_from_slice(&data);
            let b = Batch::decode(&out).unwrap();
            prop_assert_eq!(b.block, block);
            prop_assert_eq!(b.entries().collect::<Vec<_>>(), entries);
            prop_assert_eq!(b.data, &data[..]);
            if !out.is_empty() {
                prop_assert!(Batch::decode(&out[..out.len() - 1]).is_err());
            }
            out.push(0);
            prop_assert!(Batch::decode(&out).is_err());
        }

        #[test]
        fn hostile_batches_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(b) = Batch::decode(&bytes) {
                prop_assert!(b.raw_len <= BATCH_PAGES_MAX * PAGE_SIZE);
            }
        }
    }

    #[test]
    fn a_lying_raw_length_is_refused() {
        let mut out = Vec::new();
        encode_head(&mut out, 0, Encoding::Zstd, &[Entry::data(5)]);
        out[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(Batch::decode(&out), Err(WireError::OutOfRange { .. })));
    }
}
