//! QEMU's migration stream, version 3, as the source replicator reads it: bytes go in, [`Event`]s come out.
//!
//! ```text
//! magic version configuration │ commands │ RAM SECTION_START (block list) │ RAM SECTION_PART … │ RAM SECTION_END │ device state
//!                             PING ─> Ping          └─> Setup       pages ─> Page, Zero; EOS ─> Section     └─> Device … Complete
//! ```
//! The stream comes from a process that runs a guest which may be hostile: every length is bounded before it is believed,
//! what this parser does not know is an error with its name, and nothing it holds grows with the stream.
//!
//! [`parse`] is the parser, [`compose`] its opposite, [`config`] reads and extends the configuration section, [`device`] finds the end of the
//! device state, [`items`] are the stream's fixed numbers, [`return_path`] is what the source of a migration is told.

pub mod compose;
pub mod config;
pub mod device;
pub mod items;
pub mod parse;
pub mod return_path;
#[cfg(test)]
mod tests;

use umbra_api::wire::WireError;
use umbra_api::wire::setup::StreamSetup;

pub use parse::{Limits, Parser};

/// A guest page, as it travels.
pub type Page = [u8; items::PAGE_SIZE];

/// What the stream said.
#[derive(Debug)]
pub enum Event<'a> {
    /// The header, the configuration and the list of RAM blocks were read.
    Setup(&'a StreamSetup),
    /// The primary waits for PONG with this number.
    Ping(u32),
    /// `page` counts in 4 KiB from the start of the block with this number.
    Page { block: u16, page: u64, data: &'a Page },
    /// The page is all zeros.
    Zero { block: u16, page: u64 },
    /// A RAM section ended. Its footer may come only with the next one, so nobody waits for it.
    Section(Section),
    /// The next piece of the device state, word for word, its end mark and description included.
    Device(&'a [u8]),
    /// All of the device state was there.
    Complete { device_bytes: u64 },
}

/// The end of one RAM section.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Section {
    /// It was the last one: the guest is stopped, and the device state follows.
    pub end: bool,
    /// Pages with data in this section.
    pub pages: u64,
    /// Pages of zeros in this section.
    pub zeros: u64,
    /// Offset in the stream just behind the section's end mark.
    pub at: u64,
}

/// Why a stream was not understood. The migration is given up; the primary runs on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StreamError {
    #[error("not a migration stream: it opens with {0:02x?}")]
    Magic([u8; 4]),
    #[error("migration stream of version {0}, only 3 is understood")]
    Version(u32),
    #[error("the stream has no configuration section but a section of type {0}")]
    NoConfig(u8),
    #[error("unknown configuration subsection {0:?}")]
    Subsection(String),
    #[error("the migration capability {0:?} is on: it changes the stream's format")]
    Capability(String),
    #[error("guest pages of 2^{0} bytes, only 4 KiB are understood")]
    PageBits(u32),
    #[error("unexpected section of type {0:#04x}")]
    SectionType(u8),
    #[error("section {name:?} (version {version}) is not understood, only ram of version 4")]
    Section { name: String, version: u32 },
    #[error("section id {got} where {want} was expected")]
    SectionId { got: u32, want: u32 },
    #[error("a section ends with {0:#04x} where its footer was expected")]
    Footer(u8),
    #[error("unknown command {command} with {len} bytes")]
    Command { command: u16, len: u16 },
    #[error("unknown page flags {0:#x}")]
    Flags(u64),
    #[error("xbzrle pages: the capability must be off")]
    Xbzrle,
    #[error("a page says 'same block as before', and there was none")]
    NoBlockYet,
    #[error("page of an unknown RAM block {0:?}")]
    UnknownBlock(String),
    #[error("page at {offset:#x} is outside of RAM block {block:?} of {bytes} bytes")]
    OutOfBlock { block: String, offset: u64, bytes: u64 },
    #[error("zero page filled with {0:#04x}")]
    ZeroByte(u8),
    #[error("a block list of {total} bytes with a block of {bytes}")]
    BlockList { total: u64, bytes: u64 },
    #[error("block list: {0}")]
    Setup(#[from] WireError),
    #[error("{what} of {value}, at most {max} is taken")]
    TooMuch { what: &'static str, value: u64, max: u64 },
    #[error("bytes behind the end of the stream")]
    Trailing,
    #[error("the stream failed before")]
    Failed,
}
