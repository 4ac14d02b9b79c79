//! What a lab makes, on disk before it is made, so that nothing outlives it.
//!
//! ```text
//!   /run/umbra-lab/lock        held by the lab that runs; labs are serial
//!   /run/umbra-lab/ID.made     one line a thing: owner, boot, netns, pid, cgroup, mount, dir, swap
//!   /run/umbra-lab/ID/         sockets, configurations, logs
//! ```
//! A teardown reads such a list, whoever wrote it: the owner itself (drop, panic, signal) or the next lab when the owner was
//! killed. Processes are found by their network namespace, so those that daemons started are among them, and are told from
//! strangers by the namespace's cookie or their start time. Nothing is ever killed by name.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, Once};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::sys;

/// Root of all labs' lists.
const ROOT: &str = "/run/umbra-lab";
/// All names of folders and cgroups begin so, and a teardown removes no others, whatever a list says.
pub const PREFIX: &str = "umbra-lab-";
/// Longest wait for another lab. Whole test binaries hold the lock one test at a time.
const LOCK_WAIT: Duration = Duration::from_secs(1200);
/// Longest wait for killed processes to be gone.
const DEATH_WAIT: Duration = Duration::from_secs(10);

/// One thing that a lab made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Item {
    /// The lab's process and its start time.
    Owner(i32, u64),
    /// The boot in which the list was written. After another boot only folders and files are left.
    Boot(String),
    /// Inode number and cookie of a namespace.
    Netns(u64, u64),
    Pid(i32, u64),
    Cgroup(PathBuf),
    /// A file system inside of one of the lab's folders.
    Mount(PathBuf),
    Dir(PathBuf),
    /// A file, and the kernel may have pages in it.
    Swap(PathBuf),
}

impl Item {
    fn line(&self) -> String {
        match self {
            Self::Owner(pid, start) => format!("owner {pid} {start}\n"),
            Self::Boot(id) => format!("boot {id}\n"),
            Self::Netns(inode, cookie) => format!("netns {inode} {cookie}\n"),
            Self::Pid(pid, start) => format!("pid {pid} {start}\n"),
            Self::Cgroup(path) => format!("cgroup {}\n", path.display()),
            Self::Mount(path) => format!("mount {}\n", path.display()),
            Self::Dir(path) => format!("dir {}\n", path.display()),
            Self::Swap(path) => format!("swap {}\n", path.display()),
        }
    }

    /// `None` for a line that is not understood, or a path that no lab makes.
    fn parse(line: &str) -> Option<Self> {
        let (kind, rest) = line.split_once(' ')?;
        let pair = || rest.split_once(' ');
        match kind {
            "owner" => pair().and_then(|(a, b)| Some(Self::Owner(a.parse().ok()?, b.parse().ok()?))),
            "boot" => Some(Self::Boot(rest.to_owned())),
            "netns" => pair().and_then(|(a, b)| Some(Self::Netns(a.parse().ok()?, b.parse().ok()?))),
            "pid" => pair().and_then(|(a, b)| Some(Self::Pid(a.parse().ok()?, b.parse().ok()?))),
            "cgroup" => ours(rest).map(Self::Cgroup),
            "mount" => inside(rest).map(Self::Mount),
            "dir" => ours(rest).map(Self::Dir),
            "swap" => ours(rest).map(Self::Swap),
            _ => None,
        }
    }
}

/// The path, if its last part has the labs' prefix and no part climbs.
fn ours(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(path);
    let named = path.file_name()?.to_str()?.starts_with(PREFIX);
    let climbs = path.components().any(|c| matches!(c, std::path::Component::ParentDir));
    (named && path.is_absolute() && !climbs).then_some(path)
}

/// The path, if the folder that it is in is a lab's.
fn inside(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(path);
    ours(path.parent()?.to_str()?)?;
    (path.file_name()? != "..").then_some(path)
}

/// The labs of this process that are up. Whoever makes something holds the lock; the signal thread takes it and never gives it
/// back, so that nothing new is made while it cleans up.
static UP: Mutex<BTreeMap<u32, Up>> = Mutex::new(BTreeMap::new());

struct Up {
    list: PathBuf,
    items: Vec<Item>,
}

fn up() -> MutexGuard<'static, BTreeMap<u32, Up>> {
    UP.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// One lab's list. The last clone's drop tears the lab down.
#[derive(Clone)]
pub struct Ledger(Arc<Inner>);

struct Inner {
    key: u32,
    dir: PathBuf,
    /// Labs are serial as long as this is open.
    _lock: File,
}

