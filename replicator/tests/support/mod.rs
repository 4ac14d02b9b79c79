//! A plain QEMU without a guest system, in a network namespace of its own.

// Each test binary uses its own part of this.
#![allow(dead_code)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use umbra_api::VmId;
use umbra_replicator::launch::{Images, LaunchConfig, ShadowRecord, discard, records};
use umbra_replicator::qmp::Client;
use umbra_replicator::{tap, tier};

/// Parent of the groups that tests make.
pub const CGROUP: &str = "umbra-q-test";

pub const PATIENCE: Duration = Duration::from_secs(60);

/// Why real QEMUs cannot be had here. Told loudly: a skipped test is no passed test.
pub fn skipped() -> bool {
    let lack = if !nix::unistd::geteuid().is_root() {
        "not root"
    } else if !runs("qemu-system-x86_64", "--version") {
        "no qemu-system-x86_64"
    } else if !runs("ip", "-V") {
        "no iproute2"
    } else {
        return false;
    };
    println!("SKIPPED: {lack}");
    true
}

fn runs(program: &str, arg: &str) -> bool {
    Command::new(program)
        .arg(arg)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

/// Runs `f` on a thread in a new network namespace, which goes with it.
pub fn in_namespace(f: impl FnOnce() + Send + 'static) {
    let work = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        f();
    });
    if let Err(panic) = work.join() {
        std::panic::resume_unwind(panic);
    }
}

pub fn new_vm() -> VmId {
    VmId(uuid::Uuid::new_v4())
}

/// Runs `f` in a namespace of its own, with directories and the id of a VM, where real QEMUs can be had.
pub fn on_site(f: impl FnOnce(Site, VmId) + Send + 'static) {
    if !skipped() {
        in_namespace(|| f(Site::new(), new_vm()));
    }
}

pub fn ip(args: &str) {
    assert!(
        Command::new("ip").args(args.split(' ')).status().unwrap().success(),
        "ip {args}"
    );
}

/// Directories of one test; what is left in them at the end is ended and removed.
pub struct Site {
    dir: tempfile::TempDir,
    pub cfg: LaunchConfig,
    ram: PathBuf,
}

impl Site {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("umbra-q").tempdir_in("/tmp").unwrap();
        let ram = tempfile::Builder::new()
            .prefix("umbra-q")
            .tempdir_in("/dev/shm")
            .unwrap()
            .keep();
        Self::over(dir, ram)
    }

    fn over(dir: tempfile::TempDir, ram: PathBuf) -> Self {
        let cfg = LaunchConfig {
            run_dir: dir.path().join("run"),
            ram_dir: ram.join("ram"),
            disk_dir: dir.path().join("disks"),
            cgroup: Some(CGROUP.into()),
            ..LaunchConfig::default()
        };
        Self { dir, cfg, ram }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn ram(&self, name: &str) -> PathBuf {
        self.ram.join(name)
    }

    pub fn is_clean(&self) -> bool {
        let empty = |p: &Path| std::fs::read_dir(p).map_or(true, |mut d| d.next().is_none());
        empty(&self.cfg.run_dir) && empty(&self.cfg.ram_dir) && empty(&self.cfg.disk_dir)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for record in records(&self.cfg).unwrap_or_default() {
            let _ = discard(&record, Images::Remove);
        }
        let _ = std::fs::remove_dir_all(&self.ram);
        // Stays as long as another test has a group in it.
        let _ = tier::remove_parent(CGROUP);
    }
}

/// A primary, killed at the end.
pub struct Primary {
    child: Child,
    pub qmp: PathBuf,
}

impl Primary {
    /// Starts QEMU and waits for its monitor. `extra` is split at blanks.
    pub fn start(site: &Site, vm: VmId, name: &str, extra: &str) -> Self {
        let qmp = site.path(&format!("{name}.qmp"));
        let log = File::create(site.path(&format!("{name}.log"))).unwrap();
        let child = Command::new("qemu-system-x86_64")
            .args(["-uuid", &vm.to_string(), "-name", name])
            .args("-nodefaults -no-user-config -display none -accel tcg -smp 1".split(' '))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp.display()))
            .args(extra.split_ascii_whitespace())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let primary = Self { child, qmp };
        let deadline = Instant::now() + PATIENCE;
        while Client::connect(&primary.qmp, PATIENCE).is_err() {
            let log = std::fs::read_to_string(site.path(&format!("{name}.log"))).unwrap_or_default();
            assert!(Instant::now() < deadline, "{name} has no monitor: {log}");
            std::thread::sleep(Duration::from_millis(10));
        }
        primary
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A tap in a bridge, as an operator would have made them.
pub fn bridge_and_tap(bridge: &str, name: &str) {
    ip(&format!("link add {bridge} type bridge"));
    ip(&format!("link set {bridge} up"));
    tap::create(name, false).unwrap();
    tap::plug(name, bridge).unwrap();
}

pub fn status(qmp: &Client) -> String {
    let answer = qmp.execute("query-status", serde_json::Value::Null).unwrap();
    answer["status"].as_str().unwrap().to_owned()
}

/// Nothing that a record names is there any more.
pub fn assert_gone(record: &ShadowRecord) {
    assert!(!record.alive());
    assert!(!record.dir.exists());
    for (_, path) in &record.ram {
        assert!(!path.exists(), "{}", path.display());
    }
    for name in &record.taps {
        assert_eq!(tap::link(name).unwrap(), None);
    }
    if let Some(path) = &record.cgroup {
        assert!(!path.exists(), "{}", path.display());
    }
}
