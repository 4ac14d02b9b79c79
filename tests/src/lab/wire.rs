//! The way to a replicator's link, in the hands of a test: a relay in the host's namespace that lets everything through, nothing,
//! or breaks it off.
//!
//! Stalled is what a switch without power does to a connection: nothing arrives, and nobody is told. Cut is a reset of each
//! connection and of all new ones. The guests' own network is not touched.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};

use super::daemons::LINK;
use super::host::Host;
use super::net::Netns;
use super::sys;

const PORT: u16 = 7412;
/// A relay looks so often whether its way has changed.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    Open,
    Stalled,
    Cut,
    /// The wire itself is taken down.
    Over,
}

struct Shared {
    way: Mutex<(Way, u64)>,
    news: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, (Way, u64)> {
        self.way.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Waits while it is stalled. `false`: a connection that began at `cuts` is to end.
    fn passes(&self, cuts: u64) -> bool {
        let mut way = self.lock();
        while way.0 == Way::Stalled && way.1 == cuts {
            way = self.news.wait(way).unwrap_or_else(|p| p.into_inner());
        }
        way.0 == Way::Open && way.1 == cuts
    }
}

pub struct Wire {
    ip: Ipv4Addr,
    shared: Arc<Shared>,
}

impl Wire {
    /// A way to the replicator's link on this host, open.
    pub fn lay(host: &Host) -> Result<Self> {
        let (ns, ip) = (host.ns.clone(), host.ip);
        let listener = sys::in_netns(ns.fd(), || TcpListener::bind(SocketAddrV4::new(ip, PORT)))
            .with_context(|| format!("a relay on {}", host.name))?;
        let shared = Arc::new(Shared {
            way: Mutex::new((Way::Open, 0)),
            news: Condvar::new(),
        });
        let to = shared.clone();
        std::thread::Builder::new()
            .name("wire".into())
            .spawn(move || accept(&listener, &ns, ip, &to))?;
        Ok(Self { ip, shared })
    }

    /// What a source is to be given as its target's link.
    pub fn address(&self) -> String {
        format!("{}:{PORT}", self.ip)
    }

    pub fn set(&self, way: Way) {
        let mut now = self.shared.lock();
        now.0 = way;
        if matches!(way, Way::Cut | Way::Over) {
            now.1 += 1;
        }
        self.shared.news.notify_all();
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.set(Way::Over);
    }
}

fn accept(listener: &TcpListener, ns: &Netns, ip: Ipv4Addr, shared: &Arc<Shared>) {
    // Not blocking: the wire's end must be seen without a last caller, who is in another namespace.
    if listener.set_nonblocking(true).is_err() {
        return;
    }
    loop {
        let (way, cuts) = *shared.lock();
        if way == Way::Over {
            return;
        }
        let Ok((near, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        let (ns, shared) = (ns.clone(), shared.clone());
        // A connection of which not even this comes about is broken off, as it should be.
        let _ = std::thread::Builder::new().name("wire-pair".into()).spawn(move || {
            let _ = near.set_nonblocking(false);
            if way != Way::Cut && shared.passes(cuts) {
                let to = SocketAddrV4::new(ip, LINK);
                if let Ok(far) = sys::in_netns(ns.fd(), || TcpStream::connect(to)) {
                    let _ = pair(&near, &far, &shared, cuts);
                    return;
                }
            }
            reset(&near);
        });
    }
}

/// Relays both ways until one of the two ends or the wire is cut.
fn pair(near: &TcpStream, far: &TcpStream, shared: &Shared, cuts: u64) -> io::Result<()> {
    for s in [near, far] {
        s.set_nodelay(true)?;
        s.set_read_timeout(Some(LOOK))?;
        s.set_write_timeout(Some(LOOK))?;
    }
    std::thread::scope(|s| {
        let there = s.spawn(|| relay(near, far, shared, cuts));
        let back = relay(far, near, shared, cuts);
        let there = there.join();
        if !matches!((there, back), (Ok(true), true)) {
            // Both copies of neither side are read any more: the last close resets them.
            reset(near);
            reset(far);
        }
    });
    Ok(())
}

/// A close with nothing left to send is a reset.
fn reset(stream: &TcpStream) {
    let now = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    let _ = setsockopt(&stream.as_fd(), sockopt::Linger, &now);
}

/// `true`: one side has ended, in good order, and the other was told so.
fn relay(from: &TcpStream, to: &TcpStream, shared: &Shared, cuts: u64) -> bool {
    let mut buffer = vec![0; 256 << 10];
    let (mut from_reader, mut to_writer) = (from, to);
    loop {
        if !shared.passes(cuts) {
            return false;
        }
        let n = match from_reader.read(&mut buffer) {
            Ok(0) => {
                let _ = to.shutdown(std::net::Shutdown::Write);
                return true;
            }
            Ok(n) => n,
            Err(e) if later(&e) => continue,
            Err(_) => {
                let _ = (
                    to.shutdown(std::net::Shutdown::Both),
                    from.shutdown(std::net::Shutdown::Both),
                );
                return false;
            }
        };
        let mut rest = buffer.get(..n).unwrap_or_default();
        while !rest.is_empty() {
            // What was read before a stall arrives after it.
            if !shared.passes(cuts) {
                return false;
            }
            match to_writer.write(rest) {
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(e) if later(&e) => {}
                Err(_) => {
                    let _ = (
                        to.shutdown(std::net::Shutdown::Both),
                        from.shutdown(std::net::Shutdown::Both),
                    );
                    return false;
                }
            }
        }
    }
}

fn later(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}