impl Ledger {
    /// Waits for other labs, removes what killed ones left, and begins a list.
    pub fn open() -> Result<Self> {
        fs::create_dir_all(ROOT).with_context(|| format!("making {ROOT}"))?;
        static SIGNALS: Once = Once::new();
        let mut installed = Ok(());
        SIGNALS.call_once(|| installed = sys::on_first_signal(stop_all));
        installed.context("installing signal handlers")?;
        let lock = lock()?;
        sweep();
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let key = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let pid = std::process::id() as i32;
        let name = format!("{PREFIX}{pid}-{key}");
        let list = Path::new(ROOT).join(format!("{name}.made"));
        let ledger = Self(Arc::new(Inner {
            key,
            dir: Path::new(ROOT).join(name),
            _lock: lock,
        }));
        up().insert(
            key,
            Up {
                list,
                items: Vec::new(),
            },
        );
        let start = sys::start_time(pid).context("reading this process's start time")?;
        ledger.record([Item::Owner(pid, start), Item::Boot(boot_id())])?;
        Ok(ledger)
    }

    /// What the lab's things are named after.
    pub fn name(&self) -> String {
        self.0
            .dir
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    pub fn dir_path(&self) -> &Path {
        &self.0.dir
    }

    /// Makes the lab's folder and returns its path.
    pub fn dir(&self) -> Result<PathBuf> {
        self.make_dir(&self.0.dir)?;
        Ok(self.0.dir.clone())
    }

    pub fn make_dir(&self, path: &Path) -> Result<()> {
        self.making(Item::Dir(path.to_owned()), || {
            fs::create_dir(path).with_context(|| format!("making {}", path.display()))
        })
    }

    /// Writes `item` down, then makes it.
    pub fn making<T>(&self, item: Item, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut labs = up();
        Self::write(&mut labs, self.0.key, [item])?;
        make()
    }

    /// Starts a process and writes it down; both or, for whoever looks from outside, neither: it is born into one of
    /// the lab's namespaces, where a teardown finds it too.
    pub fn spawn(&self, cmd: &mut Command) -> Result<Child> {
        let mut labs = up();
        let child = cmd
            .spawn()
            .with_context(|| format!("starting {}", cmd.get_program().display()))?;
        let pid = child.id() as i32;
        if let Some(start) = sys::start_time(pid) {
            Self::write(&mut labs, self.0.key, [Item::Pid(pid, start)])?;
        }
        Ok(child)
    }

    pub fn record(&self, items: impl IntoIterator<Item = Item>) -> Result<()> {
        Self::write(&mut up(), self.0.key, items)
    }

    fn write(labs: &mut BTreeMap<u32, Up>, key: u32, items: impl IntoIterator<Item = Item>) -> Result<()> {
        let lab = labs.get_mut(&key).context("this lab has been taken down")?;
        let mut file = fs::OpenOptions::new().create(true).append(true).open(&lab.list);
        for item in items {
            let line = item.line();
            lab.items.push(item);
            let write = |f: &mut File| f.write_all(line.as_bytes());
            file.as_mut()
                .map_err(|e| std::io::Error::from(e.kind()))
                .and_then(write)
                .with_context(|| format!("writing {}", lab.list.display()))?;
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let mut labs = up();
        if let Some(lab) = labs.remove(&self.key) {
            tell(teardown(&lab.list, &lab.items));
        }
    }
}

/// The end of the process at a signal. The lock is never given back.
fn stop_all(signal: i32) {
    let labs = up();
    for lab in labs.values() {
        tell(teardown(&lab.list, &lab.items));
    }
    std::process::exit(128 + signal);
}

fn tell(problems: Vec<String>) {
    for p in problems {
        let _ = writeln!(std::io::stderr(), "lab: left behind: {p}");
    }
}

fn lock() -> Result<File> {
    let path = Path::new(ROOT).join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    let since = Instant::now();
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) if since.elapsed() < LOCK_WAIT => {
                if !told && since.elapsed() > Duration::from_secs(2) {
                    told = true;
                    let _ = writeln!(std::io::stderr(), "lab: waiting for another lab on this machine to end");
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(fs::TryLockError::WouldBlock) => bail!("another lab has held {} for {LOCK_WAIT:?}", path.display()),
            Err(fs::TryLockError::Error(e)) => return Err(e).with_context(|| format!("locking {}", path.display())),
        }
    }
}

/// Takes down what labs left whose owner is gone. Called with the lock held.
pub fn sweep() {
    for list in lists() {
        let items = read(&list);
        let alive = items
            .iter()
            .any(|i| matches!(i, Item::Owner(pid, start) if sys::start_time(*pid) == Some(*start)));
        let same_boot = items.contains(&Item::Boot(boot_id()));
        if alive && same_boot {
            continue;
        }
        let what: Vec<Item> = items
            .into_iter()
            .filter(|i| same_boot || matches!(i, Item::Dir(_) | Item::Swap(_)))
            .collect();
        tell(teardown(&list, &what));
    }
}

/// The lists on this machine, of whatever lab.
pub fn lists() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(ROOT) else {
        return Vec::new();
    };
    let paths = entries.filter_map(|e| Some(e.ok()?.path()));
    paths.filter(|p| p.extension().is_some_and(|e| e == "made")).collect()
}

