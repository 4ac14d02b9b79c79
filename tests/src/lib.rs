//! Whole-system tests and the demo: real QEMU, real networks, real daemons, all on one machine.
//!
//! [`lab`] makes several 'hosts' out of network namespaces and cpusets and removes them again whatever happens; [`demo`] is
//! `cargo xtask demo`, [`bench`] the benchmarks that need a lab, [`matrix`] what breaks when; the tests are in `tests/`.

pub mod bench;
pub mod demo;
pub mod lab;
pub mod matrix;
