//! The thread that keeps a waiting shadow's RAM at what its tier leaves it.
//!
//! ```text
//!            tier below active                      too much in RAM
//!  Waiting ────────────────────> Keeping (looks) ────────────────────> pages out, coldest first ──┐
//!     ^                             │  ^  ^ └──────────────────────────────────────────────────────┘
//!     │ held (a switchover begins)  │  └──┴── reads back, hottest first <── a higher tier
//!     └─────────────────────────────┘
//!  the VM runs: reads back all of it, and ends
//! ```
//! A look at the pages is followed by a rest that is a hundred times as long. What the rounds brought back is swapped out again for
//! at most 0.4 s each time, and 25 times as long is rested then: a guest that writes faster than this allows keeps more in RAM, and
//! the status says so. The first shrinking and reading back are done in one go: they are what an order waits for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use umbra_api::VmId;
use umbra_api::order::{Peak, Tier};
use umbra_api::replica::{Promotion, ShadowMemory};

use super::group::MemoryGroup;
use super::pages::Pages;
use super::plan::{self, Run};
use super::swap::Swap;
use crate::engine::unix_ms;
use crate::stream::items::PAGE_SIZE;

/// An epoch of [`super::heat`]: what was touched within the last two stays in RAM whatever the tier says.
const EPOCH: Duration = Duration::from_secs(5);
/// Least time between two looks at the pages, and how much longer a rest is than a look and than swapping out.
const REST: Duration = Duration::from_secs(2);
const REST_PER_LOOK: u32 = 100;
const REST_PER_WORK: u32 = 25;
/// Longest rest, and with it the longest work.
const REST_MAX: Duration = Duration::from_secs(10);
/// Where nothing is to do but to be seen.
const IDLE: Duration = Duration::from_secs(5);
/// Pages of one system call, and bytes between two looks at what the kernel made of it.
const PIECE_PAGES: usize = 512;
const STEP_BYTES: usize = 32 << 20;
/// Least time for a disk to write a step.
const WRITTEN: Duration = Duration::from_millis(50);
const PAGE: u64 = PAGE_SIZE as u64;

/// How tiers are turned into RAM, as configured.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Shares {
    pub standby: f64,
    pub armed: f64,
    /// False: RAM is left alone.
    pub shrink_ram: bool,
}

impl Default for Shares {
    fn default() -> Self {
        Self {
            standby: Tier::Standby.share(),
            armed: Tier::Armed.share(),
            shrink_ram: true,
        }
    }
}

impl Shares {
    pub fn of(&self, tier: Tier) -> f64 {
        match tier {
            Tier::Standby => self.standby,
            Tier::Armed => self.armed,
            Tier::Active => Tier::Active.share(),
        }
    }
}

#[derive(Debug)]
enum Command {
    Tier {
        tier: Tier,
        peak: Peak,
        asked: Instant,
    },
    /// The VM runs here.
    Runs {
        asked: Instant,
    },
}

/// What both threads look at between two pieces of work.
#[derive(Default)]
struct Signals {
    /// A stopped guest waits: nothing is done.
    held: AtomicBool,
    /// Counts commands before they are sent: one that was not taken yet ends the work for the old.
    news: AtomicU64,
}

/// Dropping it ends the thread; pages stay where they are.
pub struct Keeper {
    commands: Sender<Command>,
    signals: Arc<Signals>,
    thread: Thread,
}

impl Keeper {
    /// `tell` hears of each change.
    pub fn start(
        vm: VmId,
        files: Vec<Arc<Pages>>,
        group: Option<MemoryGroup>,
        shares: Shares,
        tell: impl Fn(&ShadowMemory) + Send + 'static,
    ) -> io::Result<Self> {
        let (commands, inbox) = channel();
        let signals = Arc::new(Signals::default());
        let worker = Worker {
            vm,
            files,
            group,
            shares,
            inbox,
            signals: signals.clone(),
            tell,
            taken: 0,
            goal: None,
            told: ShadowMemory::default(),
            aged: Instant::now(),
            heat: Vec::new(),
            resident: Vec::new(),
        };
        let thread = thread::Builder::new()
            .name("memory".into())
            .spawn(move || worker.run())?;
        Ok(Self {
            commands,
            signals,
            thread: thread.thread().clone(),
        })
    }

    pub fn set(&self, tier: Tier, peak: Peak) {
        let asked = Instant::now();
        self.send(Command::Tier { tier, peak, asked });
    }

