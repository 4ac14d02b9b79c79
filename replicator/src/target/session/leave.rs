//! A shadow that is not wanted any more, and what of it is kept for a source that may come again.

use std::time::Duration;

use umbra_api::order::{Refusal, RefusalCode};

use super::Session;
use crate::launch::{self, Images};
use crate::target::machine::State;

/// For the intake to end, whose connection was closed: it is in the middle of a batch at most.
const INTAKE_TIMEOUT: Duration = Duration::from_secs(10);

impl Session {
    pub(super) fn discard(&mut self) {
        self.qmp = None;
        self.tiers.end();
        self.syncer = None;
        self.comparer = None;
        self.cleaned_up(launch::discard(&self.record, self.images()));
    }

    /// As `discard`, but the RAM is kept: only if it is certain that nobody writes it any more.
    pub(super) fn hold(&mut self) {
        if !self.gate.shut(INTAKE_TIMEOUT) {
            tracing::warn!(vm = %self.plan.vm, "the shadow's intake does not end: its memory is not kept");
            return self.discard();
        }
        self.qmp = None;
        self.tiers.end();
        self.syncer = None;
        self.comparer = None;
        self.cleaned_up(launch::hold(&self.record, self.images()));
    }

    fn images(&self) -> Images {
        match self.ran {
            true => Images::Keep,
            false if self.comes_again() && self.keep() => Images::Noted,
            false => Images::Remove,
        }
    }

    fn cleaned_up(&mut self, done: Result<(), Refusal>) {
        match done {
            Ok(()) => {
                let forgotten = self.core.journal.update(self.plan.vm, |r| {
                    if let Some(t) = r.target.as_mut() {
                        t.shadow = None;
                    }
                });
                if let Err(e) = forgotten {
                    tracing::warn!(vm = %self.plan.vm, "journal: {e}");
                }
            }
            Err(e) => tracing::error!(vm = %self.plan.vm, "the shadow is not cleaned up: {e}"),
        }
    }

    /// Lost, not ended: the same source may want the same shadow again.
    fn comes_again(&self) -> bool {
        let lost = |r: &Refusal| matches!(r.code, RefusalCode::PeerUnreachable | RefusalCode::Local);
        let error = matches!(&self.machine.state, State::Discarded { error: Some(e) } if lost(e));
        error && self.undecided && !self.disks.has_begun() && !self.record.disks.is_empty()
    }

    fn keep(&self) -> bool {
        match launch::kept::keep(&self.record, &self.plan.peer, &self.core.config.launch()) {
            Ok(()) => {
                tracing::info!(vm = %self.plan.vm, "the images are kept for a while");
                true
            }
            Err(why) => {
                tracing::warn!(vm = %self.plan.vm, "the images are not kept: {why}");
                false
            }
        }
    }
}
