//! One daemon a host: the source of the VMs that run here, the target of shadows that wait here.

pub mod adopt;
pub mod launch;
pub mod proc;
pub mod qmp;
pub mod tap;
pub mod tier;
