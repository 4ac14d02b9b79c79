//! A collector over the real programs that sees one QEMU of its own among all that run, and the things that QEMU needs. All are
//! taken away on drop.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use nix::sched::{CloneFlags, setns};
use umbra_agent::collect::{Collector, Machine};
use umbra_agent::cpulist::CpuList;
use umbra_agent::kernel::{KernelError, Probe, ProgramCost};
use umbra_agent::node::{self, NodeTotals};
use umbra_agent::procfs::{Procfs, Qemu};
use umbra_agent::track::{Processes, Tracker};
use umbra_api::sample::VmSample;
use umbra_api::{UnixMs, VmId};
use uuid::Uuid;

const QEMU: &str = "qemu-system-x86_64";
const PATIENCE: Duration = Duration::from_secs(30);

pub fn skip(what: &str, why: &str) {
    eprintln!("SKIPPED: {what}: {why}");
}

pub fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !ready() {
        assert!(Instant::now() < end, "{what} did not come within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub struct Lab {
    dir: tempfile::TempDir,
    collector: Collector<Probe>,
    machine: OneVm,
    last: Instant,
    vms: Vec<VmSample>,
}

/// The machine with only one of its QEMUs: other tests run theirs beside this one.
struct OneVm {
    proc: Procfs,
    vm: VmId,
}

impl Lab {
    /// `None`, with a word why, where the machine can't run the test.
    pub fn new(name: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            skip(name, "needs root");
            return None;
        }
        if !Path::new("/sys/kernel/btf/vmlinux").exists() {
            skip(name, "this kernel has no BTF");
            return None;
        }
        if Command::new(QEMU)
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .is_err()
        {
            skip(name, "there is no qemu-system-x86_64");
            return None;
        }
        let proc = Procfs::default();
        let (probe, _messages) = match Probe::load(16, proc.clone()) {
            Ok(p) => p,
            Err(e @ KernelError::NoPrograms) => {
                skip(name, &e.to_string());
                return None;
            }
            Err(e) => panic!("{e}"),
        };
        let missing: Vec<_> = probe.programs().iter().filter(|p| p.missing.is_some()).collect();
        assert!(missing.is_empty(), "{missing:?}");
        let cpus = node::online_cpus().unwrap();
        let start = UnixMs::from_system(SystemTime::now());
        let vm = VmId(Uuid::new_v4());
        Some(Self {
            dir: tempfile::Builder::new().prefix("umbra-agent-test").tempdir().unwrap(),
            collector: Collector::new("lab".parse().unwrap(), cpus, start, probe, Tracker::new(None, 16), 16),
            machine: OneVm { proc, vm },
            last: Instant::now(),
            vms: Vec::new(),
        })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn file(&self, name: &str, bytes: u64) -> File {
        let f = File::create(self.path(name)).unwrap();
        f.set_len(bytes).unwrap();
        f
    }

    pub fn round(&mut self) {
        let elapsed = self.last.elapsed();
        self.last = Instant::now();
        let now = UnixMs::from_system(SystemTime::now());
        if let Some(batch) = self.collector.round(&self.machine, now, elapsed).unwrap() {
            batch.validate().unwrap();
            self.vms = batch.vms;
        }
    }

    /// A round, and what it says of the VM.
    pub fn round_of(&mut self, vm: &Vm) -> VmSample {
        // A round must have lasted a millisecond to be told.
        std::thread::sleep(Duration::from_millis(5));
        self.round();
        self.vms
            .iter()
            .find(|v| v.pid == vm.pid())
            .cloned()
            .expect("the VM is in the batch")
    }

    pub fn until_found(&mut self, vm: &Vm) {
        wait_for("the VM", || {
            self.round();
            self.vms().contains(&vm.pid())
        });
    }

    pub fn vms(&self) -> Vec<u32> {
        self.vms.iter().map(|v| v.pid).collect()
    }

    pub fn costs(&self) -> Vec<ProgramCost> {
        self.collector.kernel().costs()
    }
}

impl Processes for OneVm {
    fn pids(&self) -> std::io::Result<Vec<u32>> {
        Processes::pids(&self.proc)
    }
    fn start(&self, pid: u32) -> Option<u64> {
        Processes::start(&self.proc, pid)
    }
    fn qemu(&self, pid: u32) -> Option<Qemu> {
        let found = Processes::qemu(&self.proc, pid);
        found.filter(|q| q.args.uuid.as_ref().is_ok_and(|u| *u == self.vm.0))
    }
}

impl Machine for OneVm {
    fn node(&self, cpus: &CpuList) -> std::io::Result<NodeTotals> {
        self.proc.node(cpus)
    }
    fn rss_bytes(&self, pid: u32) -> u64 {
        self.proc.rss_bytes(pid)
    }
    fn taps(&self, pid: u32) -> Vec<String> {
        self.proc.taps(pid)
    }
    fn runnable_threads(&self, pid: u32) -> Vec<u32> {
        self.proc.runnable_threads(pid)
    }
    fn is_runnable(&self, pid: u32, tid: u32) -> bool {
        self.proc.is_runnable(pid, tid)
    }
}

/// A process that ends with its owner, also when a test fails.
pub struct Guarded(Child);

impl Guarded {
    pub fn start(program: &str, args: &[&str]) -> Self {
        Self(Command::new(program).args(args).stdin(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub struct Vm(Guarded);

/// `/proc/PID/task/*/schedstat`, summed.
#[derive(Clone, Copy, Debug, Default)]
pub struct SchedStat {
    pub run_ns: u64,
    pub wait_ns: u64,
}

impl Vm {
    /// `wrapper` replaces itself by QEMU, so that the pid is QEMU's.
    pub fn start(lab: &Lab, wrapper: &str, before: &[&str], args: &[&str]) -> Self {
        let uuid = lab.machine.vm.to_string();
        let qmp = format!("unix:{},server=on,wait=off", lab.path("qmp.sock").display());
        let child = Command::new(wrapper)
            .args(before)
            .args([
                QEMU,
                "-accel",
                "tcg",
                "-m",
                "64",
                "-nodefaults",
                "-display",
                "none",
                "-no-user-config",
            ])
            .args(["-name", "test,debug-threads=on", "-uuid", &uuid, "-qmp", &qmp])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(Guarded(child))
    }

    pub fn pid(&self) -> u32 {
        self.0.0.id()
    }

    /// What the kernel accounts to all threads, before and after `work`.
    pub fn around(&self, work: impl FnOnce()) -> [SchedStat; 2] {
        let before = self.schedstat();
        work();
        [before, self.schedstat()]
    }

    fn schedstat(&self) -> SchedStat {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let mut sum = SchedStat::default();
        // A thread may end between the listing and the reading.
        let texts = tasks.filter_map(|t| fs::read_to_string(t.ok()?.path().join("schedstat")).ok());
        for text in texts {
            let mut fields = text.split_whitespace().map(|f| f.parse::<u64>().unwrap());
            sum.run_ns += fields.next().unwrap();
            sum.wait_ns += fields.next().unwrap();
        }
        sum
    }

    pub fn qmp(&self, lab: &Lab) -> Qmp {
        let path = lab.path("qmp.sock");
        wait_for("QMP", || UnixStream::connect(&path).is_ok());
        let stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qmp = Qmp(BufReader::new(stream));
        assert!(qmp.line().contains("QMP"));
        qmp.ask(r#"{"execute":"qmp_capabilities"}"#);
        qmp
    }
}

pub struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line
    }

    fn ask(&mut self, command: &str) -> String {
        self.0.get_mut().write_all(command.as_bytes()).unwrap();
        loop {
            let line = self.line();
            assert!(!line.is_empty() && !line.contains("\"error\""), "{command}: {line}");
            if line.contains("\"return\"") {
                return line;
            }
        }
    }

    /// A command of the human monitor; quotes in it must be escaped for JSON.
    pub fn human(&mut self, command: &str) -> String {
        self.ask(&format!(
            r#"{{"execute":"human-monitor-command","arguments":{{"command-line":"{command}"}}}}"#
        ))
    }
}

pub struct NetNs {
    pub name: String,
}

impl NetNs {
    pub fn new(lab: &Lab) -> Option<Self> {
        let name = format!(
            "umbraA{}",
            lab.dir
                .path()
                .file_name()
                .unwrap()
                .to_string_lossy()
                .trim_start_matches("umbra-agent-test")
        );
        match Command::new("ip").args(["netns", "add", &name]).status() {
            Ok(s) if s.success() && Path::new("/dev/net/tun").exists() => {}
            _ => {
                skip("network", "no network namespace or no tun here");
                return None;
            }
        }
        let ns = Self { name };
        // No router solicitations among the frames that are counted.
        let quiet = [
            "netns",
            "exec",
            &ns.name,
            "sh",
            "-c",
            "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6",
        ];
        assert!(Command::new("ip").args(quiet).status().unwrap().success());
        Some(ns)
    }

    pub fn ip(&self, command: &str) {
        let status = Command::new("ip")
            .args(["-n", &self.name])
            .args(command.split(' '))
            .status()
            .unwrap();
        assert!(status.success(), "ip {command}");
    }

    pub fn send_udp(&self, to: &str, count: usize, bytes: usize) {
        let ns = File::open(format!("/run/netns/{}", self.name)).unwrap();
        std::thread::scope(|s| {
            s.spawn(|| {
                setns(&ns, CloneFlags::CLONE_NEWNET).unwrap();
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                for _ in 0..count {
                    socket.send_to(&vec![0; bytes], to).unwrap();
                }
            });
        });
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

pub struct LoopDevice {
    pub path: String,
}

impl LoopDevice {
    pub fn new(image: &Path) -> Option<Self> {
        let out = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(image)
            .output()
            .ok()?;
        if !out.status.success() {
            skip(
                "disk",
                &format!("no loop device: {}", String::from_utf8_lossy(&out.stderr).trim()),
            );
            return None;
        }
        let path = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        Some(Self { path })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.path]).status();
    }
}
