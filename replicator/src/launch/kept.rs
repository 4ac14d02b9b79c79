//! Images of a shadow whose link broke: kept for a while, so that its source's mirrors go on where they were.
//!
//! ```text
//!  link lost, replicator restarted ─> the daemon ends in order and without a complaint ─> NUMBER.kept beside the images
//!     ─> a shadow of the same VM from the same host asks for NUMBER ─> NUMBER.kept is removed, the images are the new shadow's
//!     └─> nobody asks in time, or something does not fit: images and note are removed
//! ```
//! An image counts only as long as nothing happened to it of which the source's mirror does not know: its daemon flushed it,
//! ended in order, had nothing to complain about, and this host has not been started anew since. Everything else means a full copy.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use umbra_api::wire::control::Disk;
use umbra_api::{HostId, VmId};

use super::disks::{self, Image};
use super::{LaunchConfig, ShadowRecord, private_file};

const EXTENSION: &str = "kept";

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    vm: VmId,
    token: u64,
    peer: HostId,
    /// Of this host's kernel: what its cache held is there as long as it runs.
    boot: String,
    images: Vec<Image>,
}

fn boot() -> io::Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
}

fn note(dir: &Path, vm: VmId, token: u64) -> PathBuf {
    dir.join(format!("{}-{token}.{EXTENSION}", vm.0.simple()))
}

/// Ends a shadow's daemon so that its images can be gone on with. An error says why they can't.
pub fn keep(record: &ShadowRecord, peer: &HostId, cfg: &LaunchConfig) -> io::Result<()> {
    let dir = record.disks.first().and_then(|i| i.path.parent());
    let (Some(dir), true) = (dir, record.disks.iter().all(|i| i.ours)) else {
        return Err(io::Error::other("they are not all ours"));
    };
    if !record.storage.is_some_and(|p| p.alive()) {
        return Err(io::Error::other("their daemon was gone before"));
    }
    // A failed write is told to who has the file open: the daemon tells of all before the flush, these of all since.
    let files = record.disks.iter().map(|i| File::open(&i.path));
    let files = files.collect::<io::Result<Vec<_>>>()?;
    disks::flush(record, cfg).map_err(io::Error::other)?;
    disks::stop(record)?;
    files.iter().try_for_each(File::sync_all)?;
    let complaints = fs::read_to_string(disks::log(record))?;
    if !complaints.trim().is_empty() {
        return Err(io::Error::other(format!("their daemon said: {}", complaints.trim())));
    }
    let kept = Kept {
        vm: record.vm,
        token: record.token,
        peer: peer.clone(),
        boot: boot()?,
        images: record.disks.clone(),
    };
    let path = note(dir, record.vm, record.token);
    let mut file = private_file(&path)?;
    file.write_all(&serde_json::to_vec(&kept)?)?;
    file.sync_all()
}

/// The images that a source asks for, and their number. Others of the VM are removed.
pub fn claim(dir: &Path, vm: VmId, asked: Option<u64>, peer: &HostId, wanted: &[Disk]) -> Option<(u64, Vec<Image>)> {
    let taken = asked.and_then(|token| Some((token, take(dir, vm, token, peer, wanted)?)));
    expire(dir, Duration::ZERO, Some(vm));
    taken
}

/// The images under this number, if they are as the source's mirrors left them. They are not kept any more.
fn take(dir: &Path, vm: VmId, token: u64, peer: &HostId, wanted: &[Disk]) -> Option<Vec<Image>> {
    let path = note(dir, vm, token);
    let kept: Kept = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
    // First: whatever comes now, nobody finds them again as they are.
    fs::remove_file(&path).and_then(|()| File::open(dir)?.sync_all()).ok()?;
    let same = kept.images.len() == wanted.len()
        && kept
            .images
            .iter()
            .zip(wanted)
            .all(|(i, d)| i.is_of(d) && i.path.is_file());
    let fit =
        same && kept.vm == vm && kept.token == token && kept.peer == *peer && boot().is_ok_and(|b| b == kept.boot);
    if !fit {
        tracing::warn!(%vm, token, "the images that were kept do not fit: the disks are copied whole");
        remove(&kept.images);
    }
    fit.then_some(kept.images)
}

pub fn remove(images: &[Image]) {
    for image in images {
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
        let (kept, disks) = scene(dir);
        put(dir, &kept);
        assert_eq!(take(dir, kept.vm, 8, &kept.peer, &disks), None, "another number");
        assert_eq!(take(dir, kept.vm, 7, &kept.peer, &disks), Some(kept.images.clone()));
        assert_eq!(take(dir, kept.vm, 7, &kept.peer, &disks), None, "a second time");
        assert!(kept.images[0].path.exists());
        let other = "b".parse().unwrap();
        put(dir, &kept);
        assert_eq!(take(dir, kept.vm, 7, &other, &disks), None, "another host's mirror");
        assert!(!kept.images[0].path.exists(), "what is not trusted goes");
    }

    #[test]
    fn another_boot_or_another_disk_means_a_full_copy() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        let (mut kept, disks) = scene(dir);
        put(dir, &kept);
        let mut larger = disks.clone();
        larger[0].bytes = 1024;
        let mut replaced = disks.clone();
        replaced[0].node = "plugged in later".into();
        for other in [larger, replaced] {
            assert_eq!(take(dir, kept.vm, 7, &kept.peer, &other), None);
            scene(dir);
            put(dir, &kept);
        }
        kept.boot = "another".into();
        put(dir, &kept);
        assert_eq!(take(dir, kept.vm, 7, &kept.peer, &disks), None);
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
