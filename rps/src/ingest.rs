//! The world as the agents tell it: hosts, and the VMs on them.
//!
//! A VM may be seen on two hosts at once, as primary and as shadow. Its demand is what its copies on the *running* host
//! use; what copies elsewhere use is their hosts' own work. Which host that is the RPS knows best
//! ([`World::set_running`]); a VM that nobody told about runs where its QEMU was not started to wait for a migration.
//!
//! `apply` is the only door for samples. It takes each batch once, in any order within bounds.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use umbra_api::sample::{HostSample, SampleBatch, SampleError, VmSample};
use umbra_api::view::HistoryPoint;
use umbra_api::{HostId, UnixMs, VmId};

use crate::series::{Series, Shape, Usage};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WorldParams {
    pub shape: Shape,
    /// A host or VM that was not heard of for this long is forgotten, its series too.
    pub expire_ms: u64,
    /// How far ahead of ours an agent's clock may be.
    pub future_ms: u64,
    /// Most hosts taken in; a bound against a confused or hostile sender.
    pub hosts_max: usize,
}

impl Default for WorldParams {
    fn default() -> Self {
        let shape = Shape {
            slot_ms: 60_000,
            keep_slots: 14 * 24 * 60,
            late_slots: 2,
        };
        Self {
            shape,
            expire_ms: 6 * 3_600_000,
            future_ms: 5_000,
            hosts_max: 10_000,
        }
    }
}

/// Why a batch was not taken.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum IngestError {
    #[error(transparent)]
    Invalid(#[from] SampleError),
    #[error("host {host}: the sample ends {ahead_ms} ms in the future, at most {max_ms} ms are taken: check its clock")]
    Future { host: HostId, ahead_ms: i64, max_ms: u64 },
    #[error("host {host}: the sample is {age_ms} ms old, older than what is kept ({max_ms} ms)")]
    TooOld { host: HostId, age_ms: i64, max_ms: u64 },
    #[error("host {host} is one too many: {max} hosts are known already")]
    TooManyHosts { host: HostId, max: usize },
}

/// What a batch brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ingested {
    /// It was here before; nothing changed.
    pub duplicate: bool,
    pub vms: usize,
    /// VMs not known before.
    pub new_vms: usize,
    /// VM time that came after its slot had been closed.
    pub too_late_ms: u64,
}

/// Whose series: what the store keys its rows by. As text `vm/<uuid>` or `host/<name>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SeriesKey {
    Vm(VmId),
    /// The host's own work: all CPU that is no VM's demand.
    Host(HostId),
}

impl fmt::Display for SeriesKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(vm) => write!(f, "vm/{vm}"),
            Self::Host(host) => write!(f, "host/{host}"),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no series key: expected vm/<uuid> or host/<name>")]
pub struct SeriesKeyError(String);

impl FromStr for SeriesKey {
    type Err = SeriesKeyError;

    fn from_str(s: &str) -> Result<Self, SeriesKeyError> {
        let key = match s.split_once('/') {
            Some(("vm", id)) => id.parse().ok().map(Self::Vm),
            Some(("host", name)) => name.parse().ok().map(Self::Host),
            _ => None,
        };
        key.ok_or_else(|| SeriesKeyError(s.to_owned()))
    }
}

impl TryFrom<String> for SeriesKey {
    type Error = SeriesKeyError;

    fn try_from(s: String) -> Result<Self, SeriesKeyError> {
        s.parse()
    }
}

impl From<SeriesKey> for String {
    fn from(key: SeriesKey) -> Self {
        key.to_string()
    }
}

/// One closed slot of one series, for the store.
#[derive(Clone, PartialEq, Debug)]
pub struct SlotRow {
    pub key: SeriesKey,
    pub start: UnixMs,
    pub usage: Usage,
    /// Umbra itself copied a VM on the host.
    pub disturbed: bool,
}

/// What is known of a host.
#[derive(Clone, Debug)]
pub struct Host {
    pub node: HostSample,
    /// End of the newest interval told.
    pub last_sample: Option<UnixMs>,
    heard: UnixMs,
    agents: Vec<Agent>,
    /// VMs in the newest batch.
    vms: BTreeSet<VmId>,
    /// CPU that is no VM's demand.
    own: Series,
}

