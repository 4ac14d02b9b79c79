//! Tiers: how much CPU a shadow may use, by a cgroup of its own in whichever cpu hierarchy this host has.
//!
//! v2 takes `cpu.max` ("quota period"), v1 `cpu.cfs_quota_us` with a fixed period. A group is made without a limit; the first
//! [`set`](Group::set) brings one. How much RAM: [`crate::memory`].

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use umbra_api::order::{Peak, Refusal, RefusalCode};

const CONTROLLER: &str = "cpu";

/// The kernel's default period, and ours.
const PERIOD_US: u64 = 100_000;

/// Least quota: QEMU's main loop must still answer QMP. The kernel refuses below 1 ms in any case.
const QUOTA_MIN_US: u64 = 5_000;

#[derive(Debug, thiserror::Error)]
pub enum TierError {
    #[error("this host has no cgroup hierarchy with a {0} controller")]
    NoController(&'static str),
    #[error("{0:?} is no name of a cgroup: it must be relative, without '..'")]
    Name(String),
    #[error("cgroup {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl From<TierError> for Refusal {
    fn from(e: TierError) -> Self {
        Refusal::new(RefusalCode::Local, e.to_string())
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    V1,
    V2,
}

/// A mounted hierarchy that has a controller.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hierarchy {
    kind: Kind,
    controller: &'static str,
    mount: PathBuf,
}

impl Hierarchy {
    pub fn detect(controller: &'static str) -> Result<Self, TierError> {
        let path = PathBuf::from("/proc/self/mountinfo");
        let table = fs::read_to_string(&path).map_err(|source| TierError::Io { path, source })?;
        let has = |mount: &Path| {
            fs::read_to_string(mount.join("cgroup.controllers"))
                .is_ok_and(|c| c.split_ascii_whitespace().any(|c| c == controller))
        };
        pick(&table, controller, has).ok_or(TierError::NoController(controller))
    }

    fn make(&self, relative: &Path) -> Result<PathBuf, TierError> {
        let mut path = self.mount.clone();
        for component in relative.components() {
            if self.kind == Kind::V2 {
                hand_down(&path, self.controller)?;
            }
            path.push(component);
            match fs::create_dir(&path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(TierError::Io { path, source: e }),
                _ => {}
            }
        }
        Ok(path)
    }
}

/// On a hybrid host the controller is in one of the two: v1 if it is mounted there.
fn pick(mountinfo: &str, controller: &'static str, v2_has: impl Fn(&Path) -> bool) -> Option<Hierarchy> {
    let mounts: Vec<_> = mountinfo.lines().filter_map(mount).collect();
    let v1 = mounts
        .iter()
        .find(|(kind, options, _)| *kind == "cgroup" && options.split(',').any(|o| o == controller));
    if let Some((.., mount)) = v1 {
        return Some(Hierarchy {
            kind: Kind::V1,
            controller,
            mount: mount.into(),
        });
    }
    let v2 = mounts
        .iter()
        .find(|(kind, _, mount)| *kind == "cgroup2" && v2_has(Path::new(mount)));
    v2.map(|(.., mount)| Hierarchy {
        kind: Kind::V2,
        controller,
        mount: mount.into(),
    })
}

/// Filesystem type, super block options, mount point of a line of mountinfo.
fn mount(line: &str) -> Option<(&str, &str, &str)> {
    let (before, after) = line.split_once(" - ")?;
    let mut after = after.split(' ');
    Some((after.next()?, after.nth(1)?, before.split(' ').nth(4)?))
}

/// One shadow's group in a hierarchy. Dropping it leaves the group in place: it lives as long as the VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cgroup {
    kind: Kind,
    path: PathBuf,
}

impl Cgroup {
    /// Makes `parent`/`name`, and `parent` where it is missing.
    pub fn create(controller: &'static str, parent: &str, name: &str) -> Result<Self, TierError> {
        let relative = Path::new(parent).join(name);
        check_name(&relative)?;
        let hierarchy = Hierarchy::detect(controller)?;
        // Once more if another replicator removes the empty parent in between.
        let path = hierarchy.make(&relative).or_else(|_| hierarchy.make(&relative))?;
        Ok(Self {
            kind: hierarchy.kind,
            path,
        })
    }

    /// The group of a record, by a file that only v1 has.
    pub fn open(path: &Path, v1_file: &str) -> Self {
        let kind = match path.join(v1_file).exists() {
            true => Kind::V1,
            false => Kind::V2,
        };
        Self {
            kind,
            path: path.to_owned(),
        }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process with all its threads. The memory that it has touched already stays charged where it is.
    pub fn add(&self, pid: i32) -> Result<(), TierError> {
        self.write("cgroup.procs", &pid.to_string())
    }

    pub fn read(&self, file: &str) -> Result<u64, TierError> {
        let path = self.path.join(file);
        let text = fs::read_to_string(&path);
        let read = text.and_then(|t| t.trim().parse().map_err(io::Error::other));
        read.map_err(|source| TierError::Io { path, source })
    }

    /// A file that this kernel lacks is 'not found': asked to create one, a cgroup says 'permission denied'.
    pub fn write(&self, file: &str, value: &str) -> Result<(), TierError> {
        let path = self.path.join(file);
        let opened = OpenOptions::new().write(true).open(&path);
        let written = opened.and_then(|mut f| f.write_all(value.as_bytes()));
        written.map_err(|source| TierError::Io { path, source })
    }
}

/// The group that holds a shadow's CPU quota.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Group(Cgroup);

impl Group {
    pub fn create(parent: &str, name: &str) -> Result<Self, TierError> {
        Cgroup::create(CONTROLLER, parent, name).map(Self)
    }

