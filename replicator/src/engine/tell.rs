//! What other hosts must hear is told for as long as it takes: one that an operator declared dead, that the VM is elsewhere now; a
//! target, that a copy to it has ended.

use std::sync::{Arc, Weak};
use std::time::Duration;

use umbra_api::HostId;
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::Message;

use super::Engine;
use crate::source::control::{Control, Target, Timeouts};

const EVERY: Duration = Duration::from_secs(2);

/// Tells them from threads of their own, which end with the engine: a target that is waited for is in no fence's way.
pub fn keep_telling(engine: &Arc<Engine>) -> std::io::Result<()> {
    again_and_again(engine, "fences", tell_fences)?;
    again_and_again(engine, "farewells", Engine::say_farewells)
}

fn again_and_again(engine: &Arc<Engine>, name: &str, round: fn(&Engine)) -> std::io::Result<()> {
    let weak = Arc::downgrade(engine);
    let tell = move || {
        while let Some(engine) = Weak::upgrade(&weak) {
            round(&engine);
            drop(engine);
            std::thread::sleep(EVERY);
        }
    };
    std::thread::Builder::new().name(name.into()).spawn(tell).map(|_| ())
}

fn tell_fences(engine: &Engine) {
    for record in engine.core.journal.all() {
        let Some(fence) = record.fence else { continue };
        match engine.tell_fence(record.vm, &fence, true) {
            Ok(()) => tracing::warn!(vm = %record.vm, host = %fence.host, "it is back, and has ended its copy"),
            Err(e) if e.code == RefusalCode::StaleEpoch => {
                tracing::warn!(vm = %record.vm, host = %fence.host, "it is past this: {e}");
            }
            Err(e) => {
                tracing::debug!(vm = %record.vm, host = %fence.host, "not told yet: {e}");
                continue;
            }
        }
        let told = engine.core.journal.update(record.vm, |r| {
            r.fence.take_if(|f| *f == fence);
        });
        if let Err(e) = told {
            tracing::warn!(vm = %record.vm, "journal: {e}");
        }
    }
}

impl Engine {
    /// One answer of another replicator, on a connection of its own.
    pub(super) fn ask_peer(
        &self,
        host: &HostId,
        link: &str,
        silence: Duration,
        question: &Message,
    ) -> Result<Message, Refusal> {
        let to = Target {
            link,
            host,
            security: self.core.security(),
        };
        let times = Timeouts {
            connect: Duration::from_millis(self.core.config.link.connect_timeout_ms),
            silence,
        };
        Control::ask(&to, times, question).map(|(_, answer)| answer)
    }
}
