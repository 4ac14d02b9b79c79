//! What this host must have before a shadow is started: each lack is a refusal that names it.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::{Nic, ShadowSpec};

use super::{LaunchConfig, command};
use crate::adopt::cpu;
use crate::tap;

fn lacks(what: String) -> Refusal {
    Refusal::new(RefusalCode::TargetLacks, what)
}

/// The QEMU binary.
pub fn binary(spec: &ShadowSpec, cfg: &LaunchConfig) -> Result<PathBuf, Refusal> {
    program(&spec.binary, cfg)
}

/// One of QEMU's programs.
pub fn program(name: &str, cfg: &LaunchConfig) -> Result<PathBuf, Refusal> {
    let dirs: Vec<PathBuf> = match &cfg.qemu_dir {
        Some(dir) => vec![dir.clone()],
        None => std::env::var_os("PATH")
            .map(|p| std::env::split_paths(&p).collect())
            .unwrap_or_default(),
    };
    let runs = |p: &PathBuf| fs::metadata(p).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    dirs.iter()
        .map(|d| d.join(name))
        .find(runs)
        .ok_or_else(|| match &cfg.qemu_dir {
            Some(dir) => lacks(format!(
                "no {name} in {}; install QEMU there, or set qemu_dir",
                dir.display()
            )),
            None => lacks(format!("no {name} on the PATH; install QEMU, or set qemu_dir")),
        })
}

/// The files that the command line names.
pub fn files(spec: &ShadowSpec) -> Result<(), Refusal> {
    let missing: Vec<_> = spec
        .files
        .iter()
        .filter(|f| !Path::new(f).exists())
        .map(String::as_str)
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(lacks(format!(
            "no file {}; copy it there from the primary's host",
            missing.join(", ")
        )))
    }
}

/// Memory for the RAM files, on a filesystem that is memory. `held` bytes of them are there already.
pub fn memory(spec: &ShadowSpec, ram_dir: &Path, held: u64) -> Result<(), Refusal> {
    let local = |e: io::Error| Refusal::new(RefusalCode::Local, format!("ram_dir {}: {e}", ram_dir.display()));
    let fs = statfs(ram_dir).map_err(|e| local(e.into()))?;
    if !is_memory(fs.filesystem_type()) {
        return Err(lacks(format!(
            "ram_dir {} is neither on tmpfs nor on hugetlbfs",
            ram_dir.display()
        )));
    }
    let whole: u64 = spec.ram.iter().fold(0, |sum, r| sum.saturating_add(r.bytes));
    let need = whole.saturating_sub(held);
    let free = fs
        .blocks_available()
        .saturating_mul(u64::try_from(fs.block_size()).unwrap_or(0));
    let promised = promised(ram_dir).map_err(local)?;
    if need.saturating_add(promised) > free {
        return Err(lacks(short("ram_dir", need, free, promised)));
    }
    // A tmpfs may promise more than the machine has. Huge pages are set aside already.
    if fs.filesystem_type() == TMPFS_MAGIC
        && let Some(available) = meminfo_available(&fs::read_to_string("/proc/meminfo").map_err(local)?)
        && need.saturating_add(promised) > available
    {
        return Err(lacks(short("this host's memory", need, available, promised)));
    }
    Ok(())
}

fn is_memory(kind: FsType) -> bool {
    kind == TMPFS_MAGIC || kind == HUGETLBFS_MAGIC
}

fn short(what: &str, need: u64, free: u64, promised: u64) -> String {
    let mib = |b: u64| b.div_ceil(1 << 20);
    format!(
        "the shadow needs {} MiB, {what} has {} MiB free, of which {} MiB are promised to other shadows",
        mib(need),
        mib(free),
        mib(promised)
    )
}

/// What the RAM files of others may still grow by: they are sparse until they are seeded.
fn promised(ram_dir: &Path) -> io::Result<u64> {
    let mut sum = 0_u64;
    for entry in fs::read_dir(ram_dir)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|e| e == super::RAM_EXTENSION)
            && let Ok(meta) = entry.metadata()
        {
            sum = sum.saturating_add(meta.len().saturating_sub(meta.blocks().saturating_mul(512)));
        }
    }
    Ok(sum)
}

