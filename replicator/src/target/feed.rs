//! The ram connection: applies pages to the shadow's RAM, and feeds its QEMU the stream that lets it resume.
//!
//! QEMU gets the stream's beginning while the shadow still waits (after the first pass), so that little is left for the time
//! in which the guest is stopped: the small pages that changed since, the end of RAM, and the device state.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::gettid;
use umbra_api::HostId;
use umbra_api::wire::WireError;
use umbra_api::wire::frame::{Kind, RoundEnd};
use umbra_api::wire::hashes::Sums;
use umbra_api::wire::setup::StreamSetup;

use super::gate::Gate;
use super::handover::HandOver;
use super::machine::Input;
use super::session::{Differing, Event, Scrubbed, gone_soon};
use crate::encode::{ApplyError, Decoder};
use crate::heat::own_time;
use crate::launch::ShadowRecord;
use crate::link::{FrameReader, FrameWriter, Link, LinkError, ReadHalf, WriteHalf};
use crate::qmp::{Client, Mark, QmpError};
use crate::ram::{RamError, RamFile, ShadowRam};
use crate::resume::fill::{self, FillError};
use crate::resume::scrub::compare;
use crate::resume::swapped::Turn;
use crate::stream::StreamError;
use crate::synth::Synth;

/// How long a shadow may take to load its device state.
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the maps of guest memory are kept for a shadow that neither runs nor goes.
const UNMAP_AFTER: Duration = Duration::from_secs(30);
/// Unmapping rests for so many times as long as it works.
const UNMAP_REST: u32 = 4;

