//! The calls that std has no safe form for, and what /proc says of a process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns, unshare};
use nix::unistd::Pid;

/// A fresh network namespace. It lives as long as this descriptor or a process in it.
pub fn new_netns() -> io::Result<OwnedFd> {
    on_own_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    })
}

/// Runs `f` on a thread inside the namespace. Sockets made there stay there, wherever they are used.
pub fn in_netns<T: Send>(ns: BorrowedFd<'_>, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    on_own_thread(|| {
        setns(ns, CloneFlags::CLONE_NEWNET)?;
        f()
    })
}

/// Moves the calling thread into the namespace, for good.
pub fn enter_netns(ns: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setns(ns, CloneFlags::CLONE_NEWNET)?)
}

fn on_own_thread<T: Send>(f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|s| match s.spawn(f).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// What a process has in swap of memory that is its alone; files on tmpfs do not count.
pub fn own_swap_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmSwap:"));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse().ok())
        .unwrap_or(0)
}

/// Bytes of a file that are in RAM. A hole is not, and neither is what waits in swap.
pub fn resident_bytes(path: &std::path::Path) -> io::Result<u64> {
    const PAGE: usize = 4096;
    let file = File::open(path)?;
    let len = file.metadata()?.len() as usize;
    let mut told = vec![0u8; len.div_ceil(PAGE)];
    // SAFETY: a new mapping of an open file, of which nothing is read; `told` has a byte for each of its pages; it is unmapped
    // before anything else can use it.
    let looked = unsafe {
        let map = libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let looked = match libc::mincore(map, len, told.as_mut_ptr()) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
        libc::munmap(map, len);
        looked
    };
    looked.map(|()| told.iter().filter(|b| **b & 1 == 1).count() as u64 * PAGE as u64)
}

/// The calling thread's network namespace, by a number that no later namespace gets. Inode numbers are used again.
pub fn netns_cookie() -> io::Result<u64> {
    let socket = std::net::UdpSocket::bind(("0.0.0.0", 0))?;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: both pointers are to locals of the sizes given, and live for the call.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if rc == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Where a child is to live. Applied between fork and exec.
pub struct Place<'a> {
    pub netns: BorrowedFd<'a>,
    /// Empty: any CPU.
    pub cpus: &'a [usize],
    /// Opened `cgroup.procs` of the cpuset.
    pub cgroup: Option<&'a File>,
}

/// Makes `cmd` start in `place`, in a process group of its own: Ctrl-C in the terminal is for the lab alone.
/// The place's descriptors must stay open until the spawn.
pub fn place(cmd: &mut Command, place: &Place<'_>) -> io::Result<()> {
    let mut set = CpuSet::new();
    for cpu in place.cpus {
        set.set(*cpu)?;
    }
    let pin = !place.cpus.is_empty();
    let netns = place.netns.as_raw_fd();
    let cgroup = place.cgroup.map(|f| f.as_raw_fd());
    cmd.process_group(0);
    // SAFETY: between fork and exec only async-signal-safe calls are made: write, setns and sched_setaffinity are plain
    // system calls and allocate nothing. Both descriptors are open in the parent, by this function's contract.
    unsafe {
        cmd.pre_exec(move || {
            if let Some(fd) = cgroup
                && libc::write(fd, c"0".as_ptr().cast(), 1) != 1
            {
                return Err(io::Error::last_os_error());
            }
            if libc::setns(netns, libc::CLONE_NEWNET) != 0 {
                return Err(io::Error::last_os_error());
            }
            // Beside the cpuset: it also holds for children that a daemon moves to another cgroup.
            if pin {
                sched_setaffinity(Pid::from_raw(0), &set)?;
            }
            Ok(())
        });
    }
    Ok(())
}

/// Keeps the calling thread, and what it starts from now on, on these CPUs.
pub fn pin(cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu)?;
    }
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Puts the calling thread before ordinary ones: it stands for a machine of its own.
pub fn go_first() -> io::Result<()> {
    // SAFETY: setpriority takes three numbers; 0 names the calling thread, which on Linux has a priority of its own.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -15) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The write end that the signal handler writes to.
static SIGNAL_PIPE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_signal(signal: libc::c_int) {
    let fd = SIGNAL_PIPE.load(Ordering::Relaxed);
    let byte = [signal as u8];
    // SAFETY: write is async-signal-safe; the descriptor is never closed. A full pipe loses nothing that matters.
    unsafe { libc::write(fd, byte.as_ptr().cast(), 1) };
}

/// Calls `f` with the signal's number on a thread of its own at the first SIGINT, SIGTERM or SIGHUP. A handler and a pipe,
/// rather than a blocked mask and sigwait: the test harness has threads before anyone could block them in all.
pub fn on_first_signal(f: impl FnOnce(i32) + Send + 'static) -> io::Result<()> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    SIGNAL_PIPE.store(write.as_raw_fd(), Ordering::SeqCst);
    std::mem::forget(write);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut byte = [0u8];
        while nix::unistd::read(read.as_fd(), &mut byte) != Ok(1) {}
        f(i32::from(byte[0]));
    })?;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: `on_signal` only makes an async-signal-safe call. An all-zero sigaction is a valid one (empty mask).
        let rc = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Start time of a process in clock ticks since boot; with the pid it names a process for good. `None` if it is gone or a zombie.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name is in brackets and may contain anything; the fields follow the last bracket.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// All process ids of the machine.
pub fn pids() -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

/// Arguments of a process; empty if it is gone.
pub fn cmdline(pid: i32) -> Vec<String> {
    let raw = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    raw.split(|b| *b == 0)
        .map(|a| String::from_utf8_lossy(a).into_owned())
        .filter(|a| !a.is_empty())
        .collect()
}

/// Inode number of a process's network namespace.
pub fn netns_inode(pid: i32) -> Option<u64> {
    let link = std::fs::read_link(format!("/proc/{pid}/ns/net")).ok()?;
    link.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

pub fn kill(pid: i32, signal: nix::sys::signal::Signal) -> nix::Result<()> {
    nix::sys::signal::kill(Pid::from_raw(pid), signal)
}

/// CPUs that are online, in order.
pub fn online_cpus() -> io::Result<Vec<usize>> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/online")?;
    parse_cpu_list(&text).ok_or_else(|| io::Error::other(format!("not a CPU list: {text:?}")))
}

/// `0-1,4` → 0, 1, 4.
fn parse_cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last > 4096 {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("0-1,4\n"), Some(vec![0, 1, 4]));
        assert_eq!(parse_cpu_list("0"), Some(vec![0]));
        assert_eq!(parse_cpu_list(""), None);
        assert_eq!(parse_cpu_list("0-99999999"), None);
    }

    #[test]
    fn this_process_has_a_start_time_and_arguments() {
        let me = std::process::id() as i32;
        assert!(start_time(me).is_some());
        assert_eq!(start_time(-1), None);
        assert!(!cmdline(me).is_empty());
        assert!(pids().contains(&me));
    }
}
