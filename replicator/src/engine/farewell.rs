//! The end of a copy, told to its target for certain: what it holds of the shadow's memory is free at once, not after
//! [`held::HELD_FOR`].
//!
//! ```text
//!  source                                                        target
//!  [disk: Released and a farewell, in one write]
//!    Ended {vm, epoch}  ── again and again, until it is heard ──>  the same source's, of the same epoch? its shadow goes, its memory too
//!  [disk: no farewell]  <── Aborted {epoch} ───────────────────   ('not yet' while the shadow goes)
//! ```
//! A goodbye on the session's own connection is quicker, and lost with it. What is told late harms no later copy: its epoch is another one.
//! After as long as a target holds memory by itself nothing is told any more.

use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::Message;
use umbra_api::{Epoch, HostId, VmId};

use super::{Engine, local, unix_ms};
use crate::journal::{Farewell, VmRecord};
use crate::resume::held;
use crate::source;
use crate::target::machine::{Durable, Input};
use crate::target::session::Event;

impl Engine {
    /// Tells what there is to tell.
    pub(super) fn say_farewells(&self) {
        let all = self.core.journal.all().into_iter();
        let owed: Vec<(VmId, Farewell)> = all
            .flat_map(|r| r.farewells.into_iter().map(move |f| (r.vm, f)))
            .collect();
        for (vm, farewell) in owed {
            let (host, epoch) = (&farewell.host, farewell.epoch);
            // The order to copy it again, to the same host in the same epoch, has come meanwhile.
            let owed = |r: VmRecord| r.farewells.contains(&farewell);
            if !self.core.journal.get(vm).is_some_and(owed) {
                continue;
            }
            match self.say_farewell(vm, &farewell) {
                Ok(()) => tracing::info!(%vm, %host, %epoch, "the target knows that the copy has ended"),
                Err(e) if farewell.is_late(unix_ms()) => {
                    tracing::warn!(%vm, %host, %epoch, "the target was not told that the copy has ended, and needs it no more: {e}");
                }
                Err(e) => {
                    tracing::debug!(%vm, %host, %epoch, "the target is not told yet that the copy has ended: {e}");
                    continue;
                }
            }
            let told = self.core.journal.update(vm, |r| r.farewells.retain(|f| *f != farewell));
            if let Err(e) = told {
                tracing::warn!(%vm, "journal: {e}");
            }
        }
    }

    fn say_farewell(&self, vm: VmId, to: &Farewell) -> Result<(), Refusal> {
        let word = Message::Ended {
            vm,
            epoch: to.epoch,
            host: self.core.config.host.clone(),
        };
        match self.ask_peer(&to.host, &to.link, self.silence(), &word)? {
            Message::Aborted { epoch } if epoch == to.epoch => Ok(()),
            Message::Refused { refusal } => Err(refusal),
            other => Err(source::control::unexpected(&to.link, &other)),
        }
    }

    /// The source of a copy to here says that it has ended. Refused for as long as something of it is left.
    pub fn ended(&self, vm: VmId, epoch: Epoch, host: &HostId) -> Result<(), Refusal> {
        // A new one is admitted, and begins, under the lock as well.
        let vms = self.lock();
        let target = self.core.journal.get(vm).and_then(|r| r.target);
        let Some(its) = target.filter(|t| t.peer == *host && t.epoch == epoch) else {
            return Ok(());
        };
        match (its.durable, its.shadow) {
            (Durable::Held | Durable::Discarded, None) => {
                tracing::info!(%vm, %host, %epoch, "the copy has ended: its memory is freed");
                held::forget(&self.core.config.ram_dir, vm);
                let noted = self
                    .core
                    .journal
                    .update(vm, |r| r.target_writes(Durable::Discarded, None));
                noted.map_err(|e| local(&e))
            }
            (Durable::Held | Durable::Shadow | Durable::Discarded, _) => {
                if let Some(session) = vms.get(&vm).and_then(|e| e.target.as_ref()) {
                    // It may not have noticed yet that the link was lost.
                    let goodbye = Input::Goodbye("the copy has ended".into());
                    let _ = session.events.send(Event::Input(goodbye));
                }
                let detail = "the shadow is on its way out";
                Err(Refusal::new(RefusalCode::PeerUnreachable, detail))
            }
            // Not begun, or more than a copy: no word of this kind decides about it.
            _ => Ok(()),
        }
    }
}
