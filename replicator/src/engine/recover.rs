//! An operator's way out of what ends by itself no more, and the word of a peer that has taken it.
//!
//! A copy is started here only after the other side has made durable that its own never runs (`Fence`), or after an operator has
//! declared that host dead, which is noted first and told to it for as long as it takes (`tell`).

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use serde_json::Value;
use umbra_api::order::{Order, OrderKind, Refusal, RefusalCode};
use umbra_api::recover::Way;
use umbra_api::replica::Phase;
use umbra_api::wire::control::Message;
use umbra_api::{Epoch, HostId, VmId};

use super::{Engine, Entry, QMP_TIMEOUT, QUIT_TIMEOUT, local, wrong_phase};
use crate::journal::{Fence, SourceRecord, VmRecord};
use crate::launch::{self, Images};
use crate::link::Identity;
use crate::proc;
use crate::qmp::Client;
use crate::source::machine::{Durable as SourceDurable, Input as SourceInput};
use crate::target::machine::{Durable as TargetDurable, Input as TargetInput};
use crate::target::session::{Event, Reply};
use crate::{source, target};

/// For a session that is over to end its thread.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

impl Engine {
    /// What an order needs of the other side before anything is done here. It may take as long as the link allows, so it is
    /// asked without the lock.
    pub(super) fn fence_first(&self, order: &Order) -> Result<(), Refusal> {
        let OrderKind::Recover { way, dead: None, link } = &order.kind else {
            return Ok(());
        };
        let fence = match way {
            Way::TakeBack => {
                let source = stopped_primary(&self.record(order.vm)?)?;
                (source.peer, Some(source.link))
            }
            Way::RunShadow => {
                let record = self.record(order.vm)?;
                let (_, peer, its) = prepared(&record)?;
                (peer, link.clone().or(its))
            }
            Way::Ask | Way::Discard | Way::Clean => return Ok(()),
        };
        let fence = Fence {
            host: fence.0,
            link: fence.1,
            epoch: order.epoch,
        };
        let lost = |e: Refusal| {
            let hint = format!(
                "; if {} is lost for ever, it must be said: --host-is-dead {}",
                fence.host, fence.host
            );
            Refusal::new(e.code, format!("{}{hint}", e.detail))
        };
        self.tell_fence(order.vm, &fence, false).map_err(lost)
    }

    /// Has a peer write down that its copy never runs below the epoch.
    pub(super) fn tell_fence(&self, vm: VmId, fence: &Fence, dead: bool) -> Result<(), Refusal> {
        let link = fence.link.as_deref().ok_or_else(|| {
            let detail = format!("the link address of {} is not known here", fence.host);
            Refusal::new(RefusalCode::PeerUnreachable, detail)
        })?;
        let question = Message::Fence {
            vm,
            epoch: fence.epoch,
            dead,
        };
        match self.ask_peer(&fence.host, link, self.silence() + QUIT_TIMEOUT, &question)? {
            Message::Aborted { epoch } if epoch == fence.epoch => Ok(()),
            Message::Refused { refusal } => Err(Refusal::new(
                match refusal.code {
                    RefusalCode::StaleEpoch => RefusalCode::StaleEpoch,
                    _ => RefusalCode::PeerRefused,
                },
                format!("{}: {refusal}", fence.host),
            )),
            other => Err(source::control::unexpected(link, &other)),
        }
    }

    pub(super) fn recover(
        &self,
        order: &Order,
        entry: &mut Entry,
        way: Way,
        dead: Option<&HostId>,
        link: Option<&str>,
    ) -> Result<(), Refusal> {
        match way {
            Way::TakeBack => {
                let record = self.record(order.vm)?;
                let source = stopped_primary(&record)?;
                self.note_dead(order, dead, &source.peer, Some(source.link.clone()))?;
                self.tell_source(entry, &record, SourceInput::Fenced { epoch: order.epoch })?;
            }
            Way::Ask => {
                let record = self.record(order.vm)?;
                match record.source.as_ref().map(|s| (s.durable, s.qemu.id.alive())) {
                    Some((SourceDurable::Relinquished { .. }, false)) => {}
                    _ => return Err(wrong_phase("no primary was lost here in the middle of a switchover")),
                }
                self.tell_source(entry, &record, SourceInput::Ask)?;
            }
            Way::RunShadow => {
                let (epoch, peer, its) = prepared(&self.record(order.vm)?)?;
                let session = waiting(entry)?;
                self.note_dead(order, dead, &peer, link.map(str::to_owned).or(its))?;
                let _ = session.events.send(Event::Input(TargetInput::Commit { epoch }));
            }
            Way::Discard => {
                let session = waiting(entry)?;
                let fence = TargetInput::Fence {
                    epoch: order.epoch,
                    dead: false,
                };
                let _ = session.events.send(Event::Input(fence));
            }
            Way::Clean => self.clean(order.vm)?,
        }
        self.remember(order)
    }