/// What is known of a VM, wherever it runs.
#[derive(Clone, Debug)]
pub struct Vm {
    pub name: String,
    pub vcpus: u32,
    pub rss_bytes: u64,
    pub guest_bytes: u64,
    heard: UnixMs,
    told: Option<HostId>,
    copies: BTreeMap<HostId, CopyState>,
    series: Series,
}

/// A VM's processes on one host.
#[derive(Clone, Copy, Debug)]
struct CopyState {
    /// All of them wait, or waited, for a migration.
    incoming: bool,
    t: UnixMs,
}

impl Vm {
    pub fn series(&self) -> &Series {
        &self.series
    }

    /// The host whose samples are this VM's demand. `None` if none reports it now.
    pub fn running(&self) -> Option<&HostId> {
        let told = self.told.as_ref().filter(|h| self.copies.contains_key(*h));
        // A VM that left the host we were told of without our doing runs where it is no shadow.
        let primary = || self.newest(|c| !c.incoming);
        let untold = || self.told.is_none().then(|| self.newest(|_| true)).flatten();
        told.or_else(primary).or_else(untold)
    }

    fn newest(&self, wanted: impl Fn(&CopyState) -> bool) -> Option<&HostId> {
        self.copies
            .iter()
            .filter(|(_, c)| wanted(c))
            .max_by_key(|(_, c)| c.t)
            .map(|(h, _)| h)
    }

    /// Hosts that hold a copy and don't run it.
    pub fn shadows(&self) -> impl Iterator<Item = &HostId> {
        let running = self.running();
        self.copies.keys().filter(move |h| Some(*h) != running)
    }
}

impl Host {
    pub fn own(&self) -> &Series {
        &self.own
    }

    /// VMs that have a process here, running or shadow.
    pub fn vms(&self) -> impl Iterator<Item = VmId> + '_ {
        self.vms.iter().copied()
    }

    /// Seen for the first time?
    fn take(&mut self, agent_start: UnixMs, seq: u64) -> bool {
        match self.agents.iter_mut().find(|a| a.start == agent_start) {
            Some(agent) => agent.take(seq),
            None => {
                if self.agents.len() >= AGENTS_KEPT {
                    self.agents.remove(0);
                }
                self.agents.push(Agent {
                    start: agent_start,
                    highest: seq,
                    below: 0,
                });
                true
            }
        }
    }
}

/// Agent processes remembered a host: the running one, and its predecessors whose backlog may still arrive.
const AGENTS_KEPT: usize = 4;

/// Which of an agent's batches were seen: the highest, and a bit for each of the 64 below it.
#[derive(Clone, Copy, Debug)]
struct Agent {
    start: UnixMs,
    highest: u64,
    below: u64,
}

impl Agent {
    fn take(&mut self, seq: u64) -> bool {
        if seq > self.highest {
            let by = seq - self.highest;
            let shifted = u32::try_from(by)
                .ok()
                .and_then(|n| self.below.checked_shl(n))
                .unwrap_or(0);
            let old_highest = if by <= 64 { 1u64 << (by - 1) } else { 0 };
            (self.highest, self.below) = (seq, shifted | old_highest);
            return true;
        }
        let behind = self.highest - seq;
        // Older than the window: it can only be a repetition, an agent sends in order.
        if behind == 0 || behind > 64 {
            return false;
        }
        let bit = 1u64 << (behind - 1);
        let fresh = self.below & bit == 0;
        self.below |= bit;
        fresh
    }
}

/// Slots of one copy that forecasts do without.
const DISTURBED_SLOTS: i64 = 5;

/// All hosts and VMs.
#[derive(Clone, Debug)]
pub struct World {
    params: WorldParams,
    hosts: BTreeMap<HostId, Host>,
    vms: BTreeMap<VmId, Vm>,
}

impl World {
    pub fn new(params: WorldParams) -> Self {
        Self {
            params,
            hosts: BTreeMap::new(),
            vms: BTreeMap::new(),
        }
    }

