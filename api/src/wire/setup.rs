//! What QEMU's migration stream opens with, as the source read it: the target builds the shadow's stream from it.
//!
//! ```text
//! setup    version u32  ram_section u32  ram_version u32  config_len u32  count u16  zero u16
//!          config[config_len]   count × block
//! block    bytes u64  name_len u8  name[name_len]
//! ```
//! On a ram connection it comes before the first page. Page batches name a block by its place in this list.

use std::collections::HashSet;

use super::pages::PAGE_SIZE;
use super::{Reader, WireError};

/// Longest configuration section that is taken. QEMU's own has a few hundred bytes.
pub const CONFIG_MAX: usize = 64 << 10;

/// Most RAM blocks of a VM. A q35 with four NICs has about a dozen.
pub const BLOCKS_MAX: usize = 1024;

/// Most bytes that all blocks have together: 64 TiB, so that sums and page numbers never overflow.
pub const RAM_BYTES_MAX: u64 = 64 << 40;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StreamSetup {
    /// Version of the stream's header.
    pub version: u32,
    /// The configuration section, word for word, with its type byte (0x07) and its subsections.
    pub config: Vec<u8>,
    /// Id and version of the `ram` section.
    pub ram_section: u32,
    pub ram_version: u32,
    /// In the order of the stream: this order gives the blocks their numbers.
    pub blocks: Vec<Block>,
}

/// One RAM block of QEMU: guest memory, or a small one like firmware or the ACPI tables.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Block {
    pub name: String,
    /// Always whole pages.
    pub bytes: u64,
}

impl Block {
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE_SIZE as u64
    }
}

impl StreamSetup {
    /// Bytes of all blocks.
    pub fn ram_bytes(&self) -> u64 {
        self.blocks.iter().fold(0, |sum, b| sum.saturating_add(b.bytes))
    }

    /// Number of the block with this name.
    pub fn block(&self, name: &str) -> Option<u16> {
        self.blocks
            .iter()
            .position(|b| b.name == name)
            .and_then(|i| u16::try_from(i).ok())
    }

    /// What `decode` would say of it: whoever makes a setup from outside data asks this.
    pub fn check(&self) -> Result<(), WireError> {
        if self.config.len() > CONFIG_MAX {
            return Err(too_much(
                "configuration section of a setup",
                self.config.len() as u64,
                CONFIG_MAX as u64,
            ));
        }
        if self.blocks.len() > BLOCKS_MAX {
            return Err(too_much(
                "block count of a setup",
                self.blocks.len() as u64,
                BLOCKS_MAX as u64,
            ));
        }
        let mut names = HashSet::new();
        for b in &self.blocks {
            if b.name.is_empty() || b.name.len() > 255 || b.name.chars().any(char::is_control) {
                return Err(WireError::BlockName(b.name.clone()));
            }
            if !b.bytes.is_multiple_of(PAGE_SIZE as u64) {
                return Err(WireError::BlockSize {
                    name: b.name.clone(),
                    bytes: b.bytes,
                });
            }
            if !names.insert(b.name.as_str()) {
                return Err(WireError::BlockTwice(b.name.clone()));
            }
        }
        match self.ram_bytes() {
            sum if sum > RAM_BYTES_MAX => Err(too_much("RAM of a setup", sum, RAM_BYTES_MAX)),
            _ => Ok(()),
        }
    }

    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        self.check()?;
        let mut out = Vec::with_capacity(20 + self.config.len() + self.blocks.len() * 32);
        for n in [
            self.version,
            self.ram_section,
            self.ram_version,
            self.config.len() as u32,
        ] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(&(self.blocks.len() as u16).to_le_bytes());
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&self.config);
        for b in &self.blocks {
            out.extend_from_slice(&b.bytes.to_le_bytes());
            out.push(b.name.len() as u8);
            out.extend_from_slice(b.name.as_bytes());
        }
        Ok(out)
    }

    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::new("setup", payload);
        let (version, ram_section, ram_version) = (r.u32()?, r.u32()?, r.u32()?);
        let config_len = r.u32()? as usize;
        let (count, zero) = (r.u16()? as usize, r.u16()?);
        if zero != 0 {
            return Err(WireError::Reserved("setup"));
        }
        if count > BLOCKS_MAX {
            return Err(too_much("block count of a setup", count as u64, BLOCKS_MAX as u64));
        }
        let config = r.take(config_len)?.to_vec();
        let mut blocks = Vec::with_capacity(count);
        for _ in 0..count {
            let bytes = r.u64()?;
            let [len] = r.array()?;
            let name = std::str::from_utf8(r.take(len.into())?);
            let name = name.map_err(|e| WireError::BlockName(e.to_string()))?.to_owned();
            blocks.push(Block { name, bytes });
        }
        r.end()?;
        let setup = Self {
            version,
            config,
            ram_section,
            ram_version,
            blocks,
        };
        setup.check().map(|()| setup)
    }
}

