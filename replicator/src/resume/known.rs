//! On the source: which pages the target has of a copy that broke off, as it says at the beginning of a ram connection.
//!
//! 16 bytes a page, until the stream has told its blocks and the encoder takes them over: there a page that the target has does not travel.

use std::time::{Duration, Instant};

use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::RamBlock;
use umbra_api::wire::frame::Kind;
use umbra_api::wire::hashes::{Hash, Held};
use umbra_api::wire::setup::StreamSetup;

use crate::encode::Encoder;
use crate::encode::held::PageHash;
use crate::link::{FrameReader, ReadHalf};
use crate::stream::items::PAGE_SIZE;

/// The target hashes its files meanwhile, and other connections must not look dead.
const PING_EVERY: Duration = Duration::from_secs(1);

/// Neighbouring pages of a RAM block.
struct Run {
    block: String,
    from: u64,
    hashes: Vec<Hash>,
}

/// What the target holds.
#[derive(Default)]
pub struct Known {
    runs: Vec<Run>,
    pages: u64,
}

impl Known {
    /// Reads what the target says. `ping` is called now and then.
    pub fn read(reader: &mut FrameReader<ReadHalf>, ram: &[RamBlock], mut ping: impl FnMut()) -> Result<Self, Refusal> {
        let mut known = Self::default();
        let mut pinged = Instant::now();
        loop {
            if pinged.elapsed() >= PING_EVERY {
                pinged = Instant::now();
                ping();
            }
            let peer = reader.peer().to_owned();
            let wrong = |why: String| Refusal::new(RefusalCode::PeerRefused, format!("{peer}: {why}"));
            match reader.next() {
                Ok((Kind::Held, payload)) => match Held::decode(payload).map_err(|e| wrong(e.to_string()))? {
                    Some(held) => known.note(&held, ram).map_err(wrong)?,
                    None => return Ok(known),
                },
                Ok((kind, _)) => return Err(wrong(format!("a {kind} frame before it said which pages it holds"))),
                Err(e) => return Err(Refusal::new(RefusalCode::PeerUnreachable, crate::chain(&e))),
            }
        }
    }

    /// A target can't hold more than there is: what it says is bounded by the VM's RAM.
    fn note(&mut self, held: &Held<'_>, ram: &[RamBlock]) -> Result<(), String> {
        let pages = |r: &RamBlock| r.bytes / PAGE_SIZE as u64;
        let block = ram.iter().find(|r| r.name == held.name);
        let block = block.ok_or_else(|| format!("it holds pages of {:?}, which is no RAM of this VM", held.name))?;
        let to = held.from.checked_add(held.hashes.len() as u64);
        if held.hashes.is_empty() || to.is_none_or(|to| to > pages(block)) {
            return Err(format!(
                "it holds {} pages of {:?} from page {} on, of {}",
                held.hashes.len(),
                held.name,
                held.from,
                pages(block)
            ));
        }
        self.pages += held.hashes.len() as u64;
        if self.pages > ram.iter().map(pages).sum() {
            return Err("it holds more pages than the VM has".into());
        }
        self.runs.push(Run {
            block: held.name.into(),
            from: held.from,
            hashes: held.hashes.to_vec(),
        });
        Ok(())
    }

    /// The stream's blocks are known now, and so is what needs not travel.
    pub fn give(self, setup: &StreamSetup, encoder: &mut Encoder) {
        for run in self.runs {
            let Some(block) = setup.block(&run.block) else { continue };
            for (page, hash) in (run.from..).zip(run.hashes) {
                encoder.target_holds(block, page, PageHash::from_bytes(hash));
            }
        }
    }

    /// Pages that the target holds.
    pub fn pages(&self) -> u64 {
        self.pages
    }
}

#[cfg(test)]
mod tests {
    use umbra_api::wire::setup::Block;

    use super::*;
    use crate::encode::Settings;
    use crate::stream::Page;

    fn ram(pages: u64) -> [RamBlock; 1] {
        [RamBlock {
            name: "ram".into(),
            bytes: pages << 12,
        }]
    }

    fn setup() -> StreamSetup {
        let block = |name: &str| Block {
            name: name.into(),
            bytes: 100 << 12,
        };
        StreamSetup {
            version: 3,
            config: vec![7],
            ram_section: 2,
            ram_version: 4,
            blocks: vec![block("bios"), block("ram")],
        }
    }

    fn sent(e: &mut Encoder, block: u16, page: u64, data: &Page) -> bool {
        let before = e.stats().same.pages;
        let mut sink = |_: &[u8]| Ok(());
        e.page(block, page, Some(data), &mut sink).unwrap();
        e.flush(&mut sink).unwrap();
        e.stats().same.pages == before
    }

    #[test]
    fn what_was_sent_is_not_what_was_held() {
        let (a, b, zero): (Page, Page, Page) = ([1; PAGE_SIZE], [2; PAGE_SIZE], [0; PAGE_SIZE]);
        let mut known = Known::default();
        let hashes = [&a, &a, &zero].map(|p| PageHash::of(p).to_bytes());
        let held = Held {
            name: "ram",
            from: 3,
            hashes: &hashes,
        };
        known.note(&held, &ram(100)).unwrap();
        assert_eq!(known.pages(), 3);
        let settings = Settings {
            level_min: 1,
            level_rounds: 1,
            level_max: 1,
            delta_cache_bytes: 0,
        };
        let mut e = Encoder::new(settings).unwrap();
        e.setup(&setup());
        known.give(&setup(), &mut e);
        assert!(!sent(&mut e, 1, 3, &a), "it is there");
        assert!(sent(&mut e, 0, 3, &a), "another block's page is");
        assert!(sent(&mut e, 1, 3, &b));
        assert!(
            sent(&mut e, 1, 3, &a),
            "it became what it was, and the target has what came between"
        );
        assert!(sent(&mut e, 1, 5, &a), "the target has zeros there");
        assert!(!sent(&mut e, 1, 4, &a));
    }

    #[test]
    fn a_target_that_holds_what_cannot_be_is_refused() {
        let hashes = [[1; 16]; 2];
        for (name, from, n) in [("other", 0, 1), ("ram", 1, 2), ("ram", u64::MAX, 2), ("ram", 0, 0)] {
            let hashes = &hashes[..n];
            let held = Held { name, from, hashes };
            assert!(Known::default().note(&held, &ram(2)).is_err(), "{name} {from} {n}");
        }
        let mut known = Known::default();
        let held = Held {
            name: "ram",
            from: 0,
            hashes: &hashes,
        };
        known.note(&held, &ram(2)).unwrap();
        let again = known.note(&held, &ram(2)).unwrap_err();
        assert!(again.contains("more pages"), "{again}");
    }
}