    /// The group of a record.
    pub fn open(path: &Path) -> Self {
        Self(Cgroup::open(path, "cpu.cfs_quota_us"))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn add(&self, pid: i32) -> Result<(), TierError> {
        self.0.add(pid)
    }

    /// Gives the shadow this share of its expected peak.
    pub fn set(&self, share: f64, peak: Peak) -> Result<(), TierError> {
        self.set_quota(quota_us(share, peak))
    }

    /// Lifts the limit.
    pub fn lift(&self) -> Result<(), TierError> {
        self.set_quota(None)
    }

    fn set_quota(&self, quota_us: Option<u64>) -> Result<(), TierError> {
        match (self.0.kind(), quota_us) {
            (Kind::V2, Some(quota)) => self.0.write("cpu.max", &format!("{quota} {PERIOD_US}")),
            (Kind::V2, None) => self.0.write("cpu.max", &format!("max {PERIOD_US}")),
            (Kind::V1, quota) => {
                self.0.write("cpu.cfs_period_us", &PERIOD_US.to_string())?;
                let quota = quota.map_or("-1".to_owned(), |q| q.to_string());
                self.0.write("cpu.cfs_quota_us", &quota)
            }
        }
    }
}

/// The group in which a process is, if this host's cpu controller is one of v1.
pub fn v1_group_of(pid: i32) -> Option<PathBuf> {
    let hierarchy = Hierarchy::detect(CONTROLLER).ok().filter(|h| h.kind == Kind::V1)?;
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = table.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|c| c == CONTROLLER).then_some(path)
    });
    Some(hierarchy.mount.join(path?.trim_start_matches('/')))
}

/// Relative, and below the hierarchy.
fn check_name(name: &Path) -> Result<(), TierError> {
    match name.components().all(|c| matches!(c, Component::Normal(_))) {
        true => Ok(()),
        false => Err(TierError::Name(name.display().to_string())),
    }
}

/// Removes a group after its last process is gone.
pub fn remove_group(path: &Path) -> Result<(), TierError> {
    let failed = |source| TierError::Io {
        path: path.to_owned(),
        source,
    };
    for _ in 0..50 {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            // A killed process leaves its group a moment after it is seen dead, and no event tells.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(Duration::from_millis(10)),
            Err(source) => return Err(failed(source)),
        }
    }
    Err(failed(io::Error::from_raw_os_error(libc::EBUSY)))
}

/// Removes the parent of all shadows' groups if none is left in it: for a host that Umbra leaves. An operator who made it
/// beforehand, with limits of their own, wants it kept.
pub fn remove_parent(parent: &str) -> Result<(), TierError> {
    check_name(Path::new(parent))?;
    for hierarchy in [CONTROLLER, "memory"].map(Hierarchy::detect).into_iter().flatten() {
        let path = hierarchy.mount.join(parent);
        match fs::remove_dir(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(TierError::Io { path, source: e }),
            _ => {}
        }
    }
    Ok(())
}

/// v2 hands a controller down level by level.
fn hand_down(path: &Path, controller: &str) -> Result<(), TierError> {
    let file = path.join("cgroup.subtree_control");
    let has = fs::read_to_string(&file).is_ok_and(|c| c.split_ascii_whitespace().any(|c| c == controller));
    if has {
        return Ok(());
    }
    fs::write(&file, format!("+{controller}")).map_err(|source| TierError::Io { path: file, source })
}

/// Microseconds of CPU a period, `None` for no limit: while no peak is known, nothing is known that could be a share of it.
pub fn quota_us(share: f64, peak: Peak) -> Option<u64> {
    if peak.cpu_cores.is_nan() || peak.cpu_cores <= 0.0 {
        return None;
    }
    // A float that does not fit saturates, which is no limit in practice either.
    Some(((peak.cpu_cores * share * PERIOD_US as f64) as u64).max(QUOTA_MIN_US))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "30 25 0:26 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n\
                          31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                          32 25 0:28 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n";
    const UNIFIED: &str = "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn the_hierarchy_with_the_controller_is_picked() {
        let h = pick(HYBRID, "cpu", |_| false).unwrap();
        assert_eq!(
            h,
            Hierarchy {
                kind: Kind::V1,
                controller: "cpu",
                mount: "/sys/fs/cgroup/cpu,cpuacct".into()
            }
        );
        let h = pick(UNIFIED, "memory", |_| true).unwrap();
        assert_eq!(
            h,
            Hierarchy {
                kind: Kind::V2,
                controller: "memory",
                mount: "/sys/fs/cgroup".into()
            }
        );
        assert_eq!(pick(UNIFIED, "cpu", |_| false), None);
        // On a hybrid host each controller is where it is.
        assert_eq!(pick(HYBRID, "memory", |_| true).map(|h| h.kind), Some(Kind::V2));
        assert_eq!(pick("garbage - x", "cpu", |_| true), None);
    }

    #[test]
    fn shares_of_the_peak() {
        let peak = |cpu_cores| Peak {
            cpu_cores,
            mem_bytes: 0,
        };
        assert_eq!(quota_us(0.1, peak(2.0)), Some(20_000));
        assert_eq!(quota_us(0.5, peak(2.0)), Some(100_000));
        assert_eq!(quota_us(1.0, peak(2.0)), Some(200_000));
        assert_eq!(quota_us(0.1, peak(0.01)), Some(QUOTA_MIN_US));
        assert_eq!(quota_us(0.1, peak(0.0)), None);
        assert_eq!(quota_us(0.1, peak(f64::NAN)), None);
    }

    #[test]
    fn names_do_not_leave_the_hierarchy() {
        for name in ["../x", "/x", "a/../../b"] {
            assert!(Group::create(name, "y").is_err(), "{name}");
        }
    }
}
