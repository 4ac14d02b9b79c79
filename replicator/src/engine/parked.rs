//! What waits for a link that was lost, on both sides: mirrors in a primary's QEMU, and the images of a shadow. It waits for some minutes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use umbra_api::VmId;
use umbra_api::replica::Phase;

use super::{Engine, QMP_TIMEOUT};
use crate::launch::kept;
use crate::qmp::Client;
use crate::source;

/// So long a mirror waits, and an image is kept.
const PARK_FOR: Duration = Duration::from_secs(600);
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Looks now and then for what waits too long.
pub(super) fn watch(engine: &Arc<Engine>) -> std::io::Result<()> {
    let engine = Arc::downgrade(engine);
    let run = move || {
        while let Some(engine) = engine.upgrade() {
            engine.expire(PARK_FOR);
            drop(engine);
            std::thread::sleep(LOOK_EVERY);
        }
    };
    std::thread::Builder::new().name("parked".into()).spawn(run).map(|_| ())
}

impl Engine {
    fn expire(&self, age: Duration) {
        for vm in self.core.parked.due(age) {
            let vms = self.lock();
            let busy = |s: &source::Handle| !matches!(s.status().phase, Phase::Released | Phase::Failed);
            if !vms.get(&vm).and_then(|e| e.source.as_ref()).is_some_and(busy) {
                // Under the lock: a protection that begins would want the same monitor.
                self.unpark(vm);
            }
        }
        kept::expire(&self.core.config.launch().disk_dir, age, None);
    }

    /// Before the replicator ends: nobody would look after them.
    pub(super) fn unpark_all(&self) {
        for vm in self.core.parked.due(Duration::ZERO) {
            self.unpark(vm);
        }
    }

    fn unpark(&self, vm: VmId) {
        let Some(source) = self.core.journal.get(vm).and_then(|r| r.source) else {
            return;
        };
        let connect = |p: &PathBuf| Client::connect(p, QMP_TIMEOUT).ok();
        if source.qemu.id.alive()
            && let Some(qmp) = source.qemu.qmp.iter().find_map(connect)
        {
            source::mirror::sweep(&qmp);
        }
    }
}
