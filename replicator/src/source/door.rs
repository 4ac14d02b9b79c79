//! The socket through which QEMU's NBD client reaches a disk's connection to the target.
//!
//! ```text
//!  bound ─QEMU, and nobody else, connects─> carried ─> closed: by the link, by QEMU, by us
//!    └─────────── closed before ──────────────────────────┘
//! ```

use std::fs;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

use super::mirror::Way;
use super::pump::{Shared, hold_back};
use crate::engine::Core;
use crate::launch::make_dir;
use crate::link::Link;
use crate::tunnel::{self, Carrier};
use crate::urgent::Crew;

/// So often a thread that waits for QEMU looks whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[derive(Default)]
struct State {
    /// QEMU's connection, to end it.
    local: Option<UnixStream>,
    closed: bool,
}

pub struct Door {
    pub path: PathBuf,
    listener: UnixListener,
    qemu: i32,
    core: Arc<Core>,
    pace: Arc<Shared>,
    crew: Arc<Crew>,
    state: Mutex<State>,
    changed: Condvar,
    /// Bytes that QEMU has sent.
    sent: AtomicU64,
}

impl Door {
    /// QEMU can connect from here on.
    pub fn open(disk: usize, way: &Way<'_>, crew: &Arc<Crew>) -> io::Result<Arc<Self>> {
        let path = way.dir.join(format!("mirror-{}-{disk}.sock", way.qemu.pid));
        make_dir(way.dir).map_err(io::Error::other)?;
        // Of a connection before, or of a replicator that died; a QEMU has one protection at a time.
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        Ok(Arc::new(Self {
            path,
            listener,
            qemu: way.qemu.pid,
            core: way.core.clone(),
            pace: way.pace.clone(),
            crew: crew.clone(),
            state: Mutex::default(),
            changed: Condvar::new(),
            sent: AtomicU64::new(0),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries QEMU's connection in a thread of its own, from when it comes until it ends.
    pub fn serve(self: Arc<Self>, link: Link, shown: String) -> io::Result<()> {
        let run = move || {
            let stream = match self.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(why) => return tracing::warn!(disk = shown, "QEMU's NBD client: {why}"),
            };
            let sent = |bytes: usize| {
                self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
                hold_back(&self.core.throttle, &self.pace, bytes);
            };
            let carrier = Carrier {
                crew: &self.crew,
                what: 0,
                sent: &sent,
            };
            if let Err(why) = tunnel::carry(stream, link, &carrier) {
                tracing::warn!(disk = shown, "the disk's connection ends: {why}");
            }
        };
        std::thread::Builder::new().name("disk".into()).spawn(run).map(|_| ())
    }

    /// Waits for one connection, as long as one is wanted, and takes it only from this QEMU.
    fn accept(&self) -> Result<Option<UnixStream>, String> {
        let timeout = PollTimeout::try_from(LOOK_EVERY).unwrap_or(PollTimeout::MAX);
        loop {
            let came = poll(&mut [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)], timeout);
            match came.map_err(|e| e.to_string())? {
                0 if self.is_closed() => return Ok(None),
                0 => {}
                _ => break,
            }
        }
        let stream = self.listener.accept().map_err(|e| e.to_string())?.0;
        let peer = getsockopt(&stream, sockopt::PeerCredentials).map_err(|e| e.to_string())?;
        if peer.pid() != self.qemu {
            let (who, qemu) = (peer.pid(), self.qemu);
            return Err(format!("process {who} connected instead of QEMU, {qemu}"));
        }
        let other = stream.try_clone().map_err(|e| e.to_string())?;
        let mut state = self.lock();
        if state.closed {
            return Ok(None);
        }
        // Nobody else is expected. Under the lock: later the name may be another door's.
        let _ = fs::remove_file(&self.path);
        state.local = Some(other);
        self.changed.notify_all();
        Ok(Some(stream))
    }

    /// Whether QEMU has connected by then.
    pub fn wait(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || state.local.is_some() || left.is_zero() {
                return !state.closed && state.local.is_some();
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Requests on their way fail, and nothing in QEMU waits for the link any more.
    pub fn close(&self) {
        let mut state = self.lock();
        if !state.closed && state.local.is_none() {
            let _ = fs::remove_file(&self.path);
        }
        state.closed = true;
        state.local.as_ref().inspect(|s| end(s));
        self.changed.notify_all();
    }
}

/// Ends a connection with QEMU, and empties it: a QEMU that waits for room in a full socket is not woken by its end.
fn end(mut local: &UnixStream) {
    let _ = local.shutdown(std::net::Shutdown::Both);
    let mut rest = [0; 64 << 10];
    while local.set_nonblocking(true).is_ok() && matches!(local.read(&mut rest), Ok(1..)) {}
}
