//! A namespace, a core, and what runs there.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result};

use super::ledger::{Item, Ledger, PREFIX};
use super::net::{self, Netns};
use super::process::Process;
use super::{cpuset, http, sys};

#[derive(Clone)]
pub struct Host {
    pub name: String,
    pub ip: Ipv4Addr,
    pub ns: Netns,
    /// Empty: not pinned.
    pub cpus: Vec<usize>,
    cgroup: Option<Arc<File>>,
    dir: PathBuf,
    ledger: Ledger,
}

impl Host {
    pub(super) fn new(
        ledger: &Ledger,
        dir: &Path,
        switch: &Netns,
        name: &str,
        ip: Ipv4Addr,
        cpus: &[usize],
        bridged: bool,
    ) -> Result<Self> {
        let ns = Netns::new(ledger)?;
        net::plug(switch, &ns, name, ip, bridged)?;
        let cgroup = if cpus.is_empty() {
            None
        } else {
            cpuset::make(ledger, name, cpus)?
        };
        Ok(Self {
            name: name.to_owned(),
            ip,
            ns,
            cpus: cpus.to_vec(),
            cgroup: cgroup.map(Arc::new),
            dir: dir.to_owned(),
            ledger: ledger.clone(),
        })
    }

    /// `FILE` in the lab's folder, named after this host.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{}-{name}", self.name))
    }

    /// `FILE` in the lab's folder, for all hosts.
    pub fn common(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A folder of this host, made if need be.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.file(name);
        std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(path)
    }

    /// A folder of this host that is a file system of its own, with room for so much.
    pub fn mount_small(&self, name: &str, mib: u64) -> Result<()> {
        let path = self.folder(name)?;
        self.ledger.making(Item::Mount(path.clone()), || {
            let size = format!("size={mib}m");
            nix::mount::mount(
                Some("tmpfs"),
                &path,
                Some("tmpfs"),
                nix::mount::MsFlags::empty(),
                Some(size.as_str()),
            )
            .with_context(|| format!("mounting {}", path.display()))
        })
    }

    /// A folder on tmpfs for shadows' RAM.
    pub fn ram_folder(&self) -> Result<PathBuf> {
        let suffix = self.ledger.name();
        let path = Path::new("/dev/shm").join(format!("{PREFIX}{}-{}", suffix.trim_start_matches(PREFIX), self.name));
        if !path.is_dir() {
            self.ledger.make_dir(&path)?;
        }
        Ok(path)
    }

    /// The cgroup that this host's replicator may make below the cpu controller.
    pub fn cpu_group(&self) -> Result<String> {
        cpuset::cpu_group(&self.ledger, &self.name)
    }

    /// Starts `cmd` in this host's namespace and on its cores. Output goes to a log in the lab's folder; a second process of
    /// the same name goes on in the same log.
    pub fn spawn(&self, name: &str, mut cmd: Command) -> Result<Process> {
        let log = self.file(&format!("{name}.log"));
        let out = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening {}", log.display()))?;
        cmd.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let place = sys::Place {
            netns: self.ns.fd(),
            cpus: &self.cpus,
            cgroup: self.cgroup.as_deref(),
        };
        sys::place(&mut cmd, &place)?;
        let child = self.ledger.spawn(&mut cmd)?;
        Ok(Process::new(child, &format!("{name} on {}", self.name), &log))
    }

    /// A persistent tap on this host's bridge.
    pub fn make_tap(&self, tap: &str) -> Result<()> {
        net::make_tap(&self.ns, tap)
    }

    pub fn remove_tap(&self, tap: &str) -> Result<()> {
        net::remove_tap(&self.ns, tap)
    }

    /// Names of this host's network interfaces.
    pub fn interfaces(&self) -> Result<Vec<String>> {
        let text = sys::in_netns(self.ns.fd(), || std::fs::read_to_string("/proc/thread-self/net/dev"))?;
        let names = text.lines().filter_map(|l| l.split_once(':'));
        Ok(names.map(|(name, _)| name.trim().to_owned()).collect())
    }

    /// An HTTP request from inside this host.
    pub fn get(&self, to: (Ipv4Addr, u16), path: &str) -> Result<http::Reply> {
        http::request(&self.ns, to, "GET", path, None)
    }

    pub fn post(&self, to: (Ipv4Addr, u16), path: &str, body: &str) -> Result<http::Reply> {
        http::request(&self.ns, to, "POST", path, Some(body))
    }

    /// Processes in this host's namespace.
    pub fn pids(&self) -> Vec<i32> {
        sys::pids()
            .into_iter()
            .filter(|p| sys::netns_inode(*p) == Some(self.ns.inode))
            .collect()
    }
}
