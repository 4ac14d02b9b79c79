//! A test guest in a QEMU: how it is started, and what it tells.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use umbra_api::VmId;

use super::daemons::target_dir;
use super::disk::{self, DiskSpec};
use super::hardware::Hardware;
use super::host::Host;
use super::process::{Process, wait_for};
use super::qmp::Qmp;
use super::{sector, sys};

/// From start to the first HTTP answer; TCG on a busy machine is slow.
pub const BOOT: Duration = Duration::from_secs(90);
pub const HTTP: u16 = 80;
pub const UDP_ECHO: u16 = 7;

/// The installed QEMU's path.
pub fn qemu() -> Result<PathBuf> {
    let name = "qemu-system-x86_64";
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|d| d.join(name))
        .find(|p| p.is_file())
        .with_context(|| format!("{name} is not installed: cargo xtask setup"))
}

/// Kernel and initramfs that `cargo xtask setup` makes.
#[derive(Clone)]
pub struct GuestImage {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

impl GuestImage {
    pub fn find() -> Result<Self> {
        let dir = target_dir()?.join("guest");
        let (kernel, initrd) = (dir.join("vmlinuz"), dir.join("initrd.img"));
        if let Some(missing) = [&kernel, &initrd].into_iter().find(|p| !p.is_file()) {
            bail!("{} is missing: cargo xtask setup", missing.display());
        }
        Ok(Self { kernel, initrd })
    }
}

/// What a guest runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Boots {
    Linux,
    /// See [`sector`]: it has no network and only its console tells of it.
    Sector,
}

/// What a guest is to be and do.
#[derive(Clone)]
pub struct VmSpec {
    pub name: String,
    pub id: VmId,
    pub ip: Ipv4Addr,
    pub mem_mib: u32,
    pub vcpus: u32,
    /// Pages a second.
    pub dirty: u32,
    /// CPU time that one web request costs.
    pub work_us: u32,
    /// MiB under the self-checking pattern; most of the RAM if `None`. Verifying it costs CPU too.
    pub pattern_mib: Option<u32>,
    /// Seconds in which the guest is to verify each page of it once.
    pub scrub_s: u32,
    /// The guest writes a journal on each.
    pub disks: Vec<DiskSpec>,
    /// Records that the guest writes on each of them a second, if not as many as it likes best.
    pub disk_rate: Option<u64>,
    pub hardware: Hardware,
    pub boots: Boots,
    /// The folder of its images, if hosts share them; else each host has its own.
    pub images: Option<PathBuf>,
}

impl VmSpec {
    /// Guest number `n`, which gets address 10.77.0.`n` and a MAC and UUID of its own.
    pub fn new(name: &str, n: u8) -> Self {
        let id = VmId(uuid::Uuid::from_u128(
            0x756d_6272_6100_4000_8000_0000_0000_0000 | u128::from(n),
        ));
        Self {
            name: name.to_owned(),
            id,
            ip: super::ip(n),
            mem_mib: 256,
            vcpus: 1,
            dirty: 200,
            work_us: 1000,
            pattern_mib: None,
            scrub_s: 10,
            disks: Vec::new(),
            disk_rate: None,
            hardware: Hardware::default(),
            boots: Boots::Linux,
            images: None,
        }
    }

    /// The tap of its first NIC.
    pub fn tap(&self) -> String {
        format!("t-{}", self.name)
    }

    /// Tap and MAC address of each NIC.
    fn nics(&self) -> impl Iterator<Item = (String, String)> {
        (0..self.hardware.nics).map(|n| {
            let mac = format!("52:54:00:75:{:02x}:{:02x}", 0x6d + n, self.ip.octets()[3]);
            let tap = self.tap();
            (if n == 0 { tap } else { format!("{tap}-{n}") }, mac)
        })
    }

    /// What the guest is told on its kernel's command line.
    fn append(&self) -> String {
        let pattern = self.pattern_mib.map_or_else(|| "auto".to_owned(), |m| m.to_string());
        let disks = match self.disks.as_slice() {
            [] => String::new(),
            some => format!(" umbra.disk={}", disk::names(some).join(",")),
        };
        let rate = self
            .disk_rate
            .map_or_else(String::new, |n| format!(" umbra.disk_rate={n}"));
        format!(
            "console=ttyS0 quiet panic=-1 umbra.ip={}/24 umbra.pattern={pattern} umbra.dirty={} umbra.tick_ms=100 \
             umbra.work_us={} umbra.scrub_s={}{disks}{rate}{}",
            self.ip,
            self.dirty,
            self.work_us,
            self.scrub_s,
            self.hardware.kernel_words()
        )
    }
}