/// A list's items; lines that make no sense are passed over.
pub fn read(list: &Path) -> Vec<Item> {
    fs::read_to_string(list)
        .unwrap_or_default()
        .lines()
        .filter_map(Item::parse)
        .collect()
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Removes everything in `items`, then the list. Returns what could not be removed; the list then stays for the next lab.
fn teardown(list: &Path, items: &[Item]) -> Vec<String> {
    let mut problems = Vec::new();
    let deadline = Instant::now() + DEATH_WAIT;
    loop {
        let left = alive(items);
        if left.is_empty() {
            break;
        }
        for pid in &left {
            let _ = sys::kill(*pid, Signal::SIGKILL);
        }
        if Instant::now() > deadline {
            problems.push(format!("processes {left:?}"));
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    problems.extend(items.iter().filter_map(|i| {
        if let Item::Cgroup(p) = i {
            remove_cgroup(p)
        } else {
            None
        }
    }));
    for item in items {
        if let Item::Mount(path) = item
            && let Err(e) = nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH)
            // It was written down before it was made; no such folder, no mount there.
            && !matches!(e, nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT)
        {
            problems.push(format!("{}: {e}", path.display()));
        }
    }
    for item in items {
        if let Item::Dir(path) = item
            && let Err(e) = fs::remove_dir_all(path)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            problems.push(format!("{}: {e}", path.display()));
        }
    }
    // Last: what was in it went with the folders and processes.
    problems.extend(items.iter().filter_map(|i| {
        if let Item::Swap(p) = i {
            super::swap::remove(p).err().map(|e| format!("{e:#}"))
        } else {
            None
        }
    }));
    if problems.is_empty() {
        let _ = fs::remove_file(list);
    }
    problems
}

/// Processes of a lab that live: those written down and those in its namespaces, this one excepted.
pub fn alive(items: &[Item]) -> Vec<i32> {
    let me = std::process::id() as i32;
    let owner = items
        .iter()
        .find_map(|i| if let Item::Owner(pid, _) = i { Some(*pid) } else { None });
    let mut found: Vec<i32> = items
        .iter()
        .filter_map(|i| match i {
            Item::Pid(pid, start) if sys::start_time(*pid) == Some(*start) => Some(*pid),
            _ => None,
        })
        .collect();
    for pid in sys::pids() {
        if pid != me && Some(pid) != owner && !found.contains(&pid) && lives_in(pid, items) {
            found.push(pid);
        }
    }
    found
}

fn lives_in(pid: i32, items: &[Item]) -> bool {
    let Some(inode) = sys::netns_inode(pid) else {
        return false;
    };
    let Some(cookie) = items.iter().find_map(|i| match i {
        Item::Netns(n, cookie) if *n == inode => Some(*cookie),
        _ => None,
    }) else {
        return false;
    };
    // The inode alone may have been given to another namespace meanwhile.
    let now = File::open(format!("/proc/{pid}/ns/net")).and_then(|ns| sys::in_netns(ns.as_fd(), sys::netns_cookie));
    now.is_ok_and(|now| now == cookie)
}

/// Removes a cgroup and those below it; a process that has just died may keep one busy for a moment.
fn remove_cgroup(path: &Path) -> Option<String> {
    for entry in fs::read_dir(path).into_iter().flatten().filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|t| t.is_dir())
            && let Some(problem) = remove_cgroup(&entry.path())
        {
            return Some(problem);
        }
    }
    let mut last = String::new();
    for _ in 0..100 {
        match fs::remove_dir(path) {
            Ok(()) => return None,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
            Err(e) => last = format!("{}: {e}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_survive_the_list() {
        let items = [
            Item::Owner(12, 345),
            Item::Boot("b-1".into()),
            Item::Netns(4026531840, 7),
            Item::Pid(99, 1),
            Item::Cgroup("/sys/fs/cgroup/umbra-lab-1-0-a".into()),
            Item::Mount("/run/umbra-lab/umbra-lab-1-0/b-disks".into()),
            Item::Dir("/dev/shm/umbra-lab-1-0".into()),
            Item::Swap("/x/target/umbra-lab-1-0-swap".into()),
        ];
        for item in items {
            assert_eq!(Item::parse(item.line().trim_end()), Some(item));
        }
    }

    #[test]
    fn a_list_cannot_name_what_no_lab_makes() {
        for line in [
            "dir /",
            "dir /etc",
            "dir umbra-lab-1",
            "dir /x/../umbra-lab-1",
            "cgroup /sys/fs/cgroup",
            "swap /swapfile",
            "mount /umbra-lab-1",
            "mount /x/umbra-lab-1/../y",
            "mount /x/umbra-lab-1/..",
            "pid x 1",
            "",
            "dir",
        ] {
            assert_eq!(Item::parse(line), None, "{line}");
        }
    }
}
