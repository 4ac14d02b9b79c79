//! A copy that broke off goes on: only pages that the target does not have any more, or never had, travel again.
//!
//! ```text
//! target   Held (QEMU gone, RAM files kept)  ── hello ──>  a new shadow, filled with what is held ([`fill`])  ── hashes ──┐
//! source   Broken, waits ([`retry`])  ──────────────────>  hello, attach  <── reads them ([`known`]) ──────────────────────┘
//!                                                          a new pass of QEMU's: what is alike is not sent
//! ```
//! QEMU's migration begins anew and hands out all of RAM, so the work that is saved is the link's, the target's and the time that they take.
//! What the target holds is asked of the files themselves each time: their content is its own truth, whatever was restarted meanwhile
//! and whoever damaged them.
//!
//! [`scrub`] looks in standby whether the target's memory is what was sent, and has a new pass repair what is not.

pub mod fill;
pub mod held;
pub mod known;
pub mod retry;
pub mod scrub;
pub mod swapped;

use xxhash_rust::xxh3::xxh3_64;

use crate::stream::Page;

/// Never 0, which means that nothing is known.
pub fn sum(page: &Page) -> u64 {
    xxh3_64(page).max(1)
}
