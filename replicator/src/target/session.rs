//! Drives one shadow on the target: turns what happens into the machine's inputs, and carries out its actions.
//!
//! Here it runs, [`leave`] is what is left of it.

mod leave;

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use umbra_api::order::{Announce, Peak, Refusal, RefusalCode, Tier};
use umbra_api::replica::{Phase, Progress, ReplicaStatus, Role};
use umbra_api::wire::control::Message;
use umbra_api::wire::frame::RoundEnd;
use umbra_api::{Epoch, HostId, VmId};

use super::compare::{Ask, Comparer};
use super::gate::Gate;
use super::handover::{HandOver, Syncer};
use super::machine::{self, Action, Durable, Input, Machine, State};
use super::tiers::Tiers;
use crate::engine::{Core, unix_ms};
use crate::faults::{self, Side};
use crate::launch::{Shadow, ShadowRecord};
use crate::link::{FrameWriter, WriteHalf};
use crate::memory::pages::Pages;
use crate::proc::ProcessId;
use crate::qmp::{self, Client, Mark};
use crate::urgent::leave::Leave;
use crate::urgent::{self, Urgent};

const TICK: Duration = Duration::from_secs(1);
const RESUME_TIMEOUT: Duration = Duration::from_secs(10);
/// A source whose ram connection ends says on the other one whether it was meant, and whether it comes again.
const LAST_WORD: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub enum Event {
    Input(Input),
    /// The thread that applies pages and feeds QEMU.
    Feeds {
        thread: i32,
    },
    Setup {
        ram_bytes: u64,
    },
    /// The files of the shadow's RAM, which are written from now on.
    Memory(Vec<Arc<Pages>>),
    RoundEnd(RoundEnd),
    /// The ram connection has ended.
    RamLost(String),
    /// Pages were compared with what the source sent.
    Scrubbed(Scrubbed),
    Loaded {
        load_us: u64,
    },
    /// A peer's words on a control connection, which is answered through `reply`.
    Said {
        message: Message,
        reply: Reply,
    },
    ControlLost {
        why: String,
        reply: Reply,
    },
    QmpClosed,
    Tier {
        tier: Tier,
        peak: Peak,
    },
    Announce(Announce),
    /// Another part of this daemon needs the shadow's monitor, which serves one client at a time.
    LetGo(Sender<()>),
    /// The VM went on to another host: stop watching it, and touch nothing.
    Leave,
}

#[derive(Debug)]
pub struct Scrubbed {
    pub pages: u64,
    /// Of them, those that waited in swap.
    pub from_swap: u64,
    pub cpu: Duration,
    pub differing: Option<Differing>,
}

/// Pages of a RAM block that are not what the source sent.
#[derive(Debug)]
pub struct Differing {
    pub block: String,
    pub pages: u64,
    pub first: u64,
}

/// The writing half of a control connection.
#[derive(Clone, Debug)]
pub struct Reply(Arc<Mutex<FrameWriter<WriteHalf>>>);

impl Reply {
    pub fn new(writer: FrameWriter<WriteHalf>) -> Self {
        Self(Arc::new(Mutex::new(writer)))
    }

    pub fn send(&self, message: &Message) {
        let sent = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send_message(message);
        if let Err(e) = sent {
            // A source that did not hear it asks again.
            tracing::debug!(?message, "not sent: {}", crate::chain(&e));
        }
    }

    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

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

pub struct Plan {
    pub vm: VmId,
    pub name: String,
    pub epoch: Epoch,
    pub peer: HostId,
    pub disks: HandOver,
}

pub struct Session {
    core: Arc<Core>,
    plan: Plan,
    machine: Machine,
    status: Arc<Mutex<ReplicaStatus>>,
    events: Receiver<Event>,
    record: ShadowRecord,
    qmp: Option<Client>,
    /// The source's present control connection.
    control: Option<Reply>,
    feeder: Option<i32>,
    tiers: Tiers,
    disks: HandOver,
    /// As long as a daemon writes them.
    syncer: Option<Syncer>,
    comparer: Option<Comparer>,
    /// Who a stopped guest waits for.
    urgent: Option<Urgent>,
    load_us: u64,
    resumed: (i64, u64),
    left: bool,
    /// No epoch was prepared for it.
    undecided: bool,
    /// The shadow was told to run, or may have been: its disks' images may be the only ones.
    ran: bool,
    /// Of the events behind the first `cont`.
    cont: Option<Mark>,
    progress: Progress,
    /// Through which its RAM is written.
    gate: Arc<Gate>,
    ram_lost: Option<(String, Instant)>,
}

impl Session {
    /// A new shadow, which waits for its pages.
    pub fn start(
        core: Arc<Core>,
        plan: Plan,
        shadow: &Shadow,
        control: Reply,
        gate: Arc<Gate>,
    ) -> std::io::Result<Handle> {
        let machine = Machine::new(plan.epoch);
        Self::spawn(
            core,
            plan,
            (machine, Vec::new()),
            shadow.record.clone(),
            Some(shadow.qmp.clone()),
            (Some(control), gate),
            (false, false),
        )
    }

