//! On the target: the RAM files of a copy that broke off, kept for the source to come back.
//!
//! ```text
//!  {vm}-{session}-{block}.ram   ── hold (its QEMU is dead, nobody writes it) ──>  {vm}-{since, unix ms}-{block}.held
//!  {vm}-{session'}-{block}.ram  <── fill: page by page into a new shadow's RAM ─────────┘ └─ drop: too old, in the way, released
//! ```
//! A file's name says all that must be known of it, so nothing has to survive a restart but the file. No shadow ever maps a held
//! file: its pages are charged to the cgroup of one that is gone, and mapped by nobody, so no tier could shrink them.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use umbra_api::{UnixMs, VmId};

use crate::launch::ShadowRecord;

/// Longer than a source tries: see [`super::retry::GIVE_UP_AFTER`].
pub const HELD_FOR: Duration = Duration::from_secs(20 * 60);
/// How often it is looked for files that are too old.
pub const LOOK_EVERY: Duration = Duration::from_secs(30);

const EXTENSION: &str = "held";

/// A held file, as its name tells it.
struct File {
    path: PathBuf,
    vm: String,
    since: UnixMs,
    block: String,
}

impl File {
    fn parse(path: PathBuf) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_suffix(".held")?;
        let (vm, rest) = name.split_once('-')?;
        let (since, block) = rest.split_once('-')?;
        let (vm, since, block) = (vm.to_owned(), UnixMs(since.parse().ok()?), block.to_owned());
        Some(Self { path, vm, since, block })
    }

    fn is_of(&self, vm: VmId) -> bool {
        self.vm == vm.0.simple().to_string()
    }

    fn remove(&self) {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), "held memory is not removed: {e}");
            }
            _ => {}
        }
    }
}

fn all(ram_dir: &Path) -> Vec<File> {
    let entries = match fs::read_dir(ram_dir) {
        Ok(entries) => entries,
        Err(_) => return Vec::new(),
    };
    entries.flatten().filter_map(|e| File::parse(e.path())).collect()
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |m| m.blocks() * 512)
}

