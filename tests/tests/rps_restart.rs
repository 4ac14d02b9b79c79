//! The RPS is killed in the middle, and goes on from its store.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use umbra_api::VmId;
use umbra_api::lifecycle::Stage;
use umbra_api::problem::Problem;
use umbra_api::view::VmView;
use umbra_tests::lab::Lab;
use umbra_tests::lab::copies::Copies;
use umbra_tests::lab::daemons::{self, Binaries};
use umbra_tests::lab::process::{Process, wait_for};
use umbra_tests::lab::vm::{self, GuestImage, Vm, VmSpec};

/// What operators ask for is done; what the planner thinks is not part of this test.
const TABLES: &str = "\n[contention]\nthreshold = 0.99\nlimit_ms_per_s = 1000000.0\n\n[policy]\nmem_reserve_bytes = 134217728\nroom_probability = 1.0\n";

struct World {
    copies: Copies,
    rps: Process,
    _others: Vec<Process>,
    vm: Vm,
    binaries: Binaries,
    lab: Lab,
}

impl World {
    fn start() -> Result<Self> {
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
        let rps = binaries.start_rps(&lab.control, &lab.hosts, TABLES)?;
        let mut others = Vec::new();
        for host in &lab.hosts {
            others.push(binaries.start_replicator(host)?);
            others.push(binaries.start_agent(host, &lab.control)?);
        }
        Ok(Self {
            copies,
            rps,
            _others: others,
            vm,
            binaries,
            lab,
        })
    }

    fn id(&self) -> VmId {
        self.vm.spec.id
    }

    /// kill -9, and a new one on the same store.
    fn restart_rps(&mut self) -> Result<()> {
        self.rps.kill()?;
        self.rps = self.binaries.start_rps(&self.lab.control, &self.lab.hosts, TABLES)?;
        Ok(())
    }

    fn view(&self) -> Result<Option<VmView>> {
        let rps = &self.lab.control;
        let reply = rps.get((rps.ip, daemons::RPS), &format!("/v1/vms/{}", self.id()))?;
        if reply.status == 404 {
            Ok(None)
        } else {
            reply.ok()?.json().map(Some)
        }
    }

    /// What an operator would do: ask again as long as the RPS says that it is busy.
    fn ask(&self, action: &str) -> Result<()> {
        let rps = &self.lab.control;
        let path = format!("/v1/vms/{}/shadow", self.id());
        let body = format!("{{\"action\":\"{action}\"}}");
        wait_for(&format!("the RPS to take {action}"), Duration::from_secs(60), || {
            let reply = rps.post((rps.ip, daemons::RPS), &path, &body)?;
            if reply.status == 409 && reply.json::<Problem>()?.code == "busy" {
                return Ok(None);
            }
            reply.ok().map(|_| Some(()))
        })
    }

    /// By QEMU's own word, which the watcher asks for ten times a second on a machine that has the time.
    fn wait_runs_on(&self, host: &str) -> Result<()> {
        wait_for(&format!("QEMU to run on {host}"), Duration::from_secs(60), || {
            Ok((self.copies.running() == [host]).then_some(()))
        })
    }

    fn wait_stage(&self, what: &str, wanted: impl Fn(Stage) -> bool) -> Result<VmView> {
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

fn story(world: &mut World) -> Result<()> {
    wait_for("the RPS to know both hosts and the VM", Duration::from_secs(60), || {
        let rps = &world.lab.control;
        let hosts: Vec<umbra_api::view::HostView> = rps.get((rps.ip, daemons::RPS), "/v1/hosts")?.ok()?.json()?;
        let ready = hosts.len() == 2 && hosts.iter().all(|h| h.replicator_up && h.last_sample.is_some());
        Ok((ready && world.view()?.is_some()).then_some(()))
    })?;
    world.ask("create")?;
    world.wait_stage("the shadow to be begun", |s| !matches!(s, Stage::Unprotected))?;
    world.restart_rps()?;
    world.wait_stage("a warm shadow in spite of the restart", |s| {
        matches!(s, Stage::Standby | Stage::Armed)
    })?;

    world.ask("switchover")?;
    world.restart_rps()?;
    let away = world.wait_stage("the VM to be away", |s| matches!(s, Stage::Active | Stage::Reverse))?;
    ensure!(away.summary.host.as_str() == "b", "it runs on b: {:?}", away.summary);
    world.wait_runs_on("b")?;

    world.restart_rps()?;
    world.wait_stage("the way back", |s| s == Stage::Reverse)?;
    world.ask("failback")?;
    world.restart_rps()?;
    let home = world.wait_stage("the VM to be home", |s| s == Stage::Unprotected)?;
    ensure!(home.summary.host.as_str() == "a", "it runs on a: {:?}", home.summary);
    world.wait_runs_on("a")?;
    let edges: Vec<Stage> = home.events.iter().map(|e| e.to).collect();
    ensure!(
        edges.contains(&Stage::Provisioning) && edges.contains(&Stage::FailingBack),
        "all of it is in the store: {edges:?}"
    );
    vm::wait_scrubbed(&world.lab.client, world.vm.spec.ip, Duration::from_secs(90))?;
    let stats = vm::stats(&world.lab.client, world.vm.spec.ip)?;
    ensure!(stats.errors == 0, "{} errors in the guest's memory", stats.errors);
    Ok(())
}

#[test]
fn an_rps_that_is_killed_in_each_stage_goes_on_from_its_store() {
    if umbra_tests::lab::skips(&daemons::ALL) {
        return;
    }
    let mut world = World::start().unwrap();
    if let Err(e) = story(&mut world) {
        let dir = daemons::target_dir().unwrap().join("lab-logs").join("rps_restart");
        let kept = world
            .lab
            .keep_logs(&dir)
            .map_or_else(|e| e.to_string(), |d| d.display().to_string());
        panic!("{e:#}; logs are in {kept}");
    }
}
