//! All replicas of this host: takes orders, opens sessions, and finds them again after a restart.
//!
//! An order is judged here, under one lock, against what is on disk: its epoch first, then whether it makes sense in
//! the replica's phase. What it leads to happens in the replica's own thread.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use umbra_api::order::{Order, OrderKind, Pacing, Refusal, RefusalCode};
use umbra_api::pace;
use umbra_api::replica::{Phase, Progress, ReplicaStatus, Role};
use umbra_api::{Epoch, HostId, UnixMs, VmId};
use umbra_daemon::config::Invalid;

mod adoptable;
mod arrive;
mod facts;
mod farewell;
mod parked;
mod recover;
mod tell;

pub use arrive::{Hello, Welcome};

use crate::adopt;
use crate::config::Config;
use crate::faults::Faults;
use crate::journal::{Journal, QemuRef, SourceRecord, TargetRecord, VmRecord};
use crate::launch::{self, Images, ShadowRecord};
use crate::limits::{Limits, Throttle};
use crate::link::{Identity, Security};
use crate::qmp::Client;
use crate::resume::held;
use crate::source;
use crate::source::machine::{Durable as SourceDurable, Input as SourceInput};
use crate::source::park::Parked;
use crate::target;
use crate::target::feed::Feed;
use crate::target::handover::HandOver;
use crate::target::machine::{Durable as TargetDurable, Input as TargetInput};
use crate::urgent::Crew;

const QMP_TIMEOUT: Duration = Duration::from_secs(3);
/// A primary that is told to quit writes nothing, so it is quick.
const QUIT_TIMEOUT: Duration = Duration::from_secs(5);
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// What all sessions share.
pub struct Core {
    pub config: Config,
    security: RwLock<Security>,
    pub throttle: Throttle,
    /// Threads that carry disks of shadows, by session.
    pub crew: Crew,
    /// VMs here whose mirrors wait for another link.
    pub parked: Parked,
    pub journal: Journal,
    pub faults: Faults,
}

