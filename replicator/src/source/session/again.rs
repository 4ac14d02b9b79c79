//! A protection whose copy broke off: ends the old pass for good, waits, and begins a new one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::{Message, RamBlock, ShadowSpec};

use super::{Event, Session};
use crate::adopt::{self, Adopted};
use crate::engine::unix_ms;
use crate::link::{Closer, Link};
use crate::qmp::QmpError;
use crate::resume::known::Known;
use crate::resume::retry::{GIVE_UP_AFTER, Retry};
use crate::source::control::unreachable;
use crate::source::machine::{Input, State};
use crate::source::migration::Rates;
use crate::source::mirror::Mirrors;
use crate::source::pressure::Pressure;
use crate::source::times::Times;
use crate::source::whose::{self, Whose};

/// For a pump whose sockets are closed to end.
const PUMP_TIMEOUT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(5);

/// What a session must know to begin a pass anew.
#[derive(Default)]
pub(super) struct Again {
    /// Ends the ram connection.
    ram: Option<Closer>,
    pump: Option<JoinHandle<()>>,
    retry: Retry,
    /// When the next attempt is due.
    at: Option<Instant>,
    /// Of passes that broke off, and what the target told of its pages.
    wire_bytes: u64,
    /// Of disks, by the primary's image.
    disk_bytes: BTreeMap<String, u64>,
    /// The replicator ends: what is broken stays so until its restart.
    stopping: bool,
}

impl Again {
    pub(super) fn pumps(&mut self, thread: JoinHandle<()>) {
        self.pump = Some(thread);
    }

    pub(super) fn travelled(&self) -> &BTreeMap<String, u64> {
        &self.disk_bytes
    }

    pub(super) fn note_travelled(&mut self, mirrors: &Mirrors) {
        self.disk_bytes.extend(mirrors.travelled());
    }