/// A running guest.
pub struct Vm {
    pub spec: VmSpec,
    pub process: Process,
    /// The replicator's socket.
    pub qmp: PathBuf,
    /// The tests' socket.
    pub watch: PathBuf,
    pub serial: PathBuf,
}

impl Vm {
    /// Starts a guest on a host; it is up when [`Vm::wait_up`] says so.
    pub fn start(host: &Host, image: &GuestImage, spec: &VmSpec) -> Result<Self> {
        Self::start_with(host, image, spec, &[])
    }

    /// The same with more arguments for QEMU.
    pub fn start_with(host: &Host, image: &GuestImage, spec: &VmSpec, more: &[&str]) -> Result<Self> {
        let file = |kind: &str| host.file(&format!("{}.{kind}", spec.name));
        let (qmp, watch, serial) = (file("qmp"), file("watch"), file("serial"));
        let mut cmd = Command::new(qemu()?);
        cmd.args(["-uuid", &spec.id.to_string()])
            .args(["-name", &format!("{},debug-threads=on", spec.name)])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(spec.hardware.arguments(host, &spec.name, spec.mem_mib)?)
            .args(["-smp", &spec.vcpus.to_string()]);
        match spec.boots {
            Boots::Sector => cmd.args(sector::arguments(host)?),
            Boots::Linux => cmd
                .arg("-kernel")
                .arg(&image.kernel)
                .arg("-initrd")
                .arg(&image.initrd)
                .args(["-append", &spec.append()]),
        };
        for (n, (tap, mac)) in spec.nics().enumerate() {
            host.make_tap(&tap)?;
            cmd.args(["-netdev", &format!("tap,id=n{n},ifname={tap},script=no,downscript=no")])
                .args(["-device", &format!("virtio-net-pci,netdev=n{n},mac={mac},romfile=")]);
        }
        cmd.args(["-serial", &format!("file:{}", serial.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", watch.display())])
            .args(more);
        cmd.args(disk::arguments(&spec.disks, |n| match &spec.images {
            Some(dir) => dir.join(format!("{}-{n}.img", spec.name)),
            None => image_of(host, &spec.name, n),
        })?);
        let process = host.spawn(&spec.name, cmd)?;
        Ok(Self {
            spec: spec.clone(),
            process,
            qmp,
            watch,
            serial,
        })
    }

    /// Waits until the guest answers HTTP to `from`, or counts on its console.
    pub fn wait_up(&mut self, from: &Host) -> Result<()> {
        let (name, ip, boots) = (self.spec.name.clone(), self.spec.ip, self.spec.boots);
        let (process, serial) = (&mut self.process, &self.serial);
        let up = wait_for(&format!("guest {name} to boot"), BOOT, || {
            process.check()?;
            let up = match boots {
                Boots::Linux => stats(from, ip).is_ok_and(|s| s.pattern_pages > 0),
                Boots::Sector => Console::read(serial).last_counter > 0,
            };
            Ok(up.then_some(()))
        });
        up.with_context(|| format!("its console says: {}", tail(&self.serial)))
    }

    pub fn watch(&self) -> Result<Qmp> {
        Qmp::connect(&self.watch, Duration::from_secs(5))
    }
}

/// A disk's image, on the host where the guest was started.
pub fn image_of(host: &Host, vm: &str, disk: usize) -> PathBuf {
    host.file(&format!("{vm}-{disk}.img"))
}

/// `GET /stats` of a guest.
#[derive(Clone, PartialEq, Debug, Deserialize)]
pub struct Stats {
    pub counter: u64,
    pub errors: u64,
    pub dirty_pages: u64,
    pub pattern_pages: u64,
    pub scrubbed_pages: u64,
    /// Acknowledged records of each disk's journal.
    #[serde(default)]
    pub disks: BTreeMap<String, u64>,
}

pub fn stats(from: &Host, ip: Ipv4Addr) -> Result<Stats> {
    from.get((ip, HTTP), "/stats")?.ok()?.json()
}

/// Waits until the guest has verified each page of its pattern once more from now on.
pub fn wait_scrubbed(from: &Host, ip: Ipv4Addr, within: Duration) -> Result<()> {
    let first = stats(from, ip)?;
    wait_for("the guest to verify its whole pattern", within, || {
        let now = stats(from, ip)?;
        std::thread::sleep(Duration::from_millis(200));
        Ok((now.scrubbed_pages >= first.scrubbed_pages + first.pattern_pages).then_some(()))
    })
}

/// Serial consoles of shadows in a replicator's run folder.
pub fn consoles_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().filter_map(Result::ok) {
            match entry.file_type() {
                Ok(t) if t.is_dir() => todo.push(entry.path()),
                Ok(t) if t.is_file() && entry.file_name().to_string_lossy().starts_with("serial") => {
                    found.push(entry.path())
                }
                _ => {}
            }
        }
    }
    found
}

/// The last lines of a serial console.
pub fn tail(serial: &Path) -> String {
    let text = std::fs::read(serial).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(5)..)
        .unwrap_or_default()
        .join(" | ")
}

