//! Whether a VM can be shadowed, told before anything starts: `GET /v1/vms/{vm}/adoptable` on the replicator of its host.

use serde::{Deserialize, Serialize};

use crate::order::{Refusal, RefusalCode};
use crate::{HostId, VmId};

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Adoptable {
    pub vm: VmId,
    pub name: String,
    pub host: HostId,
    /// QEMU's version and machine type, where it could be asked.
    pub qemu: Option<String>,
    /// The host that was asked whether it could hold the shadow.
    pub target: Option<HostId>,
    /// What stands in the way. None: a shadow can be made.
    pub findings: Vec<Finding>,
    /// What will work, but not in every case.
    pub warnings: Vec<String>,
}

/// One thing that stands in the way.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// Where.
    pub host: HostId,
    pub code: RefusalCode,
    pub reason: String,
    /// What to do about it, where there is something.
    pub remedy: Option<String>,
}

impl Finding {
    /// A refusal's words are its reason and, behind a semicolon, its remedy.
    pub fn new(host: &HostId, refusal: &Refusal) -> Self {
        let (reason, remedy) = match refusal.detail.split_once("; ") {
            Some((reason, remedy)) => (reason, Some(remedy.to_owned())),
            None => (refusal.detail.as_str(), None),
        };
        Self {
            host: host.clone(),
            code: refusal.code,
            reason: reason.to_owned(),
            remedy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_its_reason_and_its_remedy() {
        let host: HostId = "a".parse().unwrap();
        let f = Finding::new(
            &host,
            &Refusal::new(RefusalCode::Unsupported, "the device x: no; use y"),
        );
        assert_eq!(
            (f.reason.as_str(), f.remedy.as_deref()),
            ("the device x: no", Some("use y"))
        );
        assert_eq!(
            Finding::new(&host, &Refusal::new(RefusalCode::Local, "no")).remedy,
            None
        );
    }
}
