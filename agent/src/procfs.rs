//! What /proc says about processes. The one door to it: `root` is `/proc`, or a folder that a test laid out.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::argv;

/// Most bytes of a command line that are read.
const CMDLINE_MAX: u64 = 1 << 20;
/// Most descriptors of one process that are looked at for taps.
const FDS_MAX: usize = 65_536;
/// Inode of the first PID namespace (PROC_PID_INIT_INO of the kernel).
const INIT_PID_NS: u32 = 0xEFFF_FFFC;

#[derive(Clone, Debug)]
pub struct Procfs {
    root: PathBuf,
}

/// A process, told apart from a later one of the same number by its start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ProcId {
    pub pid: u32,
    /// Clock ticks after boot.
    pub start: u64,
}

/// The fields of `/proc/PID/stat` that are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stat {
    pub state: char,
    pub start: u64,
    pub rss_pages: u64,
}

/// A process that runs a QEMU binary.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Qemu {
    pub args: argv::QemuArgs,
    pub netns: Option<u32>,
}

impl Default for Procfs {
    fn default() -> Self {
        Self::at("/proc")
    }
}

impl Procfs {
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn path(&self, pid: u32, rest: &str) -> PathBuf {
        self.root.join(pid.to_string()).join(rest)
    }

    pub fn read(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(self.root.join(name))
    }

    pub fn pids(&self) -> io::Result<Vec<u32>> {
        let names = fs::read_dir(&self.root)?.filter_map(|e| Some(e.ok()?.file_name()));
        Ok(names.filter_map(|n| n.to_str()?.parse().ok()).collect())
    }

    /// `None` when the process is gone.
    pub fn stat(&self, pid: u32) -> Option<Stat> {
        parse_stat(&fs::read(self.path(pid, "stat")).ok()?)
    }

    /// The words of a command line; none for a kernel thread or a process that is gone.
    fn cmdline(&self, pid: u32) -> Vec<String> {
        let mut bytes = Vec::new();
        let read = File::open(self.path(pid, "cmdline")).and_then(|f| f.take(CMDLINE_MAX).read_to_end(&mut bytes));
        if read.is_err() {
            return Vec::new();
        }
        let text = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
        match text.is_empty() {
            true => Vec::new(),
            false => text
                .split(|b| *b == 0)
                .map(|w| String::from_utf8_lossy(w).into_owned())
                .collect(),
        }
    }

    /// What a process runs, if that is a QEMU. The binary decides; its name in the command line, which the process may choose freely,
    /// does so only where the binary can't be seen.
    pub fn qemu(&self, pid: u32) -> Option<Qemu> {
        let words = self.cmdline(pid);
        let (program, rest) = words.split_first()?;
        let name = match fs::read_link(self.path(pid, "exe")) {
            Ok(exe) => file_name(&exe),
            Err(_) => file_name(Path::new(program)),
        };
        // An upgraded package leaves running processes with a binary that was deleted.
        argv::is_qemu(name.trim_end_matches(" (deleted)")).then(|| Qemu {
            args: argv::parse(rest.iter().map(String::as_str)),
            netns: self.netns(pid),
        })
    }

    /// Inode of the process's network namespace.
    pub fn netns(&self, pid: u32) -> Option<u32> {
        namespace(&fs::read_link(self.path(pid, "ns/net")).ok()?)
    }

    pub fn netns_path(&self, pid: u32) -> PathBuf {
        self.path(pid, "ns/net")
    }

    pub fn own_netns(&self) -> Option<u32> {
        namespace(&fs::read_link(self.root.join("self/ns/net")).ok()?)
    }

    /// Whether this process sees the PIDs that the kernel's programs see.
    pub fn in_first_pid_ns(&self) -> bool {
        let ns = fs::read_link(self.root.join("self/ns/pid"))
            .ok()
            .and_then(|l| namespace(&l));
        // Where it can't be told, assume the usual.
        ns.is_none_or(|n| n == INIT_PID_NS)
    }

