//! A VM that goes to and fro by our replicators.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use umbra_api::order::OrderKind;
use umbra_api::replica::{Role, SwitchoverReport};

use super::probe::Probe;
use super::switchover::{Hop, SETTLE, SWITCH};
use crate::lab::copies::wall_us;
use crate::lab::pair::Pair;
use crate::lab::process::wait_for;
use crate::lab::qmp::Qmp;
use crate::lab::vm::{self, VmSpec};

const QMP: Duration = Duration::from_secs(5);
/// Rounds after the first copy, before it switches over.
const ROUNDS: u64 = 2;

pub struct Ours {
    pub pair: Pair,
    at: usize,
    qmp: Qmp,
}

const HOSTS: [&str; 2] = ["a", "b"];

impl Ours {
    /// Starts the VM, and pauses it.
    pub fn start(spec: &VmSpec) -> Result<Self> {
        let pair = Pair::start_unwatched(spec)?;
        let qmp = pair.vm.watch()?;
        pause(&qmp)?;
        Ok(Self { pair, at: 0, qmp })
    }

    /// Protects the VM and switches it over to the other host. It is paused before and after.
    pub fn hop(&mut self) -> Result<(Hop, SwitchoverReport)> {
        let (from, to) = (HOSTS[self.at], HOSTS[1 - self.at]);
        resume(&self.qmp)?;
        self.pair.protect(from, to)?;
        let warm = self.pair.wait_standby(from)?.progress.rounds;
        wait_for("more rounds", SWITCH, || {
            let now = self.pair.replica(from, Role::Source)?.context("no replica")?;
            Ok((now.progress.rounds >= warm + ROUNDS).then_some(()))
        })?;
        let shadow = vm::monitor_of(self.pair.qemu(to)?, 1).context("no second monitor")?;
        let shadow = Qmp::connect(&shadow, QMP)?;
        let probe = Probe::start(&self.pair.lab.client, self.pair.vm.spec.ip)?;
        sleep(SETTLE);
        let epoch = self.pair.next_epoch();
        let start = wall_us();
        self.pair.order(from, epoch, OrderKind::Switchover)?;
        let resumed = shadow.wait("RESUME", start, SWITCH).context("on the target")?.at_us;
        let stopped = self.qmp.wait("STOP", start, SWITCH).context("on the source")?.at_us;
        sleep(SETTLE);
        let hop = Hop::new(start, stopped, resumed, probe.finish()?);
        let report = wait_for("the report", SWITCH, || {
            let replica = self.pair.replica(from, Role::Source)?;
            Ok(replica.and_then(|r| r.report).filter(|r| r.epoch == epoch))
        })?;
        self.pair.retire(from)?;
        self.qmp = shadow;
        self.at = 1 - self.at;
        pause(&self.qmp)?;
        Ok((hop, report))
    }

    /// Nothing of its memory was lost on the way.
    pub fn verify(&self) -> Result<()> {
        resume(&self.qmp)?;
        self.pair.verify()?;
        pause(&self.qmp)
    }
}

pub fn pause(qmp: &Qmp) -> Result<()> {
    qmp.execute("stop", json!({}), QMP).map(|_| ())
}

pub fn resume(qmp: &Qmp) -> Result<()> {
    qmp.execute("cont", json!({}), QMP).map(|_| ())
}
