//! A connection between two replicators: TCP, TLS on it unless it is configured away by name, frames in that.
//!
//! Reader and writer are halves, so that one thread may wait for frames while another one sends. In reading order:
//! [`frames`], [`half`] (the byte stream's two halves), [`tls`] (certificates, handshake, identity).

pub mod frames;
pub mod half;
pub mod tls;

use std::io::{self, Read};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use umbra_api::HostId;
use umbra_api::wire::Purpose;

use self::frames::io_error;
pub use self::frames::{FrameReader, FrameWriter, LinkError, read_preamble, write_preamble};
pub use self::half::{Closer, ReadHalf, WriteHalf};
pub use self::tls::{Identity, Security};

/// A peer that does not acknowledge what was sent for this long is gone.
const USER_TIMEOUT: Duration = Duration::from_secs(10);
/// A quiet connection is probed after this, and then each `KEEPALIVE_EVERY_S`, `KEEPALIVE_PROBES` times.
const KEEPALIVE_AFTER_S: u32 = 5;
const KEEPALIVE_EVERY_S: u32 = 2;
const KEEPALIVE_PROBES: u32 = 3;

/// A connection between two replicators.
#[derive(Debug)]
pub struct Link {
    pub reader: FrameReader<ReadHalf>,
    pub writer: FrameWriter<WriteHalf>,
    /// Whom it was accepted from. The side that connected knows already, since it asked for a host by name.
    pub identity: Identity,
}

impl Link {
    /// How long a read waits (`None`: for ever) and a write may be stuck.
    pub fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> Result<(), LinkError> {
        let set = self.reader.get_ref().set_timeouts(read, write);
        set.map_err(|e| io_error(self.peer(), e))
    }

    pub fn peer(&self) -> &str {
        self.reader.peer()
    }

    /// Ends the connection from another thread.
    pub fn closer(&self) -> Result<Closer, LinkError> {
        self.reader.get_ref().closer().map_err(|e| io_error(self.peer(), e))
    }

    fn over((read, write): (ReadHalf, WriteHalf), peer: &str, identity: Identity) -> Self {
        Self {
            reader: FrameReader::new(read, peer),
            writer: FrameWriter::new(write, peer),
            identity,
        }
    }
}

/// Connects to the replicator of `host` at `address:port`. `timeout` bounds the connecting (of each address that a name has)
/// and then the handshake; after it reads wait for ever, and writes for as long as TCP keeps the connection: see
/// [`Link::set_timeouts`].
pub fn connect(
    addr: &str,
    host: &HostId,
    purpose: Purpose,
    security: &Security,
    timeout: Duration,
) -> Result<Link, LinkError> {
    let failed = |source| LinkError::Connect {
        peer: addr.to_owned(),
        source,
    };
    let mut tcp = reach(addr, timeout).map_err(failed)?;
    tune(&tcp).map_err(failed)?;
    let io = |source| io_error(addr, source);
    let deadline = Instant::now() + timeout;
    let halves = match security {
        Security::Plaintext => half::plain(tcp).map_err(io)?,
        Security::Tls(tls) => {
            let conn = tls.connect(&mut tcp, host, deadline, addr)?;
            half::tls(tcp, conn).map_err(io)?
        }
    };
    let mut link = Link::over(halves, addr, Identity::Unproven);
    link.set_timeouts(None, None)?;
    link.writer.open(purpose)?;
    Ok(link)
}

fn reach(addr: &str, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for a in addr.to_socket_addrs()? {
        match TcpStream::connect_timeout(&a, timeout) {
            Ok(tcp) => return Ok(tcp),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Takes a connection that a listener accepted. `timeout` bounds all that comes before the first frame.
pub fn accept(mut tcp: TcpStream, security: &Security, timeout: Duration) -> Result<(Purpose, Link), LinkError> {
    let deadline = Instant::now() + timeout;
    let peer = tcp
        .peer_addr()
        .map_or_else(|_| "unknown peer".to_owned(), |a| a.to_string());
    let io = |source| io_error(&peer, source);
    tcp.set_nonblocking(false).map_err(io)?;
    tune(&tcp).map_err(io)?;
    let socket = tcp.try_clone().map_err(io)?;
    let (halves, identity) = match security {
        Security::Plaintext => {
            tls::refuse_tls(&mut tcp, deadline, &peer)?;
            (half::plain(tcp).map_err(io)?, Identity::Unproven)
        }
        Security::Tls(tls) => {
            let (conn, identity) = tls.accept(&mut tcp, deadline, &peer)?;
            (half::tls(tcp, conn).map_err(io)?, identity)
        }
    };
    let (mut read, write) = halves;
    let mut bounded = Bounded {
        inner: &mut read,
        socket: &socket,
        deadline,
    };
    let purpose = read_preamble(&mut bounded, &peer)?;
    let link = Link::over((read, write), &peer, identity);
    link.set_timeouts(None, None)?;
    Ok((purpose, link))
}

/// Reads that end at one point in time, however many there are.
struct Bounded<'a> {
    inner: &'a mut ReadHalf,
    socket: &'a TcpStream,
    deadline: Instant,
}

impl Read for Bounded<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        tls::limit(self.socket, self.deadline)?;
        self.inner.read(room)
    }
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
mod tests;
