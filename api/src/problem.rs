//! Errors over HTTP: `application/problem+json` (RFC 9457).

use serde::{Deserialize, Serialize};

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{title}: {detail}")]
pub struct Problem {
    /// Stable, for programs: `stale_epoch`, `no_such_vm`, …
    pub code: String,
    pub title: String,
    pub status: u16,
    /// What is wrong and where, for people.
    pub detail: String,
}

impl Problem {
    pub fn new(status: u16, code: impl Into<String>, title: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            title: title.into(),
            status,
            detail: detail.into(),
        }
    }

    pub fn not_found(what: impl Into<String>) -> Self {
        Self::new(404, "not_found", "Not found", what)
    }

    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(400, "bad_request", "Bad request", detail)
    }
}

impl From<crate::order::Refusal> for Problem {
    fn from(r: crate::order::Refusal) -> Self {
        use crate::order::RefusalCode as C;
        let status = match r.code {
            C::NoSuchVm => 404,
            C::StaleEpoch | C::WrongPhase | C::Interfered | C::NotConverging | C::DowntimeTooLong => 409,
            C::BadOrder => 400,
            C::QemuTooOld | C::Unsupported | C::TargetLacks => 422,
            C::QmpUnavailable | C::PeerUnreachable | C::PeerRefused | C::PeerIdentity => 502,
            C::Local => 500,
        };
        Self::new(status, r.code.to_string(), "The replicator refused", r.detail)
    }
}
