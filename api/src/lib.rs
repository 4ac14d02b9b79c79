//! The words that Umbra's parts say to each other. Pure: nothing here opens a socket or reads a clock.
//!
//! In reading order: [`ids`] and [`units`], what the agent tells ([`sample`]), what the RPS orders and the
//! replicators report ([`order`], [`replica`], [`pace`]), the way out of trouble ([`recover`]), whether a VM can be shadowed ([`adopt`]), where a VM stands ([`lifecycle`]), what the HTTP API
//! shows ([`view`], [`problem`]), and the frames between two replicators ([`wire`]).

pub mod adopt;
pub mod ids;
pub mod lifecycle;
pub mod order;
pub mod pace;
pub mod problem;
pub mod recover;
pub mod replica;
pub mod sample;
pub mod units;
pub mod view;
pub mod wire;

pub use ids::{DecisionId, Epoch, HostId, OrderId, VmId};
pub use units::UnixMs;
