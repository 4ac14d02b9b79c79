//! The journal that the guest writes on a disk: the tests, which read the image on the host, are compiled from this very file.
//!
//! Record `n` (from 1) is one block of 4096 bytes in slot `n % SLOTS`; the slots are spread over the disk. Every word of it follows
//! from the number, so a record that is torn, stale or another one's is noticed.

/// Words of a record.
pub const WORDS: usize = 512;
pub const BYTES: u64 = WORDS as u64 * 8;
/// Records that are on the disk at a time.
pub const SLOTS: u64 = 512;

/// Where record `n` lies on a disk of `disk_bytes`; `None` if the disk is too small for the journal.
pub fn place(n: u64, disk_bytes: u64) -> Option<u64> {
    let stride = disk_bytes / SLOTS / BYTES * BYTES;
    (stride > 0).then(|| n % SLOTS * stride)
}

/// The first word is the number itself.
pub fn word(n: u64, i: usize) -> u64 {
    if i == 0 {
        return n;
    }
    // splitmix64: each word depends on every bit of the number.
    let mut x = (n << 9 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The number of a whole record, 0 for a slot that was never written.
pub fn read(words: &[u64]) -> Result<u64, String> {
    let n = words.first().copied().unwrap_or(0);
    let wrong = |(i, w): &(usize, &u64)| **w != if n == 0 { 0 } else { word(n, *i) };
    match words.iter().enumerate().find(wrong) {
        Some((i, w)) => Err(format!("word {i} of record {n} is {w:x}")),
        None => Ok(n),
    }
}
