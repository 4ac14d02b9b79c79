//! The programs in the kernel. Dropping a [`Probe`] detaches them and frees the maps.

use std::path::Path;

use aya::maps::{Array, HashMap, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues};
use aya::programs::BtfTracePoint;
use aya::util::nr_cpus;
use aya::{Btf, Ebpf, EbpfLoader, Pod, include_bytes_aligned};
use aya_log::EbpfLogger;
use nix::time::{ClockId, clock_gettime};
use tracing::{debug, warn};
use umbra_agent_ebpf::{
    BlockTotals, FILTER_WORDS, LATENCY_BUCKETS, NIC_FILTER_WORDS, NicKey, NicTotals, PROGRAMS, Thread, lost, maps,
    state,
};

use super::filter::Filter;
use super::{Kernel, KernelError, Lost, ProgramCost, ProgramState, btf, netns};
use crate::procfs::Procfs;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/umbra-agent.bpf.o"));

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
/// Threads a VM: vCPUs, I/O threads and workers. More on one VM are fine as long as others have fewer.
const THREADS_PER_VM: u32 = 32;
const NICS_PER_VM: u32 = 4;
/// bpf(2): insert only what is not there.
const BPF_NOEXIST: u64 = 1;

/// Messages of the programs, to be flushed when readable.
pub type Messages = EbpfLogger<&'static dyn log::Log>;

pub struct Probe {
    /// Owns the programs and their attachments.
    bpf: Ebpf,
    programs: Vec<ProgramState>,
    filter: Filter,
    filter_map: Array<MapData, u64>,
    nic_filter: Filter,
    nic_filter_map: Array<MapData, u64>,
    vms: HashMap<MapData, u32, u32>,
    threads: HashMap<MapData, u32, Thread>,
    block: PerCpuArray<MapData, BlockTotals>,
    nics: PerCpuHashMap<MapData, NicKey, NicTotals>,
    lost: PerCpuArray<MapData, u64>,
    proc: Procfs,
    own_netns: Option<u32>,
}

impl Probe {
    /// Loads and attaches what this kernel takes; what it does not is left out, with a message.
    pub fn load(max_vms: u32, proc: Procfs) -> Result<(Self, Option<Messages>), KernelError> {
        if OBJECT.is_empty() {
            return Err(KernelError::NoPrograms);
        }
        let globals = btf::read(Path::new(VMLINUX)).map_err(|e| KernelError::NoBtf(e.to_string()))?;
        let kernel_btf = Btf::from_sys_fs().map_err(|e| KernelError::NoBtf(e.to_string()))?;
        let mut bpf = create_maps(max_vms, &globals, &kernel_btf)?;
        let messages = match EbpfLogger::init(&mut bpf) {
            Ok(m) => Some(m),
            Err(e) => {
                warn!("messages of the kernel programs can't be read: {e}");
                None
            }
        };
        let attach_one = |(group, name): &(_, &'static str)| {
            let missing = match globals.missing.iter().find(|(g, _)| g == group) {
                Some((_, reason)) => Some(reason.clone()),
                None => attach(&mut bpf, name, &kernel_btf).err(),
            };
            if let Some(reason) = &missing {
                warn!("program {name} is left out: {reason}");
            }
            ProgramState { name, missing }
        };
        let programs: Vec<ProgramState> = PROGRAMS.iter().map(attach_one).collect();
        if programs.iter().all(|p| p.missing.is_some()) {
            let first = programs.into_iter().find_map(|p| p.missing).unwrap_or_default();
            return Err(KernelError::NothingAttached(first));
        }
        let own_netns = proc.own_netns();
        let probe = Self {
            programs,
            filter: Filter::new(FILTER_WORDS),
            filter_map: take(&mut bpf, maps::FILTER)?,
            nic_filter: Filter::new(NIC_FILTER_WORDS),
            nic_filter_map: take(&mut bpf, maps::NIC_FILTER)?,
            vms: take(&mut bpf, maps::VMS)?,
            threads: take(&mut bpf, maps::THREADS)?,
            block: take(&mut bpf, maps::BLOCK)?,
            nics: take(&mut bpf, maps::NICS)?,
            lost: take(&mut bpf, maps::LOST)?,
            bpf,
            proc,
            own_netns,
        };
        Ok((probe, messages))
    }