#[derive(Debug, thiserror::Error)]
enum FeedError {
    #[error("{0}")]
    Link(String),
    #[error("page batch: {0}")]
    Apply(String),
    #[error("{0}")]
    Ram(String),
    #[error("setup: {0}")]
    Setup(String),
    #[error("a {kind} frame {when}")]
    Order { kind: Kind, when: &'static str },
    #[error("the shadow's QEMU takes no more of its stream: {0}")]
    Qemu(io::Error),
}

impl From<LinkError> for FeedError {
    fn from(e: LinkError) -> Self {
        Self::Link(crate::chain(&e))
    }
}

impl From<ApplyError> for FeedError {
    fn from(e: ApplyError) -> Self {
        Self::Apply(crate::chain(&e))
    }
}

impl From<RamError> for FeedError {
    fn from(e: RamError) -> Self {
        Self::Ram(crate::chain(&e))
    }
}

impl From<FillError> for FeedError {
    fn from(e: FillError) -> Self {
        match e {
            FillError::Ram(e) => e.into(),
            FillError::Link(e) => e.into(),
        }
    }
}

impl From<WireError> for FeedError {
    fn from(e: WireError) -> Self {
        Self::Setup(e.to_string())
    }
}

impl From<StreamError> for FeedError {
    fn from(e: StreamError) -> Self {
        Self::Setup(e.to_string())
    }
}

pub struct Feed {
    /// The only host that may send pages.
    pub peer: HostId,
    /// RAM block and its file.
    pub files: Vec<(String, PathBuf)>,
    /// QEMU reads its migration at the other end.
    pub incoming: OwnedFd,
    pub qmp: Client,
    /// Before the migration began.
    pub mark: Mark,
    pub events: Sender<Event>,
    pub record: ShadowRecord,
    pub disks: HandOver,
    pub gate: Arc<Gate>,
    /// In which time the scrub looks at all that waits in swap; `None`: never.
    pub scrub_swap: Option<Duration>,
}

impl Feed {
    /// Runs until the shadow has loaded, or the connection ends.
    pub fn run(self, link: Link) {
        let events = self.events.clone();
        // As with all that is told below: nobody may be there to hear it.
        let _ = events.send(Event::Feeds {
            thread: gettid().as_raw(),
        });
        let (qmp, mark, disks) = (self.qmp.clone(), self.mark, self.disks.clone());
        let Link {
            mut reader, mut writer, ..
        } = link;
        let Some(inside) = reader.get_ref().closer().ok().and_then(|c| self.gate.enter(c)) else {
            return;
        };
        let mut intake = Intake {
            feed: self,
            files: Vec::new(),
            decoder: None,
            shadow: None,
            names: Vec::new(),
            swapped: None,
            seeded: false,
            finished: false,
        };
        let tell = |input| {
            // The driver may be gone: then the session is over, and nobody needs to know.
            let _ = events.send(Event::Input(input));
        };
        let mut taken = intake.open(&mut writer);
        loop {
            match taken {
                Ok(false) => taken = intake.frame(&mut reader),
                Ok(true) => break,
                // Its pages can't be written, or it takes no more of its stream: not the link's fault.
                Err(FeedError::Apply(_) | FeedError::Ram(_) | FeedError::Qemu(_)) if gone_soon(&intake.feed.record) => {
                    return tell(Input::ShadowGone);
                }
                Err(e) => {
                    let _ = events.send(Event::RamLost(format!("ram connection: {e}")));
                    return;
                }
            }
        }
        drop(inside);
        let streamed = Instant::now();
        tell(Input::Streamed);
        // Its disks as well: 'prepared' means that nothing can fail any more.
        match loaded(&qmp, mark).and_then(|()| disks.wait()) {
            Ok(()) => {
                let _ = events.send(Event::Loaded {
                    load_us: streamed.elapsed().as_micros() as u64,
                });
            }
            Err(why) => tell(Input::LoadFailed(why)),
        }
        unmap_later(intake, &qmp, mark);
    }
}

/// Removes the maps of guest memory, which only the feeding needed. That is much work for the CPU, and the shadow's QEMU may have
/// this very core: so not while the guest is stopped, and then without haste.
fn unmap_later(mut intake: Intake, qmp: &Client, mark: Mark) {
    let ram = intake.shadow.take();
    // It runs, it is gone, or its source is: nobody waits any more.
    let _ = qmp.wait(mark, UNMAP_AFTER, |e| (e.name == "RESUME").then_some(()));
    // Our end of the stream: QEMU has closed its own.
    drop(intake);
    if let Some((ram, _)) = ram {
        ram.unmap(|took| thread::sleep(took * UNMAP_REST));
    }
}

struct Intake {
    feed: Feed,
    /// RAM block and its pages, until the stream has told its blocks.
    files: Vec<(String, RamFile)>,
    decoder: Option<Decoder>,
    shadow: Option<(ShadowRam, Synth)>,
    /// Of the RAM blocks, by number.
    names: Vec<String>,
    /// When the scrub looks at what waits in swap.
    swapped: Option<Turn>,
    seeded: bool,
    /// The end of RAM was fed: only device state may follow.
    finished: bool,
}

impl Intake {
    /// Gives the shadow what is held of an earlier copy, and tells the source.
    fn open(&mut self, source: &mut FrameWriter<WriteHalf>) -> Result<bool, FeedError> {
        for (name, path) in &self.feed.files {
            let file = match self.feed.record.process {
                Some(qemu) => RamFile::of_shadow(path, qemu)?,
                None => RamFile::open_or_create(path, 0)?,
            };
            self.files.push((name.clone(), file));
        }
        let vm = self.feed.record.vm;
        let pages = fill::fill(vm, &mut self.files, source)?;
        if pages > 0 {
            tracing::info!(%vm, pages, "the shadow has what was held, and the source was told");
        }
        Ok(false)
    }

