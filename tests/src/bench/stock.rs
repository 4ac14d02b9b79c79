//! The peer: the same VM under the same load, moved by QEMU's own `migrate` over TCP with its defaults. The QEMU that waits
//! for it is started before the clock.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::ours::{pause, resume};
use super::probe::Probe;
use super::switchover::{Hop, SETTLE};
use crate::lab::Lab;
use crate::lab::copies::wall_us;
use crate::lab::process::wait_for;
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

/// A QEMU that waits for the VM.
struct Arrival {
    vm: Vm,
    qmp: Qmp,
    uri: String,
    next: usize,
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
        let arrival = self.expect(lab, multifd)?;
        resume(&self.qmp)?;
        let probe = Probe::start(&lab.client, self.vm.spec.ip)?;
        sleep(SETTLE);
        let start = wall_us();
        self.qmp.execute("migrate", json!({ "uri": arrival.uri }), QMP)?;
        let resumed = arrival
            .qmp
            .wait("RESUME", start, MIGRATE)
            .context("on the target")?
            .at_us;
        let stopped = self.qmp.wait("STOP", start, MIGRATE).context("on the source")?.at_us;
        sleep(SETTLE);
        let hop = Hop::new(start, stopped, resumed, probe.finish()?);
        self.arrived(lab, arrival)?;
        Ok(hop)
    }

    /// Moves it as fast as it goes, and tells the bytes of RAM that were not zero, and the seconds. With `zstd_level` by multifd,
    /// which is the only way in which QEMU compresses like that.
    pub fn copy(&mut self, lab: &Lab, zstd_level: Option<u8>) -> Result<(f64, f64)> {
        let arrival = self.expect(lab, zstd_level.is_some())?;
        for side in [&self.qmp, &arrival.qmp] {
            let compression = if zstd_level.is_some() { "zstd" } else { "none" };
            let mut parameters = json!({"max-bandwidth": 4u64 << 30, "multifd-compression": compression});
            if let Some(level) = zstd_level {
                parameters["multifd-zstd-level"] = json!(level);
            }
            side.execute("migrate-set-parameters", parameters, QMP)?;
        }
        resume(&self.qmp)?;
        self.qmp.execute("migrate", json!({ "uri": arrival.uri }), QMP)?;
        let told = wait_for("QEMU's own migration", MIGRATE, || {
            let info = self.qmp.execute("query-migrate", json!({}), QMP)?;
            match info["status"].as_str() {
                Some("completed") => Ok(Some(info)),
                Some("failed" | "cancelled") => bail!("it failed: {info}"),
                _ => Ok(None),
            }
        })?;
        let number = |value: &serde_json::Value| value.as_f64().with_context(|| format!("no figure in {told}"));
        let copied = (
            number(&told["ram"]["normal-bytes"])?,
            number(&told["total-time"])? / 1e3,
        );
        self.arrived(lab, arrival)?;
        Ok(copied)
    }

    /// Starts the QEMU that waits for it on the next host.
    fn expect(&self, lab: &Lab, multifd: bool) -> Result<Arrival> {
        let next = (self.at + 1) % lab.hosts.len();
        let to = lab.hosts.get(next).context("no host")?;
        let vm = Vm::start_with(to, &self.image, &self.vm.spec, &["-incoming", "defer"])?;
        let qmp = vm.watch()?;
        let capability = json!({"capabilities": [{"capability": "multifd", "state": multifd}]});
        for side in [&self.qmp, &qmp] {
            side.execute("migrate-set-capabilities", capability.clone(), QMP)?;
        }
        let uri = format!("tcp:{}:{PORT}", to.ip);
        qmp.execute("migrate-incoming", json!({ "uri": uri }), QMP)?;
        Ok(Arrival { vm, qmp, uri, next })
    }

    /// It runs there: it is paused, and the old one killed.
    fn arrived(&mut self, lab: &Lab, arrival: Arrival) -> Result<()> {
        let Arrival { vm, qmp, next, .. } = arrival;
        pause(&qmp)?;
        let from = lab.hosts.get(self.at).context("no host")?;
        self.vm = vm;
        self.qmp = qmp;
        self.at = next;
        from.remove_tap(&self.vm.spec.tap())
    }
}
