//! The kernel's side: [`Kernel`] is the door to the programs and their maps, [`Probe`] the real one. Offsets of the kernel's structs come
//! from its BTF ([`btf`]), taps are found by name in their network namespace ([`netns`]), and [`filter`] keeps the bits by which the
//! programs leave early.

use umbra_agent_ebpf::{BlockTotals, NicKey, NicTotals, Thread};

pub mod btf;
pub mod filter;
pub mod netns;
mod probe;

pub use probe::{Messages, Probe};

/// What the collector asks of the kernel. One method a fact, so that a fake is short.
pub trait Kernel {
    /// CLOCK_MONOTONIC, which the programs read too.
    fn now_ns(&self) -> u64;
    /// From now on the process's threads and requests are counted, the requests under `slot`.
    fn watch(&mut self, pid: u32, slot: u32) -> Result<(), KernelError>;
    fn unwatch(&mut self, pid: u32);
    /// A thread that is runnable now: without this, a vCPU that owns its CPU would be unknown until its next switch.
    fn seed(&mut self, pid: u32, tid: u32);
    /// The thread turned out to sleep after all.
    fn unseed(&mut self, tid: u32);
    /// All threads known to the programs; one may appear twice, with the same totals or newer ones.
    fn threads(&self) -> Result<Vec<(u32, Thread)>, KernelError>;
    fn forget(&mut self, tid: u32);
    fn block(&self, slot: u32) -> Result<BlockTotals, KernelError>;
    fn watch_nic(&mut self, nic: NicKey) -> Result<(), KernelError>;
    fn unwatch_nic(&mut self, nic: NicKey);
    fn nic(&self, nic: NicKey) -> Result<NicTotals, KernelError>;
    fn lost(&self) -> Lost;
    /// Interfaces of a process's network namespace by name; those that are not there are left out.
    fn ifindexes(&self, pid: u32, netns: u32, names: &[String]) -> Vec<(String, u32)>;
}

/// Events that found a map full.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lost {
    pub threads: u64,
    pub requests: u64,
}

/// A program of the agent: what the kernel made of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProgramState {
    pub name: &'static str,
    /// Why it is not attached.
    pub missing: Option<String>,
}

/// What a program cost since statistics were switched on.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ProgramCost {
    pub name: &'static str,
    pub runs: u64,
    pub run_ns: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error(
        "the agent was built without its kernel programs (UMBRA_EBPF=skip): build it again after `cargo xtask build`"
    )]
    NoPrograms,
    #[error("the kernel has no BTF, which the programs need to know its structs (CONFIG_DEBUG_INFO_BTF): {0}")]
    NoBtf(String),
    #[error("the kernel refuses the agent's maps: {0} (CAP_BPF and CAP_PERFMON are needed)")]
    Load(String),
    #[error("none of the kernel programs could be attached; the first: {0}")]
    NothingAttached(String),
    #[error("map {map}: {source}")]
    Map {
        map: &'static str,
        source: Box<aya::maps::MapError>,
    },
}
