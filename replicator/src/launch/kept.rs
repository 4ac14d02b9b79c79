//! Images of a shadow whose link broke: kept for a while, so that its source's mirrors go on where they were.
//!
//! ```text
//!  link lost, replicator restarted ─> the daemon ends in order and without a complaint ─> NUMBER.kept beside the images
//!     ─> a shadow of the same VM from the same host asks for NUMBER ─> NUMBER.kept is removed, the images are the new shadow's
//!     └─> nobody asks in time, or something does not fit: images and note are removed
//! ```
//! An image counts only as long as nothing happened to it of which the source's mirror does not know: its daemon flushed it,
//! ended in order, had nothing to complain about, and this host has not been started anew since. Everything else means a full copy.
//! It must be the very file, untouched: an image that an operator set aside lies where others may write, and any write, truncation or
//! replacement shows in inode, size and change time, which nobody sets back. Such an image is never removed, only trusted or not.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use umbra_api::wire::control::Disk;
use umbra_api::{HostId, VmId};

use super::disks::{self, Image};
use super::{LaunchConfig, ShadowRecord, make_dir, private_file};

const EXTENSION: &str = "kept";
/// The kernel stamps files by a clock that ticks each 1 to 10 ms: a change later than this has another time than the one before.
const TICK: Duration = Duration::from_millis(20);
const SETTLE_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    vm: VmId,
    token: u64,
    peer: HostId,
    /// Of this host's kernel: what its cache held is there as long as it runs.
    boot: String,
    images: Vec<Image>,
    /// What the images' files were, in the same order.
    files: Vec<Stamp>,
}

/// A file as it was after its last change.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stamp {
    dev: u64,
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds.
    changed: (i64, i64),
    modified: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> io::Result<Self> {
        // Of what a link leads to: that is what is written.
        let m = fs::metadata(path)?;
        Ok(Self {
            dev: m.dev(),
            inode: m.ino(),
            bytes: m.len(),
            changed: (m.ctime(), m.ctime_nsec()),
            modified: (m.mtime(), m.mtime_nsec()),
        })
    }

    /// Of a file whose next change will show: not before the tick of its last one is over.
    fn settled(path: &Path) -> io::Result<Self> {
        let began = Instant::now();
        loop {
            let stamp = Self::of(path)?;
            let changed = Duration::new(stamp.changed.0.unsigned_abs(), stamp.changed.1.unsigned_abs() as u32);
            let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + changed);
            if age.is_ok_and(|age| age >= TICK) {
                return Ok(stamp);
            }
            if began.elapsed() > SETTLE_TIMEOUT {
                return Err(io::Error::other(format!(
                    "{} changes, or has a time to come",
                    path.display()
                )));
            }
            std::thread::sleep(TICK);
        }
    }
}

fn boot() -> io::Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
}

fn note(dir: &Path, vm: VmId, token: u64) -> PathBuf {
    dir.join(format!("{}-{token}.{EXTENSION}", vm.0.simple()))
}

/// Ends a shadow's daemon so that its images can be gone on with. An error says why they can't.
pub fn keep(record: &ShadowRecord, peer: &HostId, cfg: &LaunchConfig) -> io::Result<()> {
    if !record.storage.is_some_and(|p| p.alive()) {
        return Err(io::Error::other("their daemon was gone before"));
    }
    // A failed write is told to who has the file open: the daemon tells of all before the flush, these of all since.
    let files = record.disks.iter().map(|i| File::open(&i.path));
    let files = files.collect::<io::Result<Vec<_>>>()?;
    disks::flush(record, cfg).map_err(io::Error::other)?;
    disks::stop(record)?;
    files.iter().try_for_each(File::sync_all)?;
    if let Some(complaint) = fs::read_to_string(disks::log(record))?.lines().find(|l| !is_of_link(l)) {
        return Err(io::Error::other(format!("their daemon said: {complaint}")));
    }
    make_dir(&cfg.disk_dir).map_err(io::Error::other)?;
    let kept = Kept {
        files: record
            .disks
            .iter()
            .map(|i| Stamp::settled(&i.path))
            .collect::<io::Result<_>>()?,
        vm: record.vm,
        token: record.token,
        peer: peer.clone(),
        boot: boot()?,
        images: record.disks.clone(),
    };
    let path = note(&cfg.disk_dir, record.vm, record.token);
    let mut file = private_file(&path)?;
    file.write_all(&serde_json::to_vec(&kept)?)?;
    file.sync_all()
}

