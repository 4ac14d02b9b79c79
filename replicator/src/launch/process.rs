//! Starting a QEMU that outlives us, and ending one without hitting another process of the same number.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CpuSet;

use crate::proc::ProcessId;

/// A child that is reaped by a thread of its own, so that it never stays as a zombie.
pub struct Started {
    pub id: ProcessId,
    ended: Arc<OnceLock<String>>,
}

impl Started {
    /// How it ended, if it has.
    pub fn ended(&self) -> Option<&str> {
        self.ended.get().map(String::as_str)
    }
}

/// Starts a program in a session of its own, so that neither our terminal's nor our end is its end.
pub fn start(program: &Path, args: &[String], log: File, cpus: Option<&[usize]>) -> io::Result<Started> {
    let affinity = cpus.map(cpu_set).transpose()?;
    let mut command = Command::new(program);
    command
        .args(args)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // SAFETY: between fork and exec only the system calls setsid and sched_setaffinity are made, on data that was
    // prepared before the fork; nothing allocates or takes a lock.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            if let Some(set) = &affinity {
                nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), set)?;
            }
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    let id = ProcessId::of(child.id() as i32)?;
    let ended = Arc::new(OnceLock::new());
    let tell = ended.clone();
    std::thread::Builder::new().name("reaper".into()).spawn(move || {
        let how = child
            .wait()
            .map_or_else(|e| e.to_string(), |s: ExitStatus| s.to_string());
        let _ = tell.set(how);
    })?;
    Ok(Started { id, ended })
}

fn cpu_set(cpus: &[usize]) -> io::Result<CpuSet> {
    let mut set = CpuSet::new();
    cpus.iter().try_for_each(|cpu| set.set(*cpu))?;
    Ok(set)
}

/// SIGKILL, and waits for the end. A process that is gone is no error, and neither is one whose number another has now.
pub fn kill(id: ProcessId, patience: Duration) -> io::Result<()> {
    end_by(id, libc::SIGKILL, patience)
}

/// The same by SIGTERM: the process may close what it has open.
pub fn terminate(id: ProcessId, patience: Duration) -> io::Result<()> {
    end_by(id, libc::SIGTERM, patience)
}

fn end_by(id: ProcessId, signal: i32, patience: Duration) -> io::Result<()> {
    let handle = match pidfd(id.pid) {
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        other => other?,
    };
    // Checked after the handle is open: from here on it is this process that the handle means. A process whose first thread has
    // ended may still be busy giving back gigabytes of memory, and is waited for.
    if !id.exists() {
        return Ok(());
    }
    // SAFETY: pidfd_send_signal takes a descriptor, a number, and a null pointer for 'as kill() would'.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            handle.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if sent < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ESRCH) {
            Ok(())
        } else {
            Err(error)
        };
    }
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(handle.as_fd(), PollFlags::POLLIN)], timeout)? {
        0 => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("process {} does not end", id.pid),
        )),
        _ => Ok(()),
    }
}

/// A handle that stays the process it was opened for.
pub fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_started_process_is_killed_by_its_own_name_only() {
        let log = tempfile::tempfile().unwrap();
        let started = start("/bin/sleep".as_ref(), &["600".into()], log, None).unwrap();
        let patience = Duration::from_secs(10);
        kill(
            ProcessId {
                starttime: started.id.starttime + 1,
                ..started.id
            },
            patience,
        )
        .unwrap();
        assert!(started.id.alive());
        kill(started.id, patience).unwrap();
        assert!(!started.id.alive());
        kill(started.id, patience).unwrap();
    }
}
