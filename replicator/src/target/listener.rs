//! The door of the link: accepts connections from other replicators and brings each to its session.

use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use umbra_api::HostId;
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::Purpose;
use umbra_api::wire::control::Message;

use super::session::{Event, Reply};
use crate::engine::{Engine, Hello};
use crate::link::{self, FrameReader, Identity, Link, LinkError, ReadHalf};
use crate::resume::held::LOOK_EVERY;
use crate::tunnel::{self, Carrier};

/// A stranger that connects and says nothing is not waited for.
const FIRST_WORD: Duration = Duration::from_secs(5);

/// Strangers that are listened to at once. There are no more replicators than that which would all connect in one moment.
const STRANGERS_MAX: usize = 64;

/// Accepts for as long as the daemon lives, a thread a connection.
pub fn listen(engine: Arc<Engine>, listener: TcpListener) -> std::io::Result<()> {
    let held = engine.clone();
    let expire = move || {
        loop {
            held.expire_held();
            std::thread::sleep(LOOK_EVERY);
        }
    };
    std::thread::Builder::new().name("held".into()).spawn(expire)?;
    let accept = move || {
        let strangers = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming() {
            let engine = engine.clone();
            let opened = stream.and_then(|s| {
                let Some(stranger) = Stranger::admit(&strangers) else {
                    // It is closed; whoever is in earnest comes again.
                    tracing::warn!(
                        "link: {STRANGERS_MAX} connections have not said who they are, one more is not taken"
                    );
                    return Ok(());
                };
                std::thread::Builder::new()
                    .name("link".into())
                    .spawn(move || serve(&engine, s, stranger))
                    .map(|_| ())
            });
            if let Err(e) = opened {
                // Out of descriptors or threads: it gets better when others end.
                tracing::warn!("link: {e}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    };
    std::thread::Builder::new()
        .name("link-accept".into())
        .spawn(accept)
        .map(|_| ())
}

/// A connection that has not said yet who it is; counted while this lives.
struct Stranger(Arc<AtomicUsize>);

impl Stranger {
    fn admit(count: &Arc<AtomicUsize>) -> Option<Self> {
        let admitted = Self(count.clone());
        (count.fetch_add(1, Ordering::Relaxed) < STRANGERS_MAX).then_some(admitted)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(engine: &Arc<Engine>, stream: TcpStream, stranger: Stranger) {
    let served = link::accept(stream, &engine.security(), FIRST_WORD).and_then(|(purpose, mut link)| {
        link.set_timeouts(Some(FIRST_WORD), Some(engine.silence()))?;
        let first = link.reader.next_message()?;
        drop(stranger);
        match purpose {
            Purpose::Control => control(engine, link, first),
            Purpose::Ram => {
                ram(engine, link, &first);
                Ok(())
            }
            Purpose::Disk => {
                disk(engine, link, &first);
                Ok(())
            }
        }
    });
    if let Err(e) = served {
        tracing::warn!("link: {}", crate::chain(&e));
    }
}

fn control(engine: &Arc<Engine>, link: Link, first: Message) -> Result<(), LinkError> {
    link.set_timeouts(Some(engine.silence()), Some(engine.silence()))?;
    let Link {
        reader,
        writer,
        identity,
    } = link;
    let reply = Reply::new(writer);
    match open(engine, first, &identity, reader.peer(), &reply) {
        Ok(Some(events)) => hear(reader, &reply, &events),
        Ok(None) => {}
        Err(refusal) => {
            tracing::warn!(peer = reader.peer(), "refused: {refusal}");
            reply.send(&Message::Refused { refusal });
        }
    }
    Ok(())
}

/// Answers the first message. `None`: nothing more is to be said on this connection.
fn open(
    engine: &Arc<Engine>,
    first: Message,
    from: &Identity,
    peer: &str,
    reply: &Reply,
) -> Result<Option<Sender<Event>>, Refusal> {
    let proven = |host: &HostId| {
        from.is(host)
            .map_err(|why| Refusal::new(RefusalCode::PeerIdentity, why))
    };
    match first {
        Message::Hello {
            vm,
            name,
            epoch,
            host,
            port,
            spec,
            resume,
        } => {
            proven(&host)?;
            let hello = Hello {
                vm,
                name,
                epoch,
                host,
                link: port.and_then(|p| back(peer, p)),
                spec: *spec,
                resume,
            };
            let welcome = engine.hello(hello, reply.clone())?;
            reply.send(&Message::Welcome {
                session: welcome.session,
                resumed: welcome.resumed,
            });
            Ok(Some(welcome.events))
        }
        Message::Resolve { vm, epoch } => {
            // Only the VM's own source may ask: asking decides.
            engine.source_of(vm).as_ref().map_or(Ok(()), proven)?;
            let Some(events) = engine.target_of(vm) else {
                if engine.ran(vm, epoch) {
                    reply.send(&Message::Running {
                        epoch,
                        resume_unix_us: 0,
                        resume_us: 0,
                    });
                    return Ok(None);
                }
                engine.never(vm, epoch)?;
                reply.send(&Message::Aborted { epoch });
                return Ok(None);
            };
            // A session that has just ended answers no more; the source asks again.
            let _ = events.send(Event::Said {
                message: Message::Resolve { vm, epoch },
                reply: reply.clone(),
            });
            Ok(Some(events))
        }
        Message::Check { vm, host, spec } => {
            proven(&host)?;
            let lacks = engine.lacks(vm, &spec);
            reply.send(&Message::Checked { lacks });
            Ok(None)
        }
        Message::Ended { vm, epoch, host } => {
            proven(&host)?;
            engine.ended(vm, epoch, &host)?;
            reply.send(&Message::Aborted { epoch });
            Ok(None)
        }
        Message::Fence { vm, epoch, dead } => engine.fence(vm, epoch, dead, from, reply),
        other => Err(Refusal::new(
            RefusalCode::BadOrder,
            format!("a connection can't open with {other:?}"),
        )),
    }
}

/// The address of a peer's own listener: its connection's other end, with the port that it told.
fn back(peer: &str, port: u16) -> Option<String> {
    let from: std::net::SocketAddr = peer.parse().ok()?;
    Some(std::net::SocketAddr::new(from.ip(), port).to_string())
}

fn ram(engine: &Arc<Engine>, link: Link, first: &Message) {
    let Message::Attach { session } = first else {
        return tracing::warn!(peer = link.peer(), "a ram connection can't open with {first:?}");
    };
    match engine.take_feed(*session, &link.identity) {
        Ok(feed) => feed.run(link),
        Err(why) => tracing::warn!(peer = link.peer(), session, "ram connection refused: {why}"),
    }
}

fn hear(mut reader: FrameReader<ReadHalf>, reply: &Reply, events: &Sender<Event>) {
    crate::urgent::this_thread();
    loop {
        let (event, over) = match reader.next_message() {
            Ok(message) => (
                Event::Said {
                    message,
                    reply: reply.clone(),
                },
                false,
            ),
            Err(e) => (
                Event::ControlLost {
                    why: crate::chain(&e),
                    reply: reply.clone(),
                },
                true,
            ),
        };
        if events.send(event).is_err() || over {
            return;
        }
    }
}

/// Joins a source's disk connection with the daemon that writes the shadow's images.
fn disk(engine: &Arc<Engine>, link: Link, first: &Message) {
    let peer = link.peer().to_owned();
    let Message::AttachDisk { session, disk } = first else {
        tracing::warn!(peer, "a disk connection can't open with {first:?}");
        return;
    };
    let (session, disk) = (*session, *disk);
    let path = match engine.disk_socket(session, disk, &link.identity) {
        Ok(path) => path,
        Err(why) => return tracing::warn!(peer, session, disk, "{why}"),
    };
    // Answers are small: the source has the limit.
    let carrier = Carrier {
        crew: engine.crew(),
        what: session,
        sent: &|_| {},
    };
    let carried = link
        .set_timeouts(None, Some(engine.silence()))
        .map_err(|e| crate::chain(&e))
        .and_then(|()| UnixStream::connect(&path).map_err(|e| format!("{}: {e}", path.display())))
        .and_then(|daemon| tunnel::carry(daemon, link, &carrier));
    match carried {
        Ok(()) => tracing::debug!(peer, session, disk, "the disk's connection ended"),
        Err(why) => tracing::warn!(peer, session, disk, "the disk's connection ends: {why}"),
    }
}
