//! A lab leaves nothing behind, however it ends.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use umbra_tests::lab::ledger::{self, Item};
use umbra_tests::lab::{self, daemons, sys};

/// The lab's list of the demo with this pid, once there is one. Read while it lives.
fn list_of(pid: u32) -> Option<PathBuf> {
    let prefix = format!("{}{pid}-", ledger::PREFIX);
    ledger::lists()
        .into_iter()
        .find(|l| l.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix)))
}

fn start_demo(args: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_umbra-demo"))
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn wait_end(child: &mut Child, within: Duration) -> std::process::ExitStatus {
    let deadline = Instant::now() + within;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "the demo did not end within {within:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whatever has the labs' or Umbra's name on this machine, and belongs to this pid's lab.
fn traces(pid: u32) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mine = format!("{}{pid}-", ledger::PREFIX);
    let mut look = |dir: &Path| {
        for entry in std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
            if entry.file_name().to_string_lossy().contains(&mine) {
                found.insert(entry.path().display().to_string());
            }
        }
    };
    look(Path::new("/dev/shm"));
    look(Path::new("/run/umbra-lab"));
    look(Path::new("/sys/fs/cgroup"));
    for controller in std::fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
    {
        look(&controller.path());
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    found.extend(mounts.lines().filter(|l| l.contains(&mine)).map(str::to_owned));
    found
}

fn mounts() -> usize {
    std::fs::read_to_string("/proc/self/mounts").unwrap().lines().count()
}

/// Links of the machine itself: a lab's live in its own namespaces.
fn links() -> BTreeSet<String> {
    std::fs::read_dir("/sys/class/net")
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

/// Waits until the demo has the machine: other labs may be at work.
fn wait_begun(pid: u32) {
    let deadline = Instant::now() + Duration::from_secs(1200);
    while list_of(pid).is_none() {
        assert!(Instant::now() < deadline, "the demo never got to make anything");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Interrupts a demo so long after it made its first thing, and looks for what is left.
fn interrupted(args: &[&str], delay: Duration, signal: Signal) {
    let (mounts_before, links_before) = (mounts(), links());
    let mut demo = start_demo(args);
    let pid = demo.id();
    wait_begun(pid);
    std::thread::sleep(delay);
    let items = list_of(pid).map(|l| ledger::read(&l)).unwrap_or_default();
    sys::kill(pid as i32, signal).unwrap();
    let status = wait_end(&mut demo, Duration::from_secs(120));
    let context = format!(
        "{args:?} after {delay:?} with {signal}: {status}, {} things were up",
        items.len()
    );
    println!("{context}");
    if signal == Signal::SIGKILL {
        // Its next start removes what it could not.
        ledger::Ledger::open().unwrap();
    } else {
        // SIGINT and SIGTERM before the handlers are up end it in the plain way.
        assert!(
            status.code() == Some(128 + signal as i32) || items.is_empty(),
            "{context}"
        );
    }
    assert_eq!(
        ledger::alive(&items),
        Vec::<i32>::new(),
        "processes outlived: {context}"
    );
    for item in &items {
        if let Item::Dir(path) | Item::Cgroup(path) = item {
            assert!(!path.exists(), "{} outlived: {context}", path.display());
        }
    }
    assert_eq!(traces(pid), BTreeSet::new(), "{context}");
    assert_eq!(mounts(), mounts_before, "mounts: {context}");
    assert_eq!(links(), links_before, "links: {context}");
}

/// A few moments between zero and `most`, different in each run; the seed is printed and can be given again.
fn moments(n: u64, most: Duration) -> Vec<Duration> {
    let seed: u64 = std::env::var("UMBRA_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or_else(|| u64::from(std::process::id()) ^ uuid::Uuid::new_v4().as_u64_pair().0);
    println!("UMBRA_SEED={seed}");
    let mut x = seed | 1;
    (0..n)
        .map(|_| {
            x = x
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            most.mul_f64((x >> 40) as f64 / (1u64 << 24) as f64)
        })
        .collect()
}

/// One test: labs are serial, and moments are counted from when a demo has the machine.
#[test]
fn nothing_outlives_a_demo_that_is_interrupted_or_killed() {
    if lab::skips(&daemons::ALL) {
        return;
    }
    // Namespaces, bridges and the first QEMU come up within the first second; the daemons within some more.
    for delay in moments(5, Duration::from_secs(2)) {
        interrupted(&["--plain-only"], delay, Signal::SIGINT);
    }
    for delay in moments(3, Duration::from_secs(25)) {
        interrupted(&["--umbra-only"], delay, Signal::SIGINT);
    }
    // By then a shadow is being made or warm.
    interrupted(&["--umbra-only"], Duration::from_secs(48), Signal::SIGTERM);
    interrupted(&["--umbra-only"], Duration::from_secs(20), Signal::SIGKILL);
}

#[test]
fn where_binaries_are() {
    // The tests' own folder is the one that the daemons are built into.
    let dir = daemons::target_dir().unwrap();
    assert!(dir.join("debug").is_dir() || dir.join("release").is_dir());
}