    /// Names of the taps that a process holds open: those of its command line, and those that came as descriptors or by hotplug.
    pub fn taps(&self, pid: u32) -> Vec<String> {
        let Ok(fds) = fs::read_dir(self.path(pid, "fd")) else {
            return Vec::new();
        };
        let mut names: Vec<String> = fds
            .take(FDS_MAX)
            .filter_map(|e| {
                let e = e.ok()?;
                let target = fs::read_link(e.path()).ok()?;
                (target == Path::new("/dev/net/tun")).then(|| e.file_name())
            })
            .filter_map(|fd| tap_of_fdinfo(&fs::read_to_string(self.path(pid, "fdinfo").join(fd)).ok()?))
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// Threads that run or are runnable now.
    pub fn runnable_threads(&self, pid: u32) -> Vec<u32> {
        let Ok(tasks) = fs::read_dir(self.path(pid, "task")) else {
            return Vec::new();
        };
        let tids = tasks.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
        tids.filter(|tid| self.is_runnable(pid, *tid)).collect()
    }

    pub fn is_runnable(&self, pid: u32, tid: u32) -> bool {
        let stat = fs::read(self.path(pid, "task").join(tid.to_string()).join("stat")).ok();
        stat.and_then(|s| parse_stat(&s)).is_some_and(|s| s.state == 'R')
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The fields after the name, which stands in brackets and may hold brackets, blanks and line breaks itself.
fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    let after = bytes.iter().rposition(|b| *b == b')')?;
    let text = std::str::from_utf8(bytes.get(after + 1..)?).ok()?;
    let fields: Vec<&str> = text.split_ascii_whitespace().collect();
    // proc(5) counts from 1, and the name is field 2.
    let field = |n: usize| fields.get(n - 3);
    Some(Stat {
        state: field(3)?.chars().next()?,
        start: field(22)?.parse().ok()?,
        rss_pages: field(24)?.parse().unwrap_or(0),
    })
}

/// `net:[4026531840]`.
fn namespace(link: &Path) -> Option<u32> {
    let text = link.to_str()?;
    text.split_once('[')?.1.strip_suffix(']')?.parse().ok()
}

/// A tap's descriptor says `iff:`, a tab and the name.
fn tap_of_fdinfo(text: &str) -> Option<String> {
    let name = text.lines().find_map(|l| l.strip_prefix("iff:"))?.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let line = b"42 (a) R (b) S 1 42 42 0 -1 4194560 1 0 0 0 5 6 0 0 20 0 3 0 777 1000 88 18446744073709551615\n";
        assert_eq!(
            parse_stat(line),
            Some(Stat {
                state: 'S',
                start: 777,
                rss_pages: 88
            })
        );
        for bad in [&b""[..], b"42", b"42 (x", b"42 (x) S 1 2", b"42 (x) \xff\xff"] {
            assert_eq!(parse_stat(bad), None);
        }
    }

    #[test]
    fn this_process_is_seen() {
        let p = Procfs::default();
        let me = std::process::id();
        assert!(p.pids().unwrap().contains(&me));
        assert!(p.stat(me).unwrap().start > 0);
        assert_eq!(p.netns(me), p.own_netns());
        assert!(p.qemu(me).is_none());
        assert!(p.runnable_threads(me).iter().all(|t| *t > 0));
    }

    #[test]
    fn the_binary_decides_what_is_a_qemu() {
        let dir = tempfile::tempdir().unwrap();
        let process = |pid: u32, exe: Option<&str>, cmdline: &[u8]| {
            let d = dir.path().join(pid.to_string());
            fs::create_dir_all(d.join("ns")).unwrap();
            fs::write(d.join("cmdline"), cmdline).unwrap();
            symlink("net:[7]", d.join("ns/net")).unwrap();
            if let Some(e) = exe {
                symlink(e, d.join("exe")).unwrap();
            }
        };
        process(1, Some("/usr/bin/qemu-system-x86_64 (deleted)"), b"x\0-name\0web\0");
        process(2, Some("/usr/bin/sleep"), b"qemu-system-x86_64\0-name\0web\0");
        process(3, None, b"/opt/qemu-kvm\0-name\0\xff\xfe\0");
        process(4, None, b"");
        let p = Procfs::at(dir.path());
        let q = p.qemu(1).unwrap();
        assert_eq!((q.args.name.as_str(), q.netns), ("web", Some(7)));
        assert_eq!(p.qemu(2), None);
        assert_eq!(p.qemu(3).unwrap().args.name, "\u{fffd}\u{fffd}");
        assert_eq!(p.qemu(4), None);
        assert_eq!(p.qemu(5), None);
    }

    #[test]
    fn taps_are_read_from_their_descriptors() {
        assert_eq!(
            tap_of_fdinfo("pos:\t0\nflags:\t0104002\niff:\ttap0\n").as_deref(),
            Some("tap0")
        );
        assert_eq!(tap_of_fdinfo("pos:\t0\niff:\t\n"), None);
        assert_eq!(tap_of_fdinfo(""), None);
    }
}
