//! The real `umbra-rps`, with agents that push a swelling load and replicators that answer over HTTP: it sees the
//! contention coming, makes a shadow, moves the VM, brings it home; and it is killed on the way.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::daemon::{Replicators, batch, now, vm_sample};
use common::fake::{Hosts, host};
use common::sim::vm;
use serde_json::Value;
use umbra_api::lifecycle::Stage;
use umbra_api::view::{DecisionView, LifecycleEvent, VmView};
use umbra_api::{UnixMs, VmId};
use umbra_daemon::client::Client;
use umbra_daemon::stop;

const SLOT_MS: u64 = 250;

fn neighbour() -> VmId {
    VmId(uuid::Uuid::from_u128(0xbad))
}

/// The process, killed at the end whatever happens.
struct Rps {
    child: Child,
    config: PathBuf,
    client: Client,
}

impl Rps {
    fn start(config: &Path, port: u16) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_umbra-rps"))
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let client = Client::new(&format!("http://127.0.0.1:{port}"), Duration::from_secs(5)).unwrap();
        Self {
            child,
            config: config.to_owned(),
            client,
        }
    }

    fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let config = self.config.clone();
        self.child = Command::new(env!("CARGO_BIN_EXE_umbra-rps"))
            .arg("--config")
            .arg(config)
            .spawn()
            .unwrap();
    }

    async fn view(&self) -> Option<VmView> {
        self.client.get("/v1/vms/web").await.ok()
    }
}

