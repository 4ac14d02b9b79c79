//! Adopt, don't define: what a shadow needs is read off the running primary.
//!
//! [`derive`] is the pure core, with [`rules`] as its table; [`facts`] gathers what it must know; this file finds the process.
//! If several QEMUs have the VM's UUID (a primary that was switched away from, a shadow that waits), the one that runs is it.

pub mod ability;
mod chardev;
pub mod cpu;
pub mod derive;
mod disk;
pub mod facts;
mod netdev;
pub mod options;
pub mod rules;

use std::time::Duration;

use serde_json::Value;
use umbra_api::VmId;
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::ShadowSpec;

pub use derive::{Derived, derive};
pub use facts::{Facts, Storage};

use crate::proc::{self, QemuProcess, Scope};
use crate::qmp::{Client, QmpError, Version};

/// For the greeting of a monitor that nobody else holds.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);

/// A running QEMU that is held by its QMP connection and known well enough to be shadowed.
#[derive(Debug)]
pub struct Adopted {
    pub process: QemuProcess,
    pub qmp: Client,
    pub version: Version,
    pub name: String,
    pub spec: ShadowSpec,
    /// What will work, but not in every case: told to the operator.
    pub warnings: Vec<String>,
}

/// Finds the VM's running QEMU, connects to it and derives its shadow.
pub fn adopt(vm: VmId, scope: Scope, storage: Storage) -> Result<Adopted, Refusal> {
    let all = proc::scan(scope).map_err(|e| Refusal::new(RefusalCode::Local, format!("/proc: {e}")))?;
    let (process, qmp) = choose(vm, all.into_iter().filter(|q| q.uuid == Some(vm.0)).collect())?;
    adopt_held(process, qmp, storage)
}

/// All that can be told about a VM's adoption.
#[derive(Debug)]
pub struct Checked {
    pub name: String,
    /// QEMU's version and machine type.
    pub qemu: String,
    /// `None` if there are refusals.
    pub spec: Option<ShadowSpec>,
    pub refusals: Vec<Refusal>,
    pub warnings: Vec<String>,
}

/// Looks for everything that stands in the way, and not only for the first thing. The VM is only asked.
pub fn check(vm: VmId, scope: Scope, storage: Storage) -> Result<Checked, Refusal> {
    let all = proc::scan(scope).map_err(|e| Refusal::new(RefusalCode::Local, format!("/proc: {e}")))?;
    let (process, qmp) = choose(vm, all.into_iter().filter(|q| q.uuid == Some(vm.0)).collect())?;
    let version = qmp.version();
    too_old(version)?;
    let facts = Facts::gather(&process, &qmp, storage)?;
    let qemu = format!("QEMU {version}, {}", facts.machine);
    let name = process.name.clone().unwrap_or_else(|| vm.to_string());
    let (derived, refusals) = derive::all(&process.args, &facts);
    let (spec, warnings) = derived.map_or((None, Vec::new()), |d| (Some(d.spec), d.warnings));
    Ok(Checked {
        name,
        qemu,
        spec,
        refusals,
        warnings,
    })
}

/// Before the facts are asked for: an old QEMU would stumble over the questions.
fn too_old(version: Version) -> Result<(), Refusal> {
    if version >= Version::OLDEST {
        return Ok(());
    }
    let why = format!(
        "QEMU {version}: {} or newer is needed, which can hold a migration; start the VM with a newer QEMU",
        Version::OLDEST
    );
    Err(Refusal::new(RefusalCode::QemuTooOld, why))
}

/// The same for a QEMU whose monitor this replicator holds already: a shadow that became the primary.
pub fn adopt_held(process: QemuProcess, qmp: Client, storage: Storage) -> Result<Adopted, Refusal> {
    let version = qmp.version();
    too_old(version)?;
    let facts = Facts::gather(&process, &qmp, storage)?;
    let Derived { spec, warnings } = derive(&process.args, &facts)?;
    let name = process
        .name
        .clone()
        .unwrap_or_else(|| process.uuid.unwrap_or_default().to_string());
    Ok(Adopted {
        process,
        qmp,
        version,
        name,
        spec,
        warnings,
    })
}

