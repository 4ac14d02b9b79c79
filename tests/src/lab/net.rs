//! Namespaces without names, joined by one bridge.

use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::ledger::{Item, Ledger};
use super::sys;

/// Longest run of one `ip` batch.
const IP_WAIT: Duration = Duration::from_secs(15);

/// A network namespace, held open.
#[derive(Clone)]
pub struct Netns {
    fd: Arc<OwnedFd>,
    pub inode: u64,
}

impl Netns {
    pub fn new(ledger: &Ledger) -> Result<Self> {
        let fd = sys::new_netns().context("making a network namespace")?;
        let cookie = sys::in_netns(fd.as_fd(), sys::netns_cookie).context("reading a namespace's cookie")?;
        let inode = nix::sys::stat::fstat(&fd)?.st_ino;
        ledger.record([Item::Netns(inode, cookie)])?;
        let ns = Self {
            fd: Arc::new(fd),
            inode,
        };
        // Guests and hosts speak IPv4 here; router solicitations would only be noise in measurements.
        sys::in_netns(ns.fd(), || {
            for scope in ["all", "default"] {
                let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1");
            }
            Ok(())
        })?;
        ip(&ns, "link set lo up\n")?;
        Ok(ns)
    }

    /// The namespace that this process is in.
    pub fn own() -> Result<Self> {
        let file = std::fs::File::open("/proc/self/ns/net").context("opening this process's network namespace")?;
        let inode = nix::sys::stat::fstat(&file)?.st_ino;
        Ok(Self {
            fd: Arc::new(file.into()),
            inode,
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// A path by which other processes reach the namespace while this one lives.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd())
    }
}

/// Runs `ip` commands, a line each, inside the namespace.
pub fn ip(ns: &Netns, commands: &str) -> Result<()> {
    run(ns, "ip", &["-batch", "-"], commands)
}

fn run(ns: &Netns, program: &str, args: &[&str], stdin: &str) -> Result<()> {
    let mut cmd = Command::new(program);
    cmd.args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    sys::place(
        &mut cmd,
        &sys::Place {
            netns: ns.fd(),
            cpus: &[],
            cgroup: None,
        },
    )?;
    let mut child = cmd
        .spawn()
        .with_context(|| format!("starting {program} (package iproute2)"))?;
    let deadline = Instant::now() + IP_WAIT;
    if let Some(mut pipe) = child.stdin.take() {
        pipe.write_all(stdin.as_bytes())
            .with_context(|| format!("telling {program} what to do"))?;
    }
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            bail!("{program} did not end within {IP_WAIT:?}: {stdin}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let out = child.wait_with_output()?;
    if !out.status.success() {
        bail!(
            "{program}: {} (for: {})",
            String::from_utf8_lossy(&out.stderr).trim(),
            stdin.trim().replace('\n', "; ")
        );
    }
    Ok(())
}

/// The bridge that all hosts' uplinks are plugged into.
pub fn make_switch(switch: &Netns) -> Result<()> {
    ip(
        switch,
        "link add br0 type bridge forward_delay 0 stp_state 0\nlink set br0 up\n",
    )
}

/// Name of a host's port on the switch.
pub fn port(host: &str) -> String {
    format!("p-{host}")
}

/// Plugs a namespace into the switch. A bridged one gets a bridge of its own for its guests' taps, which carries its
/// address, as hypervisor hosts have it; others carry the address on the uplink.
pub fn plug(switch: &Netns, ns: &Netns, host: &str, addr: Ipv4Addr, bridged: bool) -> Result<()> {
    let port = port(host);
    let peer = format!(
        "link add up0 type veth peer name {port} netns {}\nlink set up0 up\n",
        switch.path()
    );
    // A bridge without an address of its own borrows the lowest of its ports', and changes it when a tap comes or goes:
    // neighbours then speak to an address that is not there any more.
    let mac = format!("02:75:6d:62:72:{:02x}", addr.octets()[3]);
    let rest = if bridged {
        format!(
            "link add br0 address {mac} type bridge forward_delay 0 stp_state 0\nlink set up0 master br0\n\
             link set br0 up\naddr add {addr}/24 dev br0\n"
        )
    } else {
        format!("addr add {addr}/24 dev up0\n")
    };
    ip(ns, &(peer + &rest))?;
    ip(switch, &format!("link set {port} master br0\nlink set {port} up\n"))
}

/// A persistent tap on the host's bridge.
pub fn make_tap(ns: &Netns, tap: &str) -> Result<()> {
    ip(
        ns,
        &format!("tuntap add dev {tap} mode tap\nlink set {tap} master br0\nlink set {tap} up\n"),
    )
}

pub fn remove_tap(ns: &Netns, tap: &str) -> Result<()> {
    ip(ns, &format!("link del {tap}\n"))
}

/// Shapes what a host is sent: so many megabits a second from the switch, or as fast as it goes. What does not fit into 50 ms of
/// queue is lost, as on a real link.
pub fn shape(switch: &Netns, host: &str, mbit: Option<u32>) -> Result<()> {
    let command = match mbit {
        Some(mbit) => format!(
            "qdisc replace dev {} root tbf rate {mbit}mbit burst 32kb latency 50ms\n",
            port(host)
        ),
        None => format!("qdisc del dev {} root\n", port(host)),
    };
    run(switch, "tc", &["-batch", "-"], &command)
}