impl Drop for Rps {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the agents of A and B tell: the web VM where the model runs it, and a neighbour on A.
struct Agents {
    start: UnixMs,
    seq: u64,
    last: UnixMs,
    load: f64,
}

impl Agents {
    async fn push(&mut self, rps: &Rps, hosts: &Replicators) {
        let t = now();
        let interval_ms = u64::try_from(t.since(self.last)).unwrap_or(1).max(1);
        self.last = t;
        self.seq += 1;
        let away = hosts.lock().runs_on(vm()) == Some(&host("b"));
        let total: f64 = 0.2 + self.load;
        // On one core, what is wanted beyond it is waited for.
        let wait = if away { 0.0 } else { (total - 1.0).max(0.0) / 2.0 };
        let web = |incoming, on: bool| {
            let (cores, wait) = if on { (0.2, wait.min(0.1)) } else { (0.0, 0.0) };
            vm_sample(vm(), "web", incoming, cores, wait, interval_ms)
        };
        let burner = vm_sample(neighbour(), "neighbour", false, self.load, wait, interval_ms);
        let a = batch(
            "a",
            self.start,
            self.seq,
            t,
            interval_ms,
            vec![web(false, !away), burner],
        );
        let b = batch("b", self.start, self.seq, t, interval_ms, vec![web(true, away)]);
        for samples in [a, b] {
            // The RPS may be dead just now: agents buffer then, this one drops.
            let _ = rps.client.post::<Value>("/v1/samples", &samples).await;
        }
    }
}

fn config(dir: &Path, port: u16, a: u16, b: u16) -> PathBuf {
    let text = format!(
        "listen = '127.0.0.1:{port}'\nstore = '{}'\nslot_ms = {SLOT_MS}\nhorizon_slots = 24\n\
         [orders]\npoll_ms = 100\nresend_ms = 500\n\
         [policy]\ncopy_margin_s = 0.5\nmem_reserve_bytes = 1000000\narm_s = 3.0\nswitch_lead_s = 0.5\npromotion_s = 0.1\n\
         min_standby_s = 600.0\ncalm_slots = 3\nmin_stay_s = 1.0\ncooldown_s = 1.0\nkeep_old_s = 0.2\n\
         vms = [{{ vm = 'neighbour', protect = false }}]\n\
         [[hosts]]\nname = 'a'\nreplicator = 'http://127.0.0.1:{a}'\nlink = '127.0.0.1:1'\n\
         [[hosts]]\nname = 'b'\nreplicator = 'http://127.0.0.1:{b}'\nlink = '127.0.0.1:2'\n",
        dir.join("rps.db").display()
    );
    let file = dir.join("rps.toml");
    std::fs::write(&file, text).unwrap();
    file
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

struct World {
    rps: Rps,
    hosts: Replicators,
    agents: Agents,
    // Asks everything to stop when the test ends.
    _stopper: stop::Stopper,
    _dir: tempfile::TempDir,
}

impl World {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let hosts = Replicators(Arc::new(Mutex::new(Hosts::new(&["a", "b"], vm(), "a"))));
        let (stopper, stop) = stop::pair();
        let a = hosts.serve("a", stop.clone()).await.port();
        let b = hosts.serve("b", stop.clone()).await.port();
        hosts.run(Duration::from_millis(60), stop);
        let port = free_port();
        let rps = Rps::start(&config(dir.path(), port, a, b), port);
        let agents = Agents {
            start: now(),
            seq: 0,
            last: now(),
            load: 0.1,
        };
        Self {
            rps,
            hosts,
            agents,
            _stopper: stopper,
            _dir: dir,
        }
    }

    /// Pushes samples, the neighbour's load changing by `step` a slot up to `bounds`, until `reached` says so.
    async fn until(&mut self, what: &str, step: f64, reached: impl Fn(&VmView) -> bool) -> VmView {
        let begun = Instant::now();
        let mut last = None;
        while begun.elapsed() < Duration::from_secs(120) {
            self.agents.load = (self.agents.load + step).clamp(0.1, 1.2);
            self.agents.push(&self.rps, &self.hosts).await;
            if let Some(view) = self.rps.view().await {
                if reached(&view) {
                    return view;
                }
                last = Some(view);
            }
            tokio::time::sleep(Duration::from_millis(SLOT_MS)).await;
        }
        panic!("{what} did not come: {last:#?}");
    }

    fn runs_on(&self, name: &str) -> bool {
        self.hosts.lock().runs_on(vm()) == Some(&host(name))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sees_it_coming_moves_the_vm_and_brings_it_home_over_two_deaths() {
    let mut w = World::start().await;
    // A calm history first, then the swell.
    w.until("history", 0.0, |v| !v.model.is_empty()).await;
    let made = w.until("a shadow", 0.02, |v| v.summary.shadow.is_some()).await;
    assert_eq!(made.summary.shadow, Some(host("b")));
    w.rps.kill_and_restart();
    let moved = w.until("the move", 0.02, |v| v.summary.host == host("b")).await;
    assert!(w.runs_on("b"), "{moved:#?}");
    w.rps.kill_and_restart();
    w.until("the way back", 0.02, |v| v.summary.stage == Stage::Reverse)
        .await;
    let home = |v: &VmView| v.summary.stage == Stage::Unprotected && v.summary.host == host("a");
    let view = w.until("home", -0.05, home).await;
    assert!(w.runs_on("a"));
    assert_eq!(view.last_switchover.unwrap().guest_stopped_us, 9_000);
    let events: Vec<LifecycleEvent> = w.rps.client.get("/v1/events?vm=web").await.unwrap();
    let story: Vec<String> = events.iter().map(|e| format!("{}: {}", e.to, e.reason)).collect();
    let stages: Vec<Stage> = events.iter().map(|e| e.to).collect();
    for stage in [
        Stage::Provisioning,
        Stage::Standby,
        Stage::Switching,
        Stage::Active,
        Stage::Reverse,
        Stage::FailingBack,
    ] {
        assert!(stages.contains(&stage), "{stage} is missing: {story:#?}");
    }
    assert!(!stages.contains(&Stage::Failed), "{story:#?}");
    // Each edge that was decided names its decision, and the decision explains itself.
    let decisions: Vec<DecisionView> = w.rps.client.get("/v1/decisions?vm=web&limit=1000").await.unwrap();
    let provision = events
        .iter()
        .find(|e| e.to == Stage::Provisioning)
        .and_then(|e| e.decision)
        .unwrap();
    let why = decisions.iter().find(|d| d.id == provision).unwrap();
    assert_eq!(why.action, "provision");
    assert!(why.hosts.iter().any(|v| v.chosen && v.host == host("b")), "{why:#?}");
    assert!(
        decisions.len() < 60,
        "a slot brings a decision, but not a row: {}",
        decisions.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn stops_when_told_and_turns_a_second_one_away() {
    let mut w = World::start().await;
    w.until("the VM", 0.0, |_| true).await;
    let second = Command::new(env!("CARGO_BIN_EXE_umbra-rps"))
        .arg("--config")
        .arg(&w.rps.config)
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && words.contains("listen on"), "{words}");
    // On another port the store is what turns it away.
    let text = std::fs::read_to_string(&w.rps.config).unwrap();
    let other = w.rps.config.with_file_name("other.toml");
    let listen = text.lines().next().unwrap();
    std::fs::write(&other, text.replace(listen, "listen = '127.0.0.1:0'")).unwrap();
    let second = Command::new(env!("CARGO_BIN_EXE_umbra-rps"))
        .arg("--config")
        .arg(&other)
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(words.contains("rps.db: it is in use by another process"), "{words}");
    let pid = w.rps.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(w.rps.child.wait().unwrap().success());
}

#[test]
fn a_configuration_is_checked_without_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let run = |text: &str| {
        let file = dir.path().join("rps.toml");
        std::fs::write(&file, text).unwrap();
        let mut c = Command::new(env!("CARGO_BIN_EXE_umbra-rps"));
        c.arg("--config").arg(file).arg("--check").output().unwrap()
    };
    let good = run("slot_ms = 1000\n");
    assert!(good.status.success() && String::from_utf8_lossy(&good.stdout).contains("good"));
    let bad = run("slot_ms = 1000\nslots = 3\n");
    let words = String::from_utf8_lossy(&bad.stderr).into_owned();
    assert!(
        !bad.status.success() && words.contains("rps.toml") && words.contains("slots"),
        "{words}"
    );
}
