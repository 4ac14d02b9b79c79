//! Numbers in as few bytes as they need: seven bits a byte, the lowest first, the top bit says that more follow.

use super::{Reader, WireError};

pub fn put_varint(out: &mut Vec<u8>, n: u64) {
    let mut n = n;
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// Takes a number off the front; `None` if it does not end, or not within 64 bits.
pub fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut n = 0;
    for shift in (0..64).step_by(7) {
        let (b, rest) = bytes.split_first()?;
        *bytes = rest;
        let low = u64::from(b & 0x7f);
        if low << shift >> shift != low {
            return None;
        }
        n |= low << shift;
        if b & 0x80 == 0 {
            return Some(n);
        }
    }
    None
}

/// Small numbers of either sign become small ones without.
pub fn zigzag(n: i64) -> u64 {
    (n << 1 ^ n >> 63) as u64
}

pub fn unzigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}

impl Reader<'_> {
    pub(super) fn varint(&mut self) -> Result<u64, WireError> {
        let what = self.what;
        take_varint(&mut self.bytes).ok_or(WireError::Varint(what))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_survive(n in any::<u64>(), bits in 0u32..64, more in any::<u8>()) {
            let n = n >> bits;
            let mut out = Vec::new();
            put_varint(&mut out, n);
            prop_assert_eq!(take_varint(&mut &out[..out.len() - 1]), None);
            out.push(more);
            let mut rest = &out[..];
            prop_assert_eq!(take_varint(&mut rest), Some(n));
            prop_assert_eq!(rest, &[more]);
            prop_assert_eq!(unzigzag(zigzag(n as i64)), n as i64);
        }
    }

    #[test]
    fn too_long_is_refused() {
        assert_eq!(take_varint(&mut &[0xff; 20][..]), None);
        let mut most = [0xff; 10];
        most[9] = 1;
        assert_eq!(take_varint(&mut &most[..]), Some(u64::MAX));
        most[9] = 2;
        assert_eq!(take_varint(&mut &most[..]), None);
        assert_eq!((zigzag(-1), zigzag(1), zigzag(i64::MIN)), (1, 2, u64::MAX));
    }
}
