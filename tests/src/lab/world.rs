//! The whole system with one VM: two hosts with agent and replicator, and an RPS that does what operators ask it for.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use umbra_api::VmId;
use umbra_api::lifecycle::Stage;
use umbra_api::problem::Problem;
use umbra_api::view::{HostView, VmView};

use super::Lab;
use super::copies::Copies;
use super::daemons::{self, Binaries};
use super::process::{Process, wait_for};
use super::vm::{GuestImage, Vm, VmSpec};

/// What operators ask for is done; what the planner thinks is not part of this test.
const TABLES: &str = "\n[contention]\nthreshold = 0.99\nlimit_ms_per_s = 1000000.0\n\n[policy]\nmem_reserve_bytes = 134217728\nroom_probability = 1.0\n";

pub struct World {
    // First, so that it ends first: it watches processes of the lab.
    pub copies: Copies,
    rps: Process,
    replicators: BTreeMap<String, Process>,
    _agents: Vec<Process>,
    pub vm: Vm,
    pub binaries: Binaries,
    pub lab: Lab,
    tables: String,
}

impl World {
    /// `policy` is added to the RPS's `[policy]`.
    pub fn start(policy: &str) -> Result<Self> {
        let tables = format!("{TABLES}{policy}");
        let lab = Lab::new(&["a", "b"])?;
        let (binaries, image) = (Binaries::find(&daemons::ALL)?, GuestImage::find()?);
        let mut vm = Vm::start(
            lab.host("a")?,
            &image,
            &VmSpec {
                dirty: 500,
                ..VmSpec::new("web", 10)
            },
        )?;
        vm.wait_up(&lab.client)?;
        let copies = Copies::watch(&lab.hosts, vm.spec.id)?;
        let rps = binaries.start_rps(&lab.control, &lab.hosts, &tables)?;
        let (mut replicators, mut agents) = (BTreeMap::new(), Vec::new());
        for host in &lab.hosts {
            replicators.insert(host.name.clone(), binaries.start_replicator(host)?);
            agents.push(binaries.start_agent(host, &lab.control)?);
        }
        Ok(Self {
            copies,
            rps,
            replicators,
            _agents: agents,
            vm,
            binaries,
            lab,
            tables,
        })
    }

    pub fn id(&self) -> VmId {
        self.vm.spec.id
    }

    /// kill -9, and a new one on the same store.
    pub fn restart_rps(&mut self) -> Result<()> {
        self.rps.kill()?;
        self.rps = self
            .binaries
            .start_rps(&self.lab.control, &self.lab.hosts, &self.tables)?;
        Ok(())
    }

    pub fn view(&self) -> Result<Option<VmView>> {
        let rps = &self.lab.control;
        let reply = rps.get((rps.ip, daemons::RPS), &format!("/v1/vms/{}", self.id()))?;
        if reply.status == 404 {
            Ok(None)
        } else {
            reply.ok()?.json().map(Some)
        }
    }

    /// What an operator would do: ask again as long as the RPS says that it is busy.
    pub fn ask(&self, action: &str) -> Result<()> {
        self.ask_while(action, &["busy"])
    }

    /// Asks again as long as the answer is one of these problems.
    pub fn ask_while(&self, action: &str, passing: &[&str]) -> Result<()> {
        let rps = &self.lab.control;
        let path = format!("/v1/vms/{}/shadow", self.id());
        let body = format!("{{\"action\":\"{action}\"}}");
        wait_for(&format!("the RPS to take {action}"), Duration::from_secs(60), || {
            let reply = rps.post((rps.ip, daemons::RPS), &path, &body)?;
            if reply.status == 409 && passing.contains(&reply.json::<Problem>()?.code.as_str()) {
                return Ok(None);
            }
            reply.ok().map(|_| Some(()))
        })
    }

    /// By QEMU's own word, which the watcher asks for ten times a second on a machine that has the time.
    pub fn wait_runs_on(&self, host: &str) -> Result<()> {
        wait_for(&format!("QEMU to run on {host}"), Duration::from_secs(60), || {
            Ok((self.copies.running() == [host]).then_some(()))
        })
    }

    /// Waits until the RPS has heard of both hosts and of the VM.
    pub fn wait_known(&self) -> Result<()> {
        wait_for("the RPS to know both hosts and the VM", Duration::from_secs(60), || {
            let rps = &self.lab.control;
            let hosts: Vec<HostView> = rps.get((rps.ip, daemons::RPS), "/v1/hosts")?.ok()?.json()?;
            let ready = hosts.len() == 2 && hosts.iter().all(|h| h.replicator_up && h.last_sample.is_some());
            Ok((ready && self.view()?.is_some()).then_some(()))
        })
    }

    /// Waits until the RPS has the VM on this host, in this stage. It may go through others on its way.
    pub fn wait_record(&self, what: &str, host: &str, stage: Stage) -> Result<VmView> {
        let mut last = None;
        let found = wait_for(what, Duration::from_secs(60), || {
            let Some(view) = self.view()? else { return Ok(None) };
            let there = view.summary.host.as_str() == host && view.summary.stage == stage;
            last = Some(format!("{} on {}", view.summary.stage, view.summary.host));
            Ok(there.then_some(view))
        });
        found.with_context(|| format!("the RPS has it {last:?}"))
    }

    /// kill -9.
    pub fn kill_replicator(&mut self, host: &str) -> Result<()> {
        let process = self.replicators.get_mut(host);
        process.with_context(|| format!("no replicator on {host}"))?.kill()
    }

    pub fn restart_replicator(&mut self, host: &str) -> Result<()> {
        let process = self.binaries.start_replicator(self.lab.host(host)?)?;
        self.replicators.insert(host.to_owned(), process);
        Ok(())
    }

    pub fn wait_stage(&self, what: &str, wanted: impl Fn(Stage) -> bool) -> Result<VmView> {
        wait_for(what, Duration::from_secs(120), || {
            if let Some(double) = self.copies.doubles().first() {
                bail!("split brain: {double}");
            }
            let Some(view) = self.view()? else { return Ok(None) };
            if view.summary.stage == Stage::Failed {
                bail!("the protection failed: {:?}", view.last_error);
            }
            Ok(wanted(view.summary.stage).then_some(view))
        })
    }
}

/// Runs a test's body; when it fails, where the logs are is part of the message.
pub fn with_world(name: &str, policy: &str, body: impl FnOnce(&mut World) -> Result<()>) {
    if super::skips(&daemons::ALL) {
        return;
    }
    let mut world = World::start(policy).unwrap_or_else(|e| panic!("{name}: {e:#}"));
    if let Err(e) = body(&mut world) {
        let dir = daemons::target_dir().map(|d| d.join("lab-logs").join(name));
        let kept = dir
            .and_then(|d| world.lab.keep_logs(&d))
            .map_or_else(|e| e.to_string(), |d| d.display().to_string());
        panic!("{name}: {e:#}; logs are in {kept}");
    }
}