    /// Until the VM runs or the shadow goes, nothing more is swapped in or out: at most one piece, or the reclaim of one step, that
    /// was begun.
    pub fn hold(&self) {
        self.signals.held.store(true, SeqCst);
        self.thread.unpark();
    }

    /// The VM runs here: all that is its own comes back.
    pub fn runs(&self) {
        self.signals.held.store(false, SeqCst);
        self.send(Command::Runs { asked: Instant::now() });
    }

    fn send(&self, command: Command) {
        self.signals.news.fetch_add(1, SeqCst);
        // A thread that has ended has nothing left to do.
        let _ = self.commands.send(command);
        self.thread.unpark();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.signals.news.fetch_add(1, SeqCst);
        self.thread.unpark();
    }
}

struct Goal {
    tier: Tier,
    peak: Peak,
    /// RAM is to be read back, since then.
    rising: Option<Instant>,
    read_bytes: u64,
    /// Down to the tier's RAM once: from here on only what came back is swapped out again.
    shrunk: bool,
    last: bool,
}

struct Worker<T> {
    vm: VmId,
    files: Vec<Arc<Pages>>,
    group: Option<MemoryGroup>,
    shares: Shares,
    inbox: Receiver<Command>,
    signals: Arc<Signals>,
    tell: T,
    /// Of the commands that [`Signals::news`] counts.
    taken: u64,
    goal: Option<Goal>,
    told: ShadowMemory,
    aged: Instant,
    heat: Vec<u8>,
    /// A file's pages at the last look.
    resident: Vec<bool>,
}

