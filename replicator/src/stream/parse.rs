//! The push parser.
//!
//! ```text
//! Header ─> Config ─> Between <───────────────────────────────────────────────┐
//!                      │  ├─ COMMAND ────────────────────────────────────────>│
//!                      │  ├─ START of ram ─> List ─> Blocks ─> List ──EOS─>┐  │
//!                      │  └─ PART, END of ram ───────> Pages ─────────EOS─>┤  │
//!                      │                                                   v  │
//!                      │                                      Footer{end} ─┴──┘
//!                      └─ after the END: Device ─> Complete
//! any error ─> Failed
//! ```
//! A state takes whole items only. An item that lies whole in the pushed bytes is never copied; one that does not is
//! collected in `carry`, which so never holds more than one page and its header.

use umbra_api::wire::setup::{BLOCKS_MAX, Block, StreamSetup};

use super::device::EndFinder;
use super::items::{Fields, PAGE_SIZE, Step, Stop, command, flag, section, show, step};
use super::{Event, Section, StreamError, config, items};

/// Bounds of what a stream may hold beyond its pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// All of the device state. Three NICs have 0.26 MB.
    pub device_bytes: u64,
    /// The description at its end, which is kept in memory.
    pub description_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            device_bytes: 256 << 20,
            description_bytes: 8 << 20,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Header,
    Config,
    /// Between two sections.
    Between,
    /// In the ram section's START.
    List,
    /// Bytes of RAM whose blocks are still to be listed.
    Blocks(u64),
    /// In a PART or, with `end`, the END.
    Pages {
        end: bool,
    },
    Footer {
        end: bool,
    },
    Device,
    Complete,
    Failed,
}

#[derive(Debug)]
pub struct Parser {
    state: State,
    setup: StreamSetup,
    /// The first block list was read.
    listed: bool,
    block: Option<Current>,
    pages: u64,
    zeros: u64,
    position: u64,
    device: EndFinder,
    /// An item's bytes so far, and how many it needs at least.
    carry: Vec<u8>,
    need: usize,
}

/// The block that CONTINUE means.
#[derive(Clone, Copy, Debug)]
struct Current {
    index: u16,
    bytes: u64,
}

impl Parser {
    pub fn new(limits: Limits) -> Self {
        let setup = StreamSetup {
            version: 0,
            config: Vec::new(),
            ram_section: 0,
            ram_version: 0,
            blocks: Vec::new(),
        };
        Self {
            state: State::Header,
            setup,
            listed: false,
            block: None,
            pages: 0,
            zeros: 0,
            position: 0,
            device: EndFinder::new(limits.device_bytes, limits.description_bytes),
            carry: Vec::new(),
            need: 0,
        }
    }

    /// Bytes of the stream that were understood. What was pushed beyond them waits for the rest of its item.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes that are kept because the rest of their item is missing.
    pub fn held_bytes(&self) -> usize {
        self.carry.len()
    }

    /// The device state was there to its end.
    pub fn is_complete(&self) -> bool {
        self.state == State::Complete
    }

    /// What the stream opened with, once it was read.
    pub fn setup(&self) -> Option<&StreamSetup> {
        self.listed.then_some(&self.setup)
    }

