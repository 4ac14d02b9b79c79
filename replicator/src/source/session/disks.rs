//! The private disks of a protection, from the first copy to their end.

use std::sync::PoisonError;
use std::time::Instant;

use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::{Disk, Message};

use super::Session;
use crate::faults::Side;
use crate::qmp::Client;
use crate::source::machine::{Input, State};
use crate::source::migration::Migration;
use crate::source::mirror;

impl Session {
    /// Numbers of the mirrors that this replicator, or one before it, made or was about to make in the primary.
    pub(super) fn mirrors_on_record(&self) -> Vec<u64> {
        let source = self.core.journal.get(self.plan.vm).and_then(|r| r.source);
        source.map(|s| s.mirrors).unwrap_or_default()
    }

    /// Before new mirrors are made: ends those of ours that nobody goes on with, refuses where somebody else's are, and has the new ones'
    /// number on record, so that they are known whatever dies next.
    pub(super) fn make_way(&self, qmp: &Client, token: u64, disks: &[Disk]) -> Result<(), Refusal> {
        let known = self.mirrors_on_record();
        mirror::sweep(qmp, &known);
        if disks.is_empty() {
            return Ok(());
        }
        let there = mirror::found(qmp);
        let mut left: Vec<u64> = known
            .into_iter()
            .filter(|t| there.iter().any(|(_, of)| *of == Some(*t)))
            .collect();
        let strange = there.iter().find(|(_, of)| of.is_none_or(|t| !left.contains(&t)));
        if let Some((name, _)) = strange {
            let detail = format!(
                "the VM has a mirror {name} that this replicator does not have on record, and does not touch: if no other replicator \
                 copies the VM, end it by QMP (block-job-cancel with force, then blockdev-del of umbra-nbd-…)"
            );
            return Err(Refusal::new(RefusalCode::Local, detail));
        }
        left.push(token);
        let noted = self.core.journal.update(self.plan.vm, |r| {
            if let Some(source) = r.source.as_mut() {
                source.mirrors = left;
            }
        });
        noted.map_err(|e| Refusal::new(RefusalCode::Local, e.to_string()))
    }

    /// The guest is stopped and its writes are drained: makes the disks equal, and lets QEMU go on.
    pub(super) fn pre_switchover(&mut self) {
        if !matches!(self.machine.state, State::Stopping { .. }) {
            let why = "the migration came to its end unasked: somebody stopped the VM";
            return self.input(Input::MigrationFailed(why.into()));
        }
        self.core.faults.before(Side::Source, "disks");
        let deadline = self.give_up_at.unwrap_or_else(Instant::now);
        let began = Instant::now();
        let equal = self.mirrors.as_mut().map_or(Ok(()), |m| m.finish(deadline));
        self.report.disks_us = began.elapsed().as_micros() as u64;
        let drained = self.times.stopped.map(|t| began.saturating_duration_since(t));
        tracing::info!(vm = %self.plan.vm, ?drained, equal = ?began.elapsed(), "the disks of the stopped guest");
        let went = equal.and_then(|()| {
            self.core.faults.before(Side::Source, "go_on");
            match self.migration.as_ref().map(Migration::go_on) {
                Some(Err(e)) => Err(e.into()),
                _ => Ok(()),
            }
        });
        self.core.faults.after(Side::Source, "disks");
        match (went, self.machine.state.clone()) {
            (Err(refusal), _) => self.input(Input::Failed(refusal)),
            // Behind QEMU's word, which more waits for.
            (Ok(()), State::Stopping { epoch }) => {
                if let Some(lost) = self.say(&Message::DisksEqual { epoch }) {
                    self.input(lost);
                }
            }
            _ => {}
        }
    }

    /// A lost link is not the end of a copy that went well: its mirrors wait for another one.
    pub(super) fn leave_mirrors(&mut self) {
        let Some(mut mirrors) = self.mirrors.take() else {
            if let State::Ended { .. } = self.machine.state {
                // Of a pass that broke off: nobody comes back for them.
                self.core.parked.hurry(self.plan.vm);
            }
            return;
        };
        self.again.note_travelled(&mirrors);
        let lost = match &self.machine.state {
            State::Ended { error: Some(e) } | State::Broken { error: e } => e.code == RefusalCode::PeerUnreachable,
            _ => false,
        };
        match lost && self.waits {
            true => self.core.parked.note(self.plan.vm),
            false => mirrors.undo(),
        }
    }

    pub(super) fn ask_disks(&mut self) {
        if let State::Seeding | State::Standby = self.machine.state
            && let Some(mirrors) = self.mirrors.as_mut().filter(|m| !m.is_empty())
        {
            let mut disks = mirrors.progress();
            self.scrub.count_in(&mut disks);
            self.status.lock().unwrap_or_else(PoisonError::into_inner).disks = disks;
        }
    }
}
