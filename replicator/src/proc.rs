//! The QEMU processes of this host, as /proc shows them. Reads only.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::adopt::options::Opts;

/// Which processes a replicator may see.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// All of the host.
    #[default]
    All,
    /// Those in its own network namespace: several 'hosts' on one machine.
    Netns,
}

/// A process by a name that is never given twice: its pid, and when it started.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Deserialize, serde::Serialize)]
pub struct ProcessId {
    pub pid: i32,
    /// Clock ticks after boot, field 22 of /proc/PID/stat.
    pub starttime: u64,
}

impl ProcessId {
    /// The process that has this pid now.
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self {
            pid,
            starttime: stat(pid)?.starttime,
        })
    }

    /// Whether there is anything left of it: also true of a zombie, whose other threads may not have ended yet.
    pub fn exists(&self) -> bool {
        stat(self.pid).is_ok_and(|s| s.starttime == self.starttime)
    }

    /// Whether it still runs. A zombie does not.
    pub fn alive(&self) -> bool {
        stat(self.pid).is_ok_and(|s| s.starttime == self.starttime && !matches!(s.state, 'Z' | 'X'))
    }

    /// Whether it is gone, asked when its sockets are closed: it may need a moment.
    pub fn gone_soon(self) -> bool {
        let deadline = Instant::now() + Duration::from_millis(300);
        while self.alive() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

struct Stat {
    state: char,
    starttime: u64,
}

fn stat(pid: i32) -> io::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat: {text:?}")))
}

/// The command's name stands in parentheses and may hold spaces and parentheses itself: count from the last one.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(") ")?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // State is field 3, so that field 22 is the 19th from there.
    let starttime = fields.nth(18)?.parse().ok()?;
    Some(Stat { state, starttime })
}

/// A running QEMU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct QemuProcess {
    pub id: ProcessId,
    pub args: Vec<String>,
    pub cwd: PathBuf,
    pub uuid: Option<Uuid>,
    /// Of `-name`, without its options.
    pub name: Option<String>,
    /// Paths of its QMP sockets, the ones that Umbra made first, then in the command line's order.
    pub qmp: Vec<PathBuf>,
    /// It was started to be migrated into. It may run by now.
    pub incoming: bool,
}

/// All QEMU processes in scope, by pid. A process that ends while it is read is left out.
pub fn scan(scope: Scope) -> io::Result<Vec<QemuProcess>> {
    let mine = match scope {
        Scope::All => None,
        // The thread's, not the process's: they differ only where a test says so.
        Scope::Netns => Some(netns("/proc/thread-self/ns/net".as_ref())?),
    };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        if mine.is_some_and(|m| netns(format!("/proc/{pid}/ns/net").as_ref()).ok() != Some(m)) {
            continue;
        }
        found.extend(read(pid).ok().flatten());
    }
    found.sort_by_key(|q| q.id.pid);
    Ok(found)
}

/// Whether a process lives in the network namespace of the calling thread.
pub fn shares_netns(pid: i32) -> io::Result<bool> {
    Ok(netns("/proc/thread-self/ns/net".as_ref())? == netns(format!("/proc/{pid}/ns/net").as_ref())?)
}

fn netns(link: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::metadata(link)?;
    Ok((meta.dev(), meta.ino()))
}

fn read(pid: i32) -> io::Result<Option<QemuProcess>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline"))?;
    let args = split_cmdline(&bytes);
    if !args.first().is_some_and(|program| is_qemu(program)) {
        return Ok(None);
    }
    let id = ProcessId::of(pid)?;
    let cwd = fs::read_link(format!("/proc/{pid}/cwd"))?;
    let what = describe(&args);
    let qmp = what.qmp.into_iter().filter_map(|s| s.path(pid, &cwd)).collect();
    Ok(Some(QemuProcess {
        id,
        cwd,
        uuid: what.uuid,
        name: what.name,
        qmp,
        incoming: what.incoming,
        args,
    }))
}

fn split_cmdline(bytes: &[u8]) -> Vec<String> {
    let text = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    if text.is_empty() {
        return Vec::new();
    }
    text.split(|b| *b == 0)
        .map(|a| String::from_utf8_lossy(a).into_owned())
        .collect()
}

fn is_qemu(program: &str) -> bool {
    let name = program.rsplit('/').next().unwrap_or(program);
    name.starts_with("qemu-system-") || name == "qemu-kvm" || name == "kvm"
}

/// A QMP socket as the command line has it: by its path, or as a descriptor that QEMU inherited, as libvirt does.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Socket {
    Path(String),
    Fd(u32),
}

impl Socket {
    fn path(self, pid: i32, cwd: &Path) -> Option<PathBuf> {
        match self {
            Self::Path(p) => Some(cwd.join(p)),
            Self::Fd(fd) => socket_path(pid, fd),
        }
    }
}

/// The path that an inherited unix socket is bound to.
pub fn socket_path(pid: i32, fd: u32) -> Option<PathBuf> {
    let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
    let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
    unix_path(&fs::read_to_string(format!("/proc/{pid}/net/unix")).ok()?, inode)
}