    /// An operator's word that a host is dead is on disk before anything follows from it.
    fn note_dead(
        &self,
        order: &Order,
        dead: Option<&HostId>,
        peer: &HostId,
        link: Option<String>,
    ) -> Result<(), Refusal> {
        let Some(dead) = dead else { return Ok(()) };
        if dead != peer {
            let detail = format!("{dead} was declared dead, but the other side of this VM is {peer}");
            return Err(Refusal::new(RefusalCode::BadOrder, detail));
        }
        let fence = Fence {
            host: peer.clone(),
            link,
            epoch: order.epoch,
        };
        tracing::warn!(vm = %order.vm, host = %dead, epoch = %order.epoch, "declared dead by an operator");
        let noted = self.core.journal.update(order.vm, |r| {
            r.epoch = r.epoch.max(order.epoch);
            r.fence = Some(fence);
        });
        noted.map_err(|e| local(&e))
    }

    /// Brings a word to the source's session, which is taken up again if it has ended.
    fn tell_source(&self, entry: &mut Entry, record: &VmRecord, word: SourceInput) -> Result<(), Refusal> {
        if let Some(s) = &entry.source {
            let over = matches!(s.status().phase, Phase::Relinquished | Phase::Failed | Phase::Released);
            let deadline = Instant::now() + ENDS_WITHIN;
            let ended = || s.thread.as_ref().is_none_or(std::thread::JoinHandle::is_finished);
            while over && !ended() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            if !ended() && s.events.send(source::session::Event::Input(word.clone())).is_ok() {
                return Ok(());
            }
        }
        let s = record
            .source
            .clone()
            .ok_or_else(|| wrong_phase("this VM was never protected from here"))?;
        let qmp = s.qemu.qmp.iter().find_map(|p| Client::connect(p, QMP_TIMEOUT).ok());
        if qmp.is_none() && matches!(word, SourceInput::Fenced { .. }) {
            let detail = format!("no monitor of the stopped primary answers: {:?}", s.qemu.qmp);
            return Err(Refusal::new(RefusalCode::QmpUnavailable, detail));
        }
        let plan = s.plan(record.vm, &record.name);
        let handle = source::Session::reopen(self.core.clone(), plan, s.durable, qmp, word);
        entry.source = Some(handle.map_err(|e| local(&e))?);
        Ok(())
    }

    /// A peer has the VM, or is about to: no copy may run here below its epoch.
    pub fn fence(
        self: &Arc<Self>,
        vm: VmId,
        epoch: Epoch,
        dead: bool,
        from: &Identity,
        reply: &Reply,
    ) -> Result<Option<Sender<Event>>, Refusal> {
        let record = self.core.journal.get(vm);
        let seen = record.as_ref().map_or(Epoch(0), |r| r.epoch);
        if epoch < seen {
            let detail = format!("a fence of epoch {epoch}, epoch {seen} was seen here");
            return Err(Refusal::new(RefusalCode::StaleEpoch, detail));
        }
        let target = record.as_ref().and_then(|r| r.target.as_ref());
        if let Some(t) = target.filter(|t| t.shadow.is_some()) {
            from.is(&t.peer)
                .map_err(|why| Refusal::new(RefusalCode::PeerIdentity, why))?;
            if let Some(events) = self.target_of(vm) {
                let message = Message::Fence { vm, epoch, dead };
                // A session that has just ended answers no more; the peer asks again.
                let _ = events.send(Event::Said {
                    message,
                    reply: reply.clone(),
                });
                return Ok(Some(events));
            }
        }
        if let Some(r) = record.as_ref()
            && let Some(s) = &r.source
        {
            from.is(&s.peer)
                .map_err(|why| Refusal::new(RefusalCode::PeerIdentity, why))?;
            if s.qemu.id.alive() {
                self.end_primary(r, s, epoch, dead)?;
            }
        }
        if let Some(q) = self.qemus(vm)?.first() {
            let detail = format!("QEMU process {} of the VM is here, which no record knows", q.id.pid);
            return Err(wrong_phase(detail));
        }
        self.never(vm, epoch)?;
        reply.send(&Message::Aborted { epoch });
        Ok(None)
    }

    fn end_primary(&self, record: &VmRecord, s: &SourceRecord, epoch: Epoch, dead: bool) -> Result<(), Refusal> {
        if !dead {
            return Err(wrong_phase(
                "the VM's primary is here: what becomes of it is decided here, not on the other host",
            ));
        }
        tracing::warn!(vm = %record.vm, %epoch, "this host was declared dead, and the other one has the VM: ending the copy here");
        let mut vms = self.lock();
        self.tell_source(vms.entry(record.vm).or_default(), record, SourceInput::Yield { epoch })?;
        drop(vms);
        let deadline = Instant::now() + QUIT_TIMEOUT;
        while s.qemu.id.alive() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        match s.qemu.id.alive() {
            true => Err(wrong_phase("the copy here is being ended")),
            false => Ok(()),
        }
    }

