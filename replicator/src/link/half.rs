//! The two halves of a connection's byte stream, each for a thread of its own, in clear or in TLS.
//!
//! rustls keeps both directions in one `Connection`, which cannot be split; it does no I/O itself, however. So the connection
//! sits behind a mutex that is held only while bytes are sealed or opened, never while a socket is waited for:
//! ```text
//! reading half   socket ──read──> buffer ──┐ lock, open, copy out, unlock
//!                                      connection
//! writing half   frame ── lock, seal ──────┘──> buffer ──write──> socket      (order kept by a mutex of its own)
//! ```
//! A ram connection carries data in one direction, and a control connection carries little: nobody waits for the lock.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, send};
use rustls::Connection;

use super::tls;

/// What one read of the socket takes at most: many records, so that few system calls are made.
const READ_BYTES: usize = 256 << 10;

/// Bytes that are sealed at once. rustls keeps what it has sealed in one allocation a record until it is taken: of a whole frame
/// that is so much that the allocator gives it back to the kernel each time, and asks for it again.
const SEAL_BYTES: usize = 64 << 10;

/// What both halves of a TLS connection share. Locks are taken in this order: `out`, `conn`.
#[derive(Debug)]
struct Shared {
    out: Mutex<Out>,
    conn: Mutex<Connection>,
}

/// Where sealed bytes go, in the order in which they were sealed.
#[derive(Debug)]
struct Out {
    tcp: TcpStream,
    sealed: Vec<u8>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // rustls refuses to go on after an error of its own; a panic of ours ends the thread's connection anyway.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everything that the connection wants to send.
fn drain(conn: &mut Connection, sealed: &mut Vec<u8>) -> io::Result<()> {
    while conn.wants_write() {
        conn.write_tls(sealed)?;
    }
    Ok(())
}

/// Seals all of `bufs`; tells how many bytes they are.
fn seal(conn: &mut Connection, bufs: &[IoSlice<'_>], sealed: &mut Vec<u8>) -> io::Result<usize> {
    let mut left: Vec<IoSlice<'_>> = bufs.iter().map(|b| IoSlice::new(b)).collect();
    let (mut left, mut all) = (&mut left[..], 0);
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        let n = conn.writer().write_vectored(left)?;
        drain(conn, sealed)?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut left, n);
        all += n;
    }
    Ok(all)
}

impl Shared {
    /// Tells the peer that nothing more comes, if that can be done without waiting: the connection may be stuck.
    fn goodbye(&self) {
        let Ok(mut out) = self.out.try_lock() else { return };
        let out = &mut *out;
        out.sealed.clear();
        let mut conn = lock(&self.conn);
        conn.send_close_notify();
        if drain(&mut conn, &mut out.sealed).is_ok() && !out.sealed.is_empty() {
            let _ = send(
                out.tcp.as_raw_fd(),
                &out.sealed,
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            );
        }
    }
}

/// Receives.
#[derive(Debug)]
pub struct ReadHalf {
    tcp: TcpStream,
    kind: Reading,
}

#[derive(Debug)]
enum Reading {
    /// `fresh`: nothing was read yet, so a peer that speaks TLS can still be told from damage.
    Plain {
        fresh: bool,
    },
    Tls(Box<Opening>),
}

#[derive(Debug)]
struct Opening {
    shared: Arc<Shared>,
    /// Bytes of the socket; those `from..to` are not taken by the connection yet.
    sealed: Vec<u8>,
    from: usize,
    to: usize,
    ended: bool,
}

/// Sends.
#[derive(Debug)]
pub struct WriteHalf(Writing);

#[derive(Debug)]
enum Writing {
    Plain(TcpStream),
    Tls(Arc<Shared>),
}

/// Ends a connection from any thread.
#[derive(Debug)]
pub struct Closer {
    tcp: TcpStream,
    tls: Option<Arc<Shared>>,
}

/// In clear.
pub(super) fn plain(tcp: TcpStream) -> io::Result<(ReadHalf, WriteHalf)> {
    let other = tcp.try_clone()?;
    let read = ReadHalf {
        tcp,
        kind: Reading::Plain { fresh: true },
    };
    Ok((read, WriteHalf(Writing::Plain(other))))
}

/// In TLS, after the handshake.
pub(super) fn tls(tcp: TcpStream, mut conn: Connection) -> io::Result<(ReadHalf, WriteHalf)> {
    conn.set_buffer_limit(Some(SEAL_BYTES));
    let shared = Arc::new(Shared {
        out: Mutex::new(Out {
            tcp: tcp.try_clone()?,
            sealed: Vec::new(),
        }),
        conn: Mutex::new(conn),
    });
    let opening = Opening {
        shared: shared.clone(),
        sealed: vec![0; READ_BYTES],
        from: 0,
        to: 0,
        ended: false,
    };
    let read = ReadHalf {
        tcp,
        kind: Reading::Tls(Box::new(opening)),
    };
    Ok((read, WriteHalf(Writing::Tls(shared))))
}

