//! The side on which the VM runs: adopts the primary, seeds and holds its shadow, and hands it over.
//!
//! [`machine`] decides, [`session`] drives it and owns the thread, [`migration`] is QEMU's part, [`pump`] carries the
//! pages at the pace that [`governor`] gives, [`pressure`] deals with a guest that is too fast, [`mirror`] copies private disks and
//! [`park`] has it wait, [`scrub`] compares them, [`control`] talks to the target, [`times`] makes the report,
//! [`whose`] tells our migration from somebody else's.

pub mod control;
mod door;
pub mod governor;
pub mod machine;
pub mod migration;
pub mod mirror;
pub mod park;
pub mod pressure;
pub mod pump;
pub mod scrub;
pub mod session;
pub mod times;
pub mod whose;

pub use session::{Handle, Session};