/// What a QEMU's state means for adoption.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Standing {
    Runs,
    /// By an operator's `stop`: it is the VM unless another one runs.
    Paused,
    No,
}

fn standing(status: &str, incoming: bool) -> Standing {
    match status {
        "running" => Standing::Runs,
        // A shadow that has loaded its state says 'paused' too: only its replicator knows whether it may run.
        "paused" if !incoming => Standing::Paused,
        _ => Standing::No,
    }
}

fn choose(vm: VmId, mut candidates: Vec<QemuProcess>) -> Result<(QemuProcess, Client), Refusal> {
    if candidates.is_empty() {
        return Err(Refusal::new(
            RefusalCode::NoSuchVm,
            format!("no QEMU runs with -uuid {vm}"),
        ));
    }
    // Those that were started as the VM first: a waiting shadow's monitor is held, and asking it takes its time.
    candidates.sort_by_key(|q| q.incoming);
    let mut paused = None;
    let mut trouble: Option<Refusal> = None;
    let mut seen = Vec::new();
    for process in candidates {
        let pid = process.id.pid;
        let (client, status) = match ask(&process) {
            Ok(answer) => answer,
            Err(refusal) => {
                trouble = trouble.or(Some(refusal));
                continue;
            }
        };
        match standing(&status, process.incoming) {
            Standing::Runs => return Ok((process, client)),
            Standing::Paused => paused = paused.or(Some((process, client))),
            Standing::No => seen.push(format!("process {pid} is {status}")),
        }
    }
    if let Some(found) = paused {
        return Ok(found);
    }
    Err(trouble.unwrap_or_else(|| {
        Refusal::new(
            RefusalCode::NoSuchVm,
            format!("no QEMU with -uuid {vm} runs: {}", seen.join(", ")),
        )
    }))
}

/// Connects to the first monitor that answers, and asks how its VM is.
fn ask(process: &QemuProcess) -> Result<(Client, String), Refusal> {
    let mut trouble = None;
    for path in &process.qmp {
        match Client::connect(path, GREETING_TIMEOUT) {
            Ok(client) => {
                let answer = client.execute("query-status", Value::Null)?;
                let status = answer.get("status").and_then(Value::as_str);
                let lacks = || QmpError::Answer {
                    command: "query-status".into(),
                    what: "a status",
                };
                return Ok((client.clone(), status.ok_or_else(lacks)?.to_owned()));
            }
            Err(e) => trouble = trouble.or(Some(e)),
        }
    }
    Err(match trouble {
        Some(QmpError::Busy { path }) => Refusal::new(
            RefusalCode::QmpUnavailable,
            format!(
                "the QMP socket {} is busy: one client at a time; start the VM with a second \
                 -qmp unix:PATH,server=on,wait=off for Umbra",
                path.display()
            ),
        ),
        Some(e) => e.into(),
        None => Refusal::new(
            RefusalCode::QmpUnavailable,
            format!(
                "QEMU process {} has no QMP on a unix socket; start the VM with -qmp unix:PATH,server=on,wait=off",
                process.id.pid
            ),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_shadow_is_not_taken_for_the_vm() {
        assert_eq!(standing("running", true), Standing::Runs);
        assert_eq!(standing("paused", false), Standing::Paused);
        assert_eq!(standing("paused", true), Standing::No);
        assert_eq!(standing("inmigrate", true), Standing::No);
        assert_eq!(standing("postmigrate", false), Standing::No);
        assert_eq!(standing("shutdown", false), Standing::No);
    }

    #[test]
    fn a_vm_that_is_not_here_is_named() {
        let vm = VmId(uuid::Uuid::from_u128(0xdead));
        let refusal = adopt(vm, Scope::All, Storage::Private).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::NoSuchVm);
        assert!(refusal.detail.contains("dead"), "{refusal}");
    }
}
