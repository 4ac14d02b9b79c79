//! Frames over a blocking byte stream. Reader and writer take any `Read` and `Write`.

use std::io::{self, IoSlice, Read, Write};

use umbra_api::wire::control::Message;
use umbra_api::wire::frame::{HEADER_LEN, Header, Kind, encode_header};
use umbra_api::wire::{PREAMBLE_LEN, Purpose, WireError, decode_preamble, encode_preamble};

/// What went wrong with a connection. All but `TimedOut` end it.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("connecting to {peer}")]
    Connect { peer: String, source: io::Error },
    #[error("link to {peer}")]
    Io { peer: String, source: io::Error },
    #[error("link to {peer} was closed")]
    Closed { peer: String },
    #[error("link to {peer} was closed in the middle of a frame")]
    Cut { peer: String },
    #[error("nothing came from {peer} in time")]
    TimedOut { peer: String },
    #[error("TLS with {peer}: {reason}")]
    Tls { peer: String, reason: String },
    #[error("from {peer}")]
    Wire { peer: String, source: WireError },
    #[error("{peer} sent a {kind} frame where a control message was expected")]
    NotControl { peer: String, kind: Kind },
}

/// Sends frames.
#[derive(Debug)]
pub struct FrameWriter<W> {
    inner: W,
    peer: String,
    bytes: u64,
}

impl<W: Write> FrameWriter<W> {
    /// `peer` is named in errors.
    pub fn new(inner: W, peer: impl Into<String>) -> Self {
        Self {
            inner,
            peer: peer.into(),
            bytes: 0,
        }
    }

    /// Bytes sent, headers included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn peer(&self) -> &str {
        &self.peer
    }

    pub fn get_ref(&self) -> &W {
        &self.inner
    }

    /// Sends one frame, header and payload in one write.
    pub fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<(), LinkError> {
        let header = encode_header(kind, payload).map_err(|source| LinkError::Wire {
            peer: self.peer.clone(),
            source,
        })?;
        let mut bufs = [IoSlice::new(&header), IoSlice::new(payload)];
        let mut bufs = &mut bufs[..];
        IoSlice::advance_slices(&mut bufs, 0);
        while !bufs.is_empty() {
            match self.inner.write_vectored(bufs) {
                Ok(0) => return Err(io_error(&self.peer, io::ErrorKind::WriteZero.into())),
                Ok(n) => IoSlice::advance_slices(&mut bufs, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A frame that is sent in part cannot be taken back: a time-out here is an end.
                Err(source) => return Err(io_error(&self.peer, source)),
            }
        }
        self.bytes += (HEADER_LEN + payload.len()) as u64;
        self.inner.flush().map_err(|source| io_error(&self.peer, source))
    }

    /// Says what the connection is for: its first bytes.
    pub fn open(&mut self, purpose: Purpose) -> Result<(), LinkError> {
        write_preamble(&mut self.inner, purpose, &self.peer)
    }

    pub fn send_message(&mut self, message: &Message) -> Result<(), LinkError> {
        self.send(Kind::Control, &message.encode())
    }
}

impl FrameWriter<super::WriteHalf> {
    /// Bytes that were sent and that are not on their way yet.
    pub fn backlog(&self) -> Result<u64, LinkError> {
        self.inner.backlog().map_err(|source| io_error(&self.peer, source))
    }

    /// Bytes that were sent and that the peer's kernel has not acknowledged.
    pub fn unsent(&self) -> Result<u64, LinkError> {
        self.inner.unsent().map_err(|source| io_error(&self.peer, source))
    }
}

pub(super) fn io_error(peer: &str, source: io::Error) -> LinkError {
    LinkError::Io {
        peer: peer.into(),
        source,
    }
}

/// Receives frames. A time-out of the stream below is no end: the next call goes on where it stopped.
#[derive(Debug)]
pub struct FrameReader<R> {
    inner: R,
    peer: String,
    header: [u8; HEADER_LEN],
    payload: Vec<u8>,
    /// Bytes of the present frame that are there, its header's included.
    have: usize,
    bytes: u64,
}

impl<R: Read> FrameReader<R> {
    pub fn new(inner: R, peer: impl Into<String>) -> Self {
        Self {
            inner,
            peer: peer.into(),
            header: [0; HEADER_LEN],
            payload: Vec::new(),
            have: 0,
            bytes: 0,
        }
    }

    /// Bytes received in whole frames.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn peer(&self) -> &str {
        &self.peer
    }

    pub fn get_ref(&self) -> &R {
        &self.inner
    }

    /// Waits for the next frame.
    #[allow(clippy::should_implement_trait)] // it lends its buffer, which an Iterator cannot
    pub fn next(&mut self) -> Result<(Kind, &[u8]), LinkError> {
        while self.have < HEADER_LEN {
            let room = self.header.get_mut(self.have..).unwrap_or_default();
            self.have += read_some(&mut self.inner, room, &self.peer, self.have > 0)?;
        }
        let wire = |source| LinkError::Wire {
            peer: self.peer.clone(),
            source,
        };
        let header = Header::decode(&self.header).map_err(wire)?;
        let len = header.len as usize;
        // The buffer only ever grows to the largest kind's bound, and its old bytes are overwritten.
        if self.payload.len() < len {
            self.payload.resize(len, 0);
        }
        while self.have < HEADER_LEN + len {
            let room = self.payload.get_mut(self.have - HEADER_LEN..len).unwrap_or_default();
            self.have += read_some(&mut self.inner, room, &self.peer, true)?;
        }
        let payload = self.payload.get(..len).unwrap_or_default();
        let wire = |source| LinkError::Wire {
            peer: self.peer.clone(),
            source,
        };
        header.verify(payload).map_err(wire)?;
        self.have = 0;
        self.bytes += (HEADER_LEN + len) as u64;
        Ok((header.kind, payload))
    }

    /// Waits for the next frame, which must be a control message.
    pub fn next_message(&mut self) -> Result<Message, LinkError> {
        let peer = self.peer.clone();
        match self.next()? {
            (Kind::Control, payload) => Message::decode(payload).map_err(|source| LinkError::Wire { peer, source }),
            (kind, _) => Err(LinkError::NotControl { peer, kind }),
        }
    }
}

