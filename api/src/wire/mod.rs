//! The link between two replicators: a protocol of its own, without sockets.
//!
//! ```text
//! connection   TLS 1.3 or, if both sides are configured so by name, nothing;
//!              in it the preamble (16 bytes), then frames both ways
//! preamble     "UMBRALNK"  version u16  purpose u8  zeros[5]
//! frame        kind u8  flags u8  zero u16  length u32  xxh3 u64   payload[length]
//! ```
//! All numbers are little-endian. The checksum is XXH3-64 of the payload, seeded with the first eight bytes of the header, so
//! that a frame whose header was hit does not pass either. One connection a purpose: `control` carries the JSON messages of
//! [`control`], `ram` the [`setup`] of the stream, the page batches of [`pages`] and, behind them in order, what ends a stream. `disk`,
//! one connection a private disk, carries the NBD bytes between the two QEMUs' sides, both ways.
//!
//! In TLS both sides show a certificate. The connecting side wants the name of the host that it was ordered to; the accepting side
//! wants that of the host that `hello` names, that admitted the shadow asked for by `resolve`, or whose session is attached to.
//! A side in clear that is greeted in TLS answers with a preamble, one in TLS that is greeted in clear with a TLS alert: each
//! can tell by the first byte what the other one is. Preambles begin with 0x55, TLS records with 0x14 to 0x17, frames with less.
//!
//! Versions: 1, the first. 2, batches of pages tell known pages and deltas, in runs, with a sum over the decoded pages.
//! 3, a source asks for the images that were kept of a copy that broke off. 4, a ram connection begins with what the target still
//! holds; sums of pages ([`hashes`]). 5, a copy's end is told again until it is heard.
//! 6, sums of disks ([`disk`]).

pub mod control;
pub mod disk;
pub mod frame;
pub mod hashes;
pub mod pages;
pub mod setup;
pub mod varint;

use std::fmt;

/// The version spoken here. A peer that speaks another one is refused by number.
pub const LINK_VERSION: u16 = 6;

const MAGIC: &[u8; 8] = b"UMBRALNK";

/// Bytes of a preamble.
pub const PREAMBLE_LEN: usize = 16;

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Purpose {
    Control,
    Ram,
    /// The NBD bytes of one private disk, both ways.
    Disk,
}

impl Purpose {
    fn to_byte(self) -> u8 {
        match self {
            Self::Control => 1,
            Self::Ram => 2,
            Self::Disk => 3,
        }
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Ram => "ram",
            Self::Disk => "disk",
        })
    }
}

/// Why bytes from a peer were not understood. Every variant ends the connection.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    #[error("the peer is no umbra-replicator: it opened with {0:02x?}")]
    NotUs([u8; 8]),
    #[error("the peer speaks link version {0}, this side {LINK_VERSION}")]
    Version(u16),
    #[error("unknown purpose {0} of a connection")]
    Purpose(u8),
    #[error("reserved bytes of a {0} are not zero")]
    Reserved(&'static str),
    #[error("unknown frame kind {0}")]
    Kind(u8),
    #[error("a {kind} frame of {len} bytes, at most {max} are taken")]
    TooLong { kind: frame::Kind, len: u32, max: u32 },
    #[error("checksum of a {0} frame does not match")]
    Checksum(frame::Kind),
    #[error("a {what} ends after {have} bytes, it needs {need}")]
    Truncated {
        what: &'static str,
        need: usize,
        have: usize,
    },
    #[error("a {what} has {extra} bytes too many")]
    Trailing { what: &'static str, extra: usize },
    #[error("{what} is {value}, at most {max} is possible")]
    OutOfRange { what: &'static str, value: u64, max: u64 },
    #[error("a number in a {0} does not end")]
    Varint(&'static str),
    #[error("control message: {0}")]
    Json(String),
    #[error("{0:?} is no name of a RAM block")]
    BlockName(String),
    #[error("RAM block {0:?} is named twice")]
    BlockTwice(String),
    #[error("RAM block {name:?} has {bytes} bytes, which are no whole pages")]
    BlockSize { name: String, bytes: u64 },
}

/// What a connection opens with.
pub fn encode_preamble(purpose: Purpose) -> [u8; PREAMBLE_LEN] {
    let mut p = [0; PREAMBLE_LEN];
    p[..8].copy_from_slice(MAGIC);
    p[8..10].copy_from_slice(&LINK_VERSION.to_le_bytes());
    p[10] = purpose.to_byte();
    p
}

pub fn decode_preamble(p: &[u8; PREAMBLE_LEN]) -> Result<Purpose, WireError> {
    let (magic, rest) = p.split_at(8);
    if magic != MAGIC {
        return Err(WireError::NotUs(magic.try_into().unwrap_or_default()));
    }
    let version = u16::from_le_bytes([rest[0], rest[1]]);
    if version != LINK_VERSION {
        return Err(WireError::Version(version));
    }
    if rest[3..].iter().any(|b| *b != 0) {
        return Err(WireError::Reserved("preamble"));
    }
    match rest[2] {
        1 => Ok(Purpose::Control),
        2 => Ok(Purpose::Ram),
        3 => Ok(Purpose::Disk),
        other => Err(WireError::Purpose(other)),
    }
}

/// Reads little-endian numbers off a slice, and says what was missing.
struct Reader<'a> {
    what: &'static str,
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, bytes }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], WireError> {
        let (head, tail) = self.bytes.split_at_checked(n).ok_or(WireError::Truncated {
            what: self.what,
            need: n,
            have: self.bytes.len(),
        })?;
        self.bytes = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    fn rest(self) -> &'a [u8] {
        self.bytes
    }

    fn end(self) -> Result<(), WireError> {
        match self.bytes.len() {
            0 => Ok(()),
            extra => Err(WireError::Trailing { what: self.what, extra }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preambles() {
        for purpose in [Purpose::Control, Purpose::Ram, Purpose::Disk] {
            assert_eq!(decode_preamble(&encode_preamble(purpose)), Ok(purpose));
        }
        let good = encode_preamble(Purpose::Ram);
        let with = |at: usize, b: u8| {
            let mut p = good;
            p[at] = b;
            decode_preamble(&p)
        };
        assert!(matches!(with(0, b'H'), Err(WireError::NotUs(_))));
        assert_eq!(with(8, 9), Err(WireError::Version(9)));
        assert_eq!(with(10, 77), Err(WireError::Purpose(77)));
        assert_eq!(with(15, 1), Err(WireError::Reserved("preamble")));
    }
}
