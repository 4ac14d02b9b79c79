//! The door of the link: accepts connections from other replicators and brings each to its session.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::Purpose;
use umbra_api::wire::control::Message;

use super::session::{Event, Reply};
use crate::engine::{Engine, Hello};
use crate::link::{self, FrameReader, Link, LinkError};

/// A stranger that connects and says nothing is not waited for.
const FIRST_WORD: Duration = Duration::from_secs(5);

/// Accepts for as long as the daemon lives, a thread a connection.
pub fn listen(engine: Arc<Engine>, listener: TcpListener) -> std::io::Result<()> {
    let accept = move || {
        for stream in listener.incoming() {
            let engine = engine.clone();
            let opened = stream.and_then(|s| {
                std::thread::Builder::new()
                    .name("link".into())
                    .spawn(move || serve(&engine, s))
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

fn serve(engine: &Arc<Engine>, stream: TcpStream) {
    let served = link::accept(stream, FIRST_WORD).and_then(|(purpose, link)| {
        link.set_timeouts(Some(FIRST_WORD), Some(engine.silence()))?;
        match purpose {
            Purpose::Control => control(engine, link),
            Purpose::Ram => ram(engine, link),
        }
    });
    if let Err(e) = served {
        tracing::warn!("link: {}", crate::chain(&e));
    }
}

fn control(engine: &Arc<Engine>, mut link: Link) -> Result<(), LinkError> {
    let first = link.reader.next_message()?;
    link.set_timeouts(Some(engine.silence()), Some(engine.silence()))?;
    let Link { reader, writer } = link;
    let reply = Reply::new(writer);
    let events = match first {
        Message::Hello {
            vm,
            name,
            epoch,
            host,
            spec,
        } => {
            let hello = Hello {
                vm,
                name,
                epoch,
                host,
                spec: *spec,
            };
            match engine.hello(hello, reply.clone()) {
                Ok((session, events)) => {
                    reply.send(&Message::Welcome { session });
                    events
                }
                Err(refusal) => {
                    tracing::warn!(%vm, "refused: {refusal}");
                    reply.send(&Message::Refused { refusal });
                    return Ok(());
                }
            }
        }
        Message::Resolve { vm, epoch } => match engine.target_of(vm) {
            Some(events) => {
                // A session that has just ended answers no more; the source asks again.
                let _ = events.send(Event::Said {
                    message: Message::Resolve { vm, epoch },
                    reply: reply.clone(),
                });
                events
            }
            None => {
                reply.send(&match engine.never(vm, epoch) {
                    Ok(()) => Message::Aborted { epoch },
                    Err(refusal) => Message::Refused { refusal },
                });
                return Ok(());
            }
        },
        other => {
            let refusal = Refusal::new(RefusalCode::BadOrder, format!("a connection can't open with {other:?}"));
            reply.send(&Message::Refused { refusal });
            return Ok(());
        }
    };
    hear(reader, &reply, &events);
    Ok(())
}

fn hear(mut reader: FrameReader<TcpStream>, reply: &Reply, events: &Sender<Event>) {
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

fn ram(engine: &Arc<Engine>, mut link: Link) -> Result<(), LinkError> {
    let session = match link.reader.next_message()? {
        Message::Attach { session } => session,
        other => {
            tracing::warn!(peer = link.peer(), "a ram connection can't open with {other:?}");
            return Ok(());
        }
    };
    match engine.take_feed(session) {
        Some(feed) => feed.run(link.reader),
        None => tracing::warn!(peer = link.peer(), session, "no session waits for this ram connection"),
    }
    Ok(())
}