/// Reads at least one byte. `inside`: the peer owes us the rest of a frame.
fn read_some(inner: &mut impl Read, room: &mut [u8], peer: &str, inside: bool) -> Result<usize, LinkError> {
    loop {
        let peer = || peer.to_owned();
        return match inner.read(room) {
            Ok(0) if inside => Err(LinkError::Cut { peer: peer() }),
            Ok(0) => Err(LinkError::Closed { peer: peer() }),
            Ok(n) => Ok(n),
            Err(e) => match e.kind() {
                io::ErrorKind::Interrupted => continue,
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Err(LinkError::TimedOut { peer: peer() }),
                _ => Err(LinkError::Io {
                    peer: peer(),
                    source: e,
                }),
            },
        };
    }
}

/// Opens a connection's byte stream: tells the other side what it is for.
pub fn write_preamble(w: &mut impl Write, purpose: Purpose, peer: &str) -> Result<(), LinkError> {
    w.write_all(&encode_preamble(purpose))
        .map_err(|source| io_error(peer, source))
}

/// Reads what a new connection is for.
pub fn read_preamble(r: &mut impl Read, peer: &str) -> Result<Purpose, LinkError> {
    let mut p = [0; PREAMBLE_LEN];
    let mut have = 0;
    while have < PREAMBLE_LEN {
        have += read_some(r, p.get_mut(have..).unwrap_or_default(), peer, have > 0)?;
    }
    decode_preamble(&p).map_err(|source| LinkError::Wire {
        peer: peer.into(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Gives what was written in pieces of these sizes, each 0 a time-out.
    struct Slow {
        bytes: VecDeque<u8>,
        sizes: VecDeque<usize>,
    }

    impl Read for Slow {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let n = match self.sizes.pop_front() {
                Some(0) => return Err(io::ErrorKind::WouldBlock.into()),
                Some(n) => n.min(buf.len()),
                None => buf.len(),
            };
            self.bytes.read(&mut buf[..n])
        }
    }

    /// Takes a few bytes a write.
    struct Narrow {
        bytes: Vec<u8>,
        width: usize,
    }

    impl Write for Narrow {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let n = buf.len().min(self.width);
            self.bytes.extend_from_slice(&buf[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn frames(payloads: &[Vec<u8>], width: usize) -> Vec<u8> {
        let mut w = FrameWriter::new(
            Narrow {
                bytes: Vec::new(),
                width,
            },
            "them",
        );
        for p in payloads {
            w.send(Kind::DeviceState, p).unwrap();
        }
        let out = w.inner.bytes;
        assert_eq!(w.bytes, out.len() as u64);
        out
    }

    proptest! {
        #[test]
        fn frames_survive_slow_writes_short_reads_and_time_outs(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 0..6),
            width in 1usize..100,
            sizes in prop::collection::vec(0usize..30, 0..60),
        ) {
            let bytes: VecDeque<u8> = frames(&payloads, width).into();
            let total = bytes.len() as u64;
            let mut r = FrameReader::new(Slow { bytes, sizes: sizes.into() }, "them");
            let mut got = Vec::new();
            loop {
                match r.next() {
                    Ok((kind, payload)) => {
                        prop_assert_eq!(kind, Kind::DeviceState);
                        got.push(payload.to_vec());
                    }
                    Err(LinkError::TimedOut { .. }) => {}
                    Err(LinkError::Closed { .. }) => break,
                    Err(e) => prop_assert!(false, "{e}"),
                }
            }
            prop_assert_eq!(got, payloads);
            prop_assert_eq!(r.bytes(), total);
        }

        #[test]
        fn a_cut_is_told_from_an_end(payload in prop::collection::vec(any::<u8>(), 1..50), cut in any::<prop::sample::Index>()) {
            let bytes = frames(&[payload], 1000);
            let cut = cut.index(bytes.len());
            let mut r = FrameReader::new(&bytes[..cut], "them");
            match r.next() {
                Err(LinkError::Closed { .. }) => prop_assert_eq!(cut, 0),
                Err(LinkError::Cut { .. }) => prop_assert!(cut > 0),
                other => prop_assert!(false, "{other:?}"),
            }
        }

        #[test]
        fn noise_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(FrameReader::new(&bytes[..], "them").next().is_err());
            prop_assert!(read_preamble(&mut &bytes[..], "them").is_err());
        }
    }

    #[test]
    fn a_frame_that_is_too_long_is_sent_by_nobody() {
        let mut w = FrameWriter::new(Vec::new(), "them");
        let e = w.send(Kind::RoundEnd, &[0; 65]).unwrap_err();
        assert!(matches!(
            e,
            LinkError::Wire {
                source: WireError::TooLong { .. },
                ..
            }
        ));
        assert!(w.get_ref().is_empty());
    }
}