    fn pump_ended(&self) -> bool {
        self.pump.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Session {
    pub(super) fn is_copying(&self) -> bool {
        matches!(self.machine.state, State::Seeding | State::Standby)
    }

    pub(super) fn is_broken(&self) -> bool {
        matches!(self.machine.state, State::Broken { .. })
    }

    pub(super) fn warm(&mut self, now: Instant) {
        self.again.retry.went_on(now);
        self.progress.resume.broken_since = None;
    }

    /// Of all passes together.
    pub(super) fn wire_bytes(&self) -> u64 {
        self.again.wire_bytes + self.pump.wire_bytes.load(Ordering::Relaxed)
    }

    /// Which pages the target has of a copy that broke off.
    pub(super) fn what_is_held(&mut self, ram: &mut Link, files: &[RamBlock]) -> Result<Known, Refusal> {
        self.again.ram = Some(ram.closer().map_err(|e| unreachable(&e))?);
        let known = Known::read(&mut ram.reader, files, || {
            // A connection that is lost is noticed by who listens to it.
            let _ = self.control.as_mut().map(|c| c.send(&Message::Ping { n: 0 }));
        })?;
        if known.pages() > 0 {
            tracing::info!(vm = %self.plan.vm, pages = known.pages(), "the target holds pages of an earlier copy");
        }
        self.again.wire_bytes += ram.reader.bytes();
        Ok(known)
    }

    /// No word of the old pass may come later than this: its connections are closed, its thread has ended, and what it still said
    /// is in the queue before the next attempt. The VM's monitor is left to others meanwhile.
    pub(super) fn hang_up(&mut self) {
        self.generation += 1;
        self.control = None;
        self.qmp = None;
        if let Some(ram) = self.again.ram.take() {
            ram.close();
        }
        self.pump.hurry();
        let deadline = Instant::now() + PUMP_TIMEOUT;
        while !self.again.pump_ended() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        self.again.wire_bytes += self.pump.wire_bytes.load(Ordering::Relaxed);
        self.pump = Arc::default();
        self.seeded = false;
        self.last_round = None;
        self.give_up_at = None;
    }

    /// The VM is left as it is. A copy goes on when the replicator is back, anything else ends as if it were released.
    pub(super) fn stop_here(&mut self) {
        self.again.stopping = true;
        match self.machine.state {
            _ if self.is_copying() => self.input(Input::LinkLost("the replicator was stopped".into())),
            State::Broken { .. } => {}
            _ => self.input(Input::Release),
        }
    }

    /// Nothing more is done here: a restart goes on.
    pub(super) fn is_left(&self) -> bool {
        self.again.stopping && self.is_broken()
    }

    /// What a broken copy has to do by now.
    pub(super) fn mend(&mut self, now: Instant) {
        let State::Broken { error } = &self.machine.state else {
            self.again.at = None;
            return;
        };
        if self.again.stopping {
            return;
        }
        self.progress.resume.broken_since.get_or_insert_with(unix_ms);
        if !self.plan.process.alive() {
            return self.input(Input::PrimaryGone);
        }
        match self.again.at {
            Some(at) if at <= now => {
                self.again.at = None;
                self.input(Input::Again);
            }
            Some(_) => {}
            None => match self.again.retry.broke(now) {
                Some(wait) => {
                    // Its disks' mirrors may wait too: not less long than this.
                    self.core.parked.note(self.plan.vm);
                    tracing::warn!(vm = %self.plan.vm, ?wait, "the copy broke off, it is begun anew: {error}");
                    self.again.at = Some(now + wait);
                }
                None => {
                    let minutes = GIVE_UP_AFTER.as_secs() / 60;
                    let detail = format!("{} (tried again for {minutes} minutes)", error.detail);
                    let error = Refusal::new(error.code, detail);
                    self.input(Input::Failed(error));
                }
            },
        }
    }

    /// A new session with the target, and a new migration.
    pub(super) fn begin_again(&mut self) -> Option<Input> {
        self.progress.resume.passes += 1;
        if !self.again.pump_ended() {
            return Some(Input::LinkLost("the broken pass has not ended yet".into()));
        }
        // Only now: words of the old pass may have come since it ended.
        drop_old_words(&self.events, &self.sender);
        self.pressure = Pressure::new(self.plan.pacing.not_converging);
        self.rates = Rates::default();
        self.times = Times::default();
        self.pump = Arc::default();
        let begun = match self.look_anew() {
            Ok(Ok(spec)) => self.open(spec),
            Ok(Err(interfered)) => return Some(Input::Interfered(interfered)),
            Err(refusal) => Err(refusal),
        };
        match begun {
            Ok(()) => {
                self.again.retry.went_on(Instant::now());
                Some(Input::Begun)
            }
            Err(_) if self.plan.process.gone_soon() => Some(Input::PrimaryGone),
            Err(r) if r.code == RefusalCode::PeerUnreachable => Some(Input::LinkLost(r.detail)),
            // Somebody else has the monitor for now, or the link went again while the mirrors began.
            Err(r) if matches!(r.code, RefusalCode::QmpUnavailable | RefusalCode::Local) => {
                Some(Input::MigrationFailed(r.detail))
            }
            Err(r) => Some(Input::Failed(r)),
        }
    }

    /// The migration that QEMU has just taken is ours, and a restarted replicator is to know it.
    pub(super) fn note_migration(&self, answered_ms: u64) {
        let noted = self.core.journal.update(self.plan.vm, |r| {
            if let Some(s) = r.source.as_mut() {
                s.migrated_ms = Some(answered_ms);
            }
        });
        if let Err(e) = noted {
            // The copy is well. If it breaks off, and QEMU is slow to end it then, it is not begun anew.
            tracing::warn!(vm = %self.plan.vm, "journal: {e}");
        }
    }

    fn migrated_ms(&self) -> Option<u64> {
        self.core.journal.get(self.plan.vm)?.source?.migrated_ms
    }

    /// What the shadow is to be now: while nobody watched, devices may have come and gone. The inner error is what somebody else
    /// has made of the VM, with which no copy can begin.
    fn look_anew(&mut self) -> Result<Result<ShadowSpec, String>, Refusal> {
        // A monitor serves one client at a time.
        self.qmp = None;
        let (scope, storage) = (self.core.config.scope, self.core.config.storage);
        let adopted = adopt::adopt(self.plan.vm, scope, storage)?;
        if adopted.process.id != self.plan.process {
            let detail = format!("the VM is another process now, {}", adopted.process.id.pid);
            return Err(Refusal::new(RefusalCode::NoSuchVm, detail));
        }
        if let Some(what) = stopped(&adopted)? {
            return Ok(Err(what));
        }
        match whose::ask(&adopted.qmp, self.migrated_ms())? {
            Whose::Nobodys => {}
            Whose::Unended(state) => {
                let detail = format!("the broken pass's migration has not ended yet (QEMU says {state})");
                return Err(Refusal::new(RefusalCode::QmpUnavailable, detail));
            }
            Whose::Others(state) => {
                let what = format!("a migration was started by somebody else (QEMU says {state})");
                return Ok(Err(what));
            }
        }
        self.qmp = Some(adopted.qmp);
        Ok(Ok(adopted.spec))
    }
}

/// What the old pass still said is no word about the new one. What was ordered meanwhile comes next.
fn drop_old_words(events: &Receiver<Event>, back: &Sender<Event>) {
    let waiting: Vec<Event> = events.try_iter().collect();
    for order in waiting.into_iter().filter(Event::is_order) {
        // Its other end is ours.
        let _ = back.send(order);
    }
}

/// Who has stopped the guest, if somebody has.
fn stopped(adopted: &Adopted) -> Result<Option<String>, QmpError> {
    let status = adopted.qmp.execute("query-status", Value::Null)?;
    let says = status["status"].as_str().unwrap_or("unknown");
    let runs = status["running"].as_bool() == Some(true);
    Ok((!runs).then(|| format!("the guest was stopped by somebody else (QEMU says {says})")))
}

#[cfg(test)]
mod tests {
    use umbra_api::Epoch;

    use super::*;

    #[test]
    fn the_old_passs_last_words_are_not_heard_in_the_new_one() {
        let (sender, events) = std::sync::mpsc::channel();
        let failed = || Event::Input(Input::MigrationFailed("QEMU closed the migration".into()));
        let switch = || Event::Input(Input::Switchover { epoch: Epoch(3) });
        for event in [
            failed(),
            Event::QmpClosed,
            switch(),
            Event::Interfered("the guest shuts down".into()),
            failed(),
            Event::Input(Input::Release),
            Event::Stop,
        ] {
            sender.send(event).unwrap();
        }
        drop_old_words(&events, &sender);
        let left: Vec<Event> = events.try_iter().collect();
        assert!(
            matches!(
                left[..],
                [
                    Event::Input(Input::Switchover { epoch: Epoch(3) }),
                    Event::Input(Input::Release),
                    Event::Stop
                ]
            ),
            "{left:?}"
        );
    }
}
