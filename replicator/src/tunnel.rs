//! The NBD bytes of one disk, between a QEMU's unix socket on this host and a connection of the link, both ways.
//!
//! They travel in frames, not raw: a frame costs 16 bytes and a fast checksum, and in return a byte that was hit on the way ends
//! the copy instead of becoming the guest's data, and whatever the link does beneath its frames is done to disks too: the
//! bandwidth limit ([`Carrier::sent`]) is one of these things.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use umbra_api::wire::frame::Kind;

use crate::link::{Closer, FrameReader, FrameWriter, Link, LinkError, ReadHalf, WriteHalf};
use crate::urgent::Crew;

/// A mirror's largest request is 1 MiB; the kernel's socket buffer gives less at once.
const PIECE: usize = 256 << 10;

/// Who carries, and what for.
pub struct Carrier<'a> {
    /// The threads enter themselves here: a switchover makes them urgent.
    pub crew: &'a Crew,
    pub what: u64,
    /// So many bytes of a disk were sent; it returns when more may be.
    pub sent: &'a (dyn Fn(usize) + Sync),
}

/// Carries until either side ends, then ends the other. Blocking.
pub fn carry(local: UnixStream, link: Link, carrier: &Carrier<'_>) -> Result<(), String> {
    let closer = link.closer().map_err(|e| crate::chain(&e))?;
    let Link { reader, writer, .. } = link;
    let ends = Ends {
        local: local.try_clone().map_err(|e| e.to_string())?,
        closer,
    };
    let from = local.try_clone().map_err(|e| e.to_string())?;
    std::thread::scope(|s| {
        let out = std::thread::Builder::new().name("disk-out".into()).spawn_scoped(s, || {
            let _member = carrier.crew.enter(carrier.what);
            let result = out(from, writer, carrier.sent);
            ends.close();
            result
        });
        let member = carrier.crew.enter(carrier.what);
        let inward = inward(reader, local);
        drop(member);
        ends.close();
        let out = out.map_err(|e| e.to_string())?.join();
        // Whichever ended by itself tells more than the one that was ended for it.
        inward.and(out.unwrap_or_else(|_| Err("its thread panicked".into())))
    })
}

struct Ends {
    local: UnixStream,
    closer: Closer,
}

impl Ends {
    fn close(&self) {
        // Ended already is as good.
        let _ = self.local.shutdown(Shutdown::Both);
        self.closer.close();
    }
}

fn out(mut local: UnixStream, mut link: FrameWriter<WriteHalf>, sent: &(dyn Fn(usize) + Sync)) -> Result<(), String> {
    let mut buffer = vec![0; PIECE];
    loop {
        let n = match local.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(format!("the disk's socket: {e}")),
        };
        link.send(Kind::Disk, buffer.get(..n).unwrap_or_default())
            .map_err(|e| crate::chain(&e))?;
        sent(n);
    }
}

fn inward(mut link: FrameReader<ReadHalf>, mut local: UnixStream) -> Result<(), String> {
    loop {
        match link.next() {
            Ok((Kind::Disk, bytes)) => local.write_all(bytes).map_err(|e| format!("the disk's socket: {e}"))?,
            Ok((kind, _)) => return Err(format!("a {kind} frame on a disk's connection")),
            // A guest that writes nothing sends nothing.
            Err(LinkError::TimedOut { .. }) => {}
            Err(LinkError::Closed { .. }) => return Ok(()),
            Err(e) => return Err(crate::chain(&e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use umbra_api::wire::Purpose;

    use super::*;
    use crate::link::{self, Security};

    #[test]
    fn bytes_go_both_ways_and_one_end_ends_the_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let patience = Duration::from_secs(10);
        let (mut client, near) = UnixStream::pair().unwrap();
        let (far, mut server) = UnixStream::pair().unwrap();
        let target = std::thread::spawn(move || {
            let (purpose, link) = link::accept(listener.accept().unwrap().0, &Security::Plaintext, patience).unwrap();
            assert_eq!(purpose, Purpose::Disk);
            let (crew, sent) = (Crew::default(), |_| {});
            carry(
                far,
                link,
                &Carrier {
                    crew: &crew,
                    what: 0,
                    sent: &sent,
                },
            )
        });
        let source = std::thread::spawn(move || {
            let host = "b".parse().unwrap();
            let (crew, counted) = (Crew::default(), AtomicUsize::new(0));
            let sent = |n: usize| {
                assert!(!crew.of(1).is_empty());
                counted.fetch_add(n, Ordering::Relaxed);
            };
            let link = link::connect(&addr, &host, Purpose::Disk, &Security::Plaintext, patience).unwrap();
            carry(
                near,
                link,
                &Carrier {
                    crew: &crew,
                    what: 1,
                    sent: &sent,
                },
            )
            .unwrap();
            assert!(crew.of(1).is_empty());
            counted.into_inner()
        });
        let question: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let expected = question.clone();
        let asks = std::thread::spawn(move || {
            client.write_all(&question).unwrap();
            let mut answer = [0; 4];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"done");
        });
        let mut heard = vec![0; expected.len()];
        server.read_exact(&mut heard).unwrap();
        assert!(heard == expected);
        server.write_all(b"done").unwrap();
        asks.join().unwrap();
        // The client is gone: all the rest ends.
        assert_eq!(source.join().unwrap(), expected.len(), "each byte is counted once");
        target.join().unwrap().unwrap();
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
    }
}
