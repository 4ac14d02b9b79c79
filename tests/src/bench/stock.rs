//! The peer: the same VM under the same load, moved by QEMU's own `migrate` over TCP with its defaults. The QEMU that waits
//! for it is started before the clock.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::ours::{pause, resume};
use super::probe::Probe;
use super::switchover::{Hop, SETTLE};
use crate::lab::Lab;
use crate::lab::copies::wall_us;
use crate::lab::qmp::Qmp;
use crate::lab::vm::{GuestImage, Vm, VmSpec};

const PORT: u16 = 4444;
const QMP: Duration = Duration::from_secs(10);
/// A large busy guest takes QEMU a while.
const MIGRATE: Duration = Duration::from_secs(300);

pub struct Stock {
    vm: Vm,
    qmp: Qmp,
    at: usize,
    image: GuestImage,
}

impl Stock {
    /// Starts the VM on the first host, and pauses it.
    pub fn start(lab: &Lab, spec: &VmSpec) -> Result<Self> {
        let image = GuestImage::find()?;
        let mut vm = Vm::start(lab.hosts.first().context("no host")?, &image, spec)?;
        vm.wait_up(&lab.client)?;
        let qmp = vm.watch()?;
        pause(&qmp)?;
        Ok(Self { vm, qmp, at: 0, image })
    }

    pub fn hop(&mut self, lab: &Lab, multifd: bool) -> Result<Hop> {
        let next = (self.at + 1) % lab.hosts.len();
        let (from, to) = (
            lab.hosts.get(self.at).context("no host")?,
            lab.hosts.get(next).context("no host")?,
        );
        let spec = self.vm.spec.clone();
        let vm = Vm::start_with(to, &self.image, &spec, &["-incoming", "defer"])?;
        let qmp = vm.watch()?;
        let capability = json!({"capabilities": [{"capability": "multifd", "state": multifd}]});
        for side in [&self.qmp, &qmp] {
            side.execute("migrate-set-capabilities", capability.clone(), QMP)?;
        }
        let uri = format!("tcp:{}:{PORT}", to.ip);
        qmp.execute("migrate-incoming", json!({ "uri": uri }), QMP)?;
        resume(&self.qmp)?;
        let probe = Probe::start(&lab.client, spec.ip)?;
        sleep(SETTLE);
        let start = wall_us();
        self.qmp.execute("migrate", json!({ "uri": uri }), QMP)?;
        let resumed = qmp.wait("RESUME", start, MIGRATE).context("on the target")?.at_us;
        let stopped = self.qmp.wait("STOP", start, MIGRATE).context("on the source")?.at_us;
        sleep(SETTLE);
        let hop = Hop::new(start, stopped, resumed, probe.finish()?);
        pause(&qmp)?;
        // Kills the old one.
        self.vm = vm;
        self.qmp = qmp;
        self.at = next;
        from.remove_tap(&spec.tap())?;
        Ok(hop)
    }
}