/// Only that the connection ended under an answer: the break itself. What was done and not answered QEMU counts as not done, and has it
/// copied again.
fn is_of_link(line: &str) -> bool {
    let why = line.split_once(": Disconnect client, due to: ").map(|(_, why)| why);
    line.trim().is_empty() || why.is_some_and(|why| why.contains(" socket: "))
}

/// The images that a source asks for, and their number. Others of the VM are removed.
pub fn claim(
    cfg: &LaunchConfig,
    vm: VmId,
    asked: Option<u64>,
    peer: &HostId,
    wanted: &[Disk],
) -> Option<(u64, Vec<Image>)> {
    let taken = asked.and_then(|token| Some((token, take(cfg, vm, token, peer, wanted)?)));
    expire(&cfg.disk_dir, Duration::ZERO, Some(vm));
    taken
}

/// The images under this number, if they are as the source's mirrors left them. They are not kept any more.
fn take(cfg: &LaunchConfig, vm: VmId, token: u64, peer: &HostId, wanted: &[Disk]) -> Option<Vec<Image>> {
    let dir = &cfg.disk_dir;
    let path = note(dir, vm, token);
    let kept: Kept = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
    // First: whatever comes now, nobody finds them again as they are.
    fs::remove_file(&path).and_then(|()| File::open(dir)?.sync_all()).ok()?;
    // The operator's map may be another one by now.
    let in_place = |i: &Image, d: &Disk| match cfg.disks.get(&d.path) {
        Some(mapped) => !i.ours && i.path == *mapped,
        None => i.ours,
    };
    let untouched = |(i, was): (&Image, &Stamp)| Stamp::of(&i.path).is_ok_and(|now| now == *was);
    let same = kept.images.len() == wanted.len()
        && kept.files.len() == wanted.len()
        && kept
            .images
            .iter()
            .zip(wanted)
            .all(|(i, d)| i.is_of(d) && in_place(i, d))
        && kept.images.iter().zip(&kept.files).all(untouched);
    let fit =
        same && kept.vm == vm && kept.token == token && kept.peer == *peer && boot().is_ok_and(|b| b == kept.boot);
    if !fit {
        tracing::warn!(%vm, token, "the images that were kept do not fit: the disks are copied whole");
        remove(&kept.images);
    }
    fit.then_some(kept.images)
}

/// Those that an operator set aside stay, and are not trusted any more.
pub fn remove(images: &[Image]) {
    for image in images.iter().filter(|i| i.ours) {
        if let Err(e) = fs::remove_file(&image.path)
            && e.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(image = %image.path.display(), "a kept image stays: {e}");
        }
    }
}

/// Removes what was kept for longer than `age`; of one VM, if one is named, all the same how long.
pub fn expire(dir: &Path, age: Duration, of: Option<VmId>) {
    // Nothing was ever kept here.
    let Ok(entries) = fs::read_dir(dir) else { return };
    let now = SystemTime::now();
    for path in entries.filter_map(|e| Some(e.ok()?.path())) {
        if path.extension().is_none_or(|e| e != EXTENSION) {
            continue;
        }
        let Some(kept) = fs::read(&path)
            .ok()
            .and_then(|t| serde_json::from_slice::<Kept>(&t).ok())
        else {
            continue;
        };
        let since = fs::metadata(&path).and_then(|m| m.modified());
        let old = since.is_ok_and(|s| now.duration_since(s).is_ok_and(|d| d >= age));
        if of.map_or(old, |vm| vm == kept.vm) && fs::remove_file(&path).is_ok() {
            tracing::info!(vm = %kept.vm, "the images that were kept for a broken copy are removed");
            remove(&kept.images);
        }
    }
}

#[cfg(test)]
mod tests {
    use umbra_api::wire::control::DiskFormat;

    use super::*;

    fn config(dir: &Path) -> LaunchConfig {
        LaunchConfig {
            disk_dir: dir.to_owned(),
            ..LaunchConfig::default()
        }
    }

    fn scene(dir: &Path) -> (Kept, Vec<Disk>) {
        let path = dir.join("a.img");
        fs::write(&path, "x").unwrap();
        let image = Image {
            path,
            format: DiskFormat::Raw,
            bytes: 512,
            ours: true,
            of: ("n".into(), "/x".into()),
        };
        let disk = Disk {
            node: "n".into(),
            device: "d".into(),
            path: "/x".into(),
            format: DiskFormat::Raw,
            bytes: 512,
        };
        let kept = Kept {
            vm: VmId(Default::default()),
            token: 7,
            peer: "a".parse().unwrap(),
            boot: boot().unwrap(),
            files: vec![Stamp::settled(&image.path).unwrap()],
            images: vec![image],
        };
        (kept, vec![disk])
    }

