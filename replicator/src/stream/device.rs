//! Where the device state ends: its sections carry no length, and only the destination QEMU knows their formats.
//!
//! ```text
//! … SECTION_FULL │ 00 │ 06   length be32   JSON[length]         (end mark, then a description of all devices)
//! ```
//! The primary then waits for an answer, so nothing follows. The rule: the state is complete when the bytes so far end
//! with `00 06`, a length, and a JSON object of exactly that length that lists devices.
//!
//! JSON holds no NUL, and the length that precedes it is four bytes long. So of all places the mark can only begin at the
//! last NUL or up to five bytes before it: keeping the bytes from there on is enough, and they are bounded.
//!
//! A hostile guest may write such bytes into a device's buffer. If a read ends just there, the state is taken as complete
//! too early; the shadow then fails to load it, and the primary runs on: a switchover is lost, never the VM.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::StreamError;
use super::items::section;

/// Bytes from the end mark up to the JSON: 00 06 and the length.
const HEAD: usize = 6;

/// Watches the device state go by.
#[derive(Debug)]
pub struct EndFinder {
    /// From five bytes before the last NUL on.
    tail: Vec<u8>,
    /// The tail outgrew every description: it is no longer kept, until a NUL begins a new one.
    overflown: bool,
    seen: u64,
    max_state: u64,
    max_json: usize,
}

impl EndFinder {
    pub fn new(max_state: u64, max_json: usize) -> Self {
        Self {
            tail: Vec::new(),
            overflown: false,
            seen: 0,
            max_state,
            max_json,
        }
    }

    /// Bytes so far.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Takes the next piece.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), StreamError> {
        self.seen += piece.len() as u64;
        if self.seen > self.max_state {
            return Err(StreamError::TooMuch {
                what: "device state",
                value: self.seen,
                max: self.max_state,
            });
        }
        self.keep(piece);
        Ok(())
    }

    fn keep(&mut self, piece: &[u8]) {
        let max = HEAD + self.max_json + (HEAD - 1);
        if let Some(nul) = piece.iter().rposition(|b| *b == 0) {
            let from = nul.saturating_sub(HEAD - 1);
            let missing = HEAD - 1 - (nul - from);
            // Bytes before the piece only count if the old tail reaches up to it.
            let old = if self.overflown {
                self.tail.len()
            } else {
                self.tail.len().saturating_sub(missing)
            };
            self.tail.drain(..old);
            self.overflown = piece.len() - from > max;
            if !self.overflown {
                self.tail.extend_from_slice(&piece[from..]);
            }
        } else if self.tail.len() + piece.len() > max {
            self.overflown = true;
            self.tail.clear();
        } else if !self.overflown {
            self.tail.extend_from_slice(piece);
        }
    }

    /// The state so far is whole.
    pub fn at_end(&self) -> bool {
        self.tail.last() == Some(&b'}')
            && (0..HEAD).any(|at| {
                let Some((head, json)) = self.tail.get(at..).and_then(|t| t.split_first_chunk::<HEAD>()) else {
                    return false;
                };
                let [section::EOF, section::VMDESC, l0, l1, l2, l3] = *head else {
                    return false;
                };
                let len = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
                len == json.len() && len <= self.max_json && describes_devices(json)
            })
    }
}

/// True of `{…, "devices": […], …}`.
fn describes_devices(json: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Description {
        #[serde(rename = "devices")]
        _devices: Vec<IgnoredAny>,
    }
    json.first() == Some(&b'{') && serde_json::from_slice::<Description>(json).is_ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn described(state: &[u8], json: &[u8]) -> Vec<u8> {
        [state, &[0, 6], &(json.len() as u32).to_be_bytes(), json].concat()
    }

    fn finder() -> EndFinder {
        EndFinder::new(1 << 20, 1 << 10)
    }

    fn ends(mut f: EndFinder, bytes: &[u8]) -> bool {
        f.push(bytes).unwrap();
        f.at_end()
    }

    const JSON: &[u8] = br#"{"page_size":4096,"devices":[{"name":"timer"}]}"#;

    proptest! {
        #[test]
        fn the_end_is_found_however_the_bytes_are_cut(
            state in prop::collection::vec(any::<u8>(), 0..300),
            spaces in 0usize..400,
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let json = [&JSON[..JSON.len() - 1], &vec![b' '; spaces], b"}"].concat();
            let all = described(&state, &json);
            let mut cuts: Vec<_> = cuts.iter().map(|c| c.index(all.len())).chain([0, all.len()]).collect();
            cuts.sort_unstable();
            let mut f = finder();
            for w in cuts.windows(2) {
                f.push(&all[w[0]..w[1]]).unwrap();
                prop_assert_eq!(f.at_end(), w[1] == all.len(), "cut at {:?}", w);
                prop_assert!(f.tail.len() <= 1 << 11);
            }
        }
    }

    #[test]
    fn a_length_that_looks_like_a_mark_is_no_mark() {
        // The length 0x00060000 and below hold the mark's own bytes: use one that fits the bound.
        let json = [&JSON[..JSON.len() - 1], &vec![b' '; 0x6_0006 - JSON.len()], b"}"].concat();
        assert_eq!(json.len(), 0x6_0006);
        assert!(ends(EndFinder::new(1 << 30, 1 << 20), &described(b"\x04", &json)));
    }

    #[test]
    fn what_is_not_a_description_is_not_the_end() {
        for json in [&b"{}"[..], b"[1]", br#"{"devices":1}"#, br#"{"devices":[]} }"#] {
            assert!(!ends(finder(), &described(b"abc", json)), "{}", json.escape_ascii());
        }
        let mut wrong = described(b"abc", JSON);
        wrong[8] += 1;
        assert!(!ends(finder(), &wrong));
        assert!(ends(finder(), &described(b"abc", JSON)));
    }

    #[test]
    fn bounded() {
        let mut f = finder();
        for _ in 0..100 {
            f.push(&[b'x'; 1000]).unwrap();
        }
        assert!(f.tail.capacity() <= 4 << 10);
        // It still finds the end after that.
        f.push(&described(b"", JSON)).unwrap();
        assert!(f.at_end());
        assert!(matches!(f.push(&vec![1; 1 << 20]), Err(StreamError::TooMuch { .. })));
    }
}