    pub fn shape(&self) -> Shape {
        self.params.shape
    }

    pub fn hosts(&self) -> impl Iterator<Item = (&HostId, &Host)> {
        self.hosts.iter()
    }

    pub fn host(&self, host: &HostId) -> Option<&Host> {
        self.hosts.get(host)
    }

    pub fn vms(&self) -> impl Iterator<Item = (VmId, &Vm)> {
        self.vms.iter().map(|(id, vm)| (*id, vm))
    }

    pub fn vm(&self, vm: VmId) -> Option<&Vm> {
        self.vms.get(&vm)
    }

    /// The RPS's own knowledge of where a VM runs; holds until told otherwise.
    pub fn set_running(&mut self, vm: VmId, host: HostId) {
        self.vm_mut(vm, UnixMs::default()).told = Some(host);
    }

    /// No shadow any more: the agents' view is enough.
    pub fn clear_running(&mut self, vm: VmId) {
        if let Some(vm) = self.vms.get_mut(&vm) {
            vm.told = None;
        }
    }

    fn vm_mut(&mut self, vm: VmId, now: UnixMs) -> &mut Vm {
        let shape = self.params.shape;
        self.vms.entry(vm).or_insert_with(|| Vm {
            name: String::new(),
            vcpus: 0,
            rss_bytes: 0,
            guest_bytes: 0,
            heard: now,
            told: None,
            copies: BTreeMap::new(),
            series: Series::new(shape),
        })
    }

    /// Takes one batch in. A batch that was taken before changes nothing.
    pub fn apply(&mut self, batch: &SampleBatch, now: UnixMs) -> Result<Ingested, IngestError> {
        batch.validate()?;
        self.check_time(batch, now)?;
        let known = self.hosts.contains_key(&batch.host);
        if !known && self.hosts.len() >= self.params.hosts_max {
            return Err(IngestError::TooManyHosts {
                host: batch.host.clone(),
                max: self.params.hosts_max,
            });
        }
        let host = self.host_mut(&batch.host, now);
        if !host.take(batch.agent_start, batch.seq) {
            return Ok(Ingested {
                duplicate: true,
                ..Ingested::default()
            });
        }
        host.heard = host.heard.max(now);
        let newest = host.last_sample.is_none_or(|t| batch.t > t);
        if newest {
            host.node = batch.node;
            host.last_sample = Some(batch.t);
        }
        let known_vms = self.vms.len();
        if newest {
            self.note_copies(batch, now);
        }
        let too_late_ms = self.merge_usage(batch, now);
        Ok(Ingested {
            duplicate: false,
            vms: batch.vms.len(),
            new_vms: self.vms.len() - known_vms,
            too_late_ms,
        })
    }

    fn check_time(&self, batch: &SampleBatch, now: UnixMs) -> Result<(), IngestError> {
        let ahead_ms = batch.t.since(now);
        let max_ms = self.params.future_ms;
        if ahead_ms > i64::try_from(max_ms).unwrap_or(i64::MAX) {
            return Err(IngestError::Future {
                host: batch.host.clone(),
                ahead_ms,
                max_ms,
            });
        }
        let shape = self.params.shape;
        let max_ms = shape.slot_ms.saturating_mul(shape.keep_slots as u64);
        let age_ms = now.since(batch.t);
        if age_ms > i64::try_from(max_ms).unwrap_or(i64::MAX) {
            return Err(IngestError::TooOld {
                host: batch.host.clone(),
                age_ms,
                max_ms,
            });
        }
        Ok(())
    }

    fn host_mut(&mut self, host: &HostId, now: UnixMs) -> &mut Host {
        let shape = self.params.shape;
        self.hosts.entry(host.clone()).or_insert_with(|| Host {
            node: HostSample::default(),
            last_sample: None,
            heard: now,
            agents: Vec::new(),
            vms: BTreeSet::new(),
            own: Series::new(shape),
        })
    }

