//! The blocking client: callers write commands, one reader thread sorts what comes back.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};
use serde_json::Value;

use super::QmpError;
use super::codec::{Decoder, Event, Message, Version, encode};

/// QEMU answers in 1 to 2 ms, unless its main loop hangs on something.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Events kept for waiters that come late. A hold emits a few a minute.
const EVENTS_KEPT: usize = 4096;

/// A point in the sequence of events: see [`Client::mark`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Mark(u64);

type Answer = Result<Value, (String, String)>;
type Callback = Box<dyn FnOnce() + Send>;
/// Says whether it wants to hear more.
type Listener = Box<dyn FnMut(&Event) -> bool + Send>;

#[derive(Default)]
struct State {
    /// Commands on their way: `None` until their answer is there.
    answers: HashMap<u64, Option<Answer>>,
    events: VecDeque<(u64, Event)>,
    next_event: u64,
    closed: bool,
    on_closed: Vec<Callback>,
    listeners: Vec<Listener>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is a set of plain maps: whatever a panicking thread left is still usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let callbacks = std::mem::take(&mut state.on_closed);
        drop(state);
        self.changed.notify_all();
        callbacks.into_iter().for_each(|f| f());
    }
}

struct Inner {
    path: PathBuf,
    version: Version,
    shared: Arc<Shared>,
    /// The writing half, and the next command's id.
    writer: Mutex<(UnixStream, u64)>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let (stream, _) = self.writer.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Ends the reader thread; there is nothing to do if the socket is gone already.
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}

/// One connection to a monitor. Clones share it; the last one to go closes it.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client({})", self.0.path.display())
    }
}

