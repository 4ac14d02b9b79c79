//! One daemon a host: the source of the VMs that run here, the target of shadows that wait here.
//!
//! In reading order: what QEMU says ([`qmp`], [`proc`], [`stream`]), what a shadow is made of ([`adopt`], [`launch`],
//! [`ram`], [`synth`], [`tap`]), what it costs ([`tier`], [`memory`]), how pages travel ([`encode`], [`pacing`] and [`heat`], [`link`], [`bucket`], [`limits`], [`urgent`],
//! disks by [`tunnel`], and [`nbd`] to look at them), what must not be forgotten ([`journal`]), how a copy that broke off goes on ([`resume`]), the two sides ([`source`], [`target`]), and what holds them together ([`engine`], [`http`], [`config`]). [`faults`] is for tests.

pub mod adopt;
pub mod bucket;
pub mod config;
pub mod encode;
pub mod engine;
pub mod faults;
pub mod heat;
pub mod http;
pub mod journal;
pub mod launch;
pub mod limits;
pub mod link;
pub mod memory;
pub mod metrics;
pub mod nbd;
pub mod pacing;
pub mod proc;
pub mod qmp;
pub mod ram;
pub mod resume;
pub mod source;
pub mod stream;
pub mod synth;
pub mod tap;
pub mod target;
pub mod tier;
pub mod tunnel;
pub mod urgent;

pub use umbra_daemon::chain;
