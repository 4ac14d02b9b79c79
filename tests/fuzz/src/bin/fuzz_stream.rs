//! QEMU's migration stream, whole and in pieces: both must come to the same, and nothing may be kept.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umbra_replicator::stream::{Event, Limits, Parser, StreamError};

const LIMITS: Limits = Limits {
    device_bytes: 1 << 16,
    description_bytes: 1 << 12,
};

/// Everything but the device state, whose pieces are those of the pushes; it is summed up.
#[derive(PartialEq, Debug, Default)]
struct Seen {
    events: Vec<String>,
    device: Vec<u8>,
    complete: bool,
}

fn parse<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Seen, Result<(), StreamError>) {
    let (mut p, mut seen) = (Parser::new(LIMITS), Seen::default());
    for piece in pieces {
        let r = p.push(piece, &mut |e: Event<'_>| {
            match e {
                Event::Device(d) => seen.device.extend_from_slice(d),
                // Where the state ends is only asked after a push, so a description inside of it may be taken for the end:
                // the one thing that may differ, and no comparison is made after it.
                Event::Complete { .. } => seen.complete = true,
                Event::Page { block, page, data } => seen.events.push(format!("{block} {page} {}", data[0])),
                other => seen.events.push(format!("{other:?}")),
            }
            Ok::<_, StreamError>(())
        });
        assert!(p.held_bytes() <= 80 << 10, "{} bytes are held", p.held_bytes());
        if r.is_err() || seen.complete {
            return (seen, r);
        }
    }
    (seen, Ok(()))
}

fuzz_target!(|bytes: &[u8]| {
    let Some((cut, stream)) = bytes.split_first() else {
        return;
    };
    let whole = parse(std::iter::once(stream));
    let pieces = parse(stream.chunks(usize::from(*cut) + 1));
    if !whole.0.complete && !pieces.0.complete {
        assert_eq!(whole.1, pieces.1);
        assert_eq!(whole.0.events, pieces.0.events);
        if whole.1.is_ok() {
            assert_eq!(whole.0.device, pieces.0.device);
        }
    }
});
