//! The control connection to a target: opened with a first message, then a thread that tells the driver what comes.

use std::sync::mpsc::Sender;
use std::time::Duration;

use umbra_api::HostId;
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::Purpose;
use umbra_api::wire::control::Message;

use super::session::Event;
use crate::link::{self, Closer, FrameReader, FrameWriter, Link, LinkError, ReadHalf, Security, WriteHalf};
use crate::urgent;

/// Starting a shadow's QEMU may take its time on a busy host.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    pub connect: Duration,
    pub silence: Duration,
}

/// Whom a connection goes to.
pub struct Target<'a> {
    pub link: &'a str,
    /// Must be proven by the other side, unless the link is configured as plaintext.
    pub host: &'a HostId,
    pub security: Security,
}

impl Target<'_> {
    fn connect(&self, purpose: Purpose, times: Timeouts) -> Result<Link, Refusal> {
        link::connect(self.link, self.host, purpose, &self.security, times.connect).map_err(|e| unreachable(&e))
    }
}

pub struct Control {
    writer: FrameWriter<WriteHalf>,
    closer: Closer,
}

impl Control {
    pub fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        self.writer.send_message(message)
    }

    /// Opens a session. The second value is its number, which the ram connection names; the third, whether kept images are used.
    pub fn hello(to: &Target<'_>, times: Timeouts, hello: &Message) -> Result<(Link, u64, bool), Refusal> {
        let mut link = open(to, times, hello, WELCOME_TIMEOUT)?;
        match link.reader.next_message().map_err(|e| unreachable(&e))? {
            Message::Welcome { session, resumed } => Ok((link, session, resumed)),
            // Not now: as if there were no answer.
            Message::Refused { refusal } if refusal.code == RefusalCode::PeerUnreachable => Err(refusal),
            Message::Refused { refusal } => Err(Refusal::new(RefusalCode::PeerRefused, refusal.to_string())),
            other => Err(unexpected(to.link, &other)),
        }
    }

    /// Opens the ram connection of a session.
    pub fn attach(to: &Target<'_>, times: Timeouts, session: u64) -> Result<Link, Refusal> {
        let mut link = to.connect(Purpose::Ram, times)?;
        link.set_timeouts(Some(times.silence), Some(times.silence))
            .map_err(|e| unreachable(&e))?;
        link.writer
            .send_message(&Message::Attach { session })
            .map_err(|e| unreachable(&e))?;
        Ok(link)
    }

    /// Opens the connection of a disk.
    pub fn attach_disk(to: &Target<'_>, times: Timeouts, session: u64, disk: usize) -> Result<Link, Refusal> {
        let mut link = to.connect(Purpose::Disk, times)?;
        link.set_timeouts(None, Some(times.silence))
            .map_err(|e| unreachable(&e))?;
        link.writer
            .send_message(&Message::AttachDisk { session, disk })
            .map_err(|e| unreachable(&e))?;
        Ok(link)
    }

    /// Asks on a connection of its own, and waits for one answer.
    pub fn ask(to: &Target<'_>, times: Timeouts, question: &Message) -> Result<(Link, Message), Refusal> {
        let mut link = open(to, times, question, times.silence)?;
        let answer = link.reader.next_message().map_err(|e| unreachable(&e))?;
        Ok((link, answer))
    }

    /// Hands the reading half to a thread. `generation` tells its words from those of a connection that was replaced.
    pub fn listen(link: Link, times: Timeouts, generation: u64, events: Sender<Event>) -> Result<Self, Refusal> {
        link.set_timeouts(Some(times.silence), Some(times.silence))
            .map_err(|e| unreachable(&e))?;
        let closer = link.closer().map_err(|e| unreachable(&e))?;
        let Link { reader, writer, .. } = link;
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || hear(reader, generation, &events))
            .map_err(|e| Refusal::new(RefusalCode::Local, format!("no thread for the control connection: {e}")))?;
        Ok(Self { writer, closer })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Ends the listening thread.
        self.closer.close();
    }
}

fn open(to: &Target<'_>, times: Timeouts, first: &Message, wait: Duration) -> Result<Link, Refusal> {
    let mut link = to.connect(Purpose::Control, times)?;
    link.set_timeouts(Some(wait), Some(times.silence))
        .map_err(|e| unreachable(&e))?;
    link.writer.send_message(first).map_err(|e| unreachable(&e))?;
    Ok(link)
}

/// The source pings every second, so silence means that the peer or the way to it is gone.
fn hear(mut reader: FrameReader<ReadHalf>, generation: u64, events: &Sender<Event>) {
    urgent::this_thread();
    loop {
        let event = match reader.next_message() {
            Ok(message) => Event::Said { message, generation },
            Err(e) => Event::ControlLost {
                why: crate::chain(&e),
                generation,
            },
        };
        let over = matches!(event, Event::ControlLost { .. });
        if events.send(event).is_err() || over {
            return;
        }
    }
}

pub fn unreachable(e: &LinkError) -> Refusal {
    Refusal::new(RefusalCode::PeerUnreachable, crate::chain(e))
}

pub fn unexpected(addr: &str, message: &Message) -> Refusal {
    Refusal::new(RefusalCode::PeerRefused, format!("{addr} answered {message:?}"))
}
