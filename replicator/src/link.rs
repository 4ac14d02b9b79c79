//! A connection between two replicators: frames over a blocking byte stream.
//!
//! Reader and writer are halves, so that one thread may wait for frames while another one sends. They take any `Read` and
//! `Write`; [`connect`] and [`accept`] make them over TCP.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use umbra_api::wire::control::Message;
use umbra_api::wire::frame::{HEADER_LEN, Header, Kind, encode_header};
use umbra_api::wire::{PREAMBLE_LEN, Purpose, WireError, decode_preamble, encode_preamble};

/// A peer that does not acknowledge what was sent for this long is gone.
const USER_TIMEOUT: Duration = Duration::from_secs(10);
/// A quiet connection is probed after this, and then each `KEEPALIVE_EVERY_S`, `KEEPALIVE_PROBES` times.
const KEEPALIVE_AFTER_S: u32 = 5;
const KEEPALIVE_EVERY_S: u32 = 2;
const KEEPALIVE_PROBES: u32 = 3;

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

    pub fn send_message(&mut self, message: &Message) -> Result<(), LinkError> {
        self.send(Kind::Control, &message.encode())
    }
}

fn io_error(peer: &str, source: io::Error) -> LinkError {
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

/// A TCP connection between two replicators.
#[derive(Debug)]
pub struct Link {
    pub reader: FrameReader<TcpStream>,
    pub writer: FrameWriter<TcpStream>,
}

impl Link {
    /// How long a read waits (`None`: for ever) and a write may be stuck.
    pub fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> Result<(), LinkError> {
        let s = self.reader.get_ref();
        s.set_read_timeout(read)
            .and_then(|()| s.set_write_timeout(write))
            .map_err(|e| io_error(self.peer(), e))
    }

    pub fn peer(&self) -> &str {
        self.reader.peer()
    }

    /// Another handle on the socket, to [`TcpStream::shutdown`] it from another thread.
    pub fn socket(&self) -> Result<TcpStream, LinkError> {
        self.reader.get_ref().try_clone().map_err(|e| io_error(self.peer(), e))
    }

    /// Ends the connection, also for a thread that waits in a read. That it is ended already is no error.
    pub fn close(&self) {
        let _ = self.reader.get_ref().shutdown(Shutdown::Both);
    }

    fn over(stream: TcpStream, peer: String) -> Result<Self, LinkError> {
        let other = stream.try_clone().map_err(|e| io_error(&peer, e))?;
        Ok(Self {
            reader: FrameReader::new(stream, peer.clone()),
            writer: FrameWriter::new(other, peer),
        })
    }
}

/// Connects to `address:port`. `timeout` bounds the connecting (of each address that a name has); after it reads wait
/// for ever, and writes for as long as TCP keeps the connection: see [`Link::set_timeouts`].
pub fn connect(addr: &str, purpose: Purpose, timeout: Duration) -> Result<Link, LinkError> {
    let failed = |source| LinkError::Connect {
        peer: addr.to_owned(),
        source,
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for a in addr.to_socket_addrs().map_err(failed)? {
        match TcpStream::connect_timeout(&a, timeout) {
            Ok(mut stream) => {
                tune(&stream).map_err(failed)?;
                write_preamble(&mut stream, purpose, addr)?;
                return Link::over(stream, addr.to_owned());
            }
            Err(e) => last = e,
        }
    }
    Err(failed(last))
}

/// Takes a connection that a listener accepted. `timeout` bounds the wait for its preamble.
pub fn accept(mut stream: TcpStream, timeout: Duration) -> Result<(Purpose, Link), LinkError> {
    let peer = stream
        .peer_addr()
        .map_or_else(|_| "unknown peer".to_owned(), |a| a.to_string());
    let io = |source| io_error(&peer, source);
    tune(&stream).map_err(io)?;
    stream.set_nonblocking(false).map_err(io)?;
    stream.set_read_timeout(Some(timeout)).map_err(io)?;
    let purpose = read_preamble(&mut stream, &peer)?;
    stream.set_read_timeout(None).map_err(io)?;
    Ok((purpose, Link::over(stream, peer)?))
}

/// Frames are sent whole, so waiting for more to send only costs time; and a peer that is gone must be noticed.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &KEEPALIVE_AFTER_S)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &KEEPALIVE_EVERY_S)?;
    setsockopt(stream, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &(USER_TIMEOUT.as_millis() as u32))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::net::TcpListener;

    use proptest::prelude::*;
    use umbra_api::Epoch;

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

    #[test]
    fn over_tcp_both_ways() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let (purpose, mut link) = accept(stream, Duration::from_secs(10)).unwrap();
            let got = link.reader.next_message().unwrap();
            link.writer.send_message(&got).unwrap();
            link.writer.send(Kind::StreamEnd, &[]).unwrap();
            assert!(matches!(link.reader.next(), Err(LinkError::Closed { .. })));
            purpose
        });
        let mut link = connect(&addr, Purpose::Ram, Duration::from_secs(10)).unwrap();
        link.set_timeouts(Some(Duration::from_secs(10)), Some(Duration::from_secs(10)))
            .unwrap();
        let message = Message::Commit { epoch: Epoch(7) };
        link.writer.send_message(&message).unwrap();
        assert_eq!(link.reader.next_message().unwrap(), message);
        let e = link.reader.next_message().unwrap_err();
        assert_eq!(
            e.to_string(),
            format!("{addr} sent a stream-end frame where a control message was expected")
        );
        assert!(link.socket().unwrap().nodelay().unwrap());
        link.close();
        link.close();
        assert_eq!(server.join().unwrap(), Purpose::Ram);
    }

    #[test]
    fn a_stranger_and_a_closed_port_are_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let mut stranger = TcpStream::connect(addr).unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let e = accept(listener.accept().unwrap().0, Duration::from_secs(10)).unwrap_err();
        assert!(
            matches!(
                e,
                LinkError::Wire {
                    source: WireError::NotUs(_),
                    ..
                }
            ),
            "{e}"
        );
        drop(listener);
        let e = connect(&addr.to_string(), Purpose::Control, Duration::from_secs(10)).unwrap_err();
        assert!(e.to_string().contains(&addr.to_string()), "{e}");
        assert!(connect("no port", Purpose::Control, Duration::from_secs(1)).is_err());
    }
}