fn meminfo_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// A guest that sees its host's CPU must find the very same here.
pub fn cpu(spec: &ShadowSpec) -> Result<(), Refusal> {
    let Some(theirs) = &spec.host_cpu else { return Ok(()) };
    let here = cpu::this().ok_or_else(|| lacks("-cpu host, and /proc/cpuinfo does not tell this host's CPU".into()))?;
    match cpu::difference(theirs, &here) {
        None => Ok(()),
        Some(how) => Err(lacks(format!(
            "the CPU of -cpu host: {how}; start the VM with a named CPU model that both hosts have"
        ))),
    }
}

/// The bridge of each NIC, as it is called here.
pub fn bridges(spec: &ShadowSpec, cfg: &LaunchConfig) -> Result<Vec<String>, Refusal> {
    spec.nics
        .iter()
        .enumerate()
        .map(|(n, nic)| bridge(n, nic, cfg))
        .collect()
}

/// The bridge of one NIC, as it is called here.
pub fn bridge(index: usize, nic: &Nic, cfg: &LaunchConfig) -> Result<String, Refusal> {
    let name = bridge_name(nic, cfg).ok_or_else(|| {
        lacks(format!(
            "a bridge for NIC {index}: the primary's tap {} is a port of none; set default_bridge to name one",
            nic.tap
        ))
    })?;
    match tap::link(name) {
        Ok(Some(_)) => Ok(name.to_owned()),
        Ok(None) => Err(lacks(format!(
            "no bridge {name} for NIC {index}; make it, or map the name to another under [bridges]"
        ))),
        Err(e) => Err(Refusal::new(RefusalCode::Local, format!("bridge {name}: {e}"))),
    }
}

fn bridge_name<'a>(nic: &'a Nic, cfg: &'a LaunchConfig) -> Option<&'a str> {
    match &nic.bridge {
        Some(theirs) => Some(cfg.bridges.get(theirs).unwrap_or(theirs)),
        None => cfg.default_bridge.as_deref(),
    }
}

/// The host's half of vhost-net NICs.
pub fn vhost(spec: &ShadowSpec) -> Result<(), Refusal> {
    let wanted = (0..spec.nics.len()).any(|n| command::vhost(spec, n));
    if wanted && !Path::new("/dev/vhost-net").exists() {
        return Err(lacks(
            "no /dev/vhost-net: load the module vhost_net, or start the VM with vhost=off".into(),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_with_what_others_were_promised() {
        let text = "MemTotal:       24684108 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(meminfo_available(text), Some(1 << 20));
        assert_eq!(meminfo_available("MemAvailable: lots"), None);
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(promised(dir.path()).unwrap(), 0);
        fs::File::create(dir.path().join("a.ram"))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        fs::File::create(dir.path().join("a.other"))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        assert_eq!(promised(dir.path()).unwrap(), 1 << 20);
        let words = short("ram_dir", 4 << 20, 3 << 20, 1 << 20);
        assert!(words.contains("needs 4 MiB") && words.contains("3 MiB free") && words.contains("1 MiB are promised"));
    }

    #[test]
    fn bridges_are_mapped_by_name() {
        let mut cfg = LaunchConfig::default();
        let nic = |bridge: Option<&str>| Nic {
            bridge: bridge.map(str::to_owned),
            tap: "t0".into(),
        };
        assert_eq!(bridge_name(&nic(Some("br0")), &cfg), Some("br0"));
        assert_eq!(bridge_name(&nic(None), &cfg), None);
        cfg.bridges.insert("br0".into(), "virbr7".into());
        cfg.default_bridge = Some("lan".into());
        assert_eq!(bridge_name(&nic(Some("br0")), &cfg), Some("virbr7"));
        assert_eq!(bridge_name(&nic(None), &cfg), Some("lan"));
        let refusal = bridge(2, &nic(Some("umbra-none")), &cfg).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::TargetLacks);
        assert!(refusal.detail.contains("umbra-none") && refusal.detail.contains("NIC 2"));
    }
}