    /// Goes on after a restart of the replicator, from what is on disk.
    pub fn resume(
        core: Arc<Core>,
        plan: Plan,
        durable: Durable,
        record: ShadowRecord,
        qmp: Option<Client>,
    ) -> std::io::Result<Handle> {
        if let Some(process) = record.process {
            urgent::calm(process, &core.config.cgroup);
        }
        Tiers::new(&record, core.config.tiers.shares()).restore();
        let (shadow, waits) = ask(&record, qmp.as_ref());
        let begin = Machine::resume(durable, plan.epoch, shadow);
        let ran = match durable {
            Durable::Running { .. } | Durable::Exited { .. } | Durable::Fenced { .. } => true,
            // The commit may have come, and its record not; but QEMU knows of one that it was never told to run.
            Durable::Prepared { .. } => !waits,
            _ => false,
        };
        // The disk tells of a handed over image only with 'prepared'.
        let decided = !matches!(durable, Durable::Shadow | Durable::Held);
        Self::spawn(core, plan, begin, record, qmp, (None, Arc::default()), (ran, decided))
    }

    fn spawn(
        core: Arc<Core>,
        plan: Plan,
        (machine, actions): (Machine, Vec<Action>),
        record: ShadowRecord,
        qmp: Option<Client>,
        (control, gate): (Option<Reply>, Arc<Gate>),
        (ran, decided): (bool, bool),
    ) -> std::io::Result<Handle> {
        let (sender, events) = channel();
        let status = ReplicaStatus {
            vm: plan.vm,
            name: plan.name.clone(),
            role: Role::Target,
            peer: plan.peer.clone(),
            epoch: plan.epoch,
            seen: plan.epoch,
            phase: machine.phase(),
            since: unix_ms(),
            tier: None,
            memory: None,
            progress: Progress::default(),
            report: None,
            disks: Vec::new(),
            error: None,
        };
        if let Some(qmp) = &qmp {
            let sender = sender.clone();
            qmp.on_closed(move || {
                let _ = sender.send(Event::QmpClosed);
            });
        }
        let tiers = Tiers::new(&record, core.config.tiers.shares());
        let disks = plan.disks.clone();
        let syncer = control.as_ref().and_then(|_| Syncer::start(&record));
        let comparer = control.as_ref().and_then(|_| Comparer::start(&record));
        let mut session = Self {
            core,
            plan,
            machine,
            status: Arc::new(Mutex::new(status)),
            events,
            record,
            qmp,
            control,
            feeder: None,
            tiers,
            disks,
            syncer,
            comparer,
            urgent: None,
            load_us: 0,
            resumed: (0, 0),
            left: false,
            undecided: !decided,
            ran,
            cont: None,
            progress: Progress::default(),
            gate,
            ram_lost: None,
        };
        let status = session.status.clone();
        let run = move || {
            urgent::this_thread();
            session.perform(actions);
            session.run();
        };
        let thread = std::thread::Builder::new().name("target".into()).spawn(run)?;
        Ok(Handle {
            events: sender,
            status,
            thread: Some(thread),
        })
    }