    pub fn programs(&self) -> &[ProgramState] {
        &self.programs
    }

    /// Runs and time of each program, as the kernel counts them while statistics are on (`kernel.bpf_stats_enabled`).
    pub fn costs(&self) -> Vec<ProgramCost> {
        let cost = |(_, name): &(_, &'static str)| {
            let program: &BtfTracePoint = self.bpf.program(name)?.try_into().ok()?;
            let info = program.info().ok()?;
            let run_ns = u64::try_from(info.run_time().as_nanos()).ok()?;
            let runs = info.run_count();
            Some(ProgramCost { name, runs, run_ns })
        };
        PROGRAMS.iter().filter_map(cost).collect()
    }
}

fn create_maps(max_vms: u32, globals: &btf::Globals, kernel_btf: &Btf) -> Result<Ebpf, KernelError> {
    let level: u8 = match log::max_level() {
        log::LevelFilter::Off => 0,
        l => l as u8,
    };
    let mut loader = EbpfLoader::new();
    loader
        .btf(Some(kernel_btf))
        .map_max_entries(maps::VMS, max_vms)
        .map_max_entries(maps::BLOCK, max_vms)
        .map_max_entries(maps::THREADS, max_vms.saturating_mul(THREADS_PER_VM))
        .map_max_entries(maps::NICS, max_vms.saturating_mul(NICS_PER_VM))
        // Messages below the log's level are not even written by the kernel.
        .override_global(aya_log::LEVEL, &level, false);
    for (name, value) in &globals.values {
        loader.override_global(name, value, true);
    }
    loader.load(OBJECT).map_err(|e| KernelError::Load(chain(&e)))
}

fn attach(bpf: &mut Ebpf, name: &'static str, btf: &Btf) -> Result<(), String> {
    let program = bpf.program_mut(name).ok_or("it is not in the object")?;
    let program: &mut BtfTracePoint = program.try_into().map_err(|e| chain(&e))?;
    program.load(name, btf).map_err(|e| chain(&e))?;
    program.attach().map_err(|e| chain(&e))?;
    Ok(())
}

/// Errors of aya keep their reason in the source.
fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(s) = next {
        text = format!("{text}: {s}");
        next = s.source();
    }
    text
}

fn take<M: TryFrom<aya::maps::Map, Error = MapError>>(bpf: &mut Ebpf, map: &'static str) -> Result<M, KernelError> {
    let found = bpf
        .take_map(map)
        .ok_or_else(|| KernelError::Load(format!("the object has no map {map}")))?;
    found.try_into().map_err(failed(map))
}

fn failed(map: &'static str) -> impl FnOnce(MapError) -> KernelError {
    move |source| KernelError::Map {
        map,
        source: Box::new(source),
    }
}

fn sum<T: Pod>(values: &PerCpuValues<T>, add: impl Fn(T, &T) -> T, zero: T) -> T {
    values.iter().fold(zero, add)
}

impl Kernel for Probe {
    fn now_ns(&self) -> u64 {
        match clock_gettime(ClockId::CLOCK_MONOTONIC) {
            Ok(t) => t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64,
            // CLOCK_MONOTONIC can always be read; 0 makes every open stretch empty.
            Err(_) => 0,
        }
    }

    fn watch(&mut self, pid: u32, slot: u32) -> Result<(), KernelError> {
        self.vms.insert(pid, slot, 0).map_err(failed(maps::VMS))?;
        match self.filter.add(pid) {
            Some((word, value)) => self.filter_map.set(word, value, 0).map_err(failed(maps::FILTER)),
            None => Ok(()),
        }
    }

    fn unwatch(&mut self, pid: u32) {
        let cleared = self
            .filter
            .remove(pid)
            .map(|(word, value)| self.filter_map.set(word, value, 0));
        if let Some(Err(e)) = cleared {
            debug!("filter of {pid}: {e}");
        }
        if let Err(e) = self.vms.remove(&pid) {
            debug!("unwatch {pid}: {e}");
        }
    }

