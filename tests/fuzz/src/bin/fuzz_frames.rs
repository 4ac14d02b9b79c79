//! What a peer may send: a raw connection, or a payload of any kind under a good checksum, up to the shadow's RAM.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use umbra_api::wire::control::Message;
use umbra_api::wire::frame::{Kind, RoundEnd};
use umbra_api::wire::hashes::{Held, Sums};
use umbra_api::wire::setup::{Block, StreamSetup};
use umbra_replicator::encode::Decoder;
use umbra_replicator::link::{FrameReader, FrameWriter, read_preamble};
use umbra_replicator::ram::ShadowRam;
use umbra_replicator::resume::scrub::compare;
use umbra_replicator::synth::Synth;

const KINDS: [Kind; 6] = [
    Kind::Control,
    Kind::Pages,
    Kind::RoundEnd,
    Kind::DeviceState,
    Kind::StreamEnd,
    Kind::Setup,
];

thread_local! {
    static TARGET: RefCell<Option<(Decoder, ShadowRam)>> = RefCell::new(target());
}

fn target() -> Option<(Decoder, ShadowRam)> {
    let block = |name: &str, pages: u64| Block {
        name: name.into(),
        bytes: pages << 12,
    };
    let blocks = vec![block("pc.ram", 64), block("pc.bios", 4)];
    let setup = StreamSetup {
        version: 3,
        config: vec![7],
        ram_section: 2,
        ram_version: 4,
        blocks,
    };
    Some((Decoder::new().ok()?, ShadowRam::new(&setup, vec![]).ok()?))
}

fn take(kind: Kind, payload: &[u8]) {
    match kind {
        Kind::Pages => TARGET.with_borrow_mut(|t| {
            if let Some((decoder, ram)) = t {
                let _ = decoder.apply(payload, ram);
            }
        }),
        Kind::Setup => {
            if let Ok(setup) = StreamSetup::decode(payload) {
                assert_eq!(setup.encode().as_deref(), Ok(payload));
                let _ = Synth::new(&setup);
                let _ = ShadowRam::new(&setup, vec![]);
            }
        }
        Kind::Control => {
            if let Ok(m) = Message::decode(payload) {
                let _ = Message::decode(&m.encode());
            }
        }
        Kind::RoundEnd => {
            if let Ok(r) = RoundEnd::decode(payload) {
                assert_eq!(&r.encode()[..], payload);
            }
        }
        Kind::Held => {
            if let Ok(Some(held)) = Held::decode(payload) {
                assert_eq!(held.encode(), payload);
            }
        }
        Kind::Sums => {
            if let Ok(sums) = Sums::decode(payload) {
                assert_eq!(sums.encode(), payload);
                TARGET.with_borrow(|t| t.as_ref().map(|(_, ram)| compare(ram, &sums, None, || false)));
            }
        }
        Kind::DeviceState | Kind::StreamEnd | Kind::Disk => {}
    }
}

fn read_all(bytes: &[u8]) {
    let mut r = FrameReader::new(bytes, "fuzz");
    while let Ok((kind, payload)) = r.next() {
        take(kind, payload);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((how, rest)) = bytes.split_first() else { return };
    match KINDS.get(usize::from(*how)) {
        Some(kind) => {
            let mut w = FrameWriter::new(Vec::new(), "fuzz");
            if w.send(*kind, rest).is_ok() {
                read_all(w.get_ref());
            }
        }
        None => {
            let _ = read_preamble(&mut &rest[..], "fuzz");
            read_all(rest);
        }
    }
});
