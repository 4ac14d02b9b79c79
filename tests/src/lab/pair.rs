//! Two hosts with a replicator each and one VM: orders are given directly, as an RPS would.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use umbra_api::order::{OrderKind, Pacing, Refusal};
use umbra_api::replica::{Phase, ReplicaStatus, Role, SwitchoverReport};
use umbra_api::{Epoch, VmId};

use super::copies::Copies;
use super::daemons::{Binaries, Replicator, Settings};
use super::host::Host;
use super::process::{Process, wait_for};
use super::shadow::Shadow;
use super::vm::{self, Boots, Console, GuestImage, Vm, VmSpec};
use super::{Lab, sys};

const NEEDED: [&str; 2] = ["umbra", "umbra-replicator"];
/// TCG on one busy core; none of these is a measurement.
const SEED: Duration = Duration::from_secs(90);
const SWITCH: Duration = Duration::from_secs(60);
const SETTLE: Duration = Duration::from_secs(60);
const SCRUB: Duration = Duration::from_secs(90);

pub struct Pair {
    // First, so that it ends first: it watches processes of the lab.
    pub copies: Copies,
    pub vm: Vm,
    replicators: BTreeMap<String, Process>,
    pub binaries: Binaries,
    pub lab: Lab,
    epoch: Epoch,
}

impl Pair {
    /// Hosts a and b, the VM runs on a.
    pub fn start(spec: &VmSpec) -> Result<Self> {
        Self::start_with(spec, Settings::default())
    }

    pub fn start_with(spec: &VmSpec, settings: Settings) -> Result<Self> {
        let mut pair = Self::start_plain(spec, settings)?;
        pair.copies = Copies::watch(&pair.lab.hosts, spec.id)?;
        Ok(pair)
    }

    /// The same for a measurement, which the watcher of all copies would disturb: `copies` sees nothing.
    pub fn start_unwatched(spec: &VmSpec) -> Result<Self> {
        Self::start_plain(spec, Settings::default())
    }

    /// And without a bound on what a copy may cost.
    pub fn start_unbound(spec: &VmSpec) -> Result<Self> {
        let settings = Settings {
            cpu_pct: Some(100.0),
            ..Settings::default()
        };
        Self::start_plain(spec, settings)
    }

    fn start_plain(spec: &VmSpec, settings: Settings) -> Result<Self> {
        let lab = Lab::new(&["a", "b"])?;
        let (mut binaries, image) = (Binaries::find(&NEEDED)?, GuestImage::find()?);
        binaries.settings = settings;
        let mut replicators = BTreeMap::new();
        for host in &lab.hosts {
            replicators.insert(host.name.clone(), binaries.start_replicator(host)?);
        }
        let mut vm = Vm::start(lab.host("a")?, &image, spec)?;
        vm.wait_up(&lab.client)?;
        Ok(Self {
            copies: Copies::watch(&[], spec.id)?,
            vm,
            replicators,
            binaries,
            lab,
            epoch: Epoch(0),
        })
    }

    /// Ends the VM, whatever is left of it, and starts another one on host a.
    pub fn replace_vm(&mut self, spec: &VmSpec) -> Result<()> {
        self.at_most_one()?;
        let id = self.id();
        for host in &self.lab.hosts {
            for pid in vm::qemus(host, id) {
                sys::kill(pid, Signal::SIGKILL)?;
            }
        }
        wait_for("the replicators to clear up behind a dead VM", SETTLE, || {
            let _ = self.vm.process.exited();
            let left = self.lab.hosts.iter().any(|h| !vm::qemus(h, id).is_empty());
            let files = self.ram_files("a")?.len() + self.ram_files("b")?.len();
            Ok((!left && files == 0).then_some(()))
        })?;
        self.vm = Vm::start(self.lab.host("a")?, &GuestImage::find()?, spec)?;
        self.vm.wait_up(&self.lab.client)?;
        self.copies = Copies::watch(&self.lab.hosts, spec.id)?;
        Ok(())
    }