impl ReadHalf {
    /// How long a read waits (`None`: for ever), and a write of the other half may be stuck.
    pub fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.tcp.set_read_timeout(read)?;
        self.tcp.set_write_timeout(write)
    }

    pub fn closer(&self) -> io::Result<Closer> {
        Ok(Closer {
            tcp: self.tcp.try_clone()?,
            tls: match &self.kind {
                Reading::Plain { .. } => None,
                Reading::Tls(o) => Some(o.shared.clone()),
            },
        })
    }
}

impl Read for ReadHalf {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match &mut self.kind {
            Reading::Plain { fresh } => {
                let n = self.tcp.read(room)?;
                let first = room.first().copied().filter(|_| n > 0);
                if std::mem::take(fresh) && first.is_some_and(tls::is_record) {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, tls::PEER_IN_TLS));
                }
                Ok(n)
            }
            Reading::Tls(opening) => opening.read(&mut self.tcp, room),
        }
    }
}

impl Opening {
    fn read(&mut self, tcp: &mut TcpStream, room: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(n) = self.open(room)? {
                return Ok(n);
            }
            // A time-out here is no end: what was read of a record is in the connection.
            let n = tcp.read(&mut self.sealed)?;
            (self.from, self.to, self.ended) = (0, n, n == 0);
        }
    }

    /// Plain bytes from what was read of the socket; `None` if more of it is needed. `Some(0)` is the peer's own end.
    fn open(&mut self, room: &mut [u8]) -> io::Result<Option<usize>> {
        let mut conn = lock(&self.shared.conn);
        loop {
            match conn.reader().read(room) {
                Ok(n) => return Ok(Some(n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                    let cut = "cut off without TLS's own end: the peer died, or somebody else ended the connection";
                    return Err(io::Error::new(e.kind(), cut));
                }
                Err(e) => return Err(e),
            }
            let mut input = self.sealed.get(self.from..self.to).unwrap_or_default();
            if input.is_empty() && !self.ended {
                return Ok(None);
            }
            conn.read_tls(&mut input)?;
            self.from = self.to - input.len();
            conn.process_new_packets()
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, tls::words(&e)))?;
        }
    }
}

nix::ioctl_read_bad!(outq, nix::libc::TIOCOUTQ, nix::libc::c_int);
/// From linux/sockios.h, which libc does not have.
const SIOCOUTQNSD: nix::libc::c_ulong = 0x894b;
nix::ioctl_read_bad!(outq_nsd, SIOCOUTQNSD, nix::libc::c_int);

impl WriteHalf {
    /// Bytes that were written and that the peer's kernel has not acknowledged.
    pub fn unsent(&self) -> io::Result<u64> {
        // SAFETY: the ioctl writes one int, which lives across the call.
        self.ask(|fd, n| unsafe { outq(fd, n) })
    }

    /// Those of them that are not even on their way.
    pub fn backlog(&self) -> io::Result<u64> {
        // SAFETY: as above.
        self.ask(|fd, n| unsafe { outq_nsd(fd, n) })
    }

    fn ask(&self, count: impl Fn(RawFd, &mut nix::libc::c_int) -> nix::Result<nix::libc::c_int>) -> io::Result<u64> {
        let mut n = 0;
        match &self.0 {
            Writing::Plain(tcp) => count(tcp.as_raw_fd(), &mut n),
            Writing::Tls(shared) => count(lock(&shared.out).tcp.as_raw_fd(), &mut n),
        }?;
        Ok(u64::try_from(n).unwrap_or(0))
    }
}

impl Write for WriteHalf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let shared = match &mut self.0 {
            Writing::Plain(tcp) => return tcp.write_vectored(bufs),
            Writing::Tls(shared) => shared,
        };
        let mut out = lock(&shared.out);
        let out = &mut *out;
        out.sealed.clear();
        let n = {
            let mut conn = lock(&shared.conn);
            seal(&mut conn, bufs, &mut out.sealed)?
        };
        // A record that is sent in part cannot be taken back, so a failure here ends the connection.
        out.tcp.write_all(&out.sealed)?;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        if let Writing::Tls(shared) = &self.0 {
            shared.goodbye();
        }
    }
}

impl Closer {
    /// Ends the connection, also for a thread that waits in a read. That it is ended already is no error.
    pub fn close(&self) {
        if let Some(shared) = &self.tls {
            shared.goodbye();
        }
        let _ = self.tcp.shutdown(Shutdown::Both);
    }
}