    /// Takes one frame; true if it was the stream's last.
    fn frame(&mut self, reader: &mut FrameReader<ReadHalf>) -> Result<bool, FeedError> {
        let (kind, payload) = match reader.next() {
            Ok(frame) => frame,
            // A guest that changes nothing sends nothing; a dead peer is noticed on the control connection.
            Err(LinkError::TimedOut { .. }) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        match kind {
            Kind::Setup => self.setup(payload)?,
            Kind::Pages => {
                let (ram, _) = self.shadow.as_mut().ok_or(FeedError::Order {
                    kind,
                    when: "before the setup",
                })?;
                let decoder = self.decoder.as_mut().ok_or(FeedError::Order {
                    kind,
                    when: "before the setup",
                })?;
                if self.finished {
                    return Err(FeedError::Order {
                        kind,
                        when: "after the end of RAM",
                    });
                }
                decoder.apply(payload, ram)?;
            }
            Kind::RoundEnd => self.round_end(RoundEnd::decode(payload)?)?,
            Kind::Sums => self.scrub(&Sums::decode(payload)?)?,
            Kind::DeviceState => {
                self.finish()?;
                self.write(payload)?;
            }
            Kind::StreamEnd if self.finished => return Ok(true),
            Kind::StreamEnd | Kind::Control | Kind::Disk | Kind::Held => {
                return Err(FeedError::Order {
                    kind,
                    when: "out of place",
                });
            }
        }
        Ok(false)
    }

    fn setup(&mut self, payload: &[u8]) -> Result<(), FeedError> {
        if self.shadow.is_some() {
            return Err(FeedError::Order {
                kind: Kind::Setup,
                when: "for the second time",
            });
        }
        let setup = StreamSetup::decode(payload)?;
        let ram = ShadowRam::new(&setup, std::mem::take(&mut self.files))?;
        let synth = Synth::new(&setup)?;
        let files = ram.shared();
        self.decoder = Some(Decoder::new().map_err(|e| FeedError::Apply(e.to_string()))?);
        self.shadow = Some((ram, synth));
        self.names = setup.blocks.iter().map(|b| b.name.clone()).collect();
        let pages = setup.blocks.iter().map(|b| b.pages() as usize);
        self.swapped = Some(Turn::new(self.feed.scrub_swap, pages, Instant::now()));
        let _ = self.feed.events.send(Event::Setup {
            ram_bytes: setup.ram_bytes(),
        });
        let _ = self.feed.events.send(Event::Memory(files));
        Ok(())
    }

    fn round_end(&mut self, end: RoundEnd) -> Result<(), FeedError> {
        let (ram, synth) = self.shadow.as_mut().ok_or(FeedError::Order {
            kind: Kind::RoundEnd,
            when: "before the setup",
        })?;
        if !self.seeded {
            self.seeded = true;
            let preamble = synth.preamble(ram);
            self.write(&preamble)?;
        }
        let _ = self.feed.events.send(Event::RoundEnd(end));
        Ok(())
    }

    /// All that these pages were sent with is applied by now.
    fn scrub(&mut self, sums: &Sums) -> Result<(), FeedError> {
        let kind = Kind::Sums;
        let (ram, _) = self.shadow.as_ref().ok_or(FeedError::Order {
            kind,
            when: "before the setup",
        })?;
        let begun = own_time();
        let looked = compare(ram, sums, self.swapped.as_mut(), || self.feed.gate.is_hurried())?;
        let differing = looked.differing.first().map(|first| Differing {
            block: self.names.get(usize::from(sums.block)).cloned().unwrap_or_default(),
            pages: looked.differing.len() as u64,
            first: *first,
        });
        let _ = self.feed.events.send(Event::Scrubbed(Scrubbed {
            pages: looked.compared,
            from_swap: looked.from_swap,
            cpu: own_time().saturating_sub(begun),
            differing,
        }));
        Ok(())
    }

    /// Before the first piece of device state: what is left of RAM.
    fn finish(&mut self) -> Result<(), FeedError> {
        if self.finished {
            return Ok(());
        }
        let kind = Kind::DeviceState;
        let (ram, synth) = self.shadow.as_mut().ok_or(FeedError::Order {
            kind,
            when: "before the setup",
        })?;
        if !self.seeded {
            return Err(FeedError::Order {
                kind,
                when: "before the first pass has ended",
            });
        }
        let rest = synth.finish(ram);
        self.finished = true;
        // The source sends device state only when all of its disks' bytes were answered. It has said so, but that may still be on its way.
        let begun = self.feed.disks.begin(&self.feed.record, &self.feed.qmp);
        begun.map_err(FeedError::Qemu)?;
        self.write(&rest)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), FeedError> {
        let mut qemu = File::from(self.feed.incoming.try_clone().map_err(FeedError::Qemu)?);
        qemu.write_all(bytes).map_err(FeedError::Qemu)
    }
}

/// Waits until the shadow's QEMU says that its migration is complete; it stays paused.
fn loaded(qmp: &Client, mark: Mark) -> Result<(), String> {
    let status = qmp.wait(mark, LOAD_TIMEOUT, |e| match e.name.as_str() {
        "MIGRATION" => e.data["status"]
            .as_str()
            .filter(|s| matches!(*s, "completed" | "failed"))
            .map(str::to_owned),
        _ => None,
    });
    match status.as_deref() {
        Ok("completed") => Ok(()),
        Ok(_) => Err("the shadow's QEMU can't load the device state".into()),
        Err(QmpError::Closed) => Err("the shadow's QEMU has exited while it loaded the device state".into()),
        Err(e) => Err(format!("the shadow's load: {e}")),
    }
}
