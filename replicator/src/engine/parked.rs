//! What waits for a link that was lost, on both sides: mirrors in a primary's QEMU, and the images of a shadow. It waits for some minutes.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use umbra_api::VmId;
use umbra_api::replica::Phase;

use super::{Engine, Entry, QMP_TIMEOUT};
use crate::launch::kept;
use crate::qmp::Client;
use crate::source;
use crate::source::machine::Durable;

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
            self.unpark(vm);
        }
        kept::expire(&self.core.config.launch().disk_dir, age, None);
    }

    /// Before the replicator ends. A copy that the next one goes on with keeps its mirrors, which are on record; after others nobody
    /// would look.
    pub(super) fn unpark_all(&self) {
        for vm in self.core.parked.due(Duration::ZERO) {
            let source = self.core.journal.get(vm).and_then(|r| r.source);
            if source.is_some_and(|s| s.durable != Durable::Protecting) {
                self.unpark(vm);
            }
        }
    }

    fn unpark(&self, vm: VmId) {
        let Some(source) = self.core.journal.get(vm).and_then(|r| r.source) else {
            return;
        };
        // One that is protected anew has its mirrors back, or no more.
        let busy = |vms: &HashMap<VmId, Entry>| {
            let source = vms.get(&vm).and_then(|e| e.source.as_ref());
            source.is_some_and(|s| !matches!(s.status().phase, Phase::Released | Phase::Failed))
        };
        if !source.qemu.id.alive() || busy(&self.lock()) {
            return;
        }
        // A monitor that is busy is not waited for under the lock, where all orders come by.
        let connect = |p: &PathBuf| Client::connect(p, QMP_TIMEOUT).ok();
        let Some(qmp) = source.qemu.qmp.iter().find_map(connect) else {
            tracing::warn!(%vm, "no monitor to end the mirrors that wait: looked again later");
            return self.core.parked.note(vm);
        };
        let vms = self.lock();
        // Under the lock: a protection that begins has mirrors of the same names.
        if !busy(&vms) {
            source::mirror::sweep(&qmp, &source.mirrors);
        }
    }
}
