//! The shadow's disks on their way from the daemon that filled them to the shadow itself.
//!
//! ```text
//!  standby: synced now and then ─> Prepare: synced ─> the source says 'equal' ─> daemon ends ─> images become the shadow's ─> prepared
//!                                                      └───── beside the last pass and the device state ─────┘
//! ```
//! What the host's cache still holds is written to the medium at each flush, the last of which the stopped guest waits for: so that
//! it is little, it is written before, again and again.

use std::fs::File;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::launch::{ShadowRecord, disks};
use crate::qmp::{Client, QmpError};
use crate::urgent;

/// So much of writing is left to the cache.
const SYNC_EVERY: Duration = Duration::from_secs(5);

/// Shared by who is told and by who needs to know.
#[derive(Clone, Default)]
pub struct HandOver(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    begun: bool,
    /// Until somebody waits for it.
    over: Option<JoinHandle<Result<(), String>>>,
}

impl HandOver {
    /// The source writes nothing more. Said twice, also when it is over by then, it has begun once.
    pub fn begin(&self, record: &ShadowRecord, qmp: &Client) -> std::io::Result<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.begun || record.disks.is_empty() {
            return Ok(());
        }
        let (record, qmp) = (record.clone(), qmp.clone());
        let run = move || {
            urgent::this_thread();
            let began = Instant::now();
            disks::stop(&record).map_err(|e| format!("the disks' daemon does not end: {e}"))?;
            let closed = began.elapsed();
            activate(&qmp)?;
            tracing::info!(vm = %record.vm, ?closed, active = ?began.elapsed(), "the disks are the shadow's");
            Ok(())
        };
        state.over = Some(std::thread::Builder::new().name("disks-over".into()).spawn(run)?);
        state.begun = true;
        Ok(())
    }

    /// The shadow may have touched its images.
    pub fn has_begun(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).begun
    }

    /// Whether they are the shadow's. Without disks they always are.
    pub fn wait(&self) -> Result<(), String> {
        let over = self.0.lock().unwrap_or_else(PoisonError::into_inner).over.take();
        match over.map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(over)) => over,
            Some(Err(_)) => Err("the thread that hands the disks over panicked".into()),
        }
    }
}

/// Makes the images the shadow's, so that a 'prepared' one can't fail to get them at `cont`. Before QEMU 10 `cont` does it.
fn activate(qmp: &Client) -> Result<(), String> {
    match qmp.execute("blockdev-set-active", json!({"active": true})) {
        Ok(_) => Ok(()),
        Err(QmpError::Qemu { class, .. }) if class == "CommandNotFound" => Ok(()),
        Err(e) => Err(format!("the shadow can't have its disks: {e}")),
    }
}

/// Writes what the cache holds of the images, until it is dropped.
pub struct Syncer(Sender<()>);

impl Syncer {
    /// `None` if there is nothing to write.
    pub fn start(record: &ShadowRecord) -> Option<Self> {
        let images: Vec<PathBuf> = record.disks.iter().map(|i| i.path.clone()).collect();
        if images.is_empty() {
            return None;
        }
        let (tell, told) = channel();
        let run = move || {
            while !matches!(told.recv_timeout(SYNC_EVERY), Err(RecvTimeoutError::Disconnected)) {
                for image in &images {
                    // An image that can't be written fails at the mirror's own flush, where it counts.
                    if let Err(e) = File::open(image).and_then(|f| f.sync_data()) {
                        tracing::debug!(image = %image.display(), "not synced: {e}");
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("disks-sync".into()).spawn(run);
        thread.map(|_| Self(tell)).ok()
    }

    pub fn now(&self) {
        // The thread ends with this.
        let _ = self.0.send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_disks_nothing_is_handed_over() {
        HandOver::default().wait().unwrap();
    }
}
