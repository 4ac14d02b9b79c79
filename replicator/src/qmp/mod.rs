//! QMP, QEMU's control protocol: one JSON object a line over a unix socket.
//!
//! ```text
//! QEMU                                client
//!   {"QMP": {"version": …}}      ──>
//!                                <──  {"execute": "qmp_capabilities", "id": 1}
//!   {"return": {}, "id": 1}      ──>
//!   {"event": …, "timestamp": …} ──>      (at any time from here on)
//! ```
//! [`codec`] is pure and bounded; [`client`] owns the socket and a reader thread. A monitor serves one client at a time: a
//! second one is accepted by the kernel but not greeted, which shows here as [`QmpError::Busy`].

pub mod client;
pub mod codec;
#[cfg(test)]
pub mod fake;

use std::io;
use std::path::PathBuf;

use serde_json::json;
use umbra_api::order::{Announce, Refusal, RefusalCode};

pub use client::{Client, Mark};
pub use codec::{CodecError, Event, Version};

/// Has QEMU tell the network where the guest's addresses are.
pub fn announce(qmp: &Client, a: &Announce) -> Result<(), QmpError> {
    let args = json!({"initial": a.initial_ms, "max": a.max_ms, "rounds": a.rounds, "step": a.step_ms});
    qmp.execute("announce-self", args).map(|_| ())
}

/// Why a command had no result.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("no QMP at {}: {source}", path.display())]
    Unavailable { path: PathBuf, source: io::Error },
    #[error("the QMP socket {} does not greet: another client holds it, or QEMU hangs", path.display())]
    Busy { path: PathBuf },
    #[error("QEMU closed its QMP connection")]
    Closed,
    #[error("no answer from QEMU to {command} in time")]
    Timeout { command: String },
    /// QEMU's own words.
    #[error("{command}: {desc} ({class})")]
    Qemu {
        command: String,
        class: String,
        desc: String,
    },
    #[error("QEMU's answer is no QMP: {0}")]
    Codec(#[from] CodecError),
    #[error("QEMU's answer to {command} lacks {what}")]
    Answer { command: String, what: &'static str },
}

impl From<QmpError> for Refusal {
    fn from(e: QmpError) -> Self {
        let code = match &e {
            // QEMU is well and said no; what that means only the caller knows.
            QmpError::Qemu { .. } => RefusalCode::Local,
            _ => RefusalCode::QmpUnavailable,
        };
        Refusal::new(code, e.to_string())
    }
}