    /// Which VMs the host has now, from its newest batch.
    fn note_copies(&mut self, batch: &SampleBatch, now: UnixMs) {
        let here = batch.vms.iter().map(|s| s.vm).collect();
        let before = std::mem::replace(&mut self.host_mut(&batch.host, now).vms, here);
        // All of them: what is still here is put back below, with what is true of it now.
        for vm in before {
            if let Some(vm) = self.vms.get_mut(&vm) {
                vm.copies.remove(&batch.host);
            }
        }
        for sample in &batch.vms {
            let vm = self.vm_mut(sample.vm, now);
            let copy = CopyState {
                incoming: sample.incoming,
                t: batch.t,
            };
            let both = vm.copies.entry(batch.host.clone()).or_insert(copy);
            both.incoming &= sample.incoming;
            vm.heard = vm.heard.max(now);
        }
    }

    /// Adds what was used to the VMs' series, and the rest to the host's own.
    fn merge_usage(&mut self, batch: &SampleBatch, now: UnixMs) -> u64 {
        let mut too_late_ms = 0;
        let mut demand_run_ns = 0u64;
        for (id, samples) in by_vm(&batch.vms) {
            let vm = self.vm_mut(id, now);
            if vm.running() != Some(&batch.host) {
                continue;
            }
            vm.describe(&samples);
            let run_ns = samples.iter().map(|s| s.cpu.run_ns());
            demand_run_ns = run_ns.fold(demand_run_ns, u64::saturating_add);
            too_late_ms += vm
                .series
                .add(batch.t, batch.interval_ms, usage_of(&samples, batch.interval_ms))
                .too_late_ms;
        }
        let interval_ns = batch.interval_ms as f64 * 1e6;
        let own = batch.node.cpu_busy_ns.saturating_sub(demand_run_ns) as f64 / interval_ns;
        let usage = Usage {
            cpu_cores: own.min(batch.node.cpus),
            ..Usage::default()
        };
        self.host_mut(&batch.host, now)
            .own
            .add(batch.t, batch.interval_ms, usage);
        too_late_ms
    }

    /// A copy of a VM, ours, has loaded this host since `since`: its memory was read, sent or written. What the VMs there
    /// seem to want meanwhile is partly its doing, and a forecast that learnt it would flee from Umbra itself. A copy that
    /// takes longer than a few slots is load like any other.
    pub fn disturb(&mut self, host: &HostId, since: UnixMs, until: UnixMs) {
        let shape = self.params.shape;
        let first = shape.slot_of(since);
        let slots = first..=shape.slot_of(until).min(first.saturating_add(DISTURBED_SLOTS - 1));
        let own = self.hosts.get_mut(host).map(|h| &mut h.own);
        let vms = self.vms.values_mut().filter(|vm| vm.running() == Some(host));
        for series in vms.map(|vm| &mut vm.series).chain(own) {
            slots.clone().for_each(|slot| series.disturb(slot));
        }
    }

    /// The newest `n` slots of a VM before `now`, for the API. Gaps are absent.
    pub fn history(&self, vm: VmId, n: usize, now: UnixMs) -> Vec<HistoryPoint> {
        let shape = self.params.shape;
        let Some(vm) = self.vms.get(&vm) else { return Vec::new() };
        let end = shape.slot_of(now);
        let n = i64::try_from(n).unwrap_or(i64::MAX).min(shape.keep_slots as i64);
        (end - n..end)
            .filter_map(|slot| {
                let usage = vm.series.get(slot)?;
                let t = shape.start_of(slot);
                Some(HistoryPoint {
                    t,
                    cpu_cores: usage.cpu_cores,
                    wait_ms_per_s: usage.wait_ms_per_s,
                })
            })
            .collect()
    }

    /// Closed slots that start at `since` or later: what the store has not written yet.
    pub fn closed_slots(&self, since: UnixMs) -> Vec<SlotRow> {
        let shape = self.params.shape;
        let first = shape.slot_of(since);
        let vms = self.vms.iter().map(|(id, vm)| (SeriesKey::Vm(*id), &vm.series));
        let hosts = self
            .hosts
            .iter()
            .map(|(id, host)| (SeriesKey::Host(id.clone()), &host.own));
        vms.chain(hosts)
            .flat_map(|(key, series)| {
                series.closed_since(first).map(move |(slot, usage)| SlotRow {
                    key: key.clone(),
                    start: shape.start_of(slot),
                    usage,
                    disturbed: series.is_disturbed(slot),
                })
            })
            .collect()
    }