impl Core {
    /// How this host's links are protected, from the next connection on.
    pub fn security(&self) -> Security {
        self.security.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[derive(Default)]
struct Entry {
    source: Option<source::Handle>,
    target: Option<target::Handle>,
}

pub struct Engine {
    core: Arc<Core>,
    vms: Mutex<HashMap<VmId, Entry>>,
    /// Shadows whose ram connection has not come yet, by session.
    feeds: Mutex<HashMap<u64, Feed>>,
    /// This replicator ends: no shadow is begun any more.
    stopping: AtomicBool,
}

pub fn unix_ms() -> UnixMs {
    UnixMs::from_system(SystemTime::now())
}

fn wrong_phase(detail: impl Into<String>) -> Refusal {
    Refusal::new(RefusalCode::WrongPhase, detail)
}

fn local(e: &dyn std::fmt::Display) -> Refusal {
    Refusal::new(RefusalCode::Local, e.to_string())
}

impl Engine {
    /// Opens the journal and takes up every replica where it was.
    pub fn start(config: Config, security: Security) -> std::io::Result<Arc<Self>> {
        let journal = Journal::open(&config.state_dir)?;
        let throttle = Throttle::new(config.limits(), config.link.bandwidth_in_switchover);
        let core = Arc::new(Core {
            faults: Faults::new(config.test_faults.clone()),
            config,
            security: RwLock::new(security),
            throttle,
            crew: Crew::default(),
            parked: Parked::default(),
            journal,
        });
        let engine = Self {
            core,
            vms: Mutex::default(),
            feeds: Mutex::default(),
            stopping: AtomicBool::new(false),
        };
        for record in engine.core.journal.all() {
            engine.take_up(record)?;
        }
        engine.sweep();
        let engine = Arc::new(engine);
        tell::keep_telling(&engine)?;
        parked::watch(&engine)?;
        Ok(engine)
    }

    pub fn security(&self) -> Security {
        self.core.security()
    }

    pub fn limits(&self) -> Limits {
        self.core.throttle.limits()
    }

    pub fn set_limits(&self, limits: Limits) {
        tracing::info!(?limits, "limits");
        self.core.throttle.set(limits);
    }

    /// Takes what can change while the daemon runs from a configuration that was read anew.
    pub fn reload(&self, config: &Config) -> Result<(), Invalid> {
        let security = config.security()?;
        *self.core.security.write().unwrap_or_else(PoisonError::into_inner) = security;
        self.set_limits(config.limits());
        Ok(())
    }

    /// Threads that carry disks of shadows, by session.
    pub fn crew(&self) -> &Crew {
        &self.core.crew
    }

    pub fn silence(&self) -> Duration {
        Duration::from_millis(self.core.config.link.silence_ms)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VmId, Entry>> {
        // An entry is replaced as a whole: a panic elsewhere leaves nothing half done.
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_up(&self, record: VmRecord) -> std::io::Result<()> {
        let mut entry = Entry::default();
        if let Some(s) = &record.source
            && s.durable == SourceDurable::Released
            && s.qemu.id.alive()
        {
            // Nobody knows whether there are mirrors that wait.
            self.core.parked.note(record.vm);
        }
        if let Some(s) = record.source
            && !matches!(s.durable, SourceDurable::Released | SourceDurable::Retired)
        {
            let qmp = s.qemu.qmp.iter().find_map(|p| Client::connect(p, QMP_TIMEOUT).ok());
            let plan = s.plan(record.vm, &record.name);
            entry.source = Some(source::Session::resume(self.core.clone(), plan, s.durable, qmp)?);
        }
        if let Some(t) = record.target
            && let Some(shadow) = t.shadow
        {
            let qmp = Client::connect(&shadow.qmp_path, QMP_TIMEOUT).ok();
            let plan = target::session::Plan {
                vm: record.vm,
                name: record.name,
                epoch: t.epoch,
                peer: t.peer,
                disks: HandOver::default(),
            };
            entry.target = Some(target::Session::resume(
                self.core.clone(),
                plan,
                t.durable,
                shadow,
                qmp,
            )?);
        }
        self.lock().insert(record.vm, entry);
        Ok(())
    }

    /// Discards shadows that no record knows: the replicator died while it started them.
    fn sweep(&self) {
        let known: Vec<(VmId, u64)> = self.core.journal.all().iter().flat_map(shadows_of).collect();
        // A journal that is gone knows nothing of shadows that became the VM.
        let images = match self.core.journal.all().is_empty() {
            true => Images::Keep,
            false => Images::Remove,
        };
        let found = match launch::records(&self.core.config.launch()) {
            Ok(found) => found,
            Err(e) => return tracing::warn!("leftover shadows can't be looked for: {e}"),
        };
        for record in found.iter().filter(|r| !known.contains(&(r.vm, r.session))) {
            tracing::info!(vm = %record.vm, session = record.session, "discarding a shadow that nobody knows");
            if let Err(e) = launch::discard(record, images) {
                tracing::warn!(vm = %record.vm, "leftover shadow: {e}");
            }
        }
    }

    /// All replicas of this host.
    pub fn replicas(&self) -> Vec<ReplicaStatus> {
        let mut vms = self.lock();
        let mut out = Vec::new();
        for record in self.core.journal.all() {
            let entry = vms.entry(record.vm).or_default();
            self.reap(&record, entry);
            let seen = |mut status: ReplicaStatus| {
                status.seen = record.epoch;
                status
            };
            out.extend(entry.source.as_ref().map(|s| seen(retired(s.status(), &record))));
            match (&entry.target, &record.target) {
                (Some(t), _) => out.push(seen(t.status())),
                (None, Some(t)) if matches!(t.durable, TargetDurable::Admitted | TargetDurable::Held) => {
                    out.push(admitted(&record, t));
                }
                _ => {}
            }
        }
        out
    }

    /// A VM that was handed on from here is no replica of the target's any more.
    fn reap(&self, record: &VmRecord, entry: &mut Entry) {
        if record.target.is_none()
            && let Some(t) = entry.target.take()
        {
            // Its thread may have ended already.
            let _ = t.events.send(target::session::Event::Leave);
        }
    }

    /// Takes or refuses an order. Blocking: adopting a VM asks QEMU a dozen questions.
    pub fn order(&self, order: &Order) -> Result<(), Refusal> {
        let early = self.core.journal.get(order.vm);
        if early.is_none_or(|r| !r.knows(order.id) && order.epoch >= r.epoch) {
            self.fence_first(order)?;
        }
        let mut vms = self.lock();
        let record = self.core.journal.get(order.vm);
        if record.as_ref().is_some_and(|r| r.knows(order.id)) {
            return Ok(());
        }
        let seen = record.as_ref().map_or(Epoch(0), |r| r.epoch);
        if order.epoch < seen {
            let detail = format!(
                "order {} of epoch {}, epoch {seen} was seen here",
                order.kind.name(),
                order.epoch
            );
            return Err(Refusal::new(RefusalCode::StaleEpoch, detail));
        }
        let entry = vms.entry(order.vm).or_default();
        if let Some(record) = &record {
            self.reap(record, entry);
        }
        tracing::info!(vm = %order.vm, epoch = %order.epoch, order = order.kind.name(), "order");
        match &order.kind {
            OrderKind::Admit { source } => self.admit(order, entry, source),
            OrderKind::Protect { target, link, pacing } => self.protect(order, entry, target, link, *pacing),
            OrderKind::Tier { tier, expected_peak } => {
                let held = record
                    .and_then(|r| r.target)
                    .is_some_and(|t| t.durable == TargetDurable::Held);
                if entry.target.is_none() && !held {
                    return Err(wrong_phase("there is no shadow of this VM here"));
                }
                let noted = self.core.journal.update(order.vm, |r| {
                    r.epoch = r.epoch.max(order.epoch);
                    r.remember(order.id);
                    if let Some(t) = r.target.as_mut() {
                        t.tier = Some((*tier, *expected_peak));
                    }
                });
                noted.map_err(|e| local(&e))?;
                if let Some(target) = &entry.target {
                    let (tier, peak) = (*tier, *expected_peak);
                    let _ = target.events.send(target::session::Event::Tier { tier, peak });
                }
                Ok(())
            }
            OrderKind::Switchover => self.switchover(order, entry),
            OrderKind::Announce { announce } => match entry.target.as_ref().map(|t| (t, t.status().phase)) {
                Some((t, Phase::Active)) => {
                    let _ = t.events.send(target::session::Event::Announce(*announce));
                    self.remember(order)
                }
                _ => Err(wrong_phase("no shadow of this VM became active here")),
            },
            OrderKind::Release => self.release(order, entry),
            OrderKind::Retire => self.retire(order, entry),
            OrderKind::Recover { way, dead, link } => self.recover(order, entry, *way, dead.as_ref(), link.as_deref()),
            OrderKind::HandOver => self.hand_over(order, entry),
        }
    }

    fn remember(&self, order: &Order) -> Result<(), Refusal> {
        let noted = self.core.journal.update(order.vm, |r| {
            r.epoch = r.epoch.max(order.epoch);
            r.remember(order.id);
        });
        noted.map_err(|e| local(&e))
    }

    fn admit(&self, order: &Order, entry: &mut Entry, source: &HostId) -> Result<(), Refusal> {
        if let Some(t) = &entry.target {
            let phase = t.status().phase;
            if phase != Phase::Released {
                return Err(wrong_phase(format!(
                    "there is a shadow of this VM here already, in phase {phase:?}"
                )));
            }
        }
        let record = TargetRecord {
            peer: source.clone(),
            epoch: order.epoch,
            durable: TargetDurable::Admitted,
            shadow: None,
            link: None,
            tier: None,
            since: unix_ms(),
            error: None,
        };
        let noted = self.core.journal.update(order.vm, |r| {
            r.epoch = r.epoch.max(order.epoch);
            r.remember(order.id);
            r.target = Some(record);
        });
        noted.map_err(|e| local(&e))?;
        entry.target = None;
        Ok(())
    }

    fn protect(
        &self,
        order: &Order,
        entry: &mut Entry,
        target: &HostId,
        link: &str,
        pacing: Pacing,
    ) -> Result<(), Refusal> {
        if let Err((key, reason)) = pacing.check() {
            return Err(Refusal::new(RefusalCode::BadOrder, format!("{key}: {reason}")));
        }
        if link
            .rsplit_once(':')
            .is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err())
        {
            return Err(Refusal::new(
                RefusalCode::BadOrder,
                format!("link {link:?} is not address:port"),
            ));
        }
        if let Some(s) = &entry.source {
            match retired(s.status(), &self.record(order.vm)?).phase {
                Phase::Released | Phase::Failed | Phase::Retired => {}
                Phase::Relinquished => {
                    return Err(wrong_phase(
                        "the stopped primary of an earlier switchover is kept here: retire it first",
                    ));
                }
                phase => return Err(wrong_phase(format!("this VM is protected already, in phase {phase:?}"))),
            }
        }
        entry.target.as_ref().map_or(Ok(()), let_go)?;
        let adopted = adopt::adopt(order.vm, self.core.config.scope, self.core.config.storage)?;
        for warning in &adopted.warnings {
            tracing::warn!(vm = %order.vm, "{warning}");
        }
        let qemu = QemuRef {
            id: adopted.process.id,
            qmp: adopted.process.qmp.clone(),
        };
        let record = SourceRecord {
            peer: target.clone(),
            link: link.to_owned(),
            epoch: order.epoch,
            durable: SourceDurable::Protecting,
            qemu,
            migrated_ms: None,
            pacing,
            since: unix_ms(),
            report: None,
            leftover: None,
            mirrors: Vec::new(),
        };
        let noted = self.core.journal.update(order.vm, |r| {
            r.epoch = r.epoch.max(order.epoch);
            r.remember(order.id);
            r.name.clone_from(&adopted.name);
            r.source = Some(record.after(r.source.take()));
            r.farewells.retain(|f| f.host != *target || f.epoch != order.epoch);
        });
        noted.map_err(|e| local(&e))?;
        let plan = source::session::Plan {
            vm: order.vm,
            name: adopted.name,
            epoch: order.epoch,
            peer: target.clone(),
            link: link.to_owned(),
            pacing,
            process: adopted.process.id,
            report: None,
        };
        let handle = source::Session::start(self.core.clone(), plan, adopted.qmp, adopted.spec);
        entry.source = Some(handle.map_err(|e| local(&e))?);
        Ok(())
    }

    fn record(&self, vm: VmId) -> Result<VmRecord, Refusal> {
        self.core
            .journal
            .get(vm)
            .ok_or_else(|| wrong_phase("nothing is known of this VM here"))
    }

    fn switchover(&self, order: &Order, entry: &Entry) -> Result<(), Refusal> {
        let source = entry
            .source
            .as_ref()
            .ok_or_else(|| wrong_phase("this VM is not protected from here"))?;
        let status = source.status();
        if let Phase::Seeding | Phase::Standby = status.phase {
            pace::gate(&status.progress)?;
        }
        if status.phase != Phase::Standby {
            return Err(wrong_phase(format!(
                "a switchover needs a standby, the replica is in phase {:?}",
                status.phase
            )));
        }
        if order.epoch <= status.epoch {
            let detail = format!("a switchover needs an epoch above the protection's, {}", status.epoch);
            return Err(Refusal::new(RefusalCode::StaleEpoch, detail));
        }
        // Before the disk: the session's own note of the epoch is what must come first, and it does.
        let _ = source
            .events
            .send(source::session::Event::Input(SourceInput::Switchover {
                epoch: order.epoch,
            }));
        self.remember(order)
    }

    fn release(&self, order: &Order, entry: &mut Entry) -> Result<(), Refusal> {
        if let Some(s) = &entry.source {
            match s.status().phase {
                Phase::Provisioning | Phase::Seeding | Phase::Standby | Phase::Switching => {
                    let _ = s.events.send(source::session::Event::Input(SourceInput::Release));
                    return self.remember(order);
                }
                _ => {}
            }
        }
        match entry.target.as_ref().map(|t| (t, t.status().phase)) {
            Some((_, phase @ (Phase::Active | Phase::Prepared))) => {
                let detail = format!("the shadow here is {phase:?}: a release never stops a VM");
                return Err(wrong_phase(detail));
            }
            Some((t, phase)) if phase != Phase::Released => {
                let _ = t.events.send(target::session::Event::Input(TargetInput::Release));
                return self.remember(order);
            }
            _ => {}
        }
        // Nothing is at work: forget what has ended.
        held::forget(&self.core.config.ram_dir, order.vm);
        let forget = |r: &mut VmRecord| {
            r.remember(order.id);
            r.epoch = r.epoch.max(order.epoch);
            // A VM that ran here and died is not forgotten before the next one comes: its source may ask yet.
            let over = |t: &TargetRecord| t.shadow.is_none() && !matches!(t.durable, TargetDurable::Exited { .. });
            if r.target.as_ref().is_some_and(over) {
                r.target = None;
            }
        };
        self.core.journal.update(order.vm, forget).map_err(|e| local(&e))
    }

    fn retire(&self, order: &Order, entry: &Entry) -> Result<(), Refusal> {
        let record = self.record(order.vm)?;
        let source = record
            .source
            .ok_or_else(|| wrong_phase("this VM was never protected from here"))?;
        match source.durable {
            SourceDurable::HandedOver { .. } => {}
            SourceDurable::Retired => return self.remember(order),
            other => {
                return Err(wrong_phase(format!(
                    "only a VM that was handed over can be retired, this one is {other:?}"
                )));
            }
        }
        if entry
            .source
            .as_ref()
            .is_some_and(|s| s.status().phase != Phase::Relinquished)
        {
            return Err(wrong_phase("the switchover is not complete"));
        }
        quit(&source.qemu)?;
        if let Some(shadow) = &source.leftover {
            // The VM runs elsewhere, with all that these disks had.
            launch::discard(shadow, Images::Remove)?;
        }
        let noted = self.core.journal.update(order.vm, |r| {
            r.remember(order.id);
            r.epoch = r.epoch.max(order.epoch);
            if let Some(s) = r.source.as_mut() {
                s.durable = SourceDurable::Retired;
                s.leftover = None;
            }
        });
        noted.map_err(|e| local(&e))
    }

    /// Whom this host takes or took a shadow of the VM from.
    pub fn source_of(&self, vm: VmId) -> Option<HostId> {
        self.core.journal.get(vm)?.target.map(|t| t.peer)
    }

    /// Where a disk of a session's shadow is written, as long as it waits.
    pub fn disk_socket(&self, session: u64, disk: usize, from: &Identity) -> Result<PathBuf, String> {
        let targets = self.core.journal.all().into_iter().filter_map(|r| r.target);
        let found = targets
            .filter(|t| t.durable == TargetDurable::Shadow)
            .find_map(|t| Some((t.peer, t.shadow.filter(|s| s.session == session)?)));
        let (peer, shadow) = found.ok_or("no session waits for this disk connection")?;
        from.is(&peer)?;
        match shadow.disks.get(disk) {
            Some(_) => Ok(launch::disks::socket(&shadow.dir)),
            None => Err(format!("the session has {} disks", shadow.disks.len())),
        }
    }

    /// Where the session of a VM's shadow hears, if there is one.
    pub fn target_of(&self, vm: VmId) -> Option<Sender<target::session::Event>> {
        self.lock()
            .get(&vm)
            .and_then(|e| e.target.as_ref())
            .map(|t| t.events.clone())
    }

    /// There is no session of this VM, and it ran here under `epoch`.
    pub fn ran(&self, vm: VmId, epoch: Epoch) -> bool {
        let target = self.core.journal.get(vm).and_then(|r| r.target);
        target.is_some_and(
            |t| matches!(t.durable, TargetDurable::Running { epoch: e } | TargetDurable::Exited { epoch: e } if e == epoch),
        )
    }

    /// There is no session of this VM: makes sure that none will ever run it under `epoch`.
    pub fn never(&self, vm: VmId, epoch: Epoch) -> Result<(), Refusal> {
        self.core
            .journal
            .update(vm, |r| r.epoch = r.epoch.max(epoch))
            .map_err(|e| local(&e))
    }

    /// Leaves every VM as it is: ends what is undecided, and waits for it. Blocking.
    pub fn stop(&self) {
        let mut vms = self.lock();
        self.stopping.store(true, Ordering::Relaxed);
        let entries: Vec<Entry> = vms.drain().map(|(_, e)| e).collect();
        drop(vms);
        for e in &entries {
            if let Some(s) = &e.source {
                let _ = s.events.send(source::session::Event::Stop);
            }
            if let Some(t) = &e.target {
                // An undecided shadow goes, its memory stays: its source goes on with it when this daemon is back.
                let why = "the target's replicator was stopped";
                let _ = t
                    .events
                    .send(target::session::Event::Input(TargetInput::LinkLost(why.into())));
                let _ = t.events.send(target::session::Event::Leave);
            }
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        let threads = entries.into_iter().flat_map(|e| {
            [e.source.and_then(|s| s.thread), e.target.and_then(|t| t.thread)]
                .into_iter()
                .flatten()
        });
        for thread in threads {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        self.unpark_all();
    }
}

fn shadows_of(r: &VmRecord) -> Vec<(VmId, u64)> {
    let leftover = r.source.as_ref().and_then(|s| s.leftover.as_ref());
    let shadow = r.target.as_ref().and_then(|t| t.shadow.as_ref());
    leftover
        .into_iter()
        .chain(shadow)
        .map(|s: &ShadowRecord| (s.vm, s.session))
        .collect()
}

/// The session does not know that the process was quit after it had ended.
fn retired(mut status: ReplicaStatus, record: &VmRecord) -> ReplicaStatus {
    if status.phase == Phase::Relinquished
        && record
            .source
            .as_ref()
            .is_some_and(|s| s.durable == SourceDurable::Retired)
    {
        status.phase = Phase::Retired;
    }
    status
}

fn admitted(record: &VmRecord, t: &TargetRecord) -> ReplicaStatus {
    ReplicaStatus {
        vm: record.vm,
        name: record.name.clone(),
        role: Role::Target,
        peer: t.peer.clone(),
        epoch: t.epoch,
        seen: record.epoch,
        phase: Phase::Provisioning,
        since: t.since,
        tier: None,
        memory: None,
        progress: Progress::default(),
        report: None,
        disks: Vec::new(),
        error: None,
    }
}

/// The VM that is to be protected was a shadow here: its session gives up the monitor.
fn let_go(target: &target::Handle) -> Result<(), Refusal> {
    let (done, heard) = channel();
    match target.status().phase {
        Phase::Active => {}
        Phase::Released => return Ok(()),
        phase => return Err(wrong_phase(format!("the VM's shadow here is in phase {phase:?}"))),
    }
    // A session that has ended has let go as well.
    if target.events.send(target::session::Event::LetGo(done)).is_ok() {
        let _ = heard.recv_timeout(QMP_TIMEOUT);
    }
    Ok(())
}

/// Ends a stopped primary. One that runs is never ended here.
fn quit(qemu: &QemuRef) -> Result<(), Refusal> {
    if !qemu.id.alive() {
        return Ok(());
    }
    let connect = || qemu.qmp.iter().map(|p| Client::connect(p, QMP_TIMEOUT));
    let qmp = match connect().find(Result::is_ok).or_else(|| connect().next()) {
        Some(client) => client?,
        None => {
            return Err(Refusal::new(
                RefusalCode::QmpUnavailable,
                "the stopped primary has no QMP socket",
            ));
        }
    };
    let status = qmp.execute("query-status", Value::Null)?;
    if status["running"].as_bool() != Some(false) {
        return Err(wrong_phase(format!(
            "the primary is not stopped but {}: it is not quit",
            status["status"]
        )));
    }
    // QEMU may close the connection before it answers.
    let _ = qmp.execute("quit", Value::Null);
    let deadline = Instant::now() + QUIT_TIMEOUT;
    while qemu.id.alive() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    launch::process::kill(qemu.id, QUIT_TIMEOUT).map_err(|e| local(&e))
}
