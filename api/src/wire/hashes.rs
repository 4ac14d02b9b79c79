//! What one side knows of the other's pages, without the pages.
//!
//! ```text
//! held     from u64  name_len u8  name[name_len]   n × hash[16]       target to source, before anything else on a ram connection
//!          (no byte at all: that was the last)
//! sums     block u16  zero u16  zero u32  from u64   n × sum u64      source to target, behind a round's end
//! ```
//! `held` are the pages that a target still has of a copy that broke off: the first 16 bytes of a page's BLAKE3. A page that is
//! not sent because its hash is there is a page of a running VM, and a guest's user may choose what is in it: so the hash must be one for which
//! nobody can make two pages that are alike. Pages of the target's files that are not mentioned are zero.
//!
//! `sums` are of the pages as they were sent last, for a target that looks whether its memory is still what it wrote: XXH3-64,
//! 0 where the source does not know. They only have to notice damage, and cost the source little enough to be made of every page.

use super::{Reader, WireError};

/// Bytes of a page's hash.
pub const HASH_LEN: usize = 16;

pub type Hash = [u8; HASH_LEN];

/// Most pages of one `held` frame.
pub const HELD_PAGES_MAX: usize = 4096;

/// Most pages of one `sums` frame.
pub const SUM_PAGES_MAX: usize = 4096;

/// Hashes of neighbouring pages of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held<'a> {
    /// The RAM block.
    pub name: &'a str,
    pub from: u64,
    pub hashes: &'a [Hash],
}

impl<'a> Held<'a> {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(9 + self.name.len() + self.hashes.len() * HASH_LEN);
        out.extend_from_slice(&self.from.to_le_bytes());
        // Block names are at most 255 bytes long, see `StreamSetup::check`; a longer one is cut, and then known to nobody.
        let name = self.name.as_bytes();
        let name = name.get(..name.len().min(255)).unwrap_or_default();
        out.push(name.len() as u8);
        out.extend_from_slice(name);
        out.extend_from_slice(self.hashes.as_flattened());
        out
    }

    /// `None` if it was the last frame.
    pub fn decode(payload: &'a [u8]) -> Result<Option<Self>, WireError> {
        if payload.is_empty() {
            return Ok(None);
        }
        let mut r = Reader::new("held pages", payload);
        let from = r.u64()?;
        let [len] = r.array()?;
        let name = r.take(len.into())?;
        let name = std::str::from_utf8(name).map_err(|e| WireError::BlockName(e.to_string()))?;
        let (hashes, rest) = r.rest().as_chunks::<HASH_LEN>();
        match rest.len() {
            0 => bounded("held pages", hashes.len(), HELD_PAGES_MAX)?,
            have => return Err(truncated("hash of a held page", HASH_LEN, have)),
        }
        Ok(Some(Self { name, from, hashes }))
    }
}

/// Sums of neighbouring pages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sums {
    /// Index of the RAM block in the order of the stream's block list.
    pub block: u16,
    pub from: u64,
    /// 0: not known.
    pub sums: Vec<u64>,
}

impl Sums {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 + self.sums.len() * 8);
        out.extend_from_slice(&self.block.to_le_bytes());
        out.extend_from_slice(&[0; 6]);
        out.extend_from_slice(&self.from.to_le_bytes());
        self.sums.iter().for_each(|s| out.extend_from_slice(&s.to_le_bytes()));
        out
    }

    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::new("sums of pages", payload);
        let block = r.u16()?;
        if r.u16()? != 0 || r.u32()? != 0 {
            return Err(WireError::Reserved("sums of pages"));
        }
        let from = r.u64()?;
        let (sums, rest) = r.rest().as_chunks::<8>();
        match rest.len() {
            0 => bounded("sums of pages", sums.len(), SUM_PAGES_MAX)?,
            have => return Err(truncated("sum of a page", 8, have)),
        }
        let sums = sums.iter().map(|s| u64::from_le_bytes(*s)).collect();
        Ok(Self { block, from, sums })
    }
}

fn bounded(what: &'static str, have: usize, max: usize) -> Result<(), WireError> {
    let (value, max) = (have as u64, max as u64);
    match value <= max {
        true => Ok(()),
        false => Err(WireError::OutOfRange { what, value, max }),
    }
}

fn truncated(what: &'static str, need: usize, have: usize) -> WireError {
    WireError::Truncated { what, need, have }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::frame::Kind;
    use super::*;

    proptest! {
        #[test]
        fn held_pages_survive(name in "[a-z.]{0,40}", from in any::<u64>(), hashes in prop::collection::vec(any::<Hash>(), 0..50)) {
            let h = Held { name: &name, from, hashes: &hashes };
            let payload = h.encode();
            prop_assert_eq!(Held::decode(&payload), Ok(Some(h)));
            let cut = payload.len() - 1;
            prop_assert!(Held::decode(&payload[..cut]).is_err());
        }

        #[test]
        fn sums_survive(block in any::<u16>(), from in any::<u64>(), sums in prop::collection::vec(any::<u64>(), 0..50)) {
            let s = Sums { block, from, sums };
            let payload = s.encode();
            prop_assert_eq!(Sums::decode(&payload), Ok(s));
            prop_assert!(Sums::decode(&payload[..payload.len() - 1]).is_err());
        }

        #[test]
        fn hostile_bytes_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Held::decode(&bytes);
            let _ = Sums::decode(&bytes);
        }
    }

    #[test]
    fn the_largest_fit_their_frames_and_larger_ones_are_refused() {
        let name = "n".repeat(255);
        let hashes = vec![[7; HASH_LEN]; HELD_PAGES_MAX + 1];
        let held = |n| {
            let h = Held {
                name: &name,
                from: 0,
                hashes: &hashes[..n],
            };
            h.encode()
        };
        assert!(held(HELD_PAGES_MAX).len() <= Kind::Held.max_len() as usize);
        assert!(matches!(
            Held::decode(&held(HELD_PAGES_MAX + 1)),
            Err(WireError::OutOfRange { .. })
        ));
        let sums = |n| Sums {
            block: 0,
            from: 0,
            sums: vec![1; n],
        };
        assert!(sums(SUM_PAGES_MAX).encode().len() <= Kind::Sums.max_len() as usize);
        assert!(Sums::decode(&sums(SUM_PAGES_MAX + 1).encode()).is_err());
        assert_eq!(Held::decode(&[]), Ok(None));
    }
}