fn too_much(what: &'static str, value: u64, max: u64) -> WireError {
    WireError::OutOfRange { what, value, max }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn setup(blocks: Vec<Block>) -> StreamSetup {
        StreamSetup {
            version: 3,
            config: vec![7, 0, 0, 0, 1, b'q'],
            ram_section: 2,
            ram_version: 4,
            blocks,
        }
    }

    fn block(name: &str, bytes: u64) -> Block {
        Block {
            name: name.into(),
            bytes,
        }
    }

    proptest! {
        #[test]
        fn setups_survive(sizes in prop::collection::vec(0u64..1 << 30, 0..20), config in prop::collection::vec(any::<u8>(), 0..300)) {
            let blocks = sizes.iter().enumerate().map(|(i, pages)| block(&format!("b{i}"), pages * 4096)).collect();
            let s = StreamSetup { config, ..setup(blocks) };
            let payload = s.encode().unwrap();
            prop_assert_eq!(StreamSetup::decode(&payload).unwrap(), s);
            prop_assert!(StreamSetup::decode(&payload[..payload.len() - 1]).is_err());
            let longer = [&payload[..], &[0]].concat();
            prop_assert!(StreamSetup::decode(&longer).is_err());
        }

        #[test]
        fn hostile_setups_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(s) = StreamSetup::decode(&bytes) {
                prop_assert!(s.check().is_ok());
            }
        }
    }

    #[test]
    fn bounds() {
        let refused = |blocks| setup(blocks).encode().unwrap_err();
        assert!(matches!(refused(vec![block("", 4096)]), WireError::BlockName(_)));
        assert!(matches!(refused(vec![block("a\n", 4096)]), WireError::BlockName(_)));
        assert!(matches!(refused(vec![block("a", 4095)]), WireError::BlockSize { .. }));
        assert!(matches!(
            refused(vec![block("a", 0), block("a", 4096)]),
            WireError::BlockTwice(_)
        ));
        assert!(matches!(
            refused(vec![block("a", !4095), block("b", 4096)]),
            WireError::OutOfRange { .. }
        ));
        let many = (0..=BLOCKS_MAX).map(|i| block(&i.to_string(), 4096)).collect();
        assert!(matches!(refused(many), WireError::OutOfRange { .. }));
        let long = StreamSetup {
            config: vec![0; CONFIG_MAX + 1],
            ..setup(vec![])
        };
        assert!(matches!(long.encode(), Err(WireError::OutOfRange { .. })));
        assert_eq!(setup(vec![block("a", 0), block("b", 4096)]).block("b"), Some(1));
    }

    #[test]
    fn the_largest_setup_fits_its_frame() {
        let blocks = (0..BLOCKS_MAX).map(|i| block(&format!("{i:0>255}"), 4096)).collect();
        let s = StreamSetup {
            config: vec![7; CONFIG_MAX],
            ..setup(blocks)
        };
        let len = s.encode().unwrap().len();
        assert!(len <= super::super::frame::Kind::Setup.max_len() as usize, "{len}");
    }
}
