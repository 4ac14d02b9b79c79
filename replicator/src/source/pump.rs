//! Carries the migration stream from QEMU's socket to the link: reads, parses, packs, sends, and rests between rounds.
//! One thread, blocking: what it waits for is either QEMU, the link, or the end of a rest.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::unistd::gettid;
use umbra_api::order::{Pacing, ROUND_MS_MAX};
use umbra_api::replica::PageKinds;
use umbra_api::wire::frame::{Kind, RoundEnd};

use super::governor::{Costs, Figures, Governor, Sent};
use super::machine::Input;
use super::session::Event;
use crate::encode::{self, Encoder};
use crate::engine::Core;
use crate::heat::own_time;
use crate::limits::Throttle;
use crate::link::{FrameWriter, LinkError, WriteHalf};
use crate::pacing::{Action, Pacer, Round, Settings};
use crate::resume::known::Known;
use crate::stream::{self, Limits, Parser, StreamError, return_path};

/// As much as is read at once. Larger than a socket's buffer, so that one read empties it.
const READ_BYTES: usize = 1 << 20;

/// In the first copy the host is looked at so often.
const SEED_LOOK: Duration = Duration::from_millis(250);
/// A slow link is looked at so often for whether it has sent what it was given.
const KEEP_UP_LOOK: Duration = Duration::from_millis(5);
/// … and is not waited for when it sends nothing.
const STALLED: Duration = Duration::from_secs(2);
/// A guest that is to be stopped runs on until the link has taken what was sent before, but no longer than this.
const DRAIN_MAX: Duration = Duration::from_secs(10);

/// What the driver tells the pump, and what both count.
#[derive(Default)]
pub struct Shared {
    hurry: Mutex<bool>,
    hurried: Condvar,
    /// QEMU's `dirty-sync-count`, which the driver asks for while the first pass goes on.
    pub syncs: AtomicU64,
    /// Bytes of guest RAM read so far, in the first pass.
    pub seeded_bytes: AtomicU64,
    pub wire_bytes: AtomicU64,
    /// How pages travelled.
    pub pages: Mutex<PageKinds>,
    /// Pages of the first pass that travelled, zeros not counted, and those that the target had already.
    pub sent_pages: AtomicU64,
    pub skipped_pages: AtomicU64,
    /// CPU time that the scrub's rounds have cost; the sums of what is sent are not in it.
    pub scrub_cpu_us: AtomicU64,
    /// The pump's thread.
    pub thread: AtomicI32,
    /// The guest stands still.
    pub stopped: AtomicBool,
    /// This copy's own bandwidth.
    pub limit: Throttle,
    figures: Mutex<Figures>,
}

