//! Who may write a shadow's RAM: the one thread that takes its ram connection, until the gate is shut.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::link::Closer;

#[derive(Default, Debug)]
struct State {
    shut: bool,
    inside: Option<Closer>,
}

/// Shared by a session and its intake.
#[derive(Default, Debug)]
pub struct Gate {
    state: Mutex<State>,
    left: Condvar,
    /// A guest may stand still from now on: what can wait waits.
    hurried: AtomicBool,
}

/// Held for as long as somebody may write.
#[derive(Debug)]
pub struct Inside(Arc<Gate>);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn hurry(&self) {
        self.hurried.store(true, Ordering::Relaxed);
    }

    pub fn is_hurried(&self) -> bool {
        self.hurried.load(Ordering::Relaxed)
    }

    /// `None` if it is shut already. `closer` ends the connection that the writer reads.
    pub fn enter(self: &Arc<Self>, closer: Closer) -> Option<Inside> {
        let mut state = self.lock();
        if state.shut {
            return None;
        }
        state.inside = Some(closer);
        Some(Inside(self.clone()))
    }

    /// Ends the writer's connection and waits for it to go. False if it did not in time: its memory is no longer to be believed.
    pub fn shut(&self, wait: Duration) -> bool {
        let mut state = self.lock();
        state.shut = true;
        if let Some(closer) = &state.inside {
            closer.close();
        }
        let waited = self.left.wait_timeout_while(state, wait, |s| s.inside.is_some());
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.inside.is_none()
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.lock().inside = None;
        self.0.left.notify_all();
    }
}
