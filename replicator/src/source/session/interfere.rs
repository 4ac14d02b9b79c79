//! What others do to a VM while it is copied: somebody stops it, its QEMU goes, its shadow's memory is damaged.

use serde_json::Value;

use super::Session;
use crate::qmp::Client;
use crate::source::machine::{Input, State};

impl Session {
    /// QEMU goes through with a migration whose guest is stopped, acknowledged or not: the copy ends, and the guest stays as
    /// whoever stopped it wants it.
    pub(super) fn unasked_stop(&mut self) {
        if !matches!(
            self.machine.state,
            State::Seeding | State::Standby | State::Noting { .. }
        ) {
            return;
        }
        let status = self.qmp.as_ref().map(|q| q.execute("query-status", Value::Null));
        let status = match status {
            Some(Ok(s)) => s["status"].as_str().unwrap_or("unknown").to_owned(),
            _ => "unknown".to_owned(),
        };
        self.interfered(format!("the guest was stopped by somebody else (QEMU says {status})"));
    }

    pub(super) fn interfered(&mut self, what: String) {
        match self.machine.state {
            State::Seeding | State::Standby | State::Noting { .. } => self.input(Input::Interfered(what)),
            // The guest stands still already, or what was done to it was done by us.
            _ => tracing::warn!(vm = %self.plan.vm, "while switching over: {what}"),
        }
    }

    pub(super) fn is_primary_gone(&self) -> bool {
        self.qmp.as_ref().is_none_or(Client::is_closed) && self.plan.process.gone_soon()
    }

    pub(super) fn qmp_closed(&mut self) {
        // Of a pass that is over: the present one has its own, and a broken copy is looked at each time.
        if self.is_broken() {
            return;
        }
        if self.qmp.as_ref().is_some_and(|q| !q.is_closed()) {
            return;
        }
        match self.plan.process.gone_soon() {
            true => self.input(Input::PrimaryGone),
            false => self.input(Input::MigrationFailed("QEMU closed its QMP connection".into())),
        }
    }

    /// What the target's scrub found.
    pub(super) fn damaged(&mut self, pages: u64, block: &str, first: u64) {
        self.progress.resume.differing_pages += pages;
        let what =
            format!("{pages} pages of the shadow's RAM block {block:?} are not what was sent, the first is {first}");
        tracing::error!(vm = %self.plan.vm, "scrub: {what}");
        self.input(Input::Damaged(what));
    }
}
