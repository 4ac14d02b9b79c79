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
use crate::stream::compose::Composer;
use crate::stream::{StreamError, config};

#[derive(Debug)]
pub struct Synth {
    setup: StreamSetup,
    config: Vec<u8>,
    sent: Mark,
}

impl Synth {
    /// Fails if the setup's configuration section is no such section.
    pub fn new(setup: &StreamSetup) -> Result<Self, StreamError> {
        setup.check()?;
        let config = config::with_ignore_shared(&setup.config)?;
        Ok(Self {
            setup: setup.clone(),
            config,
            sent: Mark::default(),
        })
    }

    /// The first part, with all pages of the small blocks as they are now.
    pub fn preamble(&mut self, ram: &ShadowRam) -> Vec<u8> {
        let mut out = Composer::new(&self.setup);
        out.header(&self.config).ram_start(true).part();
        put_small(&mut out, ram, Mark::default());
        self.sent = ram.mark();
        out.into_bytes()
    }

    /// The end of RAM, with the small pages that changed since the preamble. The device state follows it.
    pub fn finish(&mut self, ram: &ShadowRam) -> Vec<u8> {
        let mut out = Composer::new(&self.setup);
        out.end();
        put_small(&mut out, ram, self.sent);
        self.sent = ram.mark();
        out.into_bytes()
    }
}

fn put_small(out: &mut Composer<'_>, ram: &ShadowRam, since: Mark) {
    for (number, block) in ram.small() {
        for (page, data) in block.changed_after(since) {
            out.page(number, page, Some(data).filter(|d| !is_zero(d)));
        }
    }
    out.end_section();
}

#[cfg(test)]
mod tests {
    use umbra_api::wire::setup::Block;

    use super::*;
    use crate::ram::RamFile;

    fn setup() -> StreamSetup {
        let block = |name: &str, pages: u64| Block {
            name: name.into(),
            bytes: pages << 12,
        };
        let blocks = vec![block("pc.ram", 16), block("pc.bios", 3), block("pc.rom", 2)];
        let config = b"\x07\0\0\0\x03q35".to_vec();
        StreamSetup {
            version: 3,
            config,
            ram_section: 0x0102_0304,
            ram_version: 4,
            blocks,
        }
    }

    #[test]
    fn layout() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = RamFile::open_or_create(&dir.path().join("ram"), 16 << 12).unwrap();
        let mut ram = ShadowRam::new(&setup(), vec![("pc.ram".into(), file)]).unwrap();
        ram.write_page(0, 5, &[5; 4096]).unwrap();
        ram.write_page(1, 1, &[6; 4096]).unwrap();
        let mut synth = Synth::new(&setup()).unwrap();
        let id = [1, 2, 3, 4];
        let head = [
            &b"QEVM\0\0\0\x03\x07\0\0\0\x03q35"[..],
            b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared",
            &[&[1][..], &id].concat(),
            b"\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\x01\x50\x04",
            b"\x06pc.ram\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0",
            b"\x07pc.bios\0\0\0\0\0\0\x30\0\0\0\0\0\0\0\0\0",
            b"\x06pc.rom\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\0\0",
            &[b"\0\0\0\0\0\0\0\x10\x7e", &id[..]].concat(),
        ]
        .concat();
        let part = [
            &[&[2][..], &id].concat(),
            &b"\0\0\0\0\0\0\0\x02\x07pc.bios\0"[..],
            b"\0\0\0\0\0\0\x10\x28",
            &[6; 4096],
            b"\0\0\0\0\0\0\x20\x22\0",
            b"\0\0\0\0\0\0\0\x02\x06pc.rom\0",
            b"\0\0\0\0\0\0\x10\x22\0",
            &[b"\0\0\0\0\0\0\0\x10\x7e", &id[..]].concat(),
        ]
        .concat();
        assert_eq!(
            synth.preamble(&ram).escape_ascii().to_string(),
            [head, part].concat().escape_ascii().to_string()
        );
        ram.write_page(2, 1, &[7; 4096]).unwrap();
        ram.write_page(1, 1, &[6; 4096]).unwrap();
        ram.write_page(0, 9, &[9; 4096]).unwrap();
        let end = [
            &[3][..],
            &id,
            b"\0\0\0\0\0\0\x10\x08\x06pc.rom",
            &[7; 4096],
            b"\0\0\0\0\0\0\0\x10\x7e",
            &id,
        ]
        .concat();
        assert_eq!(synth.finish(&ram), end);
    }

    #[test]
    fn a_setup_without_configuration_is_refused() {
        let bad = StreamSetup {
            config: b"\x08".to_vec(),
            ..setup()
        };
        assert_eq!(Synth::new(&bad).unwrap_err(), StreamError::NoConfig(8));
    }
}
