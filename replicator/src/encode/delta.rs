//! A page as the change of its version before.
//!
//! ```text
//! delta    any number of: varint(bytes to keep) varint(length) bytes[length]      the rest is kept
//! ```
//! Changes are told as the new bytes and not as differences, so that zstd, which the delta goes through with all else, finds
//! in them what the guest's data has.

use umbra_api::wire::varint::{put_varint, take_varint};

use crate::stream::Page;
use crate::stream::items::PAGE_SIZE;

/// Of 64 bytes that are looked at: three quarters, where half would be too many for the longest delta.
const REWRITTEN: usize = 48;

/// The eight bytes from `at` that differ, as bits; those behind the page's end do not.
fn differing(old: &Page, new: &Page, at: usize) -> u64 {
    let word = |page: &Page| {
        let rest = page.get(at..).unwrap_or_default();
        match rest.first_chunk() {
            Some(word) => u64::from_le_bytes(*word),
            None => rest.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)),
        }
    };
    word(old) ^ word(new)
}

/// First byte from `at` on that differs.
fn next_change(old: &Page, new: &Page, mut at: usize) -> Option<usize> {
    while at < PAGE_SIZE {
        match differing(old, new, at) {
            0 => at += 8,
            bits => return Some(at + bits.trailing_zeros() as usize / 8),
        }
    }
    None
}

/// Where a change ends that begins at `at`: behind it eight bytes are equal, fewer are not worth two numbers.
fn end_of_change(old: &Page, new: &Page, mut at: usize) -> usize {
    loop {
        match differing(old, new, at) {
            0 => return at,
            bits => at += 8 - bits.leading_zeros() as usize / 8,
        }
    }
}

/// One byte of each 64, each in another place of them. A page of which most of these differ was rewritten, and is told whole without
/// a try that would cost a fifth of what packing it does.
fn is_rewritten(old: &Page, new: &Page) -> bool {
    let lines = old.as_chunks::<64>().0.iter().zip(new.as_chunks::<64>().0);
    let differ = lines.enumerate().filter(|(i, (a, b))| {
        let at = i * 29 % 64;
        a.get(at) != b.get(at)
    });
    differ.count() > REWRITTEN
}

/// Appends to `out` what makes `old` into `new`. False, and nothing appended, if that takes more than `max` bytes.
pub fn encode(old: &Page, new: &Page, out: &mut Vec<u8>, max: usize) -> bool {
    if is_rewritten(old, new) {
        return false;
    }
    let from = out.len();
    let mut at = 0;
    while let Some(start) = next_change(old, new, at) {
        let end = end_of_change(old, new, start);
        put_varint(out, (start - at) as u64);
        put_varint(out, (end - start) as u64);
        if out.len() - from + (end - start) > max {
            out.truncate(from);
            return false;
        }
        out.extend_from_slice(new.get(start..end).unwrap_or_default());
        at = end;
    }
    true
}

/// Changes `page`. `None` if the delta is none; the page is then in between.
pub fn apply(page: &mut Page, delta: &[u8]) -> Option<()> {
    let (mut rest, mut at) = (delta, 0usize);
    while !rest.is_empty() {
        let keep = usize::try_from(take_varint(&mut rest)?).ok()?;
        let len = usize::try_from(take_varint(&mut rest)?).ok()?;
        let start = at.checked_add(keep)?;
        at = start.checked_add(len)?;
        let (bytes, tail) = rest.split_at_checked(len)?;
        page.get_mut(start..at)?.copy_from_slice(bytes);
        rest = tail;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use umbra_api::wire::pages::DELTA_MAX;

    use super::*;

    proptest! {
        #[test]
        fn changes_survive(writes in prop::collection::vec((0..PAGE_SIZE, prop::collection::vec(any::<u8>(), 1..80)), 0..30)) {
            let old: Page = std::array::from_fn(|i| (i * 7) as u8);
            let mut new = old;
            for (at, bytes) in &writes {
                for (to, b) in new[*at..].iter_mut().zip(bytes) {
                    *to = *b;
                }
            }
            let mut out = vec![9; 3];
            let told = encode(&old, &new, &mut out, DELTA_MAX);
            prop_assert_eq!(&out[..3], &[9; 3]);
            prop_assert!(out.len() <= 3 + DELTA_MAX);
            if told {
                let mut page = old;
                apply(&mut page, &out[3..]).unwrap();
                prop_assert!(page == new);
            } else {
                prop_assert_eq!(out.len(), 3);
            }
        }

        #[test]
        fn hostile_deltas_are_refused_or_stay_in_the_page(delta in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = apply(&mut [0; PAGE_SIZE], &delta);
        }
    }

    #[test]
    fn every_byte_can_be_the_changed_one() {
        let old = [3; PAGE_SIZE];
        for at in 0..PAGE_SIZE {
            let mut new = old;
            new[at] = 4;
            let mut out = Vec::new();
            assert!(encode(&old, &new, &mut out, DELTA_MAX));
            assert!(out.len() <= 4, "{at}: {out:?}");
            let mut page = old;
            apply(&mut page, &out).unwrap();
            assert!(page == new, "{at}");
        }
        let mut none = Vec::new();
        assert!(encode(&old, &old, &mut none, 0) && none.is_empty());
    }

    #[test]
    fn what_costs_more_than_it_saves_is_no_delta() {
        let mut out = Vec::new();
        assert!(!encode(&[1; PAGE_SIZE], &[2; PAGE_SIZE], &mut out, DELTA_MAX));
        let mut every_tenth = [1; PAGE_SIZE];
        every_tenth.iter_mut().step_by(10).for_each(|b| *b = 2);
        assert!(encode(&[1; PAGE_SIZE], &every_tenth, &mut out, DELTA_MAX));
        assert!(!encode(&[1; PAGE_SIZE], &every_tenth, &mut out, 1000));
    }

    #[test]
    fn deltas_that_leave_the_page_are_refused() {
        for bad in [&[0xff, 0x1f, 2, 0, 0][..], &[0xff; 12], &[0, 2, 1], &[0]] {
            assert_eq!(apply(&mut [0; PAGE_SIZE], bad), None, "{bad:?}");
        }
    }
}