    pub(super) fn qemus(&self, vm: VmId) -> Result<Vec<proc::QemuProcess>, Refusal> {
        let all = proc::scan(self.core.config.scope).map_err(|e| local(&format!("/proc: {e}")))?;
        Ok(all.into_iter().filter(|q| q.uuid == Some(vm.0)).collect())
    }

    /// Removes what no record knows of this VM. What runs is left alone.
    fn clean(&self, vm: VmId) -> Result<(), Refusal> {
        let strays = self.strays(vm)?;
        for record in &strays.shadows {
            if runs(record) {
                let detail = format!("a QEMU that runs, in {}, is not removed", record.dir.display());
                return Err(wrong_phase(detail));
            }
            launch::discard(record, Images::Keep)?;
        }
        for path in &strays.files {
            std::fs::remove_file(path).map_err(|e| local(&format!("{}: {e}", path.display())))?;
        }
        Ok(())
    }

    /// Forgets a former shadow that is the VM, and leaves all of it to somebody else.
    pub(super) fn hand_over(&self, order: &Order, entry: &mut Entry) -> Result<(), Refusal> {
        let record = self.record(order.vm)?;
        let at_work = |s: &source::Handle| {
            let over = [Phase::Released, Phase::Retired, Phase::Failed];
            Some(s.status().phase).filter(|p| !over.contains(p))
        };
        if let Some(phase) = entry.source.as_ref().and_then(at_work) {
            let detail = format!("a copy of this VM to another host is in phase {phase:?}: release it first");
            return Err(wrong_phase(detail));
        }
        match entry.target.as_ref().map(|t| t.status().phase) {
            Some(Phase::Active) => {}
            phase => {
                return Err(wrong_phase(format!(
                    "no former shadow is the VM here (phase {phase:?})"
                )));
            }
        }
        if let Some(shadow) = record.target.and_then(|t| t.shadow) {
            // First: a record that the journal does not know would be cleaned up with its QEMU at the next start.
            launch::set_aside(&shadow).map_err(|e| local(&format!("{}: {e}", shadow.dir.display())))?;
        }
        let noted = self.core.journal.update(order.vm, |r| {
            r.remember(order.id);
            r.epoch = r.epoch.max(order.epoch);
            (r.source, r.target) = (None, None);
        });
        noted.map_err(|e| local(&e))?;
        entry.source = None;
        if let Some(t) = entry.target.take() {
            let _ = t.events.send(Event::Leave);
        }
        Ok(())
    }
}

/// The kept primary of a VM that was given up from here.
fn stopped_primary(record: &VmRecord) -> Result<SourceRecord, Refusal> {
    let source = record
        .source
        .clone()
        .ok_or_else(|| wrong_phase("this VM was never protected from here"))?;
    match source.durable {
        SourceDurable::HandedOver { .. } | SourceDurable::Relinquished { .. } | SourceDurable::TakingBack { .. } => {}
        other => return Err(wrong_phase(format!("no stopped primary is kept here, it is {other:?}"))),
    }
    match source.qemu.id.alive() {
        true => Ok(source),
        false => Err(Refusal::new(
            RefusalCode::NoSuchVm,
            "the stopped primary's QEMU is gone",
        )),
    }
}

/// A prepared shadow: its epoch, its source, and where that can be asked.
fn prepared(record: &VmRecord) -> Result<(Epoch, HostId, Option<String>), Refusal> {
    match record.target.as_ref().map(|t| (t.durable, t)) {
        Some((TargetDurable::Prepared { epoch }, t)) => Ok((epoch, t.peer.clone(), t.link.clone())),
        other => {
            let state = other.map(|(d, _)| d);
            Err(wrong_phase(format!(
                "no prepared shadow of this VM is here ({state:?})"
            )))
        }
    }
}

/// The session of a shadow that is not the VM.
fn waiting(entry: &Entry) -> Result<&target::Handle, Refusal> {
    match entry.target.as_ref().map(|t| (t, t.status().phase)) {
        Some((_, phase @ (Phase::Active | Phase::Released))) => {
            Err(wrong_phase(format!("the shadow here is in phase {phase:?}")))
        }
        Some((t, _)) => Ok(t),
        None => Err(wrong_phase("there is no shadow of this VM here")),
    }
}

fn runs(record: &launch::ShadowRecord) -> bool {
    let status = Client::connect(&record.qmp_path, QMP_TIMEOUT).and_then(|q| q.execute("query-status", Value::Null));
    match status {
        Ok(s) => s["running"].as_bool() == Some(true),
        // Alive and silent may be anything.
        Err(_) => record.alive(),
    }
}
