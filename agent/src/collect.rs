//! One round: which VMs are there, what did each use, what is left to tell. The clock comes in from outside; the kernel and /proc are doors
//! that the tests replace.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tracing::{debug, info, warn};
use umbra_agent_ebpf::{NicKey, state};
use umbra_api::sample::{CpuSample, HostSample, MemSample, NetSample, SAMPLE_VERSION, SampleBatch, VmSample};
use umbra_api::{HostId, UnixMs};

use crate::cpulist::CpuList;
use crate::kernel::{Kernel, KernelError, Lost};
use crate::meter::{BlockMeter, NicMeter, ThreadMeter, Used, add_cpu, add_net};
use crate::node::{self, NodeMeter, NodeTotals};
use crate::procfs::{ProcId, Procfs};
use crate::track::{Change, Processes, Tracker, Vm};

/// Rounds between two looks at a VM's taps: they change only by hotplug.
const TAP_ROUNDS: u64 = 10;

/// What the collector asks of the machine beside the kernel programs.
pub trait Machine: Processes {
    fn node(&self, cpus: &CpuList) -> std::io::Result<NodeTotals>;
    fn rss_bytes(&self, pid: u32) -> u64;
    fn taps(&self, pid: u32) -> Vec<String>;
    fn runnable_threads(&self, pid: u32) -> Vec<u32>;
    fn is_runnable(&self, pid: u32, tid: u32) -> bool;
}

impl Machine for Procfs {
    fn node(&self, cpus: &CpuList) -> std::io::Result<NodeTotals> {
        node::read(self, cpus)
    }

    fn rss_bytes(&self, pid: u32) -> u64 {
        self.stat(pid).map_or(0, |s| s.rss_pages.saturating_mul(page_bytes()))
    }

    fn taps(&self, pid: u32) -> Vec<String> {
        Procfs::taps(self, pid)
    }

    fn runnable_threads(&self, pid: u32) -> Vec<u32> {
        Procfs::runnable_threads(self, pid)
    }

    fn is_runnable(&self, pid: u32, tid: u32) -> bool {
        Procfs::is_runnable(self, pid, tid)
    }
}

fn page_bytes() -> u64 {
    let bytes = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    bytes.ok().flatten().and_then(|b| u64::try_from(b).ok()).unwrap_or(4096)
}

#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    #[error("/proc: {0}")]
    Proc(#[from] std::io::Error),
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

struct Followed {
    vm: Vm,
    slot: u32,
    block: BlockMeter,
    nics: BTreeMap<NicKey, NicMeter>,
    used: Used,
    last: VmSample,
    /// Of the round in which it was found; its first sample ends with the next one.
    found_in: u64,
}

/// A VM as `/metrics` shows it.
#[derive(Clone, PartialEq, Debug)]
pub struct VmView {
    pub last: VmSample,
    pub used: Used,
    pub qmp: Vec<String>,
}

/// What a round found out, beside the batch.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Snapshot {
    pub vms: Vec<VmView>,
    pub node: HostSample,
    pub node_busy_ns: u64,
    pub left_out: usize,
    pub lost: Lost,
    pub rounds: u64,
}

pub struct Collector<K> {
    host: HostId,
    cpus: CpuList,
    agent_start: UnixMs,
    kernel: K,
    tracker: Tracker,
    vms: BTreeMap<ProcId, Followed>,
    threads: HashMap<u32, (u32, ThreadMeter)>,
    /// Slots that no VM has.
    free: Vec<u32>,
    node: Option<NodeMeter>,
    node_last: HostSample,
    node_busy_ns: u64,
    rounds: u64,
    seq: u64,
}

impl<K: Kernel> Collector<K> {
    pub fn new(host: HostId, cpus: CpuList, agent_start: UnixMs, kernel: K, tracker: Tracker, max_vms: u32) -> Self {
        Self {
            host,
            cpus,
            agent_start,
            kernel,
            tracker,
            vms: BTreeMap::new(),
            threads: HashMap::new(),
            free: (0..max_vms).rev().collect(),
            node: None,
            node_last: HostSample::default(),
            node_busy_ns: 0,
            rounds: 0,
            seq: 0,
        }
    }

    pub fn kernel(&self) -> &K {
        &self.kernel
    }