    pub fn id(&self) -> VmId {
        self.vm.spec.id
    }

    pub fn host(&self, name: &str) -> Result<&Host> {
        self.lab.host(name)
    }

    pub fn replicator(&self, name: &str) -> Result<Replicator<'_>> {
        Ok(Replicator {
            host: self.lab.host(name)?,
        })
    }

    /// The VM's QEMU on a host, be it primary or shadow.
    pub fn qemu(&self, host: &str) -> Result<i32> {
        match vm::qemus(self.host(host)?, self.id()).as_slice() {
            [one] => Ok(*one),
            several => bail!("one QEMU of the VM on {host}, not {several:?}"),
        }
    }

    pub fn next_epoch(&mut self) -> Epoch {
        self.epoch = self.epoch.next();
        self.epoch
    }

    /// The epoch of the last order.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Takes note of epochs that others gave: an operator's recovery takes its own.
    pub fn catch_up(&mut self) -> Result<()> {
        for host in ["a", "b"] {
            let seen = self
                .replicator(host)?
                .replicas()?
                .into_iter()
                .map(|r| r.seen.max(r.epoch));
            self.epoch = seen.chain([self.epoch]).max().unwrap_or(self.epoch);
        }
        Ok(())
    }

    /// An order that must be accepted.
    pub fn order(&self, host: &str, epoch: Epoch, kind: OrderKind) -> Result<()> {
        let name = kind.name();
        self.replicator(host)?
            .order(self.id(), epoch, kind)
            .and_then(|answer| answer.map_err(anyhow::Error::from))
            .with_context(|| format!("ordering {name} from {host}"))
    }

    /// Admits at the target and protects at the source; the first copy is under way then, or has failed.
    pub fn protect(&mut self, from: &str, to: &str) -> Result<()> {
        let link = self.replicator(to)?.link();
        self.protect_with(from, to, link, Pacing::default())
    }

    /// The same over another way to the target.
    pub fn protect_by(&mut self, from: &str, to: &str, link: String) -> Result<()> {
        self.protect_with(from, to, link, Pacing::default())
    }

    /// The same at another pace.
    pub fn protect_paced(&mut self, from: &str, to: &str, pacing: Pacing) -> Result<()> {
        let link = self.replicator(to)?.link();
        self.protect_with(from, to, link, pacing)
    }

    fn protect_with(&mut self, from: &str, to: &str, link: String, pacing: Pacing) -> Result<()> {
        let epoch = self.next_epoch();
        self.order(to, epoch, OrderKind::Admit { source: from.parse()? })?;
        self.order(from, epoch, protection(to, link, pacing)?)
    }

    /// The order that a source is given for a shadow on `to`.
    pub fn protection(&self, to: &str) -> Result<OrderKind> {
        protection(to, self.replicator(to)?.link(), Pacing::default())
    }

    /// The source's replica once the shadow is warm.
    pub fn wait_standby(&self, from: &str) -> Result<ReplicaStatus> {
        self.wait_source(from, Phase::Standby, SEED)
    }

    /// Why a copy from this host came to its end, which it must.
    pub fn wait_ended(&self, from: &str) -> Result<Refusal> {
        wait_for(&format!("the copy from {from} to end"), SETTLE, || {
            let r = self.replica(from, Role::Source)?;
            let ended = r.filter(|r| matches!(r.phase, Phase::Released | Phase::Failed));
            Ok(ended.and_then(|r| r.error))
        })
    }

    fn wait_source(&self, host: &str, phase: Phase, within: Duration) -> Result<ReplicaStatus> {
        let epoch = self.epoch;
        wait_for(&format!("{phase:?} on {host}"), within, || {
            let Some(r) = self
                .replica(host, Role::Source)?
                .filter(|r| r.epoch >= epoch || r.phase == phase)
            else {
                return Ok(None);
            };
            match &r.error {
                _ if r.phase == phase => Ok(Some(r)),
                Some(e) if matches!(r.phase, Phase::Failed | Phase::Released) => {
                    bail!("it is {:?} instead: {e}", r.phase)
                }
                _ => Ok(None),
            }
        })
    }

    pub fn replica(&self, host: &str, role: Role) -> Result<Option<ReplicaStatus>> {
        let id = self.id();
        Ok(self
            .replicator(host)?
            .replicas()?
            .into_iter()
            .find(|r| r.vm == id && r.role == role))
    }

    /// Switches over, and waits until the source has handed over.
    pub fn switchover(&mut self, from: &str) -> Result<SwitchoverReport> {
        let epoch = self.next_epoch();
        self.order(from, epoch, OrderKind::Switchover)?;
        let r = self.wait_source(from, Phase::Relinquished, SWITCH)?;
        let told = |r: ReplicaStatus| r.report.filter(|p| p.epoch == epoch);
        match told(r) {
            Some(report) => Ok(report),
            // The phase may be shown an instant before the report.
            None => wait_for("the switchover's report", SWITCH, || {
                Ok(self.replica(from, Role::Source)?.and_then(told))
            }),
        }
    }

    /// Gives up the stopped primary on a host, and waits until the VM that runs is alone.
    pub fn retire(&mut self, host: &str) -> Result<()> {
        let epoch = self.next_epoch();
        self.order(host, epoch, OrderKind::Retire)?;
        self.wait_alone()
    }

    /// Ends whatever there is, on both hosts. The VM is not touched.
    pub fn release(&mut self) -> Result<()> {
        let epoch = self.next_epoch();
        for host in ["a", "b"] {
            // Where there is no replica, there is nothing to release.
            let _ = self.replicator(host)?.order(self.id(), epoch, OrderKind::Release)?;
        }
        // One that is being begun anew hears of it when that attempt has ended.
        wait_for("the copies to end", SETTLE, || {
            let copies = |host: &Host| Replicator { host }.replicas().is_ok_and(|r| r.iter().any(copies));
            Ok((!self.lab.hosts.iter().any(copies)).then_some(()))
        })
    }

    /// kill -9.
    pub fn kill_replicator(&mut self, host: &str) -> Result<()> {
        self.replicators
            .get_mut(host)
            .with_context(|| format!("no replicator on {host}"))?
            .kill()
    }

    pub fn restart_replicator(&mut self, host: &str) -> Result<()> {
        let process = self.binaries.start_replicator(self.lab.host(host)?)?;
        self.replicators.insert(host.to_owned(), process);
        Ok(())
    }

    pub fn replicator_process(&mut self, host: &str) -> Result<&mut Process> {
        self.replicators
            .get_mut(host)
            .with_context(|| format!("no replicator on {host}"))
    }

    /// All images of this VM's disks on a host: those that it was made with, and those that the replicator made.
    pub fn images(&self, host: &str) -> Result<Vec<PathBuf>> {
        let host = self.host(host)?;
        let first = (0..self.vm.spec.disks.len()).map(|n| vm::image_of(host, &self.vm.spec.name, n));
        let mut found: Vec<PathBuf> = first.filter(|p| p.exists()).collect();
        for entry in std::fs::read_dir(host.folder("disks")?)? {
            let path = entry?.path();
            found.extend(path.extension().is_some_and(|e| e == "img").then_some(path));
        }
        Ok(found)
    }

    /// After the VM has died: a new one of the same name on host a, and replicators that know of none.
    pub fn renew(&mut self) -> Result<()> {
        for host in ["a", "b"] {
            self.kill_replicator(host)?;
        }
        let id = self.id();
        wait_for("the old copies to be gone", SETTLE, || {
            let left: Vec<i32> = self.lab.hosts.iter().flat_map(|h| vm::qemus(h, id)).collect();
            for pid in &left {
                // It may have gone by itself.
                let _ = sys::kill(*pid, Signal::SIGKILL);
            }
            Ok(left.is_empty().then_some(()))
        })?;
        for host in &self.lab.hosts {
            let folders = [host.folder("state")?, host.folder("disks")?, host.ram_folder()?];
            for entry in folders
                .iter()
                .map(std::fs::read_dir)
                .collect::<std::io::Result<Vec<_>>>()?
                .into_iter()
                .flatten()
            {
                std::fs::remove_file(entry?.path())?;
            }
            // A shadow's taps stay where its replicator could not remove them.
            let _ = host.remove_tap(&self.vm.spec.tap());
        }
        for host in ["a", "b"] {
            self.restart_replicator(host)?;
            // The bridges know the VM's address where it was last, and this guest announces itself to nobody.
            self.lab.forget_addresses(host)?;
        }
        let spec = self.vm.spec.clone();
        // Its disks are new too: an image that is there is used as it is.
        for n in 0..spec.disks.len() {
            std::fs::remove_file(vm::image_of(self.lab.host("a")?, &spec.name, n))?;
        }
        self.vm = Vm::start(self.lab.host("a")?, &GuestImage::find()?, &spec)?;
        self.vm.wait_up(&self.lab.client)
    }

    /// Hosts on which a copy of the VM ran when the watcher last looked. It looks a few times a second: wait for what is expected,
    /// a single answer may be of the moment before.
    pub fn running_on(&self) -> Vec<String> {
        self.copies.running()
    }

    /// Waits until the watcher hears each copy on a host: from then on nothing that it does is missed.
    pub fn wait_watched(&self, host: &str) -> Result<()> {
        wait_for("the watcher to find all copies", SETTLE, || {
            let pids = vm::qemus(self.host(host)?, self.id());
            Ok((!pids.is_empty() && self.copies.hears(&pids)).then_some(()))
        })
    }

    /// Waits until no copy runs anywhere.
    pub fn wait_stands_still(&self) -> Result<()> {
        wait_for("no copy to run", SETTLE, || {
            self.at_most_one()?;
            Ok(self.running_on().is_empty().then_some(()))
        })
    }

    /// Waits until the VM runs on one host, answers, and goes on doing so; returns the host.
    pub fn wait_runs(&self) -> Result<String> {
        let mut before: Option<(String, u64)> = None;
        wait_for("the VM to run on one host", SETTLE, || {
            self.at_most_one()?;
            let now = match self.running_on().as_slice() {
                [one] => self.counter(one).ok().map(|c| (one.clone(), c)),
                _ => None,
            };
            let goes_on = matches!((&before, &now), (Some(b), Some(n)) if b.0 == n.0 && b.1 < n.1);
            if now.is_some() && !goes_on {
                std::thread::sleep(Duration::from_millis(200));
            }
            before = now.clone();
            Ok(now.filter(|_| goes_on).map(|n| n.0))
        })
    }

    /// The guest's counter, which must grow; by its console if the VM that runs on `host` has no network.
    fn counter(&self, host: &str) -> Result<u64> {
        match self.vm.spec.boots {
            Boots::Linux => Ok(vm::stats(&self.lab.client, self.vm.spec.ip)?.counter),
            Boots::Sector => {
                let consoles = vm::qemus(self.host(host)?, self.id())
                    .into_iter()
                    .filter_map(vm::console_of);
                let counters = consoles.map(|c| Console::read(&c).last_counter);
                counters.max().context("it has no console")
            }
        }
    }

    /// Waits until only one QEMU of the VM is left on both hosts, and no replicator is about to clean up after another.
    pub fn wait_alone(&self) -> Result<()> {
        wait_for("all other copies to be gone", SETTLE, || {
            self.at_most_one()?;
            let count: usize = self.lab.hosts.iter().map(|h| vm::qemus(h, self.id()).len()).sum();
            // One that is dead tells nothing, and waits for nobody.
            let busy = |host: &Host| Replicator { host }.replicas().is_ok_and(|r| r.iter().any(waits));
            Ok((count == 1 && !self.lab.hosts.iter().any(busy)).then_some(()))
        })
    }

    /// An error if two copies ever ran at once.
    pub fn at_most_one(&self) -> Result<()> {
        match self.copies.doubles().first() {
            Some(double) => bail!("split brain: {double}"),
            None => Ok(()),
        }
    }

    /// Pattern errors that the guest counts, or that a console told.
    pub fn errors(&self) -> Result<u64> {
        let told = match self.vm.spec.boots {
            Boots::Linux => vm::stats(&self.lab.client, self.vm.spec.ip)?.errors,
            Boots::Sector => 0,
        };
        let shadows = self.lab.hosts.iter().flat_map(|h| vm::consoles_below(&h.file("run")));
        let consoles = shadows
            .chain([self.vm.serial.clone()])
            .map(|c| Console::read(&c).errors)
            .max();
        Ok(told.max(consoles.unwrap_or(0)))
    }

    /// The guest verifies its whole memory; the number of errors must be 0.
    pub fn verify(&self) -> Result<()> {
        vm::wait_scrubbed(&self.lab.client, self.vm.spec.ip, SCRUB)?;
        match self.errors()? {
            0 => Ok(()),
            n => bail!("the guest found {n} errors in its memory"),
        }
    }

    pub fn shadow<'a>(&'a self, host: &'a str) -> Shadow<'a> {
        Shadow { pair: self, host }
    }

    /// What is left of shadows on a host: RAM files and QEMUs that are not the VM that runs.
    pub fn ram_files(&self, host: &str) -> Result<Vec<PathBuf>> {
        let dir = self.lab.host(host)?.ram_folder()?;
        Ok(std::fs::read_dir(dir)?
            .filter_map(|e| Some(e.ok()?.path()))
            .filter(|p| p.is_file())
            .collect())
    }
}

