//! A held migration as the source replicator runs it, without a link behind it: QEMU's stream is parsed, paced and packed by the
//! replicator's own code, and what would travel is counted.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use umbra_api::replica::PageKinds;
use umbra_api::wire::frame::HEADER_LEN;
use umbra_replicator::encode::{Encoder, Settings};
use umbra_replicator::pacing::{Action, Pacer, Settings as Pacing};
use umbra_replicator::stream::{Event, Limits, Parser, Section, return_path};

use super::guest::Guest;
use super::peers::{Cost, Multifd, capabilities};
use crate::bench::cpu;
use crate::lab::process::wait_for;

const QMP: Duration = Duration::from_secs(10);
/// The replicator's own default.
const ENCODING: Settings = Settings {
    level_min: 1,
    level_rounds: -3,
    level_max: 6,
    delta_cache_bytes: 64 << 20,
};
const READ_BYTES: usize = 1 << 20;

type Page = [u8; 4096];

/// What the same pages cost in three ways.
#[derive(Clone, Copy, Default, Debug)]
pub struct Costs {
    pub ours: Cost,
    /// QEMU's stream itself: what a stock migration sends that is held in the same way. Its CPU time is not told apart.
    pub stock: Cost,
    pub multifd: Cost,
    pub pages: PageKinds,
    pub rounds: u64,
}

pub struct Hold<'a> {
    guest: &'a Guest,
    held: bool,
    socket: UnixStream,
    parser: Parser,
    pacer: Pacer,
    encoder: Encoder,
    multifd: Multifd,
    received: u64,
    buffer: Vec<u8>,
    costs: Costs,
    told: PageKinds,
}

/// The kinds of pages since `before`.
fn difference(now: PageKinds, before: PageKinds) -> PageKinds {
    let mut since = now;
    for (to, (_, less)) in since.all_mut().into_iter().zip(before.all()) {
        to.pages -= less.pages;
        to.bytes -= less.bytes;
    }
    since
}

/// What a read held that has to be acted on in order.
enum Item {
    Page(u16, u64, Option<Box<Page>>),
    Section(Section),
}

nix::ioctl_read_bad!(fionread, nix::libc::FIONREAD, nix::libc::c_int);

impl<'a> Hold<'a> {
    /// `held`: the guest runs.
    pub fn start(guest: &'a Guest, path: &Path, held: bool) -> Result<Self> {
        capabilities(&guest.qmp, &["return-path", "switchover-ack"], &[])?;
        let parameters =
            json!({"max-bandwidth": 4u64 << 30, "avail-switchover-bandwidth": 4 << 20, "downtime-limit": 100});
        guest.qmp.execute("migrate-set-parameters", parameters, QMP)?;
        let listener = UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
        let uri = format!("unix:{}", path.display());
        guest.qmp.execute("migrate", json!({ "uri": uri }), QMP)?;
        Ok(Self {
            guest,
            held,
            socket: listener.accept()?.0,
            parser: Parser::new(Limits::default()),
            pacer: Pacer::new(Pacing::default(), Instant::now()),
            encoder: Encoder::new(ENCODING)?,
            multifd: Multifd::new()?,
            received: 0,
            buffer: vec![0; READ_BYTES],
            costs: Costs::default(),
            told: PageKinds::default(),
        })
    }

