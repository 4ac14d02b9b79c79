//! A cpuset a host, and a place for its tiers, in cgroup v1 or v2, whichever the machine has. Where it has neither, affinity alone (see
//! [`super::sys::place`]) keeps a host on its core.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::ledger::{Item, Ledger};

const V1: &str = "/sys/fs/cgroup/cpuset";
const V2: &str = "/sys/fs/cgroup";

/// Where cpusets are made on this machine.
fn root() -> Option<PathBuf> {
    if Path::new(V1).join("cpuset.cpus").exists() {
        return Some(V1.into());
    }
    let controllers = fs::read_to_string(Path::new(V2).join("cgroup.controllers")).ok()?;
    controllers
        .split_ascii_whitespace()
        .any(|c| c == "cpuset")
        .then(|| V2.into())
}

/// A cpuset of these CPUs; returns its opened `cgroup.procs`, or `None` where the machine has no cpusets.
pub fn make(ledger: &Ledger, host: &str, cpus: &[usize]) -> Result<Option<File>> {
    let Some(root) = root() else { return Ok(None) };
    let v2 = root.join("cgroup.subtree_control");
    if v2.exists() {
        fs::write(&v2, "+cpuset").with_context(|| format!("enabling cpuset in {}", v2.display()))?;
    }
    let group = root.join(format!("{}-{host}", ledger.name()));
    ledger.making(Item::Cgroup(group.clone()), || {
        fs::create_dir(&group).with_context(|| format!("making {}", group.display()))
    })?;
    let list = cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mems = ["cpuset.effective_mems", "cpuset.mems.effective"]
        .iter()
        .find_map(|f| fs::read_to_string(root.join(f)).ok())
        .map_or_else(|| "0".to_owned(), |m| m.trim().to_owned());
    for (file, value) in [("cpuset.cpus", &list), ("cpuset.mems", &mems)] {
        let path = group.join(file);
        fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))?;
    }
    let procs = group.join("cgroup.procs");
    let file = File::options()
        .write(true)
        .open(&procs)
        .with_context(|| format!("opening {}", procs.display()))?;
    Ok(Some(file))
}

/// Names the group below the cpu and memory controllers that a daemon of this host may make for its tiers, and sees to its end.
pub fn cpu_group(ledger: &Ledger, host: &str) -> Result<String> {
    let name = format!("{}-{host}-tiers", ledger.name());
    let v1 = fs::read_dir(V2)
        .into_iter()
        .flatten()
        .filter_map(|e| Some(e.ok()?.path()));
    let has = |p: &PathBuf| {
        ["cpu.shares", "memory.limit_in_bytes"]
            .iter()
            .any(|f| p.join(f).exists())
    };
    let mounts = v1.filter(has).chain([PathBuf::from(V2)]);
    ledger.record(mounts.map(|m| Item::Cgroup(m.join(&name))))?;
    Ok(name)
}
