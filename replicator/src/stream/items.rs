//! The fixed numbers of QEMU's migration stream (its migration/savevm.c and migration/ram.c define them), and a reader
//! of big-endian fields that says how many bytes it misses.

use super::StreamError;

pub const PAGE_SIZE: usize = 4096;
pub const PAGE_BITS: u32 = 12;

pub const MAGIC: [u8; 4] = *b"QEVM";
pub const VERSION: u32 = 3;

/// Types of sections: the byte each begins with.
pub mod section {
    pub const EOF: u8 = 0x00;
    pub const START: u8 = 0x01;
    pub const PART: u8 = 0x02;
    pub const END: u8 = 0x03;
    pub const FULL: u8 = 0x04;
    pub const SUBSECTION: u8 = 0x05;
    pub const VMDESC: u8 = 0x06;
    pub const CONFIGURATION: u8 = 0x07;
    pub const COMMAND: u8 = 0x08;
    pub const FOOTER: u8 = 0x7e;
}

/// Commands inside of the stream, each with the length of its data.
pub mod command {
    pub const OPEN_RETURN_PATH: (u16, u16) = (1, 0);
    pub const PING: (u16, u16) = (2, 4);
    /// Sent by 9.0 and newer just before the last RAM section.
    pub const SWITCHOVER_START: (u16, u16) = (11, 0);
}

/// Flags in the low bits of a RAM page's offset.
pub mod flag {
    pub const ZERO: u64 = 0x02;
    pub const MEM_SIZE: u64 = 0x04;
    pub const PAGE: u64 = 0x08;
    pub const EOS: u64 = 0x10;
    pub const CONTINUE: u64 = 0x20;
    pub const XBZRLE: u64 = 0x40;
    pub const MASK: u64 = 0xfff;
}

pub const RAM_SECTION: &str = "ram";
pub const RAM_VERSION: u32 = 4;

/// What one step of a parser came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// So many bytes were understood.
    Took(usize),
    /// It cannot go on with less than so many bytes.
    Need(usize),
}

/// Why a field could not be read: the bytes are not there yet, or never will be right.
pub enum Stop {
    Need(usize),
    Error(StreamError),
}

impl From<StreamError> for Stop {
    fn from(e: StreamError) -> Self {
        Self::Error(e)
    }
}

/// The end of a step: `Need` is no error.
pub fn step(r: Result<usize, Stop>) -> Result<Step, StreamError> {
    match r {
        Ok(n) => Ok(Step::Took(n)),
        Err(Stop::Need(n)) => Ok(Step::Need(n)),
        Err(Stop::Error(e)) => Err(e),
    }
}

/// Reads fields off the front of what is there.
pub struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub fn at(&self) -> usize {
        self.at
    }

    pub fn take(&mut self, n: usize) -> Result<&'a [u8], Stop> {
        let end = self.at + n;
        let out = self.bytes.get(self.at..end).ok_or(Stop::Need(end))?;
        self.at = end;
        Ok(out)
    }

    pub fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], Stop> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let out = rest.first_chunk().ok_or(Stop::Need(self.at + N))?;
        self.at += N;
        Ok(out)
    }

    pub fn peek(&self) -> Result<u8, Stop> {
        self.bytes.get(self.at).copied().ok_or(Stop::Need(self.at + 1))
    }

    pub fn u8(&mut self) -> Result<u8, Stop> {
        self.array().map(|[b]| *b)
    }

    pub fn u16(&mut self) -> Result<u16, Stop> {
        self.array().map(|b| u16::from_be_bytes(*b))
    }

    pub fn u32(&mut self) -> Result<u32, Stop> {
        self.array().map(|b| u32::from_be_bytes(*b))
    }

    pub fn u64(&mut self) -> Result<u64, Stop> {
        self.array().map(|b| u64::from_be_bytes(*b))
    }

    /// A string with its length in one byte.
    pub fn name(&mut self) -> Result<&'a [u8], Stop> {
        let len = self.u8()?;
        self.take(len.into())
    }
}

/// A name for a message: what is no text is escaped.
pub fn show(name: &[u8]) -> String {
    name.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_say_what_they_miss() {
        let mut f = Fields::new(&[0, 1, 2, b'a', b'b']);
        assert!(matches!(f.u16(), Ok(1)));
        assert!(matches!(f.peek(), Ok(2)));
        assert!(matches!(f.name(), Ok(b"ab")));
        assert!(matches!(f.u64(), Err(Stop::Need(13))));
        assert!(matches!(f.take(2), Err(Stop::Need(7))));
        assert_eq!(f.at(), 5);
    }
}