    /// A discarded session stays to answer a source that asks how its epoch ended; it ends with its handle.
    fn run(mut self) {
        while !self.left {
            match self.events.recv_timeout(TICK) {
                Ok(event) => self.event(event),
                Err(RecvTimeoutError::Timeout) => self.look(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let waited = |(_, since): &(String, Instant)| self.control.is_none() || since.elapsed() >= LAST_WORD;
            if self.ram_lost.as_ref().is_some_and(waited)
                && let Some((why, _)) = self.ram_lost.take()
            {
                self.input(Input::LinkLost(why));
            }
        }
    }

    /// A shadow without a QMP connection is watched by its process.
    fn look(&mut self) {
        if self.qmp.as_ref().is_none_or(Client::is_closed)
            && !matches!(self.machine.state, State::Discarded { .. } | State::Exited { .. })
            && !self.record.alive()
        {
            self.gone();
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Input(input) => self.input(input),
            Event::Feeds { thread } => self.feeder = Some(thread),
            Event::Setup { ram_bytes } => self.progress.ram_bytes = ram_bytes,
            Event::Memory(files) => self.tiers.keep(files, self.status.clone()),
            Event::RamLost(why) => self.ram_lost = Some((why, Instant::now())),
            Event::RoundEnd(end) => {
                self.progress.rounds = end.round;
                self.progress.lag_pages = end.pages;
                if end.round == 0 {
                    self.input(Input::Seeded);
                }
                if let Some(control) = &self.control {
                    control.send(&Message::RoundDone { round: end.round });
                }
                self.publish();
            }
            Event::Scrubbed(found) => self.scrubbed(found),
            Event::Loaded { load_us } => {
                self.load_us = load_us;
                self.input(Input::Loaded);
            }
            Event::Said { message, reply } => self.said(message, reply),
            Event::ControlLost { why, reply } => {
                if self.control.as_ref().is_some_and(|c| c.is(&reply)) {
                    self.control = None;
                    self.input(Input::LinkLost(why));
                }
            }
            Event::QmpClosed => {
                if !self.record.alive() || gone_soon(&self.record) {
                    self.gone();
                }
            }
            Event::Tier { tier, peak } => self.tier(tier, peak),
            Event::Announce(a) => self.announce(a),
            Event::LetGo(done) => {
                self.qmp = None;
                // Whoever asked may have given up.
                let _ = done.send(());
            }
            Event::Leave => self.left = true,
        }
    }

    fn scrubbed(&mut self, found: Scrubbed) {
        let resume = &mut self.progress.resume;
        resume.scrubbed_pages += found.pages;
        resume.scrubbed_swap_pages += found.from_swap;
        resume.scrub_cpu_us += found.cpu.as_micros() as u64;
        if let Some(Differing { block, pages, first }) = found.differing {
            tracing::error!(vm = %self.plan.vm, block, pages, first, "scrub: the shadow's memory is not what was sent");
            self.progress.resume.differing_pages += pages;
            self.say(&Message::Differs { block, pages, first });
        }
        self.publish();
    }

    /// A guest that ran before its QEMU died is told so first: nobody may take it for one that never did.
    fn gone(&mut self) {
        if let State::Resuming { .. } = self.machine.state
            && self.ran_since_cont().is_some()
        {
            self.ran = true;
            self.input(Input::Resumed);
        }
        self.input(Input::ShadowGone);
    }

    /// QEMU says RESUME before the guest's first instruction, so without it the guest did not run, whatever became of `cont`.
    fn ran_since_cont(&self) -> Option<i64> {
        let (qmp, mark) = (self.qmp.as_ref()?, self.cont?);
        qmp.wait(mark, Duration::ZERO, |e| (e.name == "RESUME").then_some(e.unix_us))
            .ok()
    }

    fn said(&mut self, message: Message, reply: Reply) {
        if let Message::Ping { n } = message {
            return reply.send(&Message::Pong { n });
        }
        // Whoever speaks last has the source's ear: a resolving source comes on a new connection.
        self.control = Some(reply.clone());
        match message {
            Message::Prepare { epoch } => {
                if let Some(syncer) = &self.syncer {
                    syncer.now();
                }
                self.comparer = None;
                self.gate.hurry();
                self.tiers.lift();
                // Its main loop is what loads.
                let main_loop = self.record.process.filter(|p| p.alive()).map(|p| p.pid);
                let carriers = self.core.crew.of(self.record.session);
                if let Some(daemon) = self.record.storage.filter(|p| p.alive()) {
                    urgent::to_its_end(daemon.pid);
                }
                let threads = main_loop.into_iter().chain(self.feeder).chain(carriers);
                let leave = main_loop.and_then(|pid| Leave::give(pid, &self.core.config.cgroup));
                self.urgent = Some(Urgent::new(threads, leave));
                self.input(Input::Prepare { epoch });
            }
            Message::DisksEqual { .. } => {
                self.syncer = None;
                let begun = self.qmp.as_ref().map(|qmp| self.disks.begin(&self.record, qmp));
                if let Some(Err(e)) = begun {
                    // The feeder tries again.
                    tracing::warn!(vm = %self.plan.vm, "handing the disks over: {e}");
                }
            }
            Message::DiskSums { disk, from, sums } => {
                let ask = Ask {
                    disk,
                    from,
                    sums,
                    reply,
                };
                let _ = self.comparer.as_ref().map(|c| c.look(ask));
            }
            Message::Commit { epoch } => self.input(Input::Commit { epoch }),
            Message::Abort { epoch } => self.input(Input::Abort { epoch }),
            Message::Resolve { epoch, .. } => self.input(Input::Resolve { epoch }),
            Message::Goodbye { reason } => self.input(Input::Goodbye(reason)),
            Message::Fence { epoch, dead, .. } => self.input(Input::Fence { epoch, dead }),
            other => {
                let refusal = Refusal::new(RefusalCode::BadOrder, format!("{other:?} makes no sense here"));
                reply.send(&Message::Refused { refusal });
            }
        }
    }

    fn input(&mut self, input: Input) {
        tracing::debug!(vm = %self.plan.vm, ?input, state = ?self.machine.state);
        let actions = self.machine.apply(input);
        self.perform(actions);
    }

    fn perform(&mut self, actions: Vec<Action>) {
        let mut queue = VecDeque::from(actions);
        while let Some(action) = queue.pop_front() {
            tracing::debug!(vm = %self.plan.vm, ?action);
            let step = faults::target_step(&action);
            self.core.faults.before(Side::Target, step);
            let input = self.act(action);
            self.core.faults.after(Side::Target, step);
            if let Some(input) = input {
                queue.extend(self.machine.apply(input));
            }
        }
        self.publish();
    }

    fn act(&mut self, action: Action) -> Option<Input> {
        match action {
            Action::Write(durable) => return self.write(durable),
            Action::SayPrepared { epoch } => self.say(&Message::Prepared {
                epoch,
                load_us: self.load_us,
            }),
            Action::SayRunning { epoch } => {
                let (resume_unix_us, resume_us) = self.resumed;
                self.say(&Message::Running {
                    epoch,
                    resume_unix_us,
                    resume_us,
                });
            }
            Action::SayAborted { epoch } => self.say(&Message::Aborted { epoch }),
            Action::Refuse(refusal) => self.say(&Message::Refused { refusal }),
            Action::Resume => return self.resume_guest(),
            Action::Discard => self.discard(),
            Action::Kill => {
                // Its images may have what no other copy has.
                self.ran = true;
                self.discard();
            }
            Action::Hold => self.hold(),
        }
        None
    }

    fn say(&self, message: &Message) {
        if let Some(control) = &self.control {
            control.send(message);
        }
    }

    fn write(&mut self, durable: Durable) -> Option<Input> {
        let error = match &self.machine.state {
            State::Discarded { error } => error.clone(),
            State::Exited { .. } => Some(exited()),
            _ => None,
        };
        let written = (self.core.journal).update(self.plan.vm, |r| r.target_writes(durable, error.clone()));
        match written {
            Ok(()) => Some(Input::Written),
            Err(e) => {
                // Without 'written' nothing is said or done that counts on it; the source gives up by its time-out.
                tracing::error!(vm = %self.plan.vm, ?durable, "journal: {e}");
                None
            }
        }
    }

    /// `cont`. The CPU's limit went when the switchover began; after a restart it may be there still.
    fn resume_guest(&mut self) -> Option<Input> {
        let Some(qmp) = self.qmp.clone() else {
            return Some(Input::ShadowGone);
        };
        self.tiers.lift();
        // The first one's: an answer that is late is not taken for one that never came.
        let (mark, started) = (*self.cont.get_or_insert_with(|| qmp.mark()), Instant::now());
        let resumed = match qmp.execute("cont", Value::Null) {
            Ok(_) => qmp
                .wait(mark, RESUME_TIMEOUT, |e| (e.name == "RESUME").then_some(e.unix_us))
                .unwrap_or_else(|_| unix_ms().0 * 1000),
            Err(e) => {
                tracing::error!(vm = %self.plan.vm, "cont: {e}");
                match self.ran_since_cont() {
                    Some(at) => at,
                    None if gone_soon(&self.record) => return Some(Input::ShadowGone),
                    None => return None,
                }
            }
        };
        self.ran = true;
        self.resumed = (resumed, started.elapsed().as_micros() as u64);
        Some(Input::Resumed)
    }

    fn announce(&self, a: Announce) {
        let qmp = match &self.qmp {
            Some(qmp) => Ok(qmp.clone()),
            None => Client::connect(&self.record.qmp_path, RESUME_TIMEOUT),
        };
        if let Err(e) = qmp.and_then(|q| qmp::announce(&q, &a)) {
            tracing::warn!(vm = %self.plan.vm, "{e}");
        }
    }

    fn tier(&mut self, tier: Tier, peak: Peak) {
        match self.tiers.set(tier, peak) {
            Ok(()) => self.status.lock().unwrap_or_else(PoisonError::into_inner).tier = Some(tier),
            Err(e) => tracing::warn!(vm = %self.plan.vm, ?tier, "tier: {e}"),
        }
    }

    fn publish(&mut self) {
        let phase = self.machine.phase();
        if !matches!(phase, Phase::Switching | Phase::Prepared) {
            self.urgent = None;
        }
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.progress = self.progress;
        if status.phase != phase {
            tracing::info!(vm = %self.plan.vm, from = ?status.phase, to = ?phase, "target");
            status.phase = phase;
            status.since = unix_ms();
        }
        match &self.machine.state {
            State::Running { epoch } => {
                status.epoch = *epoch;
                status.tier = Some(Tier::Active);
                self.tiers.runs();
            }
            State::Prepared { epoch } | State::Resuming { epoch } => status.epoch = *epoch,
            State::Exited { epoch } => {
                status.epoch = *epoch;
                status.error = Some(exited());
            }
            State::Discarded { error } => status.error.clone_from(error),
            _ => {}
        }
        if let Phase::Released | Phase::Failed = status.phase {
            status.tier = None;
            status.memory = None;
        }
    }
}

fn exited() -> Refusal {
    Refusal::new(RefusalCode::NoSuchVm, "the VM's QEMU has exited")
}

pub(super) fn gone_soon(record: &ShadowRecord) -> bool {
    record.process.is_none_or(ProcessId::gone_soon)
}

/// What QEMU says of a shadow that outlived its replicator, and whether it waits as it did before or after its load: a guest that ran
/// and was stopped by its disk says something else.
fn ask(record: &ShadowRecord, qmp: Option<&Client>) -> (machine::Shadow, bool) {
    let answer = |command: &str| qmp.and_then(|q| q.execute(command, Value::Null).ok());
    if !record.alive() {
        return (machine::Shadow::Gone, false);
    }
    let Some(status) = answer("query-status") else {
        // Alive and silent: only its source can say what it is, and asks.
        return (machine::Shadow::Loaded, false);
    };
    if status["running"].as_bool() == Some(true) {
        return (machine::Shadow::Runs, false);
    }
    let migration = answer("query-migrate");
    let shadow = match migration.as_ref().and_then(|m| m["status"].as_str()) {
        Some("completed") => machine::Shadow::Loaded,
        _ => machine::Shadow::Waits,
    };
    (
        shadow,
        matches!(status["status"].as_str(), Some("inmigrate" | "paused")),
    )
}
