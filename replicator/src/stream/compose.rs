//! Writes a migration stream item by item, as QEMU does: for the shadow's stream, for tests and for the benchmark.

use umbra_api::wire::setup::StreamSetup;

use super::Page;
use super::items::{MAGIC, PAGE_BITS, RAM_SECTION, flag, section};

/// A stream, or a part of one.
pub struct Composer<'a> {
    setup: &'a StreamSetup,
    out: Vec<u8>,
    /// The block that CONTINUE would mean.
    block: Option<u16>,
}

impl<'a> Composer<'a> {
    pub fn new(setup: &'a StreamSetup) -> Self {
        Self {
            setup,
            out: Vec::new(),
            block: None,
        }
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.out
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// Magic, version, and this configuration section.
    pub fn header(&mut self, config: &[u8]) -> &mut Self {
        let version = self.setup.version;
        self.raw(&MAGIC).raw(&version.to_be_bytes()).raw(config)
    }

    pub fn command(&mut self, (command, len): (u16, u16), data: &[u8]) -> &mut Self {
        self.raw(&[section::COMMAND])
            .raw(&command.to_be_bytes())
            .raw(&len.to_be_bytes())
            .raw(data)
    }

    /// The RAM section's START with the block list. A stream that ignores shared RAM has each block's guest address too:
    /// QEMU compares it only with what a named RAM file has itself, which is 0.
    pub fn ram_start(&mut self, with_addresses: bool) -> &mut Self {
        let setup = self.setup;
        self.raw(&[section::START])
            .raw(&setup.ram_section.to_be_bytes())
            .name(RAM_SECTION);
        // Instance 0 of it.
        self.raw(&0u32.to_be_bytes()).raw(&setup.ram_version.to_be_bytes());
        self.raw(&(setup.ram_bytes() | flag::MEM_SIZE).to_be_bytes());
        for b in &setup.blocks {
            self.name(&b.name).raw(&b.bytes.to_be_bytes());
            if with_addresses {
                self.raw(&0u64.to_be_bytes());
            }
        }
        self.end_section()
    }

    /// Begins a RAM section that holds pages.
    pub fn part(&mut self) -> &mut Self {
        self.raw(&[section::PART]).id()
    }

    /// Begins the last RAM section.
    pub fn end(&mut self) -> &mut Self {
        self.raw(&[section::END]).id()
    }

    /// A page of a block; `None` is one of zeros. Blocks that are not in the setup have no name.
    pub fn page(&mut self, block: u16, page: u64, data: Option<&Page>) -> &mut Self {
        let kind = if data.is_some() { flag::PAGE } else { flag::ZERO };
        let same = if self.block == Some(block) { flag::CONTINUE } else { 0 };
        self.raw(&(page << PAGE_BITS | kind | same).to_be_bytes());
        if same == 0 {
            let setup = self.setup;
            self.name(setup.blocks.get(usize::from(block)).map_or("", |b| &b.name));
            self.block = Some(block);
        }
        match data {
            Some(data) => self.raw(data),
            None => self.raw(&[0]),
        }
    }

    /// The end mark of a RAM section.
    pub fn eos(&mut self) -> &mut Self {
        self.raw(&flag::EOS.to_be_bytes())
    }

    pub fn footer(&mut self) -> &mut Self {
        self.raw(&[section::FOOTER]).id()
    }

    /// End mark and footer.
    pub fn end_section(&mut self) -> &mut Self {
        self.eos().footer()
    }

    /// The device state's end: the mark, and this description.
    pub fn description(&mut self, json: &[u8]) -> &mut Self {
        self.raw(&[section::EOF, section::VMDESC])
            .raw(&(json.len() as u32).to_be_bytes())
            .raw(json)
    }

    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.out.extend_from_slice(bytes);
        self
    }

    fn id(&mut self) -> &mut Self {
        let id = self.setup.ram_section;
        self.raw(&id.to_be_bytes())
    }

    /// A string with its length in one byte. `StreamSetup::check` bounds the names of blocks.
    fn name(&mut self, name: &str) -> &mut Self {
        self.raw(&[name.len() as u8]).raw(name.as_bytes())
    }
}