impl<T: Fn(&ShadowMemory)> Worker<T> {
    fn run(mut self) {
        let mut rest = IDLE;
        loop {
            match self.inbox.recv_timeout(rest) {
                Ok(command) => self.take(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while let Ok(command) = self.inbox.try_recv() {
                self.take(command);
            }
            if self.signals.held.load(SeqCst) {
                rest = IDLE;
                continue;
            }
            rest = match self.turn() {
                Ok(rest) => rest,
                Err(e) => {
                    tracing::warn!(vm = %self.vm, "the shadow's RAM is not kept at its tier's: {e}");
                    self.told.not_shrunk = Some(e.to_string());
                    IDLE
                }
            };
            (self.tell)(&self.told);
            if self.goal.as_ref().is_some_and(|g| g.last && g.rising.is_none()) {
                return;
            }
        }
    }

    fn take(&mut self, command: Command) {
        self.taken += 1;
        self.lean(false);
        let (tier, peak, asked, last) = match command {
            Command::Tier { tier, peak, asked } => (tier, peak, asked, false),
            Command::Runs { asked } => (Tier::Active, Peak::default(), asked, true),
        };
        let old = self.goal.take();
        if old.is_none() {
            self.files.iter().for_each(|f| f.heat.forget());
        }
        // A rise that is not complete is measured from when it was first asked for.
        let under_way = old.as_ref().filter(|o| o.tier == tier).and_then(|o| o.rising);
        let rises = old.as_ref().is_some_and(|o| o.tier < tier);
        self.goal = Some(Goal {
            tier,
            peak,
            rising: under_way.or(rises.then_some(asked)),
            read_bytes: old.filter(|_| under_way.is_some()).map_or(0, |o| o.read_bytes),
            shrunk: false,
            last,
        });
    }

    /// One look and what follows from it; how long to rest then.
    fn turn(&mut self) -> io::Result<Duration> {
        let begun = Instant::now();
        if begun.duration_since(self.aged) >= EPOCH {
            self.aged = begun;
            self.files.iter().for_each(|f| f.heat.age());
        }
        let (resident, used) = self.look()?;
        let looked = begun.elapsed();
        (self.told.resident_bytes, self.told.used_bytes) = (resident, used);
        let Some(goal) = &self.goal else {
            return Ok(IDLE.max(looked * REST_PER_LOOK));
        };
        let limit =
            plan::limit_bytes(self.shares.of(goal.tier), goal.tier, goal.peak, used).filter(|_| self.shares.shrink_ram);
        (self.told.limit_bytes, self.told.not_shrunk) = (limit, None);
        if let Some(asked) = goal.rising {
            return self.rise(limit, asked).map(|()| REST);
        }
        let lean = limit.is_some() && !goal.last;
        let worked = match limit {
            Some(limit) if resident > limit + plan::slack(limit) => self.shrink(resident, limit)?,
            _ => Duration::ZERO,
        };
        self.lean(lean && !self.interrupted());
        let rest = (worked * REST_PER_WORK).clamp(REST, REST_MAX);
        Ok(rest.max(looked * REST_PER_LOOK))
    }

    /// Bytes in RAM and bytes in use, of all files.
    fn look(&mut self) -> io::Result<(u64, u64)> {
        let (mut resident, mut used) = (0, 0);
        for file in &self.files {
            file.window.resident(&mut self.resident)?;
            resident += self.resident.iter().filter(|r| **r).count() as u64 * PAGE;
            used += file.present_bytes();
        }
        Ok((resident, used))
    }

    fn lean(&self, lean: bool) {
        self.files.iter().for_each(|f| f.lean.store(lean, SeqCst));
    }

    fn interrupted(&self) -> bool {
        self.signals.held.load(SeqCst) || self.signals.news.load(SeqCst) != self.taken
    }

    /// Each file's part of `bytes`, in pages, by how much of the guest it has.
    fn part(file: &Pages, bytes: u64, used: u64) -> usize {
        let share = file.present_bytes() as f64 / used.max(1) as f64;
        (bytes.div_ceil(PAGE) as f64 * share).ceil() as usize
    }

    /// How long it worked.
    fn shrink(&mut self, resident: u64, limit: u64) -> io::Result<Duration> {
        let mut worked = Duration::ZERO;
        if self.files.iter().any(|f| !f.small) {
            self.told.not_shrunk = Some("ram_dir has huge pages, which are never swapped".into());
            return Ok(worked);
        }
        let swap = Swap::of_this_host();
        if let Some(why) = swap.refuses() {
            self.told.not_shrunk = Some(why);
            return Ok(worked);
        }
        let excess = (resident - limit).min(swap.room());
        let again = self.goal.as_ref().is_some_and(|g| g.shrunk);
        let budget = if again { REST_MAX / REST_PER_WORK } else { Duration::MAX };
        for file in self.files.clone() {
            file.window.resident(&mut self.resident)?;
            file.heat.copy_to(&mut self.heat);
            let want = Self::part(&file, excess, self.told.used_bytes);
            let runs = plan::coldest(&self.heat, &self.resident, want);
            worked += self.page_out(&file, &runs, budget.saturating_sub(worked))?;
        }
        if let Some(file) = self.files.first() {
            let own = file.window.fetch_own()?;
            tracing::debug!(vm = %self.vm, pages = own, "QEMU's own memory is back");
        }
        let complete = !self.interrupted();
        if let Some(goal) = &mut self.goal {
            goal.shrunk |= complete;
        }
        (self.told.resident_bytes, self.told.used_bytes) = self.look()?;
        tracing::debug!(vm = %self.vm, from = resident, limit, now = self.told.resident_bytes, ?worked, "RAM shrunk");
        Ok(worked)
    }

    fn page_out(&self, file: &Pages, runs: &[Run], budget: Duration) -> io::Result<Duration> {
        let mut worked = Duration::ZERO;
        let mut pieces = plan::pieces(runs, PIECE_PAGES).peekable();
        while pieces.peek().is_some() && worked < budget && !self.interrupted() {
            let begun = Instant::now();
            let before = self.charged()?;
            let mut bytes = 0;
            while bytes < STEP_BYTES
                && worked + begun.elapsed() < budget
                && !self.interrupted()
                && let Some(run) = pieces.next()
            {
                file.page_out(run)?;
                bytes += run.pages * PAGE_SIZE;
            }
            let left = self.charged()?.zip(before).map(|(now, before)| {
                // What a disk has not taken yet is still charged.
                (bytes as u64).saturating_sub(before.saturating_sub(now))
            });
            let step = begun.elapsed();
            worked += step;
            // The first time all of the guest goes; others want the disk too.
            self.pause(step.clamp(WRITTEN, REST));
            if !self.interrupted() {
                worked += self.reclaim(left.unwrap_or(0))?;
            }
        }
        Ok(worked)
    }

    /// Sleeps, unless something is or becomes more urgent.
    fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        let left = || Some(until.saturating_duration_since(Instant::now())).filter(|l| !l.is_zero());
        while let Some(left) = left().filter(|_| !self.interrupted()) {
            thread::park_timeout(left);
        }
    }

    /// Pages that were written by now are reclaimed first; too early, it would be QEMU's own memory, which a switchover needs.
    fn reclaim(&self, bytes: u64) -> io::Result<Duration> {
        let begun = Instant::now();
        if let (Some(group), 1..) = (&self.group, bytes) {
            let now = group.usage().map_err(io::Error::other)?;
            group.reclaim_to(now.saturating_sub(bytes)).map_err(io::Error::other)?;
        }
        Ok(begun.elapsed())
    }

    fn charged(&self) -> io::Result<Option<u64>> {
        self.group
            .as_ref()
            .map(MemoryGroup::usage)
            .transpose()
            .map_err(io::Error::other)
    }

    /// Reads back what the tier allows.
    fn rise(&mut self, limit: Option<u64>, asked: Instant) -> io::Result<()> {
        let used = self.told.used_bytes;
        let want = limit.unwrap_or(used).min(used).saturating_sub(self.told.resident_bytes);
        let mut scratch = vec![0; PIECE_PAGES * PAGE_SIZE];
        for file in self.files.clone() {
            file.window.resident(&mut self.resident)?;
            file.heat.copy_to(&mut self.heat);
            let want = Self::part(&file, want, used);
            let runs = plan::hottest(&self.heat, &self.resident, |p| file.present.get(p), want);
            let read = self.fetch(&file, &runs, &mut scratch)?;
            if let Some(goal) = &mut self.goal {
                goal.read_bytes += read;
            }
        }
        (self.told.resident_bytes, self.told.used_bytes) = self.look()?;
        if self.interrupted() {
            return Ok(());
        }
        if let Some(goal) = &mut self.goal {
            goal.rising = None;
            let promotion = Promotion {
                at: unix_ms(),
                tier: goal.tier,
                read_bytes: goal.read_bytes,
                took_ms: asked.elapsed().as_millis() as u64,
            };
            tracing::info!(vm = %self.vm, ?promotion, resident = self.told.resident_bytes, "promoted");
            self.told.promotion = Some(promotion);
        }
        Ok(())
    }

    /// Bytes that were read, up to when something else became more urgent.
    fn fetch(&self, file: &Pages, runs: &[Run], scratch: &mut [u8]) -> io::Result<u64> {
        let pieces: Vec<Run> = plan::pieces(runs, PIECE_PAGES).collect();
        let mut read = 0;
        // All reads of a step are begun before the first is waited for.
        for step in pieces.chunks(STEP_BYTES / PAGE_SIZE / PIECE_PAGES) {
            for run in step {
                // Without it, or if it is refused, each page is read when it is asked for.
                let _ = file.window.will_need(*run);
            }
            for run in step {
                if self.interrupted() {
                    return Ok(read);
                }
                file.fetch(*run, scratch)?;
                read += run.pages as u64 * PAGE;
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::window::Window;

    fn worker(files: Vec<Arc<Pages>>) -> Worker<impl Fn(&ShadowMemory)> {
        Worker {
            vm: VmId(uuid::Uuid::nil()),
            files,
            group: None,
            shares: Shares::default(),
            inbox: channel().1,
            signals: Arc::default(),
            tell: |_: &_| {},
            taken: 0,
            goal: None,
            told: ShadowMemory::default(),
            aged: Instant::now(),
            heat: Vec::new(),
            resident: Vec::new(),
        }
    }

    #[test]
    fn a_command_ends_the_work_before_it_is_taken() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("ram");
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path);
        let file = file.unwrap();
        file.set_len(8 << 12).unwrap();
        let window = Window::own(&file).unwrap();
        let pages = Arc::new(Pages::new(&path, file, window, true));
        pages.write(0, &[[1; PAGE_SIZE]; 8]).unwrap();
        let mut w = worker(vec![pages.clone()]);
        let runs = [Run { first: 0, pages: 8 }];
        assert!(w.page_out(&pages, &runs, Duration::MAX).unwrap() > Duration::ZERO);
        assert_eq!(w.fetch(&pages, &runs, &mut [0; 8 * PAGE_SIZE]).unwrap(), 8 * PAGE);

        let (signals, sleeper) = (w.signals.clone(), thread::current());
        let sender = thread::spawn(move || {
            signals.news.fetch_add(1, SeqCst);
            sleeper.unpark();
        });
        let begun = Instant::now();
        w.pause(Duration::from_secs(600));
        assert!(begun.elapsed() < Duration::from_secs(300));
        sender.join().unwrap();
        assert_eq!(w.page_out(&pages, &runs, Duration::MAX).unwrap(), Duration::ZERO);
        assert_eq!(w.fetch(&pages, &runs, &mut [0; 8 * PAGE_SIZE]).unwrap(), 0);
        w.take(Command::Runs { asked: begun });
        assert!(!w.interrupted());
    }
}