    /// Puts stored slots back, oldest first, before the first batch is applied. A VM is in the outlook once an agent
    /// reports it again.
    pub fn load(&mut self, rows: impl IntoIterator<Item = SlotRow>, now: UnixMs) {
        let shape = self.params.shape;
        let slot_ms = shape.slot_ms;
        for row in rows {
            let end = row.start.plus_ms(i64::try_from(slot_ms).unwrap_or(i64::MAX));
            let series = match &row.key {
                SeriesKey::Vm(vm) => &mut self.vm_mut(*vm, now).series,
                SeriesKey::Host(host) => &mut self.host_mut(host, now).own,
            };
            series.add(end, slot_ms, row.usage);
            if row.disturbed {
                series.disturb(shape.slot_of(row.start));
            }
        }
    }

    /// Forgets what was not heard of for long, but for VMs that the RPS has told us of: it knows of them, and may be
    /// waiting for a host to come back.
    pub fn expire(&mut self, now: UnixMs) -> Vec<SeriesKey> {
        let limit = i64::try_from(self.params.expire_ms).unwrap_or(i64::MAX);
        let mut gone = Vec::new();
        self.hosts.retain(|id, host| {
            let keep = now.since(host.heard) <= limit;
            if !keep {
                gone.push(SeriesKey::Host(id.clone()));
            }
            keep
        });
        let hosts = &self.hosts;
        self.vms.retain(|id, vm| {
            vm.copies.retain(|host, _| hosts.contains_key(host));
            let keep = vm.told.is_some() || now.since(vm.heard) <= limit;
            if !keep {
                gone.push(SeriesKey::Vm(*id));
            }
            keep
        });
        gone
    }
}

impl Vm {
    fn describe(&mut self, samples: &[&VmSample]) {
        let Some(first) = samples.first() else { return };
        self.name.clone_from(&first.name);
        self.vcpus = samples.iter().map(|s| s.vcpus).max().unwrap_or(first.vcpus);
        self.rss_bytes = samples.iter().map(|s| s.mem.rss_bytes).max().unwrap_or(0);
        self.guest_bytes = samples.iter().map(|s| s.mem.guest_bytes).max().unwrap_or(0);
    }
}

/// A host may hold two processes of one VM: the one that was handed over and its successor.
fn by_vm(samples: &[VmSample]) -> BTreeMap<VmId, Vec<&VmSample>> {
    let mut map: BTreeMap<VmId, Vec<&VmSample>> = BTreeMap::new();
    samples.iter().for_each(|s| map.entry(s.vm).or_default().push(s));
    map
}

/// The demand of a VM's processes together: only one of them runs, the other's figures are zero.
fn usage_of(samples: &[&VmSample], interval_ms: u64) -> Usage {
    let seconds = interval_ms as f64 / 1000.0;
    let sum = |f: fn(&VmSample) -> u64| samples.iter().map(|s| f(s) as f64).sum::<f64>();
    let run_ns = sum(|s| s.cpu.run_ns());
    let wait_ns = sum(|s| s.cpu.wait_ns());
    Usage {
        cpu_cores: (run_ns + wait_ns) / 1e9 / seconds,
        wait_ms_per_s: wait_ns / 1e6 / seconds,
        rss_bytes: samples.iter().map(|s| s.mem.rss_bytes as f64).fold(0.0, f64::max),
        net_bytes_per_s: sum(|s| s.net.rx_bytes.saturating_add(s.net.tx_bytes)) / seconds,
        disk_bytes_per_s: sum(|s| s.block.read_bytes.saturating_add(s.block.write_bytes)) / seconds,
    }
}

#[cfg(test)]
#[path = "ingest_tests.rs"]
mod tests;
