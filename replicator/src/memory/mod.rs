//! A shadow's RAM by tier: what the tier leaves it stays in RAM, the coldest pages wait in swap, and a promotion reads them back.
//!
//! ```text
//!  rounds ──new pages──> QEMU's own mapping of the file (so: charged to the shadow's cgroup) ──marks──> heat, a byte a page
//!                                                                                                         │
//!  tier, peak ──> limit ──> keeper ── too much in RAM: coldest first ──> MADV_PAGEOUT, then the group's reclaim ──> swap
//!                             └────── promoted: hottest first <── MADV_WILLNEED, then a read through QEMU's mapping ──┘
//! ```
//! In reading order: [`heat`] (which pages the rounds touch), [`plan`] (which go, which come back; pure), [`window`] (the system calls),
//! [`own`] (QEMU's own memory, which stays), [`pages`] (a file that the feed writes and the keeper shrinks), [`swap`] (whether this host can), [`keeper`] (the thread).
//!
//! Why new pages are written through QEMU's mapping: tmpfs charges a page to whoever's address space first touches it, on cgroup v1
//! and v2 alike, and a thread has no memory cgroup of its own. Why both PAGEOUT and reclaim: the first names the pages, but a page whose
//! write to a disk was only begun stays in RAM as swap cache until somebody reclaims; then it is the first to go.

pub mod group;
pub mod heat;
pub mod keeper;
pub mod own;
pub mod pages;
pub mod plan;
pub mod swap;
pub mod window;