    fn seed(&mut self, pid: u32, tid: u32) {
        let now = self.now_ns();
        let thread = Thread {
            born_ns: now,
            since_ns: now,
            tgid: pid,
            state: state::SEEDED,
            ..Thread::default()
        };
        // It is there already if it switched in the meantime.
        let _ = self.threads.insert(tid, thread, BPF_NOEXIST);
    }

    fn unseed(&mut self, tid: u32) {
        if self.threads.get(&tid, 0).is_ok_and(|t| t.state == state::SEEDED) {
            self.forget(tid);
        }
    }

    fn threads(&self) -> Result<Vec<(u32, Thread)>, KernelError> {
        self.threads
            .iter()
            .collect::<Result<_, _>>()
            .map_err(failed(maps::THREADS))
    }

    fn forget(&mut self, tid: u32) {
        // It may be gone already.
        let _ = self.threads.remove(&tid);
    }

    fn block(&self, slot: u32) -> Result<BlockTotals, KernelError> {
        let values = self.block.get(&slot, 0).map_err(failed(maps::BLOCK))?;
        Ok(sum(&values, add_block, BlockTotals::default()))
    }

    fn watch_nic(&mut self, nic: NicKey) -> Result<(), KernelError> {
        let cpus = nr_cpus().map_err(|(_, e)| failed(maps::NICS)(e.into()))?;
        let zeros =
            PerCpuValues::try_from(vec![NicTotals::default(); cpus]).map_err(|e| failed(maps::NICS)(e.into()))?;
        self.nics.insert(nic, zeros, 0).map_err(failed(maps::NICS))?;
        match self.nic_filter.add(nic.ifindex) {
            Some((word, value)) => self
                .nic_filter_map
                .set(word, value, 0)
                .map_err(failed(maps::NIC_FILTER)),
            None => Ok(()),
        }
    }

    fn unwatch_nic(&mut self, nic: NicKey) {
        let cleared = self
            .nic_filter
            .remove(nic.ifindex)
            .map(|(word, value)| self.nic_filter_map.set(word, value, 0));
        if let Some(Err(e)) = cleared {
            debug!("filter of {nic:?}: {e}");
        }
        if let Err(e) = self.nics.remove(&nic) {
            debug!("unwatch {nic:?}: {e}");
        }
    }

    fn nic(&self, nic: NicKey) -> Result<NicTotals, KernelError> {
        let values = self.nics.get(&nic, 0).map_err(failed(maps::NICS))?;
        Ok(sum(&values, add_nic, NicTotals::default()))
    }

    fn lost(&self) -> Lost {
        let of = |entry: u32| self.lost.get(&entry, 0).map_or(0, |v| v.iter().sum());
        Lost {
            threads: of(lost::THREADS),
            requests: of(lost::REQUESTS),
        }
    }

    fn ifindexes(&self, pid: u32, ns: u32, names: &[String]) -> Vec<(String, u32)> {
        if self.own_netns == Some(ns) {
            return netns::ifindexes(names);
        }
        netns::ifindexes_in(&self.proc.netns_path(pid), names).unwrap_or_else(|e| {
            debug!("network namespace of process {pid}: {e}");
            Vec::new()
        })
    }
}

fn add_block(mut a: BlockTotals, b: &BlockTotals) -> BlockTotals {
    a.read_bytes += b.read_bytes;
    a.write_bytes += b.write_bytes;
    a.read_ops += b.read_ops;
    a.write_ops += b.write_ops;
    a.latency_ns_sum += b.latency_ns_sum;
    let buckets: &[u64; LATENCY_BUCKETS] = &b.latency_us_log2;
    a.latency_us_log2.iter_mut().zip(buckets).for_each(|(x, y)| *x += y);
    a
}

fn add_nic(mut a: NicTotals, b: &NicTotals) -> NicTotals {
    a.rx_bytes += b.rx_bytes;
    a.tx_bytes += b.tx_bytes;
    a.rx_packets += b.rx_packets;
    a.tx_packets += b.tx_packets;
    a
}
