//! Threads that a stopped guest waits for go before all others on this host, for the few milliseconds that it takes.
//!
//! A switchover passes through a dozen threads of two replicators and two QEMUs. On a host whose cores are busy (the very reason
//! to leave it) each of them would wait for its turn, some milliseconds each. Real-time priority, the lowest there is, makes
//! that none; the kernel sees to it that such threads leave others a share even if they ran wild. Where it is not allowed,
//! everything works as well, and takes longer. Where only a cgroup of Umbra's own stands in the way, [`leave`] lets them.

pub mod leave;

use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};

use nix::libc;

use self::leave::Leave;
use crate::proc::ProcessId;

/// Lets the calling thread, which does little and is waited for, go first as long as it lives.
pub fn this_thread() {
    // Refused: it waits like all others.
    let _ = set(0, libc::SCHED_RR);
}

/// Threads that go first until this is dropped.
#[derive(Debug, Default)]
pub struct Urgent {
    threads: Vec<i32>,
    /// Behind them: a group can't lose it as long as it has such threads.
    _leave: Option<Leave>,
}

impl Urgent {
    /// Threads that have a real-time priority already keep theirs. Some may need leave, which ends with this.
    pub fn new(threads: impl IntoIterator<Item = i32>, leave: Option<Leave>) -> Self {
        let ordinary = |t: &i32| policy(*t) == Some(libc::SCHED_OTHER);
        let urgent = threads
            .into_iter()
            .filter(ordinary)
            .filter(|t| set(*t, libc::SCHED_RR).is_ok());
        Self {
            threads: urgent.collect(),
            _leave: leave,
        }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        for thread in &self.threads {
            // It may have ended.
            let _ = set(*thread, libc::SCHED_OTHER);
        }
    }
}

/// Threads of this process that carry for others, by what they carry for: who hastens it must find them.
#[derive(Debug, Default)]
pub struct Crew(Mutex<Vec<(u64, i32)>>);

/// The calling thread's entry in a [`Crew`].
#[derive(Debug)]
pub struct Member<'a> {
    crew: &'a Crew,
    entry: (u64, i32),
}

impl Crew {
    pub fn enter(&self, what: u64) -> Member<'_> {
        let entry = (what, nix::unistd::gettid().as_raw());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
        Member { crew: self, entry }
    }

    pub fn of(&self, what: u64) -> Vec<i32> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter(|(w, _)| *w == what).map(|(_, t)| *t).collect()
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        let mut all = self.crew.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|e| *e != self.entry);
    }
}

/// Lets a process that ends with the switchover, however it ends, go first until then, with the threads that it starts meanwhile.
pub fn to_its_end(pid: i32) {
    for thread in threads(pid) {
        // Refused, or gone: it waits like all others.
        let _ = set_with(thread, libc::SCHED_RR, 0);
    }
}

/// After a restart: a QEMU's threads, which a switchover may have left so, in a group below `parent` perhaps.
pub fn calm(process: ProcessId, parent: &str) {
    if !process.alive() {
        return;
    }
    for thread in threads(process.pid) {
        if policy(thread) == Some(libc::SCHED_RR) {
            let _ = set(thread, libc::SCHED_OTHER);
        }
    }
    leave::withdraw(process.pid, parent);
}

/// The threads of a process.
pub fn threads(pid: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

fn policy(thread: i32) -> Option<i32> {
    // SAFETY: takes a number and returns one.
    let policy = unsafe { libc::sched_getscheduler(thread) };
    (policy >= 0).then_some(policy & !libc::SCHED_RESET_ON_FORK)
}

/// Threads that it starts meanwhile (a QEMU's workers) are ordinary ones.
fn set(thread: i32, policy: i32) -> io::Result<()> {
    let flag = match policy {
        libc::SCHED_RR => libc::SCHED_RESET_ON_FORK,
        _ => 0,
    };
    set_with(thread, policy, flag)
}

fn set_with(thread: i32, policy: i32, flag: i32) -> io::Result<()> {
    let priority = i32::from(policy == libc::SCHED_RR);
    let mut param = std::mem::MaybeUninit::<libc::sched_param>::zeroed();
    // SAFETY: all zeros is a valid sched_param, which is a few numbers.
    let param = unsafe {
        (*param.as_mut_ptr()).sched_priority = priority;
        param.assume_init()
    };
    // SAFETY: `param` lives across the call; a thread that does not exist is an error.
    match unsafe { libc::sched_setscheduler(thread, policy | flag, &raw const param) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crew_knows_who_is_at_work() {
        let crew = Crew::default();
        let here = nix::unistd::gettid().as_raw();
        let member = crew.enter(7);
        assert_eq!((crew.of(7), crew.of(8)), (vec![here], vec![]));
        drop(member);
        assert!(crew.of(7).is_empty());
    }

    #[test]
    fn a_thread_is_urgent_until_it_is_dropped() {
        let (tell, told) = std::sync::mpsc::channel::<()>();
        let (number, thread) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || {
            number.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = told.recv();
        });
        let thread = thread.recv().unwrap();
        assert!(threads(std::process::id() as i32).contains(&thread));
        let urgent = Urgent::new([thread, -1], None);
        if urgent.threads.is_empty() {
            println!("SKIPPED: real-time priorities are not allowed here");
            return;
        }
        assert_eq!(policy(thread), Some(libc::SCHED_RR));
        drop(urgent);
        assert_eq!(policy(thread), Some(libc::SCHED_OTHER));
        drop(tell);
        other.join().unwrap();
    }

    #[test]
    fn a_process_in_a_group_of_ours_is_urgent_too() {
        let parent = format!("umbra-test-{}", std::process::id());
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        let group = crate::tier::Group::create(&parent, "vm-x");
        let moved = group.as_ref().ok().filter(|g| g.add(pid).is_ok());
        let urgent = Urgent::new([pid], Leave::give(pid, &parent));
        let is = policy(pid);
        drop(urgent);
        let was = policy(pid);
        child.kill().unwrap();
        child.wait().unwrap();
        if moved.is_none() || set(0, libc::SCHED_OTHER).is_err() || !may_be_urgent() {
            println!("SKIPPED: no cgroups, or no real-time priorities, are allowed here");
        } else {
            assert_eq!((is, was), (Some(libc::SCHED_RR), Some(libc::SCHED_OTHER)));
        }
        if let Ok(group) = group {
            crate::tier::remove_group(group.path()).unwrap();
            crate::tier::remove_parent(&parent).unwrap();
        }
    }

    /// A thread of this process, outside of any group of ours.
    fn may_be_urgent() -> bool {
        std::thread::spawn(|| set(0, libc::SCHED_RR).is_ok()).join().unwrap()
    }
}
