//! What is read of this host. Nothing here judges, and what can't be read is absent.

use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(Clone, PartialEq, Debug, Default)]
pub struct Facts {
    /// First line of `qemu-system-x86_64 --version`.
    pub qemu: Option<String>,
    pub kvm: bool,
    /// Kernel types, which the agent's programs need.
    pub btf: bool,
    pub ram_dir: PathBuf,
    /// Type of the file system below `ram_dir`, and its options.
    pub ram_fs: Option<(String, String)>,
    pub ram_size_bytes: u64,
    pub ram_free_bytes: u64,
    pub memory_bytes: u64,
    pub swap_bytes: u64,
    pub swap_free_bytes: u64,
    pub zswap: bool,
    /// Controllers of mounted cgroup hierarchies.
    pub controllers: Vec<String>,
}

impl Facts {
    pub fn read(ram_dir: &Path) -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let (mounts, meminfo) = (text("/proc/self/mounts"), text("/proc/meminfo"));
        let existing = ram_dir.ancestors().find(|p| p.is_dir());
        let space = existing.and_then(|p| nix::sys::statvfs::statvfs(p).ok());
        let blocks = |n: u64| n.saturating_mul(space.map_or(0, |s| s.fragment_size()));
        Self {
            qemu: qemu(),
            kvm: Path::new("/dev/kvm").exists(),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            ram_fs: existing.and_then(|p| file_system(&mounts, p)),
            ram_size_bytes: blocks(space.map_or(0, |s| s.blocks())),
            ram_free_bytes: blocks(space.map_or(0, |s| s.blocks_available())),
            ram_dir: ram_dir.to_owned(),
            memory_bytes: kib(&meminfo, "MemTotal"),
            swap_bytes: kib(&meminfo, "SwapTotal"),
            swap_free_bytes: kib(&meminfo, "SwapFree"),
            zswap: text("/sys/module/zswap/parameters/enabled").starts_with('Y'),
            controllers: controllers(&mounts, |mount| text(&format!("{mount}/cgroup.controllers"))),
        }
    }
}

fn qemu() -> Option<String> {
    let out = Command::new("qemu-system-x86_64").arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}

fn kib(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    let value = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    value.unwrap_or(0).saturating_mul(1024)
}

/// The file system that holds a path: that of the longest mount point above it; of several at one place the last.
fn file_system(mounts: &str, path: &Path) -> Option<(String, String)> {
    let mut best: Option<(usize, (String, String))> = None;
    for line in mounts.lines() {
        let mut words = line.split(' ').skip(1);
        let (Some(point), Some(kind), Some(options)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let longer = best.as_ref().is_none_or(|(len, _)| *len <= point.len());
        if path.starts_with(point) && longer {
            best = Some((point.len(), (kind.to_owned(), options.to_owned())));
        }
    }
    best.map(|(_, found)| found)
}

fn controllers(mounts: &str, v2: impl Fn(&str) -> String) -> Vec<String> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let mut words = line.split(' ').skip(1);
        let (Some(point), Some(kind), Some(options)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        match kind {
            "cgroup" => found.extend(options.split(',').map(str::to_owned)),
            "cgroup2" => found.extend(v2(point).split_ascii_whitespace().map(str::to_owned)),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_mount_counts_and_controllers_of_both_kinds_are_found() {
        let mounts = "/dev/vda / ext4 rw 0 0\ntmpfs /dev/shm tmpfs rw,size=24684100k 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nodd\n";
        let kind = |p: &str| file_system(mounts, Path::new(p)).unwrap().0;
        assert_eq!(
            (kind("/dev/shm/umbra"), kind("/dev/shmoo"), kind("/")),
            ("tmpfs".into(), "ext4".into(), "ext4".into())
        );
        let found = controllers(mounts, |mount| match mount {
            "/sys/fs/cgroup/unified" => "memory io\n".into(),
            _ => String::new(),
        });
        assert!(
            ["cpu", "memory", "io"].iter().all(|c| found.iter().any(|f| f == c)),
            "{found:?}"
        );
        assert_eq!(file_system("", Path::new("/x")), None);
        assert_eq!(kib("SwapTotal:  12 kB\n", "SwapTotal"), 12 << 10);
    }
}
