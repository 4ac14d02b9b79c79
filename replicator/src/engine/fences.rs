//! Hosts that an operator declared dead are told, for as long as it takes, that the VM is elsewhere now.

use std::sync::{Arc, Weak};
use std::time::Duration;

use umbra_api::order::RefusalCode;

use super::Engine;

const EVERY: Duration = Duration::from_secs(2);

/// Tells them from a thread of its own, which ends with the engine.
pub fn keep_telling(engine: &Arc<Engine>) -> std::io::Result<()> {
    let weak = Arc::downgrade(engine);
    let tell = move || {
        while let Some(engine) = Weak::upgrade(&weak) {
            round(&engine);
            drop(engine);
            std::thread::sleep(EVERY);
        }
    };
    std::thread::Builder::new()
        .name("fences".into())
        .spawn(tell)
        .map(|_| ())
}

fn round(engine: &Engine) {
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
