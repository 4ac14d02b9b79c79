//! Batches into the shadow's RAM.

use std::io;

use umbra_api::wire::WireError;
use umbra_api::wire::pages::{BATCH_PAGES_MAX, Batch, Encoding, PageData};
use xxhash_rust::xxh3::Xxh3;
use zstd::bulk::Decompressor;

use super::delta;
use crate::ram::{RamError, ShadowRam};
use crate::stream::items::PAGE_SIZE;

/// Why a batch was not applied. Some of its pages may be written; the copy is of no use any more.
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
    #[error("the delta for page {page} of RAM block {block} leaves the page")]
    Delta { block: u16, page: u64 },
    #[error(
        "integrity: a batch of RAM block {block}, {pages} pages around page {page}, comes to other bytes than the source has \
         (sum {have:016x}, it said {want:016x})"
    )]
    Sum {
        block: u16,
        page: u64,
        pages: u64,
        have: u64,
        want: u64,
    },
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
        Ok(Self {
            decompressor: Decompressor::new()?,
            raw: vec![0; BATCH_PAGES_MAX * PAGE_SIZE],
        })
    }

    /// Writes a batch's pages into the shadow's RAM.
    pub fn apply(&mut self, payload: &[u8], ram: &mut ShadowRam) -> Result<Applied, ApplyError> {
        let batch = Batch::decode(payload)?;
        let data = self.unpack(&batch)?;
        let block = batch.block;
        let mut sum = Xxh3::with_seed(u64::from(block));
        let (mut pages, mut done, mut last) = (batch.pages(data), Applied::default(), 0);
        let mut whole = [0; PAGE_SIZE];
        while let Some((page, told)) = pages.next_pages()? {
            match told {
                PageData::Zero => {
                    ram.zero_page(block, page)?;
                    done.zeros += 1;
                    continue;
                }
                PageData::Full(data) => {
                    ram.write_pages(block, page, data)?;
                    sum.update(data.as_flattened());
                    done.pages += data.len() as u64;
                    last = page;
                    continue;
                }
                PageData::Known { block: from, page: at } => {
                    ram.read_page(from, at, &mut whole)?;
                }
                PageData::Delta(change) => {
                    ram.read_page(block, page, &mut whole)?;
                    delta::apply(&mut whole, change).ok_or(ApplyError::Delta { block, page })?;
                }
            }
            ram.write_page(block, page, &whole)?;
            sum.update(&whole);
            done.pages += 1;
            last = page;
        }
        match sum.digest() {
            have if have != batch.sum => Err(ApplyError::Sum {
                block,
                page: last,
                pages: done.pages,
                have,
                want: batch.sum,
            }),
            _ => Ok(done),
        }
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