    fn put(dir: &Path, kept: &Kept) {
        fs::write(note(dir, kept.vm, kept.token), serde_json::to_vec(kept).unwrap()).unwrap();
    }

    #[test]
    fn an_image_is_taken_once_and_only_by_its_own() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        let cfg = &config(dir);
        let (kept, disks) = scene(dir);
        put(dir, &kept);
        assert_eq!(take(cfg, kept.vm, 8, &kept.peer, &disks), None, "another number");
        assert_eq!(take(cfg, kept.vm, 7, &kept.peer, &disks), Some(kept.images.clone()));
        assert_eq!(take(cfg, kept.vm, 7, &kept.peer, &disks), None, "a second time");
        assert!(kept.images[0].path.exists());
        let other = "b".parse().unwrap();
        put(dir, &kept);
        assert_eq!(take(cfg, kept.vm, 7, &other, &disks), None, "another host's mirror");
        assert!(!kept.images[0].path.exists(), "what is not trusted goes");
    }

    #[test]
    fn another_boot_or_another_disk_means_a_full_copy() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        let cfg = &config(dir);
        let (mut kept, disks) = scene(dir);
        put(dir, &kept);
        let mut larger = disks.clone();
        larger[0].bytes = 1024;
        let mut replaced = disks.clone();
        replaced[0].node = "plugged in later".into();
        for other in [larger, replaced] {
            assert_eq!(take(cfg, kept.vm, 7, &kept.peer, &other), None);
            kept = scene(dir).0;
            put(dir, &kept);
        }
        kept.boot = "another".into();
        put(dir, &kept);
        assert_eq!(take(cfg, kept.vm, 7, &kept.peer, &disks), None);
    }

    #[test]
    fn an_image_that_an_operator_set_aside_is_trusted_only_untouched_and_never_removed() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        let mut cfg = config(dir);
        let (mut kept, disks) = scene(dir);
        kept.images[0].ours = false;
        let path = kept.images[0].path.clone();
        let taken = |cfg: &LaunchConfig, kept: &Kept| {
            put(dir, kept);
            let taken = take(cfg, kept.vm, 7, &kept.peer, &disks);
            assert!(path.exists());
            taken.is_some()
        };
        assert!(!taken(&cfg, &kept), "it is not in the map any more");
        cfg.disks.insert("/x".into(), dir.join("b.img"));
        assert!(!taken(&cfg, &kept), "another one is");
        cfg.disks.insert("/x".into(), path.clone());
        assert!(taken(&cfg, &kept));
        // The same bytes once more, and the time of the last change set back: it may have been anything.
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        (&file).write_all(b"x").unwrap();
        file.set_modified(modified).unwrap();
        assert!(!taken(&cfg, &kept), "somebody wrote");
        kept.files[0] = Stamp::settled(&path).unwrap();
        assert!(taken(&cfg, &kept));
        fs::rename(&path, dir.join("c.img")).unwrap();
        fs::copy(dir.join("c.img"), &path).unwrap();
        assert!(!taken(&cfg, &kept), "another file in its place");
        // The link stays as it is.
        let link = dir.join("link.img");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        cfg.disks.insert("/x".into(), link.clone());
        kept.images[0].path = link.clone();
        kept.files[0] = Stamp::settled(&link).unwrap();
        assert!(taken(&cfg, &kept));
        fs::write(&path, "y").unwrap();
        assert!(!taken(&cfg, &kept), "somebody wrote to what it leads to");
    }

    #[test]
    fn a_daemon_that_lost_its_client_says_nothing_of_its_images() {
        let said = |what: &str| is_of_link(&format!("qemu-storage-daemon: {what}"));
        assert!(said(
            "Disconnect client, due to: Failed to send reply: Unable to write to socket: Broken pipe"
        ));
        assert!(said(
            "Disconnect client, due to: Unable to read from socket: Connection reset by peer"
        ));
        assert!(!said("Disconnect client, due to: invalid magic"));
        assert!(!said("Failed to flush the L2 block cache: No space left on device"));
        assert!(is_of_link(""));
    }

    #[test]
    fn what_nobody_asks_for_goes() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        let (kept, _) = scene(dir);
        put(dir, &kept);
        expire(dir, Duration::from_secs(600), None);
        assert!(kept.images[0].path.exists());
        expire(dir, Duration::ZERO, None);
        assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
    }
}
