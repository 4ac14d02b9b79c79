//! Drives one protection on the source: turns what happens into the machine's inputs, and carries out its actions.
//!
//! [`open`] begins, here it runs, [`pace`] keeps to its pacing, [`disks`] is what comes of its private disks, [`interfere`] what others do
//! to the VM meanwhile, [`again`] goes on after a break, and [`undecided`] asks until it is answered.

mod again;
mod disks;
mod interfere;
mod open;
mod pace;
mod scrubs;
mod undecided;

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use umbra_api::order::{Pacing, Refusal, RefusalCode};
use umbra_api::replica::{Phase, Progress, ReplicaStatus, Role, SwitchoverReport};
use umbra_api::wire::control::{Message, ShadowSpec};
use umbra_api::{Epoch, HostId, VmId};

use self::again::Again;
use self::scrubs::Scrubs;
use self::undecided::{Abort, Retries};
use super::control::{Control, Target, Timeouts};
use super::machine::{Action, Durable, Input, Machine, State};
use super::migration::{Migration, Rates};
use super::mirror::{Mirrors, News};
use super::pressure::Pressure;
use super::pump::Shared;
use super::scrub;
use super::times::{Resumed, Times};
use crate::engine::{Core, unix_ms};
use crate::faults::{self, Side};
use crate::pacing::Round;
use crate::proc::ProcessId;
use crate::qmp::Client;
use crate::urgent::leave::Leave;
use crate::urgent::{self, Urgent};

/// While the first pass goes on, QEMU is asked how far it is.
const SEEDING_TICK: Duration = Duration::from_millis(50);
const TICK: Duration = Duration::from_millis(500);
const PING_EVERY: Duration = Duration::from_secs(1);
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// What happens to a session.
#[derive(Debug)]
pub enum Event {
    Input(Input),
    /// The replicator ends: what goes on after its restart is left as it is.
    Stop,
    Setup {
        ram_bytes: u64,
    },
    Round(Round),
    NotConverging(Round),
    TooFast,
    RamDone(Round),
    DeviceBytes(u64),
    /// The guest was stopped, by QEMU's clock.
    Stopped {
        unix_us: i64,
    },
    /// The guest is stopped, and QEMU waits to be told to go on.
    PreSwitchover,
    /// Of a mirror.
    Disk {
        disk: usize,
        news: News,
    },
    /// Of the comparison of the disks.
    Scrub(scrub::News),
    GuestReset,
    /// Somebody else did something to the VM with which the copy can't go on: what, in words.
    Interfered(String),
    QmpClosed,
    Said {
        message: Message,
        generation: u64,
    },
    ControlLost {
        why: String,
        generation: u64,
    },
}

impl Event {
    /// Somebody wants it, as opposed to what happens to a pass.
    fn is_order(&self) -> bool {
        match self {
            Self::Stop => true,
            Self::Input(input) => matches!(
                input,
                Input::Switchover { .. } | Input::Release | Input::Fenced { .. } | Input::Ask | Input::Yield { .. }
            ),
            _ => false,
        }
    }
}

/// What the engine holds of a session.
pub struct Handle {
    pub events: Sender<Event>,
    pub status: Arc<Mutex<ReplicaStatus>>,
    pub thread: Option<std::thread::JoinHandle<()>>,
}