/// Keeps a shadow's RAM files under their own names. The caller has ended whoever writes or maps them. Of one that is held already
/// the fuller stays; the other goes, or stays to be discarded.
pub fn hold(record: &ShadowRecord, now: UnixMs) -> io::Result<()> {
    for (block, path) in &record.ram {
        let Some(dir) = path.parent() else { continue };
        let older: Vec<_> = all(dir)
            .into_iter()
            .filter(|f| f.is_of(record.vm) && f.block == *block)
            .collect();
        // A pass that broke off before it got far: either is true of itself, as hashes are of what is there.
        if older.iter().any(|f| allocated(&f.path) > allocated(path)) {
            continue;
        }
        older.iter().for_each(File::remove);
        let name = format!("{}-{}-{block}.{EXTENSION}", record.vm.0.simple(), now.0);
        match fs::rename(path, dir.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// What is held of one of a new shadow's blocks, beside its RAM file. What is of another size is of no use, and goes.
pub fn of(vm: VmId, block: &str, bytes: u64, ram: &Path) -> Option<PathBuf> {
    let held = all(ram.parent()?)
        .into_iter()
        .filter(|f| f.is_of(vm) && f.block == block);
    let (of_use, others): (Vec<_>, Vec<_>) = held.partition(|f| fs::metadata(&f.path).is_ok_and(|m| m.len() == bytes));
    others.iter().for_each(File::remove);
    of_use.into_iter().max_by_key(|f| f.since).map(|f| f.path)
}

/// Bytes that a VM's held files take up.
pub fn bytes_of(ram_dir: &Path, vm: VmId) -> u64 {
    let own = all(ram_dir).into_iter().filter(|f| f.is_of(vm));
    own.map(|f| allocated(&f.path)).sum()
}

/// The VM is not coming back here.
pub fn forget(ram_dir: &Path, vm: VmId) {
    all(ram_dir).iter().filter(|f| f.is_of(vm)).for_each(File::remove);
}

/// Memory for a shadow that is wanted now goes before memory for one that may come: drops the oldest of the other VMs. False if there is none.
pub fn make_room(ram_dir: &Path, but: VmId) -> bool {
    let others = all(ram_dir).into_iter().filter(|f| !f.is_of(but));
    let oldest = others.min_by_key(|f| f.since);
    if let Some(file) = &oldest {
        tracing::info!(path = %file.path.display(), "held memory makes room for a shadow");
        file.remove();
    }
    oldest.is_some()
}

/// Drops what was held for too long. A clock that was set back makes nothing older.
pub fn expire(ram_dir: &Path, now: UnixMs) {
    let limit = i64::try_from(HELD_FOR.as_millis()).unwrap_or(i64::MAX);
    for file in all(ram_dir).iter().filter(|f| now.since(f.since).abs() > limit) {
        tracing::info!(path = %file.path.display(), "its source did not come back in time: held memory is dropped");
        file.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId(uuid::Uuid::from_u128(7));
    const OTHER: VmId = VmId(uuid::Uuid::from_u128(8));

    fn record(dir: &Path, vm: VmId, session: u64) -> ShadowRecord {
        let path = dir.join(format!("{}-{session}-pc.ram.ram", vm.0.simple()));
        fs::write(&path, b"memory").unwrap();
        ShadowRecord {
            vm,
            session,
            process: None,
            dir: dir.to_owned(),
            qmp_path: dir.join("q"),
            log: dir.join("l"),
            ram: vec![("pc.ram".into(), path)],
            taps: vec![],
            run_files: vec![],
            cgroup: None,
            memory_cgroup: None,
            disks: vec![],
            storage: None,
            token: 0,
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let name = |e: fs::DirEntry| e.file_name().into_string().unwrap();
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().flatten().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn memory_is_held_for_its_own_vm() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        hold(&record(dir, VM, 1), UnixMs(5000)).unwrap();
        hold(&record(dir, VM, 2), UnixMs(6000)).unwrap();
        assert_eq!(
            names(dir),
            [format!("{}-6000-pc.ram.held", VM.0.simple())],
            "only the last"
        );
        let new = dir.join("new.ram");
        let found = |vm, block, bytes| of(vm, block, bytes, &new);
        assert!(found(OTHER, "pc.ram", 6).is_none() && found(VM, "other", 6).is_none());
        let held = found(VM, "pc.ram", 6).unwrap();
        assert_eq!(fs::read(held).unwrap(), b"memory");
        assert!(found(VM, "pc.ram", 7).is_none(), "of another size");
        assert!(names(dir).is_empty(), "and of no use");
    }

    #[test]
    fn what_broke_off_at_once_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        hold(&record(dir, VM, 1), UnixMs(5000)).unwrap();
        let empty = record(dir, VM, 2);
        fs::write(&empty.ram[0].1, b"").unwrap();
        hold(&empty, UnixMs(6000)).unwrap();
        assert!(empty.ram[0].1.exists(), "for who discards the shadow");
        let held = of(VM, "pc.ram", 6, &dir.join("new.ram")).unwrap();
        assert_eq!(fs::read(held).unwrap(), b"memory");
    }

    #[test]
    fn memory_is_held_for_a_time_and_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let limit = HELD_FOR.as_millis() as i64;
        hold(&record(dir, VM, 1), UnixMs(1000)).unwrap();
        hold(&record(dir, OTHER, 1), UnixMs(2000)).unwrap();
        assert!(bytes_of(dir, VM) > 0);
        expire(dir, UnixMs(1000 + limit));
        assert_eq!(names(dir).len(), 2);
        expire(dir, UnixMs(1001 + limit));
        assert_eq!(names(dir).len(), 1);
        assert!(!make_room(dir, OTHER), "its own is not in its way");
        assert!(make_room(dir, VM));
        hold(&record(dir, VM, 2), UnixMs(1)).unwrap();
        forget(dir, OTHER);
        assert_eq!(names(dir).len(), 1);
        forget(dir, VM);
        assert!(names(dir).is_empty());
        fs::write(dir.join("strange-name.held"), b"").unwrap();
        forget(dir, VM);
        expire(dir, UnixMs(i64::MAX / 2));
        assert_eq!(names(dir), ["strange-name.held"], "not ours");
    }
}
