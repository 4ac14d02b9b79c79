//! Parts of disks that are compared: sums of ranges. What they are sums of is the primary's disk at that moment.

use xxhash_rust::xxh3::xxh3_64;

/// The last range of a disk may be shorter.
pub const RANGE_BYTES: u64 = 64 << 10;
/// Ranges that are compared at a time.
pub const RANGES_MAX: usize = 64;

/// Of each range of neighbouring ones.
pub fn sums(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(RANGE_BYTES as usize).map(xxh3_64).collect()
}