fn protection(to: &str, link: String, pacing: Pacing) -> Result<OrderKind> {
    Ok(OrderKind::Protect {
        target: to.parse()?,
        link,
        pacing,
    })
}

/// A source that is at it, or about to begin anew.
fn copies(r: &ReplicaStatus) -> bool {
    r.role == Role::Source && matches!(r.phase, Phase::Provisioning | Phase::Seeding | Phase::Standby)
}

/// A shadow that is still on record as waiting. Its QEMU may be gone by now.
pub fn waits(r: &ReplicaStatus) -> bool {
    r.role == Role::Target
        && matches!(
            r.phase,
            Phase::Seeding | Phase::Standby | Phase::Switching | Phase::Prepared
        )
}

/// Runs a test's body; when it fails, where the logs are is part of the message.
pub fn with_pair(name: &str, spec: &VmSpec, body: impl FnOnce(&mut Pair) -> Result<()>) {
    with_pair_as(name, spec, Settings::default(), body);
}

pub fn with_pair_as(name: &str, spec: &VmSpec, settings: Settings, body: impl FnOnce(&mut Pair) -> Result<()>) {
    if super::skips(&NEEDED) {
        return;
    }
    let result = Pair::start_with(spec, settings).and_then(|mut pair| {
        let result = body(&mut pair).and_then(|()| pair.at_most_one());
        result.map_err(|e| match keep(&pair, name) {
            Ok(dir) => e.context(format!("logs are in {}", dir.display())),
            Err(_) => e,
        })
    });
    if let Err(e) = result {
        panic!("{name}: {e:#}");
    }
}

fn keep(pair: &Pair, name: &str) -> Result<std::path::PathBuf> {
    pair.lab
        .keep_logs(&super::daemons::target_dir()?.join("lab-logs").join(name))
}
