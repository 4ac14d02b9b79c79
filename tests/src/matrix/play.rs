//! Plays cases of the matrix in a row on one pair of hosts: each starts where the VM runs after the one before.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use umbra_api::order::OrderKind;
use umbra_api::replica::{Phase, Role};

use super::{Case, Fault, Outcome, Point};
use crate::lab::disk::{Bus, DiskSpec, Journal, names};
use crate::lab::pair::Pair;
use crate::lab::process::wait_for;
use crate::lab::vm::{self, VmSpec};
use crate::lab::wire::{Way, Wire};
use crate::lab::{daemons, sys};

/// What a link may be silent for; the stalls are longer.
const SILENCE: Duration = Duration::from_secs(3);
const STALL: Duration = Duration::from_secs(4);
const LONG: Duration = Duration::from_secs(90);
/// Room for a shadow's image, and those that are kept because nobody can know whether it ran.
const DISK_FS_MIB: u64 = 160;

fn disk(bus: Bus, format: &'static str) -> DiskSpec {
    DiskSpec { bus, format, mib: 16 }
}

pub fn spec() -> VmSpec {
    VmSpec {
        dirty: 200,
        pattern_mib: Some(32),
        disks: vec![disk(Bus::VirtioBlk, "raw"), disk(Bus::VirtioScsi, "qcow2")],
        ..VmSpec::new("web", 10)
    }
}

/// More of the replicators' configuration than a lab needs.
pub fn settings() -> daemons::Settings {
    daemons::Settings {
        faults: true,
        silence_ms: Some(SILENCE.as_millis() as u64),
        ..daemons::Settings::default()
    }
}

pub struct Stage<'a> {
    pair: &'a mut Pair,
    /// By the target's name.
    wires: BTreeMap<&'static str, Wire>,
}

fn other(host: &str) -> &'static str {
    if host == "a" { "b" } else { "a" }
}

/// Plays them all, and prints a line a case.
pub fn all(pair: &mut Pair, cases: &[Case]) -> Result<()> {
    let mut wires = BTreeMap::new();
    for host in ["a", "b"] {
        wires.insert(host, Wire::lay(pair.host(host)?)?);
    }
    let mut stage = Stage { pair, wires };
    for case in cases {
        let began = Instant::now();
        let what = format!("{} at {}", case.fault.name(), case.point.name());
        let end = stage.play(case).with_context(|| what.clone())?;
        println!("{what}: {end}, in {:.1} s", began.elapsed().as_secs_f64());
    }
    stage.end()
}

