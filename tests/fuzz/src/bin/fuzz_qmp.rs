//! What a monitor may send, whole and in pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umbra_replicator::qmp::codec::{CodecError, Decoder, Message};

fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Message>, Option<CodecError>) {
    let (mut d, mut out) = (Decoder::default(), Vec::new());
    for piece in pieces {
        d.push(piece);
        loop {
            match d.next_message() {
                Ok(Some(m)) => out.push(m),
                Ok(None) => break,
                Err(e) => return (out, Some(e)),
            }
        }
    }
    (out, None)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((cut, lines)) = bytes.split_first() else {
        return;
    };
    let whole = decode(std::iter::once(lines));
    assert_eq!(whole, decode(lines.chunks(usize::from(*cut) + 1)));
});
