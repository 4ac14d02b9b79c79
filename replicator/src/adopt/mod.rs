//! Adopt, don't define: what a shadow needs is read off the running primary.

pub mod options;

use umbra_api::wire::control::ShadowSpec;

use crate::proc::QemuProcess;
use crate::qmp::{Client, Version};

/// A running QEMU that is held by its QMP connection and known well enough to be shadowed.
pub struct Adopted {
    pub process: QemuProcess,
    pub qmp: Client,
    pub version: Version,
    pub name: String,
    pub spec: ShadowSpec,
    /// What will work, but not in every case: told to the operator.
    pub warnings: Vec<String>,
}
