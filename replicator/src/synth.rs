//! The stream that the shadow's QEMU loads: what the primary sent, but without its guest memory, which is there already.
//!
//! ```text
//! preamble   magic version   configuration + x-ignore-shared   RAM START (a guest address with each block)   PART: small blocks
//! finish     END: small pages that changed since
//! (then the primary's device state, word for word)
//! ```
//! The preamble is sent while the shadow waits, so that at the switchover only a few pages and the device state are left.

use umbra_api::wire::setup::StreamSetup;

use crate::encode::is_zero;
use crate::ram::{Mark, ShadowRam};
use crate::stream::items::{MAGIC, PAGE_BITS, flag, section};
use crate::stream::{StreamError, config};

#[derive(Debug)]
pub struct Synth {
    /// Everything up to the end of the RAM section's START.
    head: Vec<u8>,
    section_id: [u8; 4],
    sent: Mark,
}

impl Synth {
    /// Fails if the setup's configuration section is no such section.
    pub fn new(setup: &StreamSetup) -> Result<Self, StreamError> {
        setup.check()?;
        let section_id = setup.ram_section.to_be_bytes();
        let mut head = Vec::new();
        head.extend_from_slice(&MAGIC);
        head.extend_from_slice(&setup.version.to_be_bytes());
        head.extend_from_slice(&config::with_ignore_shared(&setup.config)?);
        head.push(section::START);
        head.extend_from_slice(&section_id);
        head.extend_from_slice(b"\x03ram");
        // Instance 0 of it.
        head.extend_from_slice(&0u32.to_be_bytes());
        head.extend_from_slice(&setup.ram_version.to_be_bytes());
        head.extend_from_slice(&(setup.ram_bytes() | flag::MEM_SIZE).to_be_bytes());
        for b in &setup.blocks {
            put_name(&mut head, &b.name);
            head.extend_from_slice(&b.bytes.to_be_bytes());
            // The block's guest address: QEMU compares it only with what such a block has itself, which is 0.
            head.extend_from_slice(&0u64.to_be_bytes());
        }
        let mut out = Self {
            head,
            section_id,
            sent: Mark::default(),
        };
        let mut head = std::mem::take(&mut out.head);
        out.put_end(&mut head);
        out.head = head;
        Ok(out)
    }

    /// The first part, with all pages of the small blocks as they are now.
    pub fn preamble(&mut self, ram: &ShadowRam) -> Vec<u8> {
        let mut out = self.head.clone();
        self.sent = Mark::default();
        self.put_section(&mut out, section::PART, ram);
        out
    }

    /// The end of RAM, with the small pages that changed since the preamble. The device state follows it.
    pub fn finish(&mut self, ram: &ShadowRam) -> Vec<u8> {
        let mut out = Vec::new();
        self.put_section(&mut out, section::END, ram);
        out
    }

    fn put_section(&mut self, out: &mut Vec<u8>, kind: u8, ram: &ShadowRam) {
        out.push(kind);
        out.extend_from_slice(&self.section_id);
        for block in ram.small() {
            let mut same_block = 0;
            for (page, data) in block.changed_after(self.sent) {
                let zero = is_zero(data);
                let kind = if zero { flag::ZERO } else { flag::PAGE };
                out.extend_from_slice(&(page << PAGE_BITS | kind | same_block).to_be_bytes());
                if same_block == 0 {
                    put_name(out, &block.name);
                    same_block = flag::CONTINUE;
                }
                match zero {
                    true => out.push(0),
                    false => out.extend_from_slice(data),
                }
            }
        }
        self.put_end(out);
        self.sent = ram.mark();
    }

    fn put_end(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&flag::EOS.to_be_bytes());
        out.push(section::FOOTER);
        out.extend_from_slice(&self.section_id);
    }
}

fn put_name(out: &mut Vec<u8>, name: &str) {
    // `StreamSetup::check` bounds names to 255 bytes.
    out.push(name.len() as u8);
    out.extend_from_slice(name.as_bytes());
}
