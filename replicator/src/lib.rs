//! One daemon a host: the source of the VMs that run here, the target of shadows that wait here.

pub mod adopt;
pub mod encode;
pub mod launch;
pub mod link;
pub mod pacing;
pub mod proc;
pub mod qmp;
pub mod ram;
pub mod stream;
pub mod synth;
pub mod tap;
pub mod tier;