impl Handle {
    pub fn status(&self) -> ReplicaStatus {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What a new protection begins with.
pub struct Plan {
    pub vm: VmId,
    pub name: String,
    pub epoch: Epoch,
    pub peer: HostId,
    pub link: String,
    pub pacing: Pacing,
    pub process: ProcessId,
    /// Of a switchover that ended before a restart.
    pub report: Option<SwitchoverReport>,
}

pub struct Session {
    core: Arc<Core>,
    plan: Plan,
    machine: Machine,
    status: Arc<Mutex<ReplicaStatus>>,
    sender: Sender<Event>,
    events: Receiver<Event>,
    qmp: Option<Client>,
    migration: Option<Migration>,
    mirrors: Option<Mirrors>,
    scrub: Scrubs,
    /// The mirrors may wait for another link.
    waits: bool,
    /// The first full pass is in the shadow's RAM.
    seeded: bool,
    pump: Arc<Shared>,
    again: Again,
    control: Option<Control>,
    generation: u64,
    progress: Progress,
    pressure: Pressure,
    rates: Rates,
    started: Instant,
    last_round: Option<Instant>,
    pinged: Instant,
    times: Times,
    report: SwitchoverReport,
    /// Who a stopped guest waits for.
    urgent: Option<Urgent>,
    /// For its QEMU, if that was a shadow once: asked for before the guest is stopped.
    leave: Option<Leave>,
    give_up_at: Option<Instant>,
    retries: Retries,
}

impl Session {
    /// Starts the thread of a new protection.
    pub fn start(core: Arc<Core>, plan: Plan, qmp: Client, spec: ShadowSpec) -> std::io::Result<Handle> {
        let session = Self::new(core, plan, Machine::new(), Some(qmp));
        session.spawn(move |s| s.begin(spec))
    }

    /// Goes on after a restart of the replicator, from what is on disk.
    pub fn resume(core: Arc<Core>, plan: Plan, durable: Durable, qmp: Option<Client>) -> std::io::Result<Handle> {
        let session = Self::new(core, plan, Machine::new(), qmp);
        session.spawn(move |s| s.recover(durable))
    }

    /// Takes up a protection that has ended by itself, with an operator's word about it.
    pub fn reopen(
        core: Arc<Core>,
        plan: Plan,
        durable: Durable,
        qmp: Option<Client>,
        word: Input,
    ) -> std::io::Result<Handle> {
        let session = Self::new(core, plan, Machine::new(), qmp);
        session.spawn(move |s| {
            s.recover(durable);
            s.input(word);
        })
    }

    fn new(core: Arc<Core>, plan: Plan, machine: Machine, qmp: Option<Client>) -> Self {
        let (sender, events) = channel();
        let status = ReplicaStatus {
            vm: plan.vm,
            name: plan.name.clone(),
            role: Role::Source,
            peer: plan.peer.clone(),
            epoch: plan.epoch,
            seen: plan.epoch,
            phase: Phase::Provisioning,
            since: unix_ms(),
            tier: None,
            memory: None,
            progress: Progress::default(),
            report: plan.report,
            disks: Vec::new(),
            error: None,
        };
        let now = Instant::now();
        let pressure = Pressure::new(plan.pacing.not_converging);
        Self {
            core,
            plan,
            machine,
            status: Arc::new(Mutex::new(status)),
            sender,
            events,
            qmp,
            migration: None,
            mirrors: None,
            scrub: Scrubs::default(),
            waits: false,
            seeded: false,
            pump: Arc::default(),
            again: Again::default(),
            control: None,
            generation: 0,
            progress: Progress::default(),
            pressure,
            rates: Rates::default(),
            started: now,
            last_round: None,
            pinged: now,
            times: Times::default(),
            report: SwitchoverReport::default(),
            urgent: None,
            leave: None,
            give_up_at: None,
            retries: Retries::default(),
        }
    }

    fn spawn(mut self, begin: impl FnOnce(&mut Self) + Send + 'static) -> std::io::Result<Handle> {
        let (events, status) = (self.sender.clone(), self.status.clone());
        let run = move || {
            urgent::this_thread();
            begin(&mut self);
            self.run();
        };
        let thread = std::thread::Builder::new().name("source".into()).spawn(run)?;
        Ok(Handle {
            events,
            status,
            thread: Some(thread),
        })
    }

    fn times(&self) -> Timeouts {
        let link = &self.core.config.link;
        Timeouts {
            connect: Duration::from_millis(link.connect_timeout_ms),
            silence: Duration::from_millis(link.silence_ms),
        }
    }

    fn target(&self) -> Target<'_> {
        Target {
            link: &self.plan.link,
            host: &self.plan.peer,
            security: self.core.security(),
        }
    }

    fn run(mut self) {
        while !self.is_done() {
            let tick = match self.machine.state {
                State::Seeding => SEEDING_TICK,
                _ => TICK,
            };
            match self.events.recv_timeout(tick) {
                Ok(event) => self.event(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.tick(Instant::now());
        }
        self.leave_scrub();
        if let Some(mut mirrors) = self.mirrors.take() {
            mirrors.undo();
        }
        self.publish();
    }

    fn is_done(&self) -> bool {
        self.is_left() || self.machine.is_over() && self.retries.abort.is_none()
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Input(input) => self.fate(input),
            Event::Stop => self.stop_here(),
            Event::Setup { ram_bytes } => self.progress.ram_bytes = ram_bytes,
            Event::Round(round) => self.round(round),
            Event::NotConverging(round) => self.not_converging(round),
            // From now on a switchover is refused.
            Event::TooFast => self.publish(),
            Event::RamDone(round) => {
                self.times.ram_done = Some(Instant::now());
                self.report.last_pass_pages = round.pages;
            }
            Event::DeviceBytes(n) => self.report.device_state_bytes = n,
            Event::Stopped { unix_us } => {
                self.times.stopped = Some(Instant::now());
                self.times.stopped_unix_us = unix_us;
                self.hasten();
                self.unasked_stop();
                self.bound_the_stop();
            }
            Event::PreSwitchover => self.pre_switchover(),
            Event::Disk { disk, news } => {
                let heard = self.mirrors.as_mut().map_or(Ok(()), |m| m.heard(disk, news));
                match heard {
                    Ok(()) => {
                        // A warm shadow's figures are there with its phase.
                        self.ask_disks();
                        self.maybe_seeded();
                    }
                    // Over a link that was lost a mirror can wait; one that failed by itself has the disk copied anew.
                    Err(refusal) if self.is_copying() => self.input(match refusal.code {
                        RefusalCode::PeerUnreachable => Input::LinkLost(refusal.detail),
                        RefusalCode::Local => Input::MigrationFailed(refusal.detail),
                        _ => Input::Failed(refusal),
                    }),
                    Err(refusal) => self.input(Input::Failed(refusal)),
                }
            }
            Event::Scrub(news) => self.scrub_says(news),
            // QEMU keeps the migration, and the rounds bring what the reset wrote.
            Event::GuestReset => tracing::info!(vm = %self.plan.vm, "the guest was reset"),
            Event::Interfered(what) => self.interfered(what),
            Event::QmpClosed => self.qmp_closed(),
            Event::Said { message, generation } if generation == self.generation => self.said(message),
            Event::ControlLost { why, generation } if generation == self.generation => {
                self.control = None;
                self.input(Input::LinkLost(why));
            }
            // From a connection that was replaced.
            Event::Said { .. } | Event::ControlLost { .. } => {}
        }
    }

    /// Warm is a shadow that has both, memory and disks.
    fn maybe_seeded(&mut self) {
        if self.seeded && self.mirrors.as_ref().is_none_or(Mirrors::are_ready) && self.machine.state == State::Seeding {
            self.warm(Instant::now());
            self.input(Input::Seeded);
        }
    }

    /// Inputs from outside of the driver, with what must be noted or checked at that moment.
    fn fate(&mut self, input: Input) {
        match &input {
            Input::Switchover { .. } => {
                self.times.ordered = Some(Instant::now());
                if !self.leave_scrub() {
                    let why = "a damaged range of a disk was being mended, and it is not known how that went";
                    return self.input(Input::LinkLost(why.into()));
                }
            }
            Input::Streamed if !matches!(self.machine.state, State::Stopping { .. }) => {
                let why = "the migration completed unasked: somebody stopped the VM";
                return self.input(Input::MigrationFailed(why.into()));
            }
            Input::Streamed => self.times.streamed = Some(Instant::now()),
            // A copy is begun anew only of a VM that is there.
            Input::MigrationFailed(_) if self.is_copying() && self.plan.process.gone_soon() => {
                return self.input(Input::PrimaryGone);
            }
            // Of a broken copy it is looked at each time: an old pass's last words need no patience.
            Input::MigrationFailed(_) if !self.is_broken() && self.is_primary_gone() => self.input(Input::PrimaryGone),
            _ => {}
        }
        self.input(input);
    }

    /// The guest stands still: everybody else on this host can wait.
    fn hasten(&mut self) {
        if let (State::Stopping { .. }, Some(migration)) = (&self.machine.state, &self.migration) {
            let pump = self.pump.thread.load(Ordering::Relaxed);
            let disks = self.mirrors.as_ref().filter(|m| !m.is_empty());
            // QEMU's disks are written by workers that come and go, and its vCPUs are stopped: all of its threads.
            let workers = disks.map(|m| (m.threads(), urgent::threads(self.plan.process.pid)));
            let (carriers, workers) = workers.unwrap_or_default();
            let own = migration.threads().iter().copied().chain([pump]);
            self.urgent = Some(Urgent::new(own.chain(carriers).chain(workers), self.leave.take()));
        }
    }

    fn said(&mut self, message: Message) {
        match message {
            Message::RoundDone { round: 0 } => {
                self.seeded = true;
                self.maybe_seeded();
            }
            Message::RoundDone { .. } | Message::Pong { .. } => {}
            Message::Prepared { epoch, load_us } => {
                self.report.load_us = load_us;
                self.input(Input::Prepared { epoch });
            }
            Message::Running {
                epoch,
                resume_unix_us,
                resume_us,
            } => {
                self.conclude(Resumed {
                    epoch,
                    unix_us: resume_unix_us,
                    took_us: resume_us,
                });
                self.input(Input::Running { epoch });
            }
            Message::Aborted { epoch } => {
                self.retries.abort = None;
                self.input(Input::Aborted { epoch });
            }
            Message::Refused { refusal } => self.input(Input::Refused(refusal)),
            Message::DiskLooked {
                disk,
                from,
                bytes,
                differing,
            } => self.scrub.heard(scrub::Looked {
                disk,
                from,
                bytes,
                differing,
            }),
            Message::Differs { pages, block, first } => self.damaged(pages, &block, first),
            Message::Goodbye { reason } => self.input(Input::LinkLost(format!("the target says goodbye: {reason}"))),
            other => self.input(Input::LinkLost(format!(
                "the target said {other:?}, which makes no sense here"
            ))),
        }
        self.publish();
    }

    fn conclude(&mut self, resumed: Resumed) {
        let wire_bytes = self.wire_bytes();
        self.report = self
            .times
            .conclude(resumed, self.report, wire_bytes, Instant::now(), unix_ms());
        let stopped_ms = self.report.guest_stopped_us as f64 / 1e3;
        tracing::info!(vm = %self.plan.vm, epoch = %resumed.epoch, stopped_ms, report = ?self.report, "handed over");
    }

    fn input(&mut self, input: Input) {
        tracing::debug!(vm = %self.plan.vm, ?input, state = ?self.machine.state);
        let actions = self.machine.apply(input);
        self.perform(actions);
    }

    /// Carries out actions in order; what they lead to comes behind them.
    fn perform(&mut self, actions: Vec<Action>) {
        let mut queue = VecDeque::from(actions);
        while let Some(action) = queue.pop_front() {
            tracing::debug!(vm = %self.plan.vm, ?action);
            let step = faults::source_step(&action);
            self.core.faults.before(Side::Source, step);
            let input = self.act(action);
            self.core.faults.after(Side::Source, step);
            if let Some(input) = input {
                queue.extend(self.machine.apply(input));
            }
        }
        self.publish();
    }

    fn act(&mut self, action: Action) -> Option<Input> {
        match action {
            Action::Write(durable) => self.write(durable),
            Action::Stop { epoch } => self.stop(epoch),
            Action::Shut => {
                let shut = self.migration.as_ref().map_or(Ok(()), Migration::shut);
                self.times.shut = Some(Instant::now());
                // If QEMU is gone or has given up, it says so itself.
                shut.err().and_then(|e| {
                    tracing::warn!(vm = %self.plan.vm, "SHUT: {e}");
                    None
                })
            }
            Action::Commit { epoch } => {
                self.times.committed = Some(Instant::now());
                self.give_up_at = Some(Instant::now() + self.times().silence);
                self.say(&Message::Commit { epoch })
            }
            Action::Abort { epoch } => {
                self.retries.abort = Some(Abort::new(epoch, Instant::now()));
                self.say(&Message::Abort { epoch }).and(None)
            }
            Action::Abandon => {
                self.give_up_at = None;
                // First: with its disks' sockets closed, nothing in QEMU waits for the link.
                if let Some(mirrors) = self.mirrors.as_mut() {
                    self.waits = mirrors.can_wait();
                    mirrors.cut();
                }
                self.leave_scrub();
                if let Some(Err(why)) = self.migration.take().map(|m| m.abandon()) {
                    tracing::error!(vm = %self.plan.vm, "the migration's end is not known: {why}");
                }
                self.leave_mirrors();
                None
            }
            Action::Resolve { .. } => {
                self.give_up_at = None;
                self.retries.resolve = Some(Instant::now());
                None
            }
            Action::TakeBack => self.take_back(),
            Action::Kill => {
                if let Err(e) = crate::launch::process::kill(self.plan.process, KILL_TIMEOUT) {
                    tracing::error!(vm = %self.plan.vm, "the copy here does not end: {e}");
                }
                None
            }
            Action::Goodbye { reason } => self.say(&Message::Goodbye { reason }).and(None),
            Action::HangUp => {
                self.hang_up();
                None
            }
            Action::Begin => self.begin_again(),
        }
    }

    fn say(&mut self, message: &Message) -> Option<Input> {
        let Some(control) = self.control.as_mut() else {
            return Some(Input::LinkLost("there is no control connection".into()));
        };
        control.send(message).err().map(|e| Input::LinkLost(crate::chain(&e)))
    }

    fn write(&mut self, durable: Durable) -> Option<Input> {
        let report = self.report;
        let written = (self.core.journal).update(self.plan.vm, |r| r.source_writes(durable, report, unix_ms()));
        match written {
            Ok(()) => {
                self.times.written = Some(Instant::now());
                Some(Input::Written)
            }
            Err(e) => {
                tracing::error!(vm = %self.plan.vm, ?durable, "journal: {e}");
                Some(Input::Failed(Refusal::new(RefusalCode::Local, e.to_string())))
            }
        }
    }

    fn stop(&mut self, epoch: Epoch) -> Option<Input> {
        let time = Duration::from_millis(self.core.config.switchover.timeout_ms);
        self.give_up_at = Some(Instant::now() + time);
        if let Some(lost) = self.say(&Message::Prepare { epoch }) {
            return Some(lost);
        }
        self.leave = Leave::give(self.plan.process.pid, &self.core.config.cgroup);
        let acknowledged = self.migration.as_ref().map_or(Ok(()), Migration::acknowledge);
        self.pump.hurry();
        acknowledged
            .err()
            .map(|e| Input::MigrationFailed(format!("QEMU's migration socket: {e}")))
    }

    /// What is due by time.
    fn tick(&mut self, now: Instant) {
        if self.machine.state == State::Seeding {
            self.ask_syncs();
        }
        self.mend(now);
        if self.give_up_at.is_some_and(|t| t <= now) {
            self.give_up_at = None;
            let input = self.timed_out();
            self.input(input);
        }
        self.retry(now);
        if now - self.pinged >= PING_EVERY {
            self.pinged = now;
            if self.control.is_some()
                && let Some(lost) = self.say(&Message::Ping { n: self.generation })
            {
                self.input(lost);
            }
            self.ask_disks();
            self.maybe_seeded();
            self.scrub_disks();
            let holding = matches!(self.machine.state, State::Seeding | State::Standby);
            if holding && self.pressure.may_throttle() {
                self.ask_rates();
            }
            self.publish();
        }
    }

    fn ask_syncs(&mut self) {
        match self.migration.as_ref().map(Migration::dirty_sync_count) {
            Some(Ok(n)) => self.pump.syncs.store(n, Ordering::Release),
            Some(Err(e)) => tracing::debug!(vm = %self.plan.vm, "query-migrate: {e}"),
            None => {}
        }
    }

    fn publish(&mut self) {
        if self.machine.phase() != Phase::Switching {
            self.urgent = None;
            self.leave = None;
        }
        let (report, phase) = (self.report, self.machine.phase());
        self.progress.seeded_bytes = self.pump.seeded_bytes.load(Ordering::Relaxed);
        self.progress.wire_bytes = self.wire_bytes();
        self.progress.pages = *self.pump.pages.lock().unwrap_or_else(PoisonError::into_inner);
        self.note_figures();
        let resume = &mut self.progress.resume;
        resume.sent_pages = self.pump.sent_pages.load(Ordering::Relaxed);
        resume.skipped_pages = self.pump.skipped_pages.load(Ordering::Relaxed);
        resume.scrub_cpu_us = self.pump.scrub_cpu_us.load(Ordering::Relaxed);
        self.progress.lag_ms = self.last_round.map_or(0, |t| t.elapsed().as_millis() as u64);
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.progress = self.progress;
        if status.phase != phase {
            tracing::info!(vm = %self.plan.vm, from = ?status.phase, to = ?phase, "source");
            status.phase = phase;
            status.since = unix_ms();
        }
        match &self.machine.state {
            State::HandedOver { epoch } => {
                status.epoch = *epoch;
                status.report = status.report.or((report.epoch == *epoch).then_some(report));
                status.error = None;
            }
            State::TakingBack { epoch } | State::Yielding { epoch } => status.epoch = status.epoch.max(*epoch),
            State::Broken { error } => status.error = Some(error.clone()),
            State::Standby => status.error = None,
            State::Ended { .. } | State::Orphaned { .. } => status.error = self.machine.error(),
            _ => {}
        }
    }

    fn set_error(&self, error: Option<Refusal>) {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).error = error;
    }
}
