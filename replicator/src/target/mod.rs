//! The side on which a shadow waits: starts it, keeps its RAM warm, and makes it the VM when the source says so.
//!
//! [`machine`] decides, [`session`] drives it, [`feed`] takes the ram connection's frames ([`gate`] tells when it no longer does),
//! [`handover`] gives the shadow its disks, [`compare`] compares them with the source's, [`tiers`] bounds what it costs, [`listener`] is the door.

pub mod compare;
pub mod feed;
pub mod gate;
pub mod handover;
pub mod listener;
pub mod machine;
pub mod session;
pub mod tiers;

pub use session::{Handle, Session};