/// What a serial console says of the pattern and the counter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Console {
    pub last_counter: u64,
    /// The highest error count told.
    pub errors: u64,
    /// The counter went back, or jumped: two copies wrote, or time was lost.
    pub jumps: u64,
}

impl Console {
    pub fn read(serial: &Path) -> Self {
        Self::of(&String::from_utf8_lossy(&std::fs::read(serial).unwrap_or_default()))
    }

    pub fn of(text: &str) -> Self {
        let mut console = Self::default();
        let mut before = None;
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let ("C", Some(counter)) = (
                words.next().unwrap_or_default(),
                words.next().and_then(|w| w.parse::<u64>().ok()),
            ) else {
                continue;
            };
            let errors = words
                .next()
                .and_then(|w| w.strip_prefix("err="))
                .and_then(|w| w.parse().ok());
            console.errors = console.errors.max(errors.unwrap_or(0));
            if before.is_some_and(|b| counter != b + 1) {
                console.jumps += 1;
            }
            before = Some(counter);
            console.last_counter = counter;
        }
        console
    }
}

/// The value after a QEMU option, for the `n`th time that the option appears.
pub fn option(cmdline: &[String], name: &str, n: usize) -> Option<String> {
    let at = cmdline.iter().enumerate().filter(|(_, a)| *a == name).nth(n)?.0;
    cmdline.get(at + 1).cloned()
}

/// The serial console of a running QEMU, as its command line names it.
pub fn console_of(pid: i32) -> Option<PathBuf> {
    let serial = option(&sys::cmdline(pid), "-serial", 0)?;
    serial.strip_prefix("file:").map(PathBuf::from)
}

/// The `n`th monitor's socket of a running QEMU, as its command line names it. The second one is the tests' own.
pub fn monitor_of(pid: i32, n: usize) -> Option<PathBuf> {
    let socket = option(&sys::cmdline(pid), "-qmp", n)?;
    socket.strip_prefix("unix:")?.split(',').next().map(PathBuf::from)
}

/// QEMU processes of this VM in a host, primary or shadow.
pub fn qemus(host: &Host, id: VmId) -> Vec<i32> {
    let id = id.to_string();
    host.pids()
        .into_iter()
        .filter(|pid| option(&sys::cmdline(*pid), "-uuid", 0).is_some_and(|u| u.eq_ignore_ascii_case(&id)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles_are_read_line_by_line() {
        let text =
            "UP\nC 0 err=0 t=5 dirty=1\nC 1 err=0 t=6 dirty=2\nE x\nC 2 err=3 t=7 dirty=2\nC 9 err=3 t=8 dirty=2\nC 1";
        assert_eq!(
            Console::of(text),
            Console {
                last_counter: 1,
                errors: 3,
                jumps: 2
            }
        );
        assert_eq!(Console::of(""), Console::default());
    }

    #[test]
    fn options_are_found_by_their_place() {
        let line: Vec<String> = ["q", "-qmp", "a", "-uuid", "u", "-qmp", "b"].map(String::from).into();
        assert_eq!(option(&line, "-qmp", 1).as_deref(), Some("b"));
        assert_eq!(option(&line, "-qmp", 2), None);
    }
}
