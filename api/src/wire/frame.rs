//! One frame: a header that bounds its payload before a byte of it is read.

use std::fmt;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Reader, WireError};

/// Bytes of a header.
pub const HEADER_LEN: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// JSON of [`super::control::Message`].
    Control,
    /// [`super::pages::Batch`].
    Pages,
    /// A pass over RAM is complete: [`RoundEnd`].
    RoundEnd,
    /// A piece of QEMU's device state, word for word, in order.
    DeviceState,
    /// The stream is complete: no frame follows that changes the shadow.
    StreamEnd,
    /// [`super::setup::StreamSetup`]: before the first batch of pages.
    Setup,
    /// A piece of a disk's NBD conversation, word for word, in order.
    Disk,
    /// Target to source: [`super::hashes::Held`].
    Held,
    /// [`super::hashes::Sums`].
    Sums,
}

impl Kind {
    const ALL: [(Self, u8, u32); 9] = [
        (Self::Control, 1, 1 << 20),
        (Self::Pages, 2, 2 << 20),
        (Self::RoundEnd, 3, 64),
        (Self::DeviceState, 4, 1 << 20),
        (Self::StreamEnd, 5, 64),
        (Self::Setup, 6, 512 << 10),
        (Self::Disk, 7, 1 << 20),
        (Self::Held, 16, 128 << 10),
        (Self::Sums, 17, 64 << 10),
    ];

    fn to_byte(self) -> u8 {
        Self::ALL.iter().find(|(k, ..)| *k == self).map_or(0, |(_, b, _)| *b)
    }

    /// Most bytes a payload of this kind may have.
    pub fn max_len(self) -> u32 {
        Self::ALL.iter().find(|(k, ..)| *k == self).map_or(0, |(.., max)| *max)
    }

    fn from_byte(b: u8) -> Result<Self, WireError> {
        Self::ALL
            .iter()
            .find(|(_, x, _)| *x == b)
            .map(|(k, ..)| *k)
            .ok_or(WireError::Kind(b))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Pages => "pages",
            Self::RoundEnd => "round-end",
            Self::DeviceState => "device-state",
            Self::StreamEnd => "stream-end",
            Self::Setup => "setup",
            Self::Disk => "disk",
            Self::Held => "held",
            Self::Sums => "sums",
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    pub kind: Kind,
    pub len: u32,
    seed: u64,
    sum: u64,
}

impl Header {
    /// Reads a header and checks its bounds, before the payload is there.
    pub fn decode(h: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let mut r = Reader::new("frame header", h);
        let [kind, flags] = r.array()?;
        let zero = r.u16()?;
        let len = r.u32()?;
        let sum = r.u64()?;
        let kind = Kind::from_byte(kind)?;
        if flags != 0 || zero != 0 {
            return Err(WireError::Reserved("frame header"));
        }
        if len > kind.max_len() {
            return Err(WireError::TooLong {
                kind,
                len,
                max: kind.max_len(),
            });
        }
        Ok(Self {
            kind,
            len,
            seed: seed(kind, len),
            sum,
        })
    }

    /// Checks the payload that came with this header.
    pub fn verify(&self, payload: &[u8]) -> Result<(), WireError> {
        if payload.len() != self.len as usize {
            return Err(WireError::Truncated {
                what: "frame payload",
                need: self.len as usize,
                have: payload.len(),
            });
        }
        match xxh3_64_with_seed(payload, self.seed) == self.sum {
            true => Ok(()),
            false => Err(WireError::Checksum(self.kind)),
        }
    }
}

/// The first eight bytes of a header as a number.
fn seed(kind: Kind, len: u32) -> u64 {
    u64::from(kind.to_byte()) | u64::from(len) << 32
}

/// Header for a payload. The caller keeps payloads below [`Kind::max_len`]; a longer one is an error, not a
/// frame that the peer would refuse.
pub fn encode_header(kind: Kind, payload: &[u8]) -> Result<[u8; HEADER_LEN], WireError> {
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    if len > kind.max_len() {
        return Err(WireError::TooLong {
            kind,
            len,
            max: kind.max_len(),
        });
    }
    let mut h = [0; HEADER_LEN];
    h[0] = kind.to_byte();
    h[4..8].copy_from_slice(&len.to_le_bytes());
    h[8..].copy_from_slice(&xxh3_64_with_seed(payload, seed(kind, len)).to_le_bytes());
    Ok(h)
}

/// Payload of [`Kind::RoundEnd`]: the shadow's RAM is now as the primary's was when this round's last dirty sync was taken,
/// but for what was dirtied while it travelled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RoundEnd {
    /// 0 ends the seed.
    pub round: u64,
    pub pages: u64,
}

impl RoundEnd {
    pub fn encode(self) -> [u8; 16] {
        let mut b = [0; 16];
        b[..8].copy_from_slice(&self.round.to_le_bytes());
        b[8..].copy_from_slice(&self.pages.to_le_bytes());
        b
    }

    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::new("round-end", payload);
        let out = Self {
            round: r.u64()?,
            pages: r.u64()?,
        };
        r.end().map(|()| out)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_kind_survives_and_is_bounded() {
        for (kind, ..) in Kind::ALL {
            let payload = [7u8; 33];
            let h = Header::decode(&encode_header(kind, &payload).unwrap()).unwrap();
            assert_eq!((h.kind, h.len), (kind, 33));
            h.verify(&payload).unwrap();
            let long = vec![0; kind.max_len() as usize + 1];
            assert!(matches!(encode_header(kind, &long), Err(WireError::TooLong { .. })));
        }
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_noticed(payload in prop::collection::vec(any::<u8>(), 1..64), bit in any::<prop::sample::Index>()) {
            let mut frame = encode_header(Kind::Pages, &payload).unwrap().to_vec();
            frame.extend_from_slice(&payload);
            let bit = bit.index(frame.len() * 8);
            frame[bit / 8] ^= 1 << (bit % 8);
            let header: [u8; HEADER_LEN] = frame[..HEADER_LEN].try_into().unwrap();
            let noticed = match Header::decode(&header) {
                Err(_) => true,
                Ok(h) => h.verify(&frame[HEADER_LEN..]).is_err(),
            };
            prop_assert!(noticed);
        }

        #[test]
        fn no_header_makes_decode_panic(h in any::<[u8; HEADER_LEN]>()) {
            if let Ok(h) = Header::decode(&h) {
                prop_assert!(h.len <= h.kind.max_len());
            }
        }

        #[test]
        fn round_ends(round in any::<u64>(), pages in any::<u64>(), cut in 0usize..16) {
            let r = RoundEnd { round, pages };
            prop_assert_eq!(RoundEnd::decode(&r.encode()), Ok(r));
            prop_assert!(RoundEnd::decode(&r.encode()[..cut]).is_err());
        }
    }
}
