//! umbra-agent counts what each VM of a host uses and waits for. It only reads: it tells the RPS, and asks for nothing.
//!
//! In reading order: what a QEMU's command line says ([`argv`]), what /proc says ([`procfs`]), which VMs come and go ([`track`]);
//! the kernel's side, loading the programs and reading their maps ([`kernel`]), and the host as a whole ([`node`]); growing
//! totals become deltas ([`meter`]); one round of all that ([`collect`]); and what goes out: batches to the RPS ([`push`]) and
//! `/metrics` ([`metrics`]).
//!
//! ```text
//!   /proc ──> procfs ──> track ──came, gone──┐
//!                                            v
//!   eBPF maps ──> kernel ──totals──────> collect ──SampleBatch──> push ──> RPS
//!   /proc/stat ──> node ──totals────────>    └───────Snapshot───> metrics ──> /metrics
//! ```

pub mod argv;
pub mod collect;
pub mod config;
pub mod cpulist;
pub mod kernel;
pub mod meter;
pub mod metrics;
pub mod node;
pub mod procfs;
pub mod push;
pub mod track;