impl Stage<'_> {
    fn play(&mut self, case: &Case) -> Result<&'static str> {
        let mut from = self.pair.wait_runs()?;
        if case.point == Point::Reverse {
            self.there(&from)?;
            from = other(&from).to_owned();
        }
        let to = other(&from);
        let before = self.acknowledged()?;
        self.begin(case, &from, to)?;
        self.break_it(case, &from, to)?;
        self.settle()?;
        let end = match case.outcome {
            Outcome::Dies => {
                self.died(case.fault, &from, to, &before)?;
                "died, and stayed so"
            }
            expected => {
                let runs = self.pair.wait_runs()?;
                match expected {
                    Outcome::Stays => ensure!(runs == from, "it was to stay on {from} and runs on {runs}"),
                    Outcome::Moves => ensure!(runs == to, "it was to move to {to} and runs on {runs}"),
                    _ => {}
                }
                self.whole(&runs, &before)?;
                self.tidy(&runs)?;
                if runs == from { "stayed" } else { "moved" }
            }
        };
        Ok(end)
    }

    /// At last the guest verifies all of its memory, and dies so that its images can be read as they are.
    fn end(&self) -> Result<()> {
        let runs = self.pair.wait_runs()?;
        self.pair.verify()?;
        let (told, images) = (self.acknowledged()?, self.pair.images(&runs)?);
        self.kill_qemu(&runs)?;
        self.journals(&images, &told, |_| true)
    }

    /// Up to the point at which it is to break. At a step, the driver waits there, or has died.
    fn begin(&mut self, case: &Case, from: &str, to: &'static str) -> Result<()> {
        let place = match case.point {
            Point::Seeding => Some("source after open"),
            Point::Step(place) => Some(place),
            _ => None,
        };
        let link = self.wires.get(to).context("a wire to each host")?.address();
        let switches = matches!(case.point, Point::Step(_) | Point::After);
        let arm = |stage: &Self| match place {
            Some(place) => stage.arm(case, place, from, to),
            None => Ok(()),
        };
        if !switches {
            arm(self)?;
        }
        self.pair.protect_by(from, to, link)?;
        if case.point != Point::Seeding {
            self.pair.wait_standby(from)?;
            self.pair.wait_watched(to)?;
        }
        if switches {
            arm(self)?;
            let epoch = self.pair.next_epoch();
            let ordered = self.pair.order(from, epoch, OrderKind::Switchover);
            // A replicator that dies of it may not get to answer.
            if !place.is_some_and(|p| dies_itself(case.fault, p)) {
                ordered?;
            }
        }
        if let Some(place) = place {
            let hit = hit(&self.fault_file(at(place, from, to))?);
            wait_for(&format!("the step {place}"), LONG, || {
                self.pair.at_most_one()?;
                Ok(hit.exists().then_some(()))
            })?;
        }
        if case.point == Point::After {
            wait_for("the switchover to be over", LONG, || {
                let source = self.pair.replica(from, Role::Source)?.map(|r| r.phase);
                let target = self.pair.replica(to, Role::Target)?.map(|r| r.phase);
                Ok((source == Some(Phase::Relinquished) && target == Some(Phase::Active)).then_some(()))
            })?;
        }
        Ok(())
    }

    fn fault_file(&self, host: &str) -> Result<PathBuf> {
        Ok(daemons::fault_file(self.pair.host(host)?))
    }

    /// A replicator that is to die at its own step dies by its own hand, at once; whoever else is to suffer does it while this one waits.
    /// Where the VM is to stay, the target says nothing of 'prepared' before: which of both was faster is another row's matter.
    fn arm(&self, case: &Case, place: &str, from: &str, to: &str) -> Result<()> {
        let races = matches!(case.fault, Fault::Target | Fault::Cut) && place.starts_with("source");
        if races && case.outcome == Outcome::Stays {
            self.order_fault(to, "wait target before say_prepared")?;
        }
        let what = if dies_itself(case.fault, place) { "kill" } else { "wait" };
        self.order_fault(at(place, from, to), &format!("{what} {place}"))
    }

    fn order_fault(&self, host: &str, line: &str) -> Result<()> {
        let file = self.fault_file(host)?;
        // By a name of its own first: it is looked for all the time.
        let new = file.with_extension("new");
        fs::write(&new, format!("{line}\n"))?;
        Ok(fs::rename(&new, &file)?)
    }

    /// Does the harm, lets whoever waits go on, and puts right what an operator or a service manager would.
    fn break_it(&mut self, case: &Case, from: &str, to: &'static str) -> Result<()> {
        match case.fault {
            Fault::Source => self.restart(from, |s| s.go_on(from, to))?,
            Fault::Target => self.restart(to, |s| s.go_on(from, to))?,
            Fault::Primary => self.kill_qemu(from)?,
            Fault::Shadow => self.kill_qemu(to)?,
            Fault::Cut => {
                self.way(to, Way::Cut)?;
                self.go_on(from, to)?;
                // As long as it takes to be refused a few times.
                std::thread::sleep(Duration::from_millis(700));
                self.way(to, Way::Open)?;
            }
            Fault::Stall => {
                self.way(to, Way::Stalled)?;
                self.go_on(from, to)?;
                // It is the length of the stall that is tested.
                std::thread::sleep(STALL);
                self.way(to, Way::Open)?;
            }
            Fault::Full => {
                let filler = self.fill(to)?;
                self.go_on(from, to)?;
                self.settle()?;
                fs::remove_file(filler)?;
                self.pair.copies.made_room();
            }
            Fault::Rps => {}
        }
        self.go_on(from, to)
    }

    fn way(&self, to: &str, way: Way) -> Result<()> {
        self.wires.get(to).context("a wire to each host")?.set(way);
        Ok(())
    }

    /// Whoever waits at a step goes on.
    fn go_on(&self, from: &str, to: &str) -> Result<()> {
        for host in [from, to] {
            let file = self.fault_file(host)?;
            for f in [hit(&file), file] {
                match fs::remove_file(&f) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn restart(&mut self, host: &str, between: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        self.pair.kill_replicator(host)?;
        between(self)?;
        self.pair.restart_replicator(host)
    }

    fn kill_qemu(&self, host: &str) -> Result<()> {
        let pids = vm::qemus(self.pair.host(host)?, self.pair.id());
        let [pid] = pids.as_slice() else {
            bail!("one QEMU on {host}, not {pids:?}")
        };
        sys::kill(*pid, Signal::SIGKILL)?;
        wait_for("the killed QEMU to be gone", LONG, || {
            Ok((!vm::qemus(self.pair.host(host)?, self.pair.id()).contains(pid)).then_some(()))
        })
    }

    /// Takes all that is left of the file system of a host's images.
    fn fill(&self, host: &str) -> Result<PathBuf> {
        let path = self.pair.host(host)?.folder("disks")?.join("filler");
        let mut file = fs::File::create(&path)?;
        loop {
            match std::io::Write::write_all(&mut file, &[1; 64 << 10]) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::StorageFull => return Ok(path),
                Err(e) => return Err(e).with_context(|| format!("filling {}", path.display())),
            }
        }
    }

    /// Waits until neither side has anything undecided.
    fn settle(&self) -> Result<()> {
        wait_for("both sides to be sure", LONG, || {
            self.pair.at_most_one()?;
            for host in ["a", "b"] {
                for r in self.pair.replicator(host)?.replicas()? {
                    if matches!(r.phase, Phase::Switching | Phase::Prepared) {
                        return Ok(None);
                    }
                }
            }
            Ok(Some(()))
        })
    }

    fn acknowledged(&self) -> Result<BTreeMap<String, u64>> {
        wait_for("the guest to tell of its disks", LONG, || {
            let told = vm::stats(&self.pair.lab.client, self.pair.vm.spec.ip);
            Ok(told.ok().map(|s| s.disks).filter(|d| !d.is_empty()))
        })
    }

    /// The guest's memory and disk have what they had, and a little more by now.
    fn whole(&self, host: &str, before: &BTreeMap<String, u64>) -> Result<()> {
        let now = wait_for("the guest to write on its disk", LONG, || {
            let now = self.acknowledged()?;
            Ok(before
                .iter()
                .all(|(d, n)| now.get(d).is_some_and(|m| m > n))
                .then_some(now))
        })?;
        let pids = vm::qemus(self.pair.host(host)?, self.pair.id());
        let images: Vec<PathBuf> = pids.iter().flat_map(|p| images_of(*p)).collect();
        // A qcow2 image may be between two of its own tables while its QEMU runs; what is on it the guest itself reads back.
        self.journals(&images, &now, |d| d.format == "raw")?;
        ensure!(
            self.pair.errors()? == 0,
            "no error in the guest's memory or on its disks"
        );
        Ok(())
    }

    /// Each disk's image, in the order of the disks, has all records that were acknowledged.
    fn journals(
        &self,
        images: &[PathBuf],
        told: &BTreeMap<String, u64>,
        which: impl Fn(&DiskSpec) -> bool,
    ) -> Result<()> {
        let disks = &self.pair.vm.spec.disks;
        for (n, (name, disk)) in names(disks).iter().zip(disks).enumerate().filter(|(_, d)| which(d.1)) {
            let ending = format!("-{n}.img");
            let of_it = images.iter().filter(|i| i.to_string_lossy().ends_with(&ending));
            // The guest may be writing a record: what is read torn is read again.
            let read = |image: &PathBuf| Journal::read(image, disk.format).map(|j| j.last);
            let found: Vec<Result<u64>> = of_it
                .map(|i| read(i).or_else(|_| read(i)).or_else(|_| read(i)))
                .collect();
            let told = told.get(name).copied().unwrap_or(0);
            ensure!(
                found.iter().flatten().any(|last| *last >= told),
                "{told} records of {name} were acknowledged, its images have {found:#?}"
            );
        }
        Ok(())
    }

    /// Nothing but the VM that runs is left.
    fn tidy(&mut self, runs: &str) -> Result<()> {
        self.pair.release()?;
        let epoch = self.pair.next_epoch();
        // Where a stopped primary was kept, it is not needed any more; elsewhere it is refused.
        let _ = self
            .pair
            .replicator(other(runs))?
            .order(self.pair.id(), epoch, OrderKind::Retire)?;
        self.pair.wait_alone()?;
        ensure!(self.pair.wait_runs()? == runs, "clearing up moves nothing");
        Ok(())
    }

    /// A switchover that nothing disturbs, and the old primary is given up.
    fn there(&mut self, from: &str) -> Result<()> {
        self.pair.protect(from, other(from))?;
        self.pair.wait_standby(from)?;
        self.pair.wait_watched(other(from))?;
        self.pair.switchover(from)?;
        ensure!(self.pair.wait_runs()? == other(from), "it moves when nothing breaks");
        self.tidy(other(from))
    }

    /// No copy runs in the dead one's place, its image is there with all records, and a new VM takes the stage.
    fn died(&mut self, fault: Fault, from: &str, to: &str, before: &BTreeMap<String, u64>) -> Result<()> {
        self.pair.wait_stands_still()?;
        let host = if fault == Fault::Primary { from } else { to };
        self.journals(&self.pair.images(host)?, before, |_| true)?;
        self.pair.renew()
    }
}

/// On whose host a place is.
fn at<'a>(place: &str, from: &'a str, to: &'a str) -> &'a str {
    if place.starts_with("source") { from } else { to }
}

fn dies_itself(fault: Fault, place: &str) -> bool {
    match fault {
        Fault::Source => place.starts_with("source"),
        Fault::Target => place.starts_with("target"),
        _ => false,
    }
}

fn hit(file: &Path) -> PathBuf {
    file.with_extension("hit")
}

/// The images that a QEMU's command line names.
fn images_of(pid: i32) -> Vec<PathBuf> {
    let line = sys::cmdline(pid);
    let words = line.iter().flat_map(|a| a.split([',', '"', '=']));
    words
        .filter(|w| w.ends_with(".img") && !w.ends_with("initrd.img"))
        .map(PathBuf::from)
        .collect()
}

/// A file system of its own for each host's images, so that it can be filled up.
pub fn small_disks(pair: &Pair) -> Result<()> {
    for host in &pair.lab.hosts {
        host.mount_small("disks", DISK_FS_MIB)?;
    }
    Ok(())
}
