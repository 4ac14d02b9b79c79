//! Several hosts on one machine.
//!
//! ```text
//!   netns host a (core 0)        netns switch         netns host b (core 1)
//!   ┌──────────────────┐        ┌────────────┐        ┌──────────────────┐
//!   │ QEMU ─ tap ─ br0 ─── up ────── br0 ──────── up ─── br0 ─ tap ─ QEMU │
//!   │ agent, replicator│        └──┬──────┬──┘        │ agent, replicator│
//!   └──────────────────┘           │      │           └──────────────────┘
//!                     netns control: RPS  netns client: who asks the guests
//! ```
//! All are on one layer 2, 10.77.0.0/24. The namespaces have no name and no mount: they live as long as a process or
//! this one holds them, so the kernel itself removes them with all links, taps and bridges when the lab ends. What the kernel
//! does not remove (processes, cgroups, folders) is in the [`ledger`] before it exists, and goes on drop, on panic, on
//! SIGINT and SIGTERM, and at the next lab's start if this process was killed hard.
//!
//! In reading order: [`sys`] (the unsafe calls), [`ledger`], [`cpuset`], [`net`], [`process`], [`host`], [`qmp`], [`disk`],
//! [`hardware`], [`sector`], [`vm`], [`http`], [`daemons`], [`client`] and [`udp`] (probers), [`sched`] (run-queue waits), [`swap`],
//! [`copies`] (which QEMU runs a VM), [`wire`] (a way to a host that can be cut), [`pair`] (two hosts, a VM, and orders without an
//! RPS), [`shadow`] (its tier and memory), [`world`] (the same with agents and an RPS).

pub mod client;
pub mod copies;
pub mod cpuset;
pub mod daemons;
pub mod disk;
pub mod hardware;
pub mod host;
pub mod http;
pub mod ledger;
pub mod net;
pub mod pair;
pub mod process;
pub mod qmp;
pub mod sched;
pub mod sector;
pub mod shadow;
pub mod swap;
pub mod sys;
pub mod udp;
pub mod vm;
pub mod wire;
pub mod world;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use host::Host;
use ledger::Ledger;
use net::Netns;

/// Where a lab's guests, hosts and clients live: `10.77.0.x/24`.
pub fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, last)
}

/// A running lab. Dropping it removes everything.
pub struct Lab {
    /// The RPS lives here.
    pub control: Host,
    /// Outside of all hosts.
    pub client: Host,
    pub hosts: Vec<Host>,
    switch: Netns,
    ledger: Ledger,
}

impl Lab {
    /// A lab with these hosts, one core each, in the order of the names. Waits while another lab runs on this machine.
    pub fn new(names: &[&str]) -> Result<Self> {
        let cores = sys::online_cpus().context("reading which CPUs are online")?;
        if cores.len() < names.len() {
            bail!(
                "{} hosts need {} cores, this machine has {}",
                names.len(),
                names.len(),
                cores.len()
            );
        }
        let ledger = Ledger::open()?;
        let dir = ledger.dir()?;
        let switch = Netns::new(&ledger)?;
        net::make_switch(&switch)?;
        let make = |name: &str, last: u8, cpus: Vec<usize>, bridged: bool| {
            Host::new(&ledger, &dir, &switch, name, ip(last), &cpus, bridged).with_context(|| format!("making {name}"))
        };
        let hosts = names
            .iter()
            .zip(1u8..)
            .zip(&cores)
            .map(|((name, last), core)| make(name, last, vec![*core], true))
            .collect::<Result<Vec<_>>>()?;
        // Clients and the RPS get the cores that no host has; on a small machine they share, unpinned.
        let spare: Vec<usize> = cores.iter().copied().skip(names.len()).collect();
        let control = make("ctl", 250, spare.clone(), false)?;
        let client = make("client", 251, spare, false)?;
        Ok(Self {
            control,
            client,
            hosts,
            switch,
            ledger,
        })
    }

    pub fn host(&self, name: &str) -> Result<&Host> {
        self.hosts
            .iter()
            .find(|h| h.name == name)
            .with_context(|| format!("the lab has no host {name:?}"))
    }

    /// Configurations, sockets, serial consoles and logs; removed with the lab.
    pub fn dir(&self) -> &Path {
        self.ledger.dir_path()
    }

    /// Swap of so many MiB until the lab ends, where the machine has none of its own. The inner error says why there can be none.
    pub fn swap(&self, mib: u64) -> Result<Result<(), String>> {
        swap::add(&self.ledger, mib)
    }

    /// Copies logs and serial consoles to where they outlive the lab.
    pub fn keep_logs(&self, to: &Path) -> Result<PathBuf> {
        // Of an earlier run; what is told below is about this one.
        let _ = std::fs::remove_dir_all(to);
        std::fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
        let mut todo = vec![self.dir().to_owned()];
        while let Some(dir) = todo.pop() {
            for entry in std::fs::read_dir(&dir)? {
                let path = entry?.path();
                let kept = ["log", "serial", "toml", "json"]
                    .iter()
                    .any(|e| path.extension().is_some_and(|x| x == *e));
                if path.is_dir() {
                    todo.push(path);
                } else if kept {
                    let name = path.strip_prefix(self.dir())?.to_string_lossy().replace('/', "-");
                    std::fs::copy(&path, to.join(name))?;
                }
            }
        }
        Ok(to.to_owned())
    }

    /// A bridge forgets what it has learned of a port that goes down: here on both ends of a host's uplink.
    fn forget_addresses(&self, host: &str) -> Result<()> {
        net::ip(&self.host(host)?.ns, "link set up0 down\nlink set up0 up\n")?;
        self.set_uplink(host, false)?;
        self.set_uplink(host, true)
    }

    /// Slows down what a host is sent by all others, or no more.
    pub fn shape(&self, host: &str, mbit: Option<u32>) -> Result<()> {
        net::shape(&self.switch, host, mbit)
    }

    /// Cuts or restores a host's uplink.
    pub fn set_uplink(&self, host: &str, up: bool) -> Result<()> {
        net::ip(
            &self.switch,
            &format!("link set {} {}\n", net::port(host), if up { "up" } else { "down" }),
        )
    }
}

/// Why no lab can run here, if it can't.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("network namespaces need root".into());
    }
    vm::qemu()
        .and_then(|_| vm::GuestImage::find())
        .err()
        .map(|e| format!("{e:#}"))
}

/// For tests: prints why and returns `true` where a test that needs a lab and these daemons cannot run.
pub fn skips(binaries: &[&str]) -> bool {
    let reason = missing().or_else(|| daemons::Binaries::find(binaries).err().map(|e| format!("{e:#}")));
    if let Some(reason) = &reason {
        println!("SKIPPED: {reason}");
    }
    reason.is_some()
}
