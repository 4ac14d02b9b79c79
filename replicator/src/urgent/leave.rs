//! Leave to be urgent, for the cgroup that a process is in.
//!
//! Under cgroup v1 and a kernel with RT_GROUP_SCHED, the threads of a group may have a real-time priority only for as much time as their group was
//! given, which is none when it is made: a shadow's QEMU, and a VM that was a shadow once, would wait like all others. Groups share what the
//! one above them has, and all have 0.95 s of a second; so it is given for a switchover only, and taken back.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::tier;

const FILE: &str = "cpu.rt_runtime_us";
/// Of each second; the group's threads would have to wait for the next one then. It is ten times the CPU time of the longest switchover, and
/// three VMs at once can have it.
const TIME_US: u64 = 300_000;

/// What the group above has is read and written.
static CHANGES: Mutex<()> = Mutex::new(());

/// A group that has leave until this is dropped.
#[derive(Debug)]
pub struct Leave(PathBuf);

impl Leave {
    /// For a process in a group below `parent`, which is Umbra's. `None` where none is needed, or there is none to give.
    pub fn give(pid: i32, parent: &str) -> Option<Self> {
        group(pid, parent).and_then(Self::give_to)
    }

    fn give_to(group: PathBuf) -> Option<Self> {
        let _changes = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
        let above = group.parent().filter(|_| read(&group) == Some(0))?;
        write(above, of_all_below(above) + TIME_US)?;
        if write(&group, TIME_US).is_none() {
            write(above, of_all_below(above));
            return None;
        }
        Some(Self(group))
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        take_back(&self.0);
    }
}

/// After a restart of who gave it.
pub fn withdraw(pid: i32, parent: &str) {
    if let Some(group) = group(pid, parent).filter(|g| read(g) == Some(TIME_US)) {
        take_back(&group);
    }
}

fn take_back(group: &Path) {
    let _changes = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    // The group may be gone with its VM.
    write(group, 0);
    if let Some(above) = group.parent() {
        write(above, of_all_below(above));
    }
}

/// The one above needs this and no more, whatever it was left with by a replicator that died.
fn of_all_below(above: &Path) -> u64 {
    let groups = fs::read_dir(above).into_iter().flatten().flatten();
    groups.filter_map(|g| read(&g.path())).sum()
}

fn group(pid: i32, parent: &str) -> Option<PathBuf> {
    let group = tier::v1_group_of(pid)?;
    (!parent.is_empty() && group.parent()?.ends_with(parent)).then_some(group)
}

fn read(group: &Path) -> Option<u64> {
    fs::read_to_string(group.join(FILE)).ok()?.trim().parse().ok()
}

fn write(group: &Path, time_us: u64) -> Option<()> {
    // No file is made where there is none.
    let file = fs::OpenOptions::new().write(true).truncate(true).open(group.join(FILE));
    std::io::Write::write_all(&mut file.ok()?, format!("{time_us}\n").as_bytes()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leave_is_given_on_both_levels_and_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let parent = dir.path().join("umbra");
        let groups = ["vm-a", "vm-b"].map(|name| parent.join(name));
        for group in &groups {
            fs::create_dir_all(group).unwrap();
            fs::write(group.join(FILE), "0\n").unwrap();
        }
        assert!(Leave::give_to(groups[0].clone()).is_none(), "there is none to give");
        // As it is left if a VM goes while the replicator is dead.
        fs::write(parent.join(FILE), "300000\n").unwrap();
        let leaves = groups.clone().map(Leave::give_to);
        assert!(leaves.iter().all(Option::is_some));
        assert_eq!((read(&parent), read(&groups[1])), (Some(600_000), Some(300_000)));
        assert!(Leave::give_to(groups[0].clone()).is_none(), "it has it");
        let [first, second] = leaves;
        drop(first);
        assert_eq!((read(&parent), read(&groups[0])), (Some(300_000), Some(0)));
        fs::remove_dir_all(&groups[1]).unwrap();
        drop(second);
        assert_eq!(read(&parent), Some(0));
        assert!(!groups[1].exists());
    }
}