impl Client {
    /// Connects, reads the greeting and negotiates. `timeout` covers all of it.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + timeout;
        let mut stream = open(path, deadline)?;
        let (mut decoder, version) = greet(&mut stream, path, deadline)?;
        let unavailable = |source| QmpError::Unavailable {
            path: path.to_owned(),
            source,
        };
        stream.set_read_timeout(None).map_err(unavailable)?;
        // A QEMU that stops reading its monitor must not block us for good.
        stream.set_write_timeout(Some(DEFAULT_TIMEOUT)).map_err(unavailable)?;
        let mut reader = stream.try_clone().map_err(unavailable)?;

        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let theirs = shared.clone();
        std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || {
                crate::urgent::this_thread();
                if let Err(error) = read_on(&mut reader, &mut decoder, &theirs) {
                    tracing::debug!(%error, "QMP connection ends");
                }
                theirs.close();
            })
            .map_err(unavailable)?;
        let client = Self(Arc::new(Inner {
            path: path.to_owned(),
            version,
            shared,
            writer: Mutex::new((stream, 1)),
        }));
        client.execute_for(
            "qmp_capabilities",
            Value::Null,
            deadline.saturating_duration_since(Instant::now()),
        )?;
        Ok(client)
    }

    pub fn version(&self) -> Version {
        self.0.version
    }

    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Runs a command within [`DEFAULT_TIMEOUT`]. `args` is an object, or null for none.
    pub fn execute(&self, command: &str, args: Value) -> Result<Value, QmpError> {
        self.execute_for(command, args, DEFAULT_TIMEOUT)
    }

    pub fn execute_for(&self, command: &str, args: Value, timeout: Duration) -> Result<Value, QmpError> {
        let id = self.send(command, args, None)?;
        self.answer(command, id, timeout)
    }

    /// Runs a command that takes a file descriptor along, as `getfd` does. QEMU has its own copy afterwards.
    pub fn execute_with_fd(&self, command: &str, args: Value, fd: BorrowedFd<'_>) -> Result<Value, QmpError> {
        let id = self.send(command, args, Some(fd))?;
        self.answer(command, id, DEFAULT_TIMEOUT)
    }

    /// Where the sequence of events stands now. Take it before the command whose events are waited for.
    pub fn mark(&self) -> Mark {
        Mark(self.0.shared.lock().next_event)
    }

    /// Waits for the first event since `since` in which `pick` finds something, those that came before the call included.
    pub fn wait<T>(
        &self,
        since: Mark,
        timeout: Duration,
        mut pick: impl FnMut(&Event) -> Option<T>,
    ) -> Result<T, QmpError> {
        let deadline = Instant::now() + timeout;
        let mut next = since.0;
        let mut state = self.0.shared.lock();
        loop {
            if let Some(found) = state
                .events
                .iter()
                .filter(|(n, _)| *n >= next)
                .find_map(|(_, e)| pick(e))
            {
                return Ok(found);
            }
            next = state.next_event;
            if state.closed {
                return Err(QmpError::Closed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QmpError::Timeout {
                    command: "the wait for an event".into(),
                });
            }
            state = self
                .0
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    pub fn is_closed(&self) -> bool {
        self.0.shared.lock().closed
    }

    /// Calls `f` once when the connection ends, from the reader thread; at once if it has ended.
    pub fn on_closed(&self, f: impl FnOnce() + Send + 'static) {
        let mut state = self.0.shared.lock();
        if !state.closed {
            state.on_closed.push(Box::new(f));
            return;
        }
        drop(state);
        f();
    }

    /// Calls `f` with each event from now on, from the reader thread, until it returns false. `f` must not call the client.
    pub fn on_event(&self, f: impl FnMut(&Event) -> bool + Send + 'static) {
        self.0.shared.lock().listeners.push(Box::new(f));
    }

    fn send(&self, command: &str, args: Value, fd: Option<BorrowedFd<'_>>) -> Result<u64, QmpError> {
        let mut writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let (stream, next) = &mut *writer;
        let id = *next;
        *next += 1;
        let line = encode(command, args, id);
        {
            // Registered before it is written: the answer may be faster than this thread.
            let mut state = self.0.shared.lock();
            if state.closed {
                return Err(QmpError::Closed);
            }
            state.answers.insert(id, None);
        }
        let Err(error) = write_line(stream, &line, fd) else {
            return Ok(id);
        };
        self.0.shared.lock().answers.remove(&id);
        tracing::debug!(%error, command, "QMP write failed");
        // Half a command may be on the wire: nothing that follows would be understood.
        let _ = stream.shutdown(std::net::Shutdown::Both);
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Err(QmpError::Timeout {
                command: command.into(),
            }),
            _ => Err(QmpError::Closed),
        }
    }

    fn answer(&self, command: &str, id: u64, timeout: Duration) -> Result<Value, QmpError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.0.shared.lock();
        loop {
            if let Some(Some(_)) = state.answers.get(&id) {
                return match state.answers.remove(&id).flatten() {
                    Some(Ok(value)) => Ok(value),
                    Some(Err((class, desc))) => Err(QmpError::Qemu {
                        command: command.into(),
                        class,
                        desc,
                    }),
                    None => Err(QmpError::Closed),
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                // From here on nobody waits: an answer that comes late is dropped by the reader.
                state.answers.remove(&id);
                return Err(match state.closed {
                    true => QmpError::Closed,
                    false => QmpError::Timeout {
                        command: command.into(),
                    },
                });
            }
            state = self
                .0
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// Connects without ever blocking: a listener whose backlog is full would block a plain connect for as long as its one client
/// stays.
fn open(path: &Path, deadline: Instant) -> Result<UnixStream, QmpError> {
    let unavailable = |source: io::Error| QmpError::Unavailable {
        path: path.to_owned(),
        source,
    };
    let address = UnixAddr::new(path).map_err(|e| unavailable(e.into()))?;
    loop {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd: OwnedFd =
            socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(|e| unavailable(e.into()))?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => {
                let stream = UnixStream::from(fd);
                stream.set_nonblocking(false).map_err(unavailable)?;
                return Ok(stream);
            }
            Err(Errno::EAGAIN) if Instant::now() < deadline => {
                // Nothing to wait on: the kernel has no event for 'the backlog has room'.
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(Errno::EAGAIN) => return Err(QmpError::Busy { path: path.to_owned() }),
            Err(e) => return Err(unavailable(e.into())),
        }
    }
}

fn greet(stream: &mut UnixStream, path: &Path, deadline: Instant) -> Result<(Decoder, Version), QmpError> {
    let mut decoder = Decoder::default();
    let mut buffer = [0; 4096];
    loop {
        match decoder.next_message()? {
            Some(Message::Greeting(version)) => return Ok((decoder, version)),
            Some(_) => return Err(super::CodecError::Unknown.into()),
            None => {}
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let busy = || QmpError::Busy { path: path.to_owned() };
        if left.is_zero() {
            return Err(busy());
        }
        let unavailable = |source| QmpError::Unavailable {
            path: path.to_owned(),
            source,
        };
        stream.set_read_timeout(Some(left)).map_err(unavailable)?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(QmpError::Closed),
            Ok(n) => decoder.push(buffer.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => return Err(busy()),
            Err(e) => return Err(unavailable(e)),
        }
    }
}

/// The descriptor travels with the line's first byte; a short write is completed without it.
fn write_line(stream: &mut UnixStream, line: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let Some(fd) = fd else { return stream.write_all(line) };
    let fds = [fd.as_raw_fd()];
    let sent = loop {
        let message = [ControlMessage::ScmRights(&fds)];
        match sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(line)],
            &message,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    stream.write_all(line.get(sent..).unwrap_or_default())
}

fn read_on(stream: &mut UnixStream, decoder: &mut Decoder, shared: &Shared) -> Result<(), QmpError> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        while let Some(message) = decoder.next_message()? {
            sort(message, shared);
        }
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => decoder.push(buffer.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(QmpError::Closed),
        }
    }
}

fn sort(message: Message, shared: &Shared) {
    let mut state = shared.lock();
    match message {
        Message::Event { name, data, unix_us } => {
            let n = state.next_event;
            state.next_event += 1;
            let event = Event {
                name,
                data,
                unix_us,
                arrived: Instant::now(),
            };
            state.listeners.retain_mut(|hear| hear(&event));
            state.events.push_back((n, event));
            if state.events.len() > EVENTS_KEPT {
                state.events.pop_front();
            }
        }
        Message::Return { id: Some(id), value } => settle(&mut state, id, Ok(value)),
        Message::Error {
            id: Some(id),
            class,
            desc,
        } => settle(&mut state, id, Err((class, desc))),
        Message::Greeting(_) | Message::Return { id: None, .. } => {}
        Message::Error { id: None, desc, .. } => tracing::warn!(desc, "QEMU could not read a command"),
    }
    drop(state);
    shared.changed.notify_all();
}

fn settle(state: &mut State, id: u64, answer: Answer) {
    if let Some(slot) = state.answers.get_mut(&id) {
        *slot = Some(answer);
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
pub(crate) mod tests;