    /// One round, which ends at `now` and lasted `elapsed`. The first one, and one that lasted no millisecond, have nothing to tell.
    pub fn round(
        &mut self,
        machine: &impl Machine,
        now: UnixMs,
        elapsed: Duration,
    ) -> Result<Option<SampleBatch>, CollectError> {
        self.rounds += 1;
        for change in self.tracker.scan(machine)? {
            self.apply(machine, change);
        }
        self.refresh_taps(machine);
        let mut cpu = self.cpu_of_vms()?;
        let mut samples = Vec::with_capacity(self.vms.len());
        let mut vms = std::mem::take(&mut self.vms);
        for f in vms.values_mut() {
            let cpu = cpu.remove(&f.vm.id.pid).unwrap_or_default();
            if let Some(sample) = self.sample(machine, f, cpu) {
                samples.push(sample);
            }
        }
        self.vms = vms;
        let totals = machine.node(&self.cpus)?;
        let first = self.node.is_none();
        let meter = self
            .node
            .get_or_insert_with(|| NodeMeter::starting_at(&totals, &self.cpus));
        self.node_last = meter.advance(&totals);
        self.node_busy_ns += self.node_last.cpu_busy_ns;
        let interval_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).min(3_600_000);
        if first || interval_ms == 0 {
            return Ok(None);
        }
        self.seq += 1;
        Ok(Some(SampleBatch {
            version: SAMPLE_VERSION,
            host: self.host.clone(),
            agent_start: self.agent_start,
            seq: self.seq,
            t: now,
            interval_ms,
            node: self.node_last,
            vms: samples,
        }))
    }

    pub fn snapshot(&self) -> Snapshot {
        let view = |f: &Followed| VmView {
            last: f.last.clone(),
            used: f.used.clone(),
            qmp: f.vm.qemu.args.qmp.clone(),
        };
        Snapshot {
            vms: self.vms.values().map(view).collect(),
            node: self.node_last,
            node_busy_ns: self.node_busy_ns,
            left_out: self.tracker.left_out(),
            lost: self.kernel.lost(),
            rounds: self.rounds,
        }
    }

    fn apply(&mut self, machine: &impl Machine, change: Change) {
        match change {
            Change::Came(vm) => {
                let (name, id, pid) = (vm.qemu.args.name.clone(), vm.vm, vm.id.pid);
                let tcg_unnamed = vm.qemu.args.accel.as_deref() != Some("kvm") && !vm.qemu.args.debug_threads;
                info!(%id, name, pid, incoming = vm.qemu.args.incoming, qmp = ?vm.qemu.args.qmp, "VM found");
                if tcg_unnamed {
                    debug!(%id, name, "without -name …,debug-threads=on a TCG vCPU can't be told from other threads: all count as emulator");
                }
                if let Err(e) = self.follow(machine, *vm) {
                    warn!(%id, name, pid, "the VM can't be counted: {e}");
                }
            }
            Change::Gone(id) => {
                if let Some(f) = self.vms.remove(&id) {
                    info!(id = %f.vm.vm, name = f.vm.qemu.args.name, pid = id.pid, "VM gone");
                    self.kernel.unwatch(id.pid);
                    f.nics.keys().for_each(|nic| self.kernel.unwatch_nic(*nic));
                    self.free.push(f.slot);
                }
            }
            Change::LeftOut { id, name, reason } => warn!(pid = id.pid, name, "a QEMU is left out: {reason}"),
        }
    }

    fn follow(&mut self, machine: &impl Machine, vm: Vm) -> Result<(), KernelError> {
        // The tracker follows no more VMs than there are slots.
        let Some(slot) = self.free.pop() else { return Ok(()) };
        let pid = vm.id.pid;
        if let Err(e) = self.kernel.watch(pid, slot) {
            self.kernel.unwatch(pid);
            self.free.push(slot);
            return Err(e);
        }
        for tid in machine.runnable_threads(pid) {
            self.kernel.seed(pid, tid);
            // It may have gone to sleep before the seed; if it slept and woke since, the programs have seen that.
            if !machine.is_runnable(pid, tid) {
                self.kernel.unseed(tid);
            }
        }
        // The slot may have had another VM.
        let block = BlockMeter::starting_at(&self.kernel.block(slot).unwrap_or_default());
        let args = &vm.qemu.args;
        let last = VmSample {
            vm: vm.vm,
            name: args.name.clone(),
            pid,
            incoming: args.incoming,
            vcpus: args.vcpus,
            cpu: CpuSample::default(),
            mem: MemSample {
                rss_bytes: machine.rss_bytes(pid),
                guest_bytes: args.memory_bytes,
            },
            block: Default::default(),
            net: NetSample::default(),
        };
        let followed = Followed {
            slot,
            block,
            nics: BTreeMap::new(),
            used: Used::default(),
            last,
            found_in: self.rounds,
            vm,
        };
        self.vms.insert(followed.vm.id, followed);
        Ok(())
    }

    /// Taps appear a moment after the process, and later by hotplug.
    fn refresh_taps(&mut self, machine: &impl Machine) {
        let mut vms = std::mem::take(&mut self.vms);
        for f in vms.values_mut() {
            let age = self.rounds - f.found_in;
            if age < TAP_ROUNDS || age.is_multiple_of(TAP_ROUNDS) {
                self.taps_of(machine, f);
            }
        }
        self.vms = vms;
    }

    fn taps_of(&mut self, machine: &impl Machine, f: &mut Followed) {
        let Some(netns) = f.vm.qemu.netns else { return };
        let pid = f.vm.id.pid;
        let mut names = machine.taps(pid);
        names.extend(f.vm.qemu.args.taps.iter().cloned());
        names.sort();
        names.dedup();
        let found: BTreeMap<NicKey, String> = match names.is_empty() {
            true => BTreeMap::new(),
            false => {
                let found = self.kernel.ifindexes(pid, netns, &names).into_iter();
                found.map(|(name, ifindex)| (NicKey { netns, ifindex }, name)).collect()
            }
        };
        f.nics.retain(|nic, _| {
            let stays = found.contains_key(nic);
            if !stays {
                self.kernel.unwatch_nic(*nic);
            }
            stays
        });
        for (nic, name) in found {
            if f.nics.contains_key(&nic) {
                continue;
            }
            match self.kernel.watch_nic(nic) {
                Ok(()) => {
                    debug!(id = %f.vm.vm, name, ?nic, "tap found");
                    f.nics
                        .insert(nic, NicMeter::starting_at(&self.kernel.nic(nic).unwrap_or_default()));
                }
                Err(e) => debug!(id = %f.vm.vm, name, "tap can't be counted: {e}"),
            }
        }
    }

    /// CPU time of each VM by pid since the last round.
    fn cpu_of_vms(&mut self) -> Result<HashMap<u32, CpuSample>, KernelError> {
        let by_pid: HashMap<u32, u64> = self.vms.values().map(|f| (f.vm.id.pid, f.found_in)).collect();
        let mut cpu: HashMap<u32, CpuSample> = HashMap::with_capacity(by_pid.len());
        let threads = self.kernel.threads()?;
        // After the reading: a state that began later would have an open stretch below zero.
        let now_ns = self.kernel.now_ns();
        for (tid, thread) in threads {
            let Some(found_in) = by_pid.get(&thread.tgid) else {
                self.kernel.forget(tid);
                continue;
            };
            let (_, meter) = self
                .threads
                .entry(tid)
                .or_insert_with(|| (thread.tgid, ThreadMeter::born(&thread)));
            let delta = meter.advance(&thread, now_ns);
            // What a VM used in the moments since it was found this round belongs to no interval.
            if *found_in != self.rounds {
                add_cpu(cpu.entry(thread.tgid).or_default(), &delta);
            }
            if thread.state == state::DEAD {
                self.kernel.forget(tid);
                self.threads.remove(&tid);
            }
        }
        self.threads.retain(|_, (tgid, _)| by_pid.contains_key(tgid));
        Ok(cpu)
    }

    fn sample(&self, machine: &impl Machine, f: &mut Followed, cpu: CpuSample) -> Option<VmSample> {
        let block = match self.kernel.block(f.slot) {
            Ok(t) => f.block.advance(&t),
            Err(e) => {
                warn!(id = %f.vm.vm, "{e}");
                Default::default()
            }
        };
        let mut net = NetSample::default();
        for (nic, meter) in &mut f.nics {
            match self.kernel.nic(*nic) {
                Ok(t) => add_net(&mut net, &meter.advance(&t)),
                Err(e) => debug!(id = %f.vm.vm, "{e}"),
            }
        }
        if f.found_in == self.rounds {
            return None;
        }
        f.used.add(&cpu, &block, &net);
        f.last.cpu = cpu;
        f.last.block = block.sample;
        f.last.net = net;
        f.last.mem.rss_bytes = machine.rss_bytes(f.vm.id.pid);
        Some(f.last.clone())
    }
}

#[cfg(test)]
#[path = "collect_tests.rs"]
mod tests;
