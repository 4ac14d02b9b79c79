//! A swap file for as long as a lab lives. It is the whole machine's: others use it only if they run short meanwhile.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::daemons::target_dir;
use super::ledger::{Item, Ledger};

/// Whether this machine has swap now.
pub fn there() -> bool {
    fs::read_to_string("/proc/swaps").is_ok_and(|t| t.lines().count() > 1)
}

/// Makes it, unless the machine has some. The inner error says why there can be none: a kernel or a file system without it.
pub fn add(ledger: &Ledger, mib: u64) -> Result<Result<(), String>> {
    if there() {
        return Ok(Ok(()));
    }
    // Not in the lab's own folder, which may be on tmpfs.
    let path = target_dir()?.join(format!("{}-swap", ledger.name()));
    ledger.making(Item::Swap(path.clone()), || {
        fill(&path, mib).with_context(|| format!("making {}", path.display()))
    })?;
    let made = run("mkswap", &path).and_then(|()| run("swapon", &path));
    Ok(made.map_err(|e| format!("{e:#}")))
}

/// No holes: the kernel refuses them.
fn fill(path: &Path, mib: u64) -> Result<()> {
    let mut file = File::create_new(path)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    let zeros = vec![0; 1 << 20];
    for _ in 0..mib {
        file.write_all(&zeros)?;
    }
    Ok(file.sync_all()?)
}

/// What is not there, or not in use, is no error.
pub fn remove(path: &Path) -> Result<()> {
    if in_use(path) {
        run("swapoff", path)?;
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn in_use(path: &Path) -> bool {
    let name = path.display().to_string();
    fs::read_to_string("/proc/swaps").is_ok_and(|t| t.lines().any(|l| l.split_whitespace().next() == Some(&name)))
}

fn run(program: &str, path: &Path) -> Result<()> {
    let out = Command::new(program)
        .arg(path)
        .output()
        .with_context(|| format!("{program} {}", path.display()))?;
    if !out.status.success() {
        bail!(
            "{program} {}: {}",
            path.display(),
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(())
}
