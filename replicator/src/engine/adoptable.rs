//! Whether a VM can be shadowed: all that stands in the way, here and on a target, before anything starts.

use std::time::Duration;

use umbra_api::adopt::{Adoptable, Finding};
use umbra_api::order::Refusal;
use umbra_api::wire::control::{Message, ShadowSpec};
use umbra_api::{HostId, VmId};

use super::Engine;
use crate::adopt::{self, Checked};
use crate::launch;
use crate::source::control::unexpected;

/// A target asks its QEMU for machine types.
const CHECK_TIMEOUT: Duration = Duration::from_secs(20);

impl Engine {
    /// `target`: its name and the address of its link.
    pub fn adoptable(&self, vm: VmId, target: Option<(&HostId, &str)>) -> Adoptable {
        let config = &self.core.config;
        let here = |refusals: &[Refusal]| refusals.iter().map(|r| Finding::new(&config.host, r)).collect();
        let mut report = Adoptable {
            vm,
            name: String::new(),
            host: config.host.clone(),
            qemu: None,
            target: target.map(|(host, _)| host.clone()),
            findings: Vec::new(),
            warnings: Vec::new(),
        };
        let checked: Checked = match adopt::check(vm, config.scope, config.storage) {
            Ok(checked) => checked,
            Err(refusal) => {
                report.findings = here(&[refusal]);
                return report;
            }
        };
        report.name = checked.name;
        report.qemu = Some(checked.qemu);
        report.findings = here(&checked.refusals);
        report.warnings = checked.warnings;
        if let (Some((host, link)), Some(spec)) = (target, checked.spec) {
            let lacks = self.ask_lacks(vm, host, link, spec).unwrap_or_else(|e| vec![e]);
            report.findings.extend(lacks.iter().map(|r| Finding::new(host, r)));
        }
        report
    }

    /// Over the link, so that its way and its certificates are tried too.
    fn ask_lacks(&self, vm: VmId, host: &HostId, link: &str, spec: ShadowSpec) -> Result<Vec<Refusal>, Refusal> {
        let question = Message::Check {
            vm,
            host: self.core.config.host.clone(),
            spec: Box::new(spec),
        };
        match self.ask_peer(host, link, CHECK_TIMEOUT, &question)? {
            Message::Checked { lacks } => Ok(lacks),
            Message::Refused { refusal } => Err(refusal),
            other => Err(unexpected(link, &other)),
        }
    }

    /// What this host lacks for a shadow of that kind.
    pub fn lacks(&self, vm: VmId, spec: &ShadowSpec) -> Vec<Refusal> {
        launch::lacks(spec, &self.core.config.launch(), vm)
    }
}