    /// Takes the next bytes, however they are cut. An error, of the stream or of the sink, is final.
    pub fn push<E, F>(&mut self, bytes: &[u8], sink: &mut F) -> Result<(), E>
    where
        E: From<StreamError>,
        F: FnMut(Event<'_>) -> Result<(), E> + ?Sized,
    {
        let r = self.push_all(bytes, sink);
        if r.is_err() {
            self.state = State::Failed;
            self.carry = Vec::new();
        }
        r
    }

    fn push_all<E, F>(&mut self, mut bytes: &[u8], sink: &mut F) -> Result<(), E>
    where
        E: From<StreamError>,
        F: FnMut(Event<'_>) -> Result<(), E> + ?Sized,
    {
        while !self.carry.is_empty() {
            let missing = self.need.saturating_sub(self.carry.len()).min(bytes.len());
            let (head, rest) = bytes.split_at(missing);
            self.carry.extend_from_slice(head);
            bytes = rest;
            if self.carry.len() < self.need {
                return Ok(());
            }
            let mut carry = std::mem::take(&mut self.carry);
            let took = self.run(&carry, sink)?;
            carry.drain(..took);
            self.carry = carry;
        }
        let took = self.run(bytes, sink)?;
        self.carry.extend_from_slice(bytes.get(took..).unwrap_or_default());
        // Asked here and not for each piece: only a primary that waits for its answer has nothing more to say.
        if self.state == State::Device && self.device.at_end() {
            self.state = State::Complete;
            sink(Event::Complete {
                device_bytes: self.device.seen(),
            })?;
        }
        Ok(())
    }

    /// Takes all whole items off `buf`; tells how many bytes they were.
    fn run<E, F>(&mut self, buf: &[u8], sink: &mut F) -> Result<usize, E>
    where
        E: From<StreamError>,
        F: FnMut(Event<'_>) -> Result<(), E> + ?Sized,
    {
        let mut at = 0;
        loop {
            let rest = buf.get(at..).unwrap_or_default();
            let step = match self.state {
                State::Header => self.header(rest)?,
                State::Config => self.config(rest)?,
                State::Between => self.between(rest, sink)?,
                State::List => self.list(rest, sink)?,
                State::Blocks(left) => self.blocks(rest, left)?,
                State::Pages { end } => self.pages(rest, end, sink)?,
                State::Footer { end } => self.footer(rest, end)?,
                State::Device => self.device(rest, sink)?,
                State::Complete if rest.is_empty() => Step::Need(1),
                State::Complete => return Err(StreamError::Trailing.into()),
                State::Failed => return Err(StreamError::Failed.into()),
            };
            match step {
                Step::Took(n) => {
                    at += n;
                    self.position += n as u64;
                }
                Step::Need(n) => {
                    self.need = n;
                    return Ok(at);
                }
            }
        }
    }

    fn header(&mut self, buf: &[u8]) -> Result<Step, StreamError> {
        let mut f = Fields::new(buf);
        let mut read = || -> Result<usize, Stop> {
            let magic = *f.array::<4>()?;
            if magic != items::MAGIC {
                return Err(StreamError::Magic(magic).into());
            }
            match f.u32()? {
                items::VERSION => Ok(f.at()),
                other => Err(Stop::Error(StreamError::Version(other))),
            }
        };
        let out = step(read())?;
        if let Step::Took(_) = out {
            self.setup.version = items::VERSION;
            self.state = State::Config;
        }
        Ok(out)
    }

    fn config(&mut self, buf: &[u8]) -> Result<Step, StreamError> {
        let out = config::measure(buf)?;
        if let Step::Took(n) = out {
            self.setup.config = buf.get(..n).unwrap_or_default().to_vec();
            self.state = State::Between;
        }
        Ok(out)
    }

    /// One command, or the head of a section.
    fn between<E, F>(&mut self, buf: &[u8], sink: &mut F) -> Result<Step, E>
    where
        E: From<StreamError>,
        F: FnMut(Event<'_>) -> Result<(), E> + ?Sized,
    {
        let mut f = Fields::new(buf);
        let mut ping = None;
        let mut read = || -> Result<usize, Stop> {
            match f.u8()? {
                section::COMMAND => {
                    ping = self.command(&mut f)?;
                    Ok(f.at())
                }
                section::START if !self.listed => {
                    self.start(&mut f)?;
                    Ok(f.at())
                }
                kind @ (section::PART | section::END) if self.listed => {
                    self.same_section(f.u32()?)?;
                    (self.pages, self.zeros) = (0, 0);
                    self.state = State::Pages {
                        end: kind == section::END,
                    };
                    Ok(f.at())
                }
                other => Err(Stop::Error(StreamError::SectionType(other))),
            }
        };
        let out = step(read())?;
        if let Some(value) = ping {
            sink(Event::Ping(value))?;
        }
        Ok(out)
    }

    /// The number of a PING.
    fn command(&mut self, f: &mut Fields<'_>) -> Result<Option<u32>, Stop> {
        match (f.u16()?, f.u16()?) {
            command::PING => f.u32().map(Some),
            command::OPEN_RETURN_PATH => Ok(None),
            command::SWITCHOVER_START => Ok(None),
            (command, len) => Err(StreamError::Command { command, len }.into()),
        }
    }

    fn start(&mut self, f: &mut Fields<'_>) -> Result<(), Stop> {
        let id = f.u32()?;
        let name = f.name()?;
        let (_instance, version) = (f.u32()?, f.u32()?);
        if name != items::RAM_SECTION.as_bytes() || version != items::RAM_VERSION {
            return Err(StreamError::Section {
                name: show(name),
                version,
            }
            .into());
        }
        (self.setup.ram_section, self.setup.ram_version) = (id, version);
        self.state = State::List;
        Ok(())
    }

    fn same_section(&self, got: u32) -> Result<(), Stop> {
        match self.setup.ram_section {
            want if want == got => Ok(()),
            want => Err(StreamError::SectionId { got, want }.into()),
        }
    }

    /// In the START: the size of RAM, with the list of blocks behind it, and the end mark.
    fn list<E, F>(&mut self, buf: &[u8], sink: &mut F) -> Result<Step, E>
    where
        E: From<StreamError>,
        F: FnMut(Event<'_>) -> Result<(), E> + ?Sized,
    {
        let Some(head) = buf.first_chunk() else {
            return Ok(Step::Need(8));
        };
        let head = u64::from_be_bytes(*head);
        match head & flag::MASK {
            flag::MEM_SIZE if self.setup.blocks.is_empty() => self.state = State::Blocks(head & !flag::MASK),
            flag::EOS => {
                self.setup.check().map_err(StreamError::from)?;
                self.listed = true;
                self.state = State::Footer { end: false };
                sink(Event::Setup(&self.setup))?;
            }
            flags => return Err(StreamError::Flags(flags).into()),
        }
        Ok(Step::Took(8))
    }

    /// One block of the list, which ends when its sum is that of all RAM.
    fn blocks(&mut self, buf: &[u8], left: u64) -> Result<Step, StreamError> {
        if left == 0 {
            self.state = State::List;
            return Ok(Step::Took(0));
        }
        let mut f = Fields::new(buf);
        let mut read = || -> Result<_, Stop> { Ok((f.name()?, f.u64()?)) };
        let (name, bytes) = match read() {
            Ok(block) => block,
            Err(Stop::Need(n)) => return Ok(Step::Need(n)),
            Err(Stop::Error(e)) => return Err(e),
        };
        let Some(left) = left.checked_sub(bytes) else {
            return Err(StreamError::BlockList { total: left, bytes });
        };
        if self.setup.blocks.len() == BLOCKS_MAX {
            let what = "RAM blocks";
            return Err(StreamError::TooMuch {
                what,
                value: BLOCKS_MAX as u64 + 1,
                max: BLOCKS_MAX as u64,
            });
        }
        let name = std::str::from_utf8(name)
            .map_err(|_| StreamError::UnknownBlock(show(name)))?
            .to_owned();
        self.setup.blocks.push(Block { name, bytes });
        self.state = State::Blocks(left);
        Ok(Step::Took(f.at()))
    }

    /// As many pages as there are: the hot path.
    fn pages<E, F>(&mut self, buf: &[u8], end: bool, sink: &mut F) -> Result<Step, E>
    where
        E: From<StreamError>,
        F: FnMut(Event<'_>) -> Result<(), E> + ?Sized,
    {
        let mut at = 0;
        let need = loop {
            let rest = buf.get(at..).unwrap_or_default();
            let Some((head, body)) = rest.split_first_chunk() else {
                break 8;
            };
            let head = u64::from_be_bytes(*head);
            let (offset, flags) = (head & !flag::MASK, head & flag::MASK);
            if flags == flag::EOS {
                let at = at + 8;
                self.state = State::Footer { end };
                let done = Section {
                    end,
                    pages: self.pages,
                    zeros: self.zeros,
                    at: self.position + at as u64,
                };
                sink(Event::Section(done))?;
                return Ok(Step::Took(at));
            }
            let name_len = match flags & flag::CONTINUE {
                0 => match self.name(body, flags)? {
                    Ok(n) => n,
                    Err(n) => break 8 + n,
                },
                _ => 0,
            };
            let body = body.get(name_len..).unwrap_or_default();
            match flags & !flag::CONTINUE {
                flag::PAGE => {
                    let Some(data) = body.first_chunk::<PAGE_SIZE>() else {
                        break 8 + name_len + PAGE_SIZE;
                    };
                    let (block, page) = self.place(offset)?;
                    self.pages += 1;
                    at += 8 + name_len + PAGE_SIZE;
                    sink(Event::Page { block, page, data })?;
                }
                flag::ZERO => {
                    let Some(fill) = body.first() else {
                        break 8 + name_len + 1;
                    };
                    if *fill != 0 {
                        return Err(StreamError::ZeroByte(*fill).into());
                    }
                    let (block, page) = self.place(offset)?;
                    self.zeros += 1;
                    at += 8 + name_len + 1;
                    sink(Event::Zero { block, page })?;
                }
                _ => return Err(unknown(flags).into()),
            }
        };
        Ok(if at > 0 { Step::Took(at) } else { Step::Need(need) })
    }

    /// Makes the named block the current one. Inside: bytes of the name, or how many it needs.
    #[cold]
    fn name(&mut self, body: &[u8], flags: u64) -> Result<Result<usize, usize>, StreamError> {
        if !matches!(flags, flag::PAGE | flag::ZERO) {
            return Err(unknown(flags));
        }
        let mut f = Fields::new(body);
        let name = match f.name() {
            Ok(name) => name,
            Err(Stop::Need(n)) => return Ok(Err(n)),
            Err(Stop::Error(e)) => return Err(e),
        };
        let same = |b: &Block| b.name.as_bytes() == name;
        let found = self.setup.blocks.iter().zip(0u16..).find(|(b, _)| same(b));
        let (block, index) = found.ok_or_else(|| StreamError::UnknownBlock(show(name)))?;
        self.block = Some(Current {
            index,
            bytes: block.bytes,
        });
        Ok(Ok(f.at()))
    }

    /// Block and number of the page at this offset of the current block.
    #[inline]
    fn place(&self, offset: u64) -> Result<(u16, u64), StreamError> {
        match self.block {
            Some(b) if offset < b.bytes => Ok((b.index, offset >> items::PAGE_BITS)),
            Some(b) => Err(self.outside(b, offset)),
            None => Err(StreamError::NoBlockYet),
        }
    }

    #[cold]
    fn outside(&self, b: Current, offset: u64) -> StreamError {
        let block = self
            .setup
            .blocks
            .get(usize::from(b.index))
            .map(|b| b.name.clone())
            .unwrap_or_default();
        StreamError::OutOfBlock {
            block,
            offset,
            bytes: b.bytes,
        }
    }

    fn footer(&mut self, buf: &[u8], end: bool) -> Result<Step, StreamError> {
        let mut f = Fields::new(buf);
        let mut read = || -> Result<usize, Stop> {
            match f.u8()? {
                section::FOOTER => self.same_section(f.u32()?)?,
                other => return Err(StreamError::Footer(other).into()),
            }
            Ok(f.at())
        };
        let out = step(read())?;
        if let Step::Took(_) = out {
            self.state = if end { State::Device } else { State::Between };
        }
        Ok(out)
    }

    fn device<E, F>(&mut self, buf: &[u8], sink: &mut F) -> Result<Step, E>
    where
        E: From<StreamError>,
        F: FnMut(Event<'_>) -> Result<(), E> + ?Sized,
    {
        if buf.is_empty() {
            return Ok(Step::Need(1));
        }
        self.device.push(buf)?;
        sink(Event::Device(buf))?;
        Ok(Step::Took(buf.len()))
    }
}

#[cold]
fn unknown(flags: u64) -> StreamError {
    match flags & flag::XBZRLE {
        0 => StreamError::Flags(flags),
        _ => StreamError::Xbzrle,
    }
}