    /// Reads up to the end of a round, the first of which is the whole memory. Of a stopped guest that is all.
    pub fn round(&mut self) -> Result<()> {
        loop {
            for item in self.read()? {
                let section = match item {
                    Item::Page(block, page, _) => {
                        self.pacer.page(block, page);
                        continue;
                    }
                    Item::Section(section) => section,
                };
                match self.pacer.section(section, Instant::now()) {
                    // It never asks for a rest, since nobody asks it for a pause.
                    Action::KeepReading | Action::Rest(_) => {}
                    Action::NotConverging(round) => println!("    a round does not end: {round:?}"),
                    Action::RoundDone { .. } => {
                        self.costs.rounds += 1;
                        return self.end_round();
                    }
                    // A stopped guest's migration is not held: it ends with its first pass.
                    Action::RamDone(_) => {
                        self.costs.rounds += 1;
                        self.end_round()?;
                        return self.end();
                    }
                }
            }
            // QEMU ends a stopped guest's migration under the lock that its monitor needs: it would wait for us, and we for it.
            if self.held && self.pacer.is_seeding() {
                let info = self.guest.qmp.execute("query-migrate", json!({}), QMP)?;
                let syncs = info["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
                self.pacer.synced(syncs, self.received + self.waiting()?);
            }
        }
    }

    /// Reads the device state, and lets QEMU's migration end well.
    fn end(&mut self) -> Result<()> {
        while !self.parser.is_complete() {
            self.read()?;
        }
        self.socket.write_all(&return_path::shut(0))?;
        wait_for("the migration to end", QMP, || {
            let info = self.guest.qmp.execute("query-migrate", json!({}), QMP)?;
            Ok((info["status"] == "completed").then_some(()))
        })
    }

    /// After the rest between two rounds.
    pub fn woke(&mut self) -> Result<()> {
        let mark = self.received + self.waiting()?;
        self.pacer.woke(mark, Instant::now());
        Ok(())
    }

    /// What was counted since it was taken last.
    pub fn take(&mut self) -> Costs {
        let mut costs = std::mem::take(&mut self.costs);
        let now = self.encoder.stats();
        costs.pages = difference(now, std::mem::replace(&mut self.told, now));
        costs.multifd.bytes = std::mem::take(&mut self.multifd.bytes);
        costs
    }

    fn read(&mut self) -> Result<Vec<Item>> {
        let n = self.socket.read(&mut self.buffer)?;
        if n == 0 {
            bail!("QEMU closed the migration");
        }
        self.received += n as u64;
        self.costs.stock.bytes += n as u64;
        let (mut items, mut pings) = (Vec::new(), Vec::new());
        let (encoder, pacer) = (&mut self.encoder, &mut self.pacer);
        let bytes = self.buffer.get(..n).unwrap_or_default();
        self.parser.push(bytes, &mut |e: Event<'_>| {
            match e {
                Event::Setup(s) => {
                    encoder.setup(s);
                    pacer.setup(s);
                }
                Event::Ping(n) => pings.push(n),
                Event::Page { block, page, data } => items.push(Item::Page(block, page, Some(Box::new(*data)))),
                Event::Zero { block, page } => items.push(Item::Page(block, page, None)),
                Event::Section(s) => items.push(Item::Section(s)),
                Event::Device(_) | Event::Complete { .. } => {}
            }
            Ok::<_, anyhow::Error>(())
        })?;
        for n in pings {
            self.socket.write_all(&return_path::pong(n))?;
        }
        self.pack(&items)?;
        Ok(items)
    }

    /// The same pages, once as we send them, and once as multifd would.
    fn pack(&mut self, items: &[Item]) -> Result<()> {
        let before = cpu::of_thread()?;
        let bytes = &mut self.costs.ours.bytes;
        let mut sink = |payload: &[u8]| {
            *bytes += (HEADER_LEN + payload.len()) as u64;
            Ok(())
        };
        for item in items {
            if let Item::Page(block, page, data) = item {
                self.encoder.page(*block, *page, data.as_deref(), &mut sink)?;
            }
        }
        let between = cpu::of_thread()?;
        for item in items {
            if let Item::Page(_, _, data) = item {
                self.multifd.page(data.as_deref())?;
            }
        }
        self.costs.ours.cpu_s += between - before;
        self.costs.multifd.cpu_s += cpu::of_thread()? - between;
        Ok(())
    }

    fn end_round(&mut self) -> Result<()> {
        let before = cpu::of_thread()?;
        let bytes = &mut self.costs.ours.bytes;
        self.encoder.flush(&mut |payload: &[u8]| {
            *bytes += (HEADER_LEN + payload.len()) as u64;
            Ok(())
        })?;
        self.encoder.tick();
        if self.pacer.round().number == 1 {
            self.encoder.begin_rounds()?;
        }
        // The frame that ends a round.
        *bytes += (HEADER_LEN + 16) as u64;
        let between = cpu::of_thread()?;
        self.multifd.flush()?;
        self.costs.ours.cpu_s += between - before;
        self.costs.multifd.cpu_s += cpu::of_thread()? - between;
        Ok(())
    }

    fn waiting(&self) -> Result<u64> {
        let mut n = 0;
        // SAFETY: FIONREAD writes one int, and `n` is one that lives across the call.
        unsafe { fionread(self.socket.as_raw_fd(), &mut n) }?;
        Ok(n.max(0) as u64)
    }
}