impl Shared {
    pub fn figures(&self) -> Figures {
        *self.figures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a rest, and all further ones.
    pub fn hurry(&self) {
        *self.hurry.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.hurried.notify_all();
    }

    fn is_hurried(&self) -> bool {
        *self.hurry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rest(&self, time: Duration) {
        let guard = self.hurry.lock().unwrap_or_else(PoisonError::into_inner);
        // A wake-up for another reason only makes the rest shorter.
        let _ = self.hurried.wait_timeout_while(guard, time, |hurried| !*hurried);
    }
}

#[derive(Debug, thiserror::Error)]
enum PumpError {
    #[error("migration stream: {0}")]
    Stream(#[from] StreamError),
    #[error("{0}")]
    Link(String),
    #[error("QEMU's migration socket: {0}")]
    Qemu(io::Error),
    #[error("QEMU closed the migration")]
    Closed,
    #[error("packing pages: {0}")]
    Pack(io::Error),
}

impl From<LinkError> for PumpError {
    fn from(e: LinkError) -> Self {
        Self::Link(crate::chain(&e))
    }
}

pub struct Pump {
    pub socket: UnixStream,
    pub ram: FrameWriter<WriteHalf>,
    pub encoding: encode::Settings,
    pub known: Known,
    pub pacing: Pacing,
    pub costs: Costs,
    pub core: Arc<Core>,
    pub shared: Arc<Shared>,
    pub events: Sender<Event>,
}

impl Pump {
    /// Runs until the stream is complete or something fails; either is told as an [`Input`].
    pub fn run(self) {
        self.shared.thread.store(gettid().as_raw(), Ordering::Relaxed);
        let events = self.events.clone();
        let input = match self.carry() {
            Ok(()) => Input::Streamed,
            Err(e @ PumpError::Link(_)) => Input::LinkLost(e.to_string()),
            Err(e) => Input::MigrationFailed(e.to_string()),
        };
        // The driver may be gone already: then nobody needs to know.
        let _ = events.send(Event::Input(input));
    }

    fn carry(self) -> Result<(), PumpError> {
        let mut socket = self.socket;
        let mut parser = Parser::new(Limits::default());
        let now = Instant::now();
        let mut out = Out {
            encoder: Encoder::new(self.encoding).map_err(PumpError::Pack)?,
            known: Some(self.known),
            ram: self.ram,
            pacer: Pacer::new(Settings::default(), now),
            governor: Governor::new(self.pacing, self.core.config.pacing.bounds(), self.costs, now),
            core: self.core,
            shared: self.shared,
            events: self.events,
            answers: socket.try_clone().map_err(PumpError::Qemu)?,
            rest: None,
            owed: Duration::ZERO,
            sipped: 0,
            complete: false,
        };
        let mut buffer = vec![0; READ_BYTES];
        let mut received = 0;
        while !out.complete {
            let n = match socket.read(&mut buffer) {
                Ok(0) => return Err(PumpError::Closed),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(PumpError::Qemu(e)),
            };
            received += n as u64;
            parser.push(buffer.get(..n).unwrap_or_default(), &mut |e| out.event(e))?;
            out.between_reads(&socket, received)?;
        }
        Ok(())
    }
}

/// Where the parsed stream goes.
struct Out {
    encoder: Encoder,
    /// Until the stream has told its blocks.
    known: Option<Known>,
    ram: FrameWriter<WriteHalf>,
    pacer: Pacer,
    governor: Governor,
    core: Arc<Core>,
    shared: Arc<Shared>,
    events: Sender<Event>,
    /// The same socket: what QEMU is answered.
    answers: UnixStream,
    rest: Option<Duration>,
    /// Of a pause in the first copy, what is left; and sections that were read when its last part began.
    owed: Duration,
    sipped: u64,
    complete: bool,
}

impl Out {
    fn event(&mut self, event: stream::Event<'_>) -> Result<(), PumpError> {
        match event {
            stream::Event::Page { block, page, data } => self.page(block, page, Some(data)),
            stream::Event::Zero { block, page } => self.page(block, page, None),
            stream::Event::Section(section) => {
                let action = self.pacer.section(section, Instant::now());
                self.paced(action)
            }
            stream::Event::Setup(setup) => {
                let payload = setup.encode().map_err(|e| PumpError::Stream(e.into()))?;
                self.ram.send(Kind::Setup, &payload)?;
                self.encoder.setup(setup);
                self.pacer.setup(setup);
                self.governor.setup(setup);
                if let Some(known) = self.known.take() {
                    known.give(setup, &mut self.encoder);
                }
                let _ = self.events.send(Event::Setup {
                    ram_bytes: setup.ram_bytes(),
                });
                Ok(())
            }
            stream::Event::Ping(n) => self.answers.write_all(&return_path::pong(n)).map_err(PumpError::Qemu),
            stream::Event::Device(bytes) => {
                for piece in bytes.chunks(Kind::DeviceState.max_len() as usize) {
                    self.ram.send(Kind::DeviceState, piece)?;
                }
                Ok(())
            }
            stream::Event::Complete { device_bytes } => {
                self.ram.send(Kind::StreamEnd, &device_bytes.to_le_bytes())?;
                let _ = self.events.send(Event::DeviceBytes(device_bytes));
                self.complete = true;
                self.count();
                Ok(())
            }
        }
    }

    fn page(&mut self, block: u16, page: u64, data: Option<&stream::Page>) -> Result<(), PumpError> {
        self.pacer.page(block, page);
        if self.pacer.round().number > 0 {
            self.governor.page(block, page);
        }
        let most = (!self.pacer.is_seeding()).then(|| self.governor.backlog_max());
        let (ram, throttle, shared) = (&mut self.ram, &self.core.throttle, &self.shared);
        let mut send = |payload: &[u8]| {
            send_pages(ram, throttle, shared, payload)?;
            most.map_or(Ok(()), |most| keep_up(ram, shared, most))
        };
        self.encoder
            .page(block, page, data, &mut send)
            .map_err(|e| PumpError::Link(e.to_string()))
    }

    fn paced(&mut self, action: Action) -> Result<(), PumpError> {
        match action {
            Action::KeepReading => Ok(()),
            Action::Rest(time) => {
                self.rest = Some(time);
                Ok(())
            }
            Action::NotConverging(round) => {
                let time = self.governor.complained(&round, self.sent()?, Instant::now());
                self.tell(Event::NotConverging(round));
                if !time.is_zero() {
                    self.rest = self.pacer.pause(time);
                }
                Ok(())
            }
            Action::RoundDone(round) => {
                self.end_round(round)?;
                if round.number == 0 {
                    self.count_pass();
                    self.encoder.begin_rounds().map_err(PumpError::Pack)?;
                }
                let time = self.governor.ended(&round, self.sent()?, Instant::now());
                self.rest = self.pacer.pause(time);
                self.tell(Event::Round(round));
                Ok(())
            }
            Action::RamDone(round) => {
                self.end_round(round)?;
                let _ = self.events.send(Event::RamDone(round));
                Ok(())
            }
        }
    }

    fn end_round(&mut self, round: Round) -> Result<(), PumpError> {
        let (ram, throttle, shared) = (&mut self.ram, &self.core.throttle, &self.shared);
        let mut send = |payload: &[u8]| send_pages(ram, throttle, shared, payload);
        self.encoder
            .flush(&mut send)
            .map_err(|e| PumpError::Link(e.to_string()))?;
        self.encoder.tick();
        let end = RoundEnd {
            round: round.number,
            pages: round.pages,
        };
        self.ram.send(Kind::RoundEnd, &end.encode())?;
        self.count();
        Ok(())
    }

    /// The figures as they are now.
    fn show(&self) {
        *self.shared.figures.lock().unwrap_or_else(PoisonError::into_inner) = self.governor.figures();
    }

    fn tell(&self, event: Event) {
        self.show();
        let _ = self.events.send(event);
    }

    fn sent(&self) -> Result<Sent, PumpError> {
        Ok(Sent {
            wire: self.ram.bytes(),
            unsent: self.ram.unsent()?,
        })
    }

    fn count_pass(&self) {
        let stats = self.encoder.stats();
        let sent = stats.pages() - stats.zero.pages - stats.same.pages;
        self.shared.sent_pages.store(sent, Ordering::Relaxed);
        self.shared.skipped_pages.store(stats.same.pages, Ordering::Relaxed);
    }

    /// Has the target look at some pages, in a rest.
    fn scrub(&mut self) -> Result<(), PumpError> {
        let Some(sums) = self.encoder.due_sums(Instant::now()) else {
            return Ok(());
        };
        // Some of these pages may be in the open batch still.
        let (ram, throttle, shared) = (&mut self.ram, &self.core.throttle, &self.shared);
        let mut send = |p: &[u8]| send_pages(ram, throttle, shared, p);
        self.encoder
            .flush(&mut send)
            .map_err(|e| PumpError::Link(e.to_string()))?;
        Ok(self.ram.send(Kind::Sums, &sums.encode())?)
    }

    fn count(&self) {
        self.shared.wire_bytes.store(self.ram.bytes(), Ordering::Relaxed);
        *self.shared.pages.lock().unwrap_or_else(PoisonError::into_inner) = self.encoder.stats();
    }

    /// Tells the pacer what it can't see by itself, and rests if a round has ended.
    fn between_reads(&mut self, socket: &UnixStream, received: u64) -> Result<(), PumpError> {
        if self.pacer.is_seeding() {
            self.count();
            let seen = self.encoder.stats().pages() * stream::items::PAGE_SIZE as u64;
            self.shared.seeded_bytes.store(seen, Ordering::Relaxed);
            let syncs = self.shared.syncs.load(Ordering::Acquire);
            self.pacer.synced(syncs, received + waiting(socket)?);
            self.share_host()?;
        } else if let Some(dirtied) = self.pacer.too_fast(Instant::now()) {
            self.governor.too_fast(&self.pacer.round(), dirtied);
            self.tell(Event::TooFast);
        }
        if let Some(time) = self.rest.take() {
            if !self.shared.is_hurried() {
                let begun = own_time();
                self.scrub()?;
                let took = own_time().saturating_sub(begun).as_micros() as u64;
                self.shared.scrub_cpu_us.fetch_add(took, Ordering::Relaxed);
                self.shared.rest(time);
            }
            match self.shared.is_hurried() {
                true => self.pacer.hurry(Instant::now()),
                false => self.pacer.woke(received + waiting(socket)?, Instant::now()),
            }
            self.governor.woke(self.sent()?, Instant::now());
        } else if self.shared.is_hurried() {
            self.pacer.hurry(Instant::now());
            self.drain()?;
        }
        Ok(())
    }

    /// The first copy is bounded in CPU time like the rounds, and on a hot host works every other moment.
    fn share_host(&mut self) -> Result<(), PumpError> {
        let (now, sections) = (Instant::now(), self.pacer.round().sections);
        if self.owed.is_zero() {
            if now.saturating_duration_since(self.governor.since()) < SEED_LOOK {
                return Ok(());
            }
            self.owed = self.governor.seeding(self.sent()?, now);
            self.show();
        } else if sections == self.sipped {
            // Within a section QEMU may hold what others wait for, so it is not left unread for longer.
            return Ok(());
        }
        let part = self.owed.min(Duration::from_millis(ROUND_MS_MAX));
        if part.is_zero() {
            return Ok(());
        }
        (self.owed, self.sipped) = (self.owed - part, sections);
        self.shared.rest(part);
        if self.owed.is_zero() {
            self.governor.woke(self.sent()?, Instant::now());
        }
        Ok(())
    }

    /// QEMU stops the guest when it has given away nearly everything, and can't know how much of that is still on this
    /// side of a slow link. As long as it is much, nothing more is taken from it, and the guest runs on.
    fn drain(&mut self) -> Result<(), PumpError> {
        let (since, most) = (Instant::now(), self.governor.backlog_max());
        while !self.shared.stopped.load(Ordering::Relaxed) && self.ram.unsent()? > most && since.elapsed() < DRAIN_MAX {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// Sends a batch, and holds back what comes next.
fn send_pages(ram: &mut FrameWriter<WriteHalf>, throttle: &Throttle, shared: &Shared, batch: &[u8]) -> io::Result<()> {
    ram.send(Kind::Pages, batch)
        .map_err(|e| io::Error::other(crate::chain(&e)))?;
    hold_back(throttle, shared, batch.len());
    Ok(())
}

/// Waits for the link, of which the kernel would take megabytes for sent. Else rounds would end that are only begun to travel:
/// what QEMU gives away is to be what the link carries.
fn keep_up(ram: &FrameWriter<WriteHalf>, shared: &Shared, most: u64) -> io::Result<()> {
    let (mut least, mut since) = (u64::MAX, Instant::now());
    while !shared.is_hurried() {
        let backlog = ram.backlog().map_err(|e| io::Error::other(crate::chain(&e)))?;
        if backlog < least {
            (least, since) = (backlog, Instant::now());
        }
        // A link that is dead is found out by writing to it.
        if backlog <= most || since.elapsed() > STALLED {
            break;
        }
        shared.rest(KEEP_UP_LOOK);
    }
    Ok(())
}

/// These bytes were sent: returns when the bandwidth limits, the host's and this copy's, let more go.
pub fn hold_back(throttle: &Throttle, shared: &Shared, bytes: usize) {
    let limits = [throttle, &shared.limit];
    // What a switchover sends while the guest stands still is free, for itself and for the others.
    let free = || !throttle.in_switchover && shared.is_hurried();
    if free() {
        return;
    }
    let mut wait = limits.map(|l| l.spent(bytes)).into_iter().flatten().max();
    while let Some(time) = wait.filter(|_| !free()) {
        match throttle.in_switchover {
            true => std::thread::sleep(time),
            false => shared.rest(time),
        }
        wait = limits.map(Throttle::due).into_iter().flatten().max();
    }
}

nix::ioctl_read_bad!(fionread, nix::libc::FIONREAD, nix::libc::c_int);

/// Bytes that wait in the socket.
fn waiting(socket: &UnixStream) -> Result<u64, PumpError> {
    let mut n = 0;
    // SAFETY: FIONREAD writes one int, and `n` is one that lives across the call.
    unsafe { fionread(socket.as_raw_fd(), &mut n) }.map_err(|e| PumpError::Qemu(e.into()))?;
    Ok(n.max(0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Limits;

    #[test]
    fn a_copys_own_bandwidth_holds_back_where_the_hosts_does_not() {
        let host = Throttle::default();
        let shared = Shared::default();
        let mbit = |bandwidth_mbit| Limits { bandwidth_mbit };
        shared.limit.set(mbit(Some(1)));
        std::thread::scope(|s| {
            // A quarter of an hour.
            let copy = s.spawn(|| hold_back(&host, &shared, 100 << 20));
            while shared.limit.due().is_none() {
                std::thread::yield_now();
            }
            assert!(!copy.is_finished());
            shared.limit.set(mbit(None));
        });
        // In a switchover nothing is spent.
        shared.limit.set(mbit(Some(1)));
        shared.hurry();
        hold_back(&host, &shared, 100 << 20);
        assert_eq!(shared.limit.due(), None);
    }
}