fn unix_path(table: &str, inode: &str) -> Option<PathBuf> {
    let row = table
        .lines()
        .skip(1)
        .find(|row| row.split_ascii_whitespace().nth(6) == Some(inode))?;
    let path = row.split_ascii_whitespace().nth(7)?;
    path.starts_with('/').then(|| path.into())
}

#[derive(Default)]
struct Described {
    uuid: Option<Uuid>,
    name: Option<String>,
    qmp: Vec<Socket>,
    incoming: bool,
}

fn describe(args: &[String]) -> Described {
    let mut out = Described::default();
    let mut chardevs: Vec<(String, Socket)> = Vec::new();
    let mut monitors = Vec::new();
    for (option, value) in args.iter().zip(args.iter().skip(1)) {
        let Some(option) = option.strip_prefix('-') else {
            continue;
        };
        match option.strip_prefix('-').unwrap_or(option) {
            "uuid" => out.uuid = value.parse().ok(),
            "name" => out.name = Opts::parse(value, Some("guest")).ok().and_then(|o| o.get("guest")),
            "incoming" => out.incoming = true,
            "qmp" | "qmp-pretty" => out.qmp.extend(qmp_socket(value)),
            "chardev" => chardevs.extend(chardev_socket(value)),
            "mon" => monitors.extend(control_monitor(value)),
            _ => {}
        }
    }
    for id in monitors {
        let Some((_, socket)) = chardevs.iter().find(|(c, _)| *c == id) else {
            continue;
        };
        if id == crate::launch::QMP_ID {
            out.qmp.insert(0, socket.clone());
        } else {
            out.qmp.push(socket.clone());
        }
    }
    out
}

fn qmp_socket(value: &str) -> Option<Socket> {
    let opts = Opts::parse(value.strip_prefix("unix:")?, Some("path")).ok()?;
    opts.get("path").map(Socket::Path)
}

fn chardev_socket(value: &str) -> Option<(String, Socket)> {
    let opts = Opts::parse(value, Some("backend")).ok()?;
    if opts.get("backend").as_deref() != Some("socket") {
        return None;
    }
    let socket = match opts.get("path") {
        Some(path) => Socket::Path(path),
        None => Socket::Fd(opts.get("fd")?.parse().ok()?),
    };
    Some((opts.get("id")?, socket))
}

fn control_monitor(value: &str) -> Option<String> {
    let opts = Opts::parse(value, Some("chardev")).ok()?;
    if opts.get("mode").as_deref() == Some("control") {
        opts.get("chardev")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_names_with_parentheses_do_not_shift_the_fields() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        let stat = parse_stat(&format!("77 (CPU 0) KVM (x) {tail}")).unwrap();
        assert_eq!((stat.state, stat.starttime), ('S', 4242));
        assert!(parse_stat("77 (x) S 1").is_none());
        assert!(parse_stat("").is_none());
    }

    #[test]
    fn this_process_is_alive_under_its_own_start_only() {
        let me = ProcessId::of(std::process::id() as i32).unwrap();
        assert!(me.alive());
        assert!(
            !ProcessId {
                starttime: me.starttime + 1,
                ..me
            }
            .alive()
        );
    }

    fn describe_line(line: &str) -> Described {
        describe(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn qmp_sockets_are_found_in_every_form() {
        let d = describe_line(
            "qemu-system-x86_64 -name guest=web,debug-threads=on -uuid 6e3a0b3e-6f3d-4a83-9a55-0f6a3d1f2c11 \
             -qmp unix:/run/a.qmp,server=on,wait=off -chardev socket,id=charmonitor,fd=22,server=on,wait=off \
             -mon chardev=charmonitor,id=monitor,mode=control -chardev socket,id=hmp,path=/run/hmp,server=on \
             -mon chardev=hmp,mode=readline -chardev socket,id=umbra-qmp,path=/run/u,server=on,wait=off \
             -mon chardev=umbra-qmp,mode=control -incoming defer",
        );
        let path = |p: &str| Socket::Path(p.into());
        assert_eq!(d.qmp, [path("/run/u"), path("/run/a.qmp"), Socket::Fd(22)]);
        assert_eq!(d.name.as_deref(), Some("web"));
        assert!(d.uuid.is_some() && d.incoming);
        assert!(
            describe_line("qemu-system-x86_64 -qmp tcp:localhost:1 -uuid nonsense -mon")
                .qmp
                .is_empty()
        );
    }

    #[test]
    fn bound_sockets_are_found_by_their_inode() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                     0000000000000000: 00000002 00000000 00010000 0001 01 4711 /run/x.sock\n\
                     0000000000000000: 00000003 00000000 00000000 0001 03 4712\n\
                     0000000000000000: 00000002 00000000 00010000 0001 01 4713 @abstract\n";
        assert_eq!(unix_path(table, "4711"), Some("/run/x.sock".into()));
        assert_eq!(unix_path(table, "4712"), None);
        assert_eq!(unix_path(table, "4713"), None);
        assert_eq!(unix_path(table, "1"), None);
    }

    #[test]
    fn programs() {
        assert!(is_qemu("/usr/bin/qemu-system-x86_64"));
        assert!(is_qemu("qemu-kvm"));
        assert!(!is_qemu("qemu-img"));
        assert_eq!(split_cmdline(b"a\0\0b\0"), ["a", "", "b"]);
        assert!(split_cmdline(b"").is_empty());
    }
}
