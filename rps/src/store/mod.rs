//! What a restart needs: VM states, orders, lifecycle events, decisions with their explanations, the slots of the series, the
//! mode. One trait, so that PostgreSQL can join; the default is one SQLite file ([`sqlite`]).
//!
//! Writes come in batches that are committed whole. An order is committed before it is sent, and so is the edge that it
//! follows from.

mod sqlite;

pub use sqlite::SqliteStore;

use std::path::PathBuf;

use umbra_api::view::{DecisionView, LifecycleEvent, Mode};
use umbra_api::{DecisionId, UnixMs, VmId};

use crate::ingest::SlotRow;
use crate::lifecycle::VmState;
use crate::orchestrator::orders::OrderRecord;

#[derive(Clone, PartialEq, Debug)]
pub enum Write {
    /// In place of the VM's former state.
    Vm(Box<VmState>),
    /// In place of the order's former record.
    Order(Box<OrderRecord>),
    Event(LifecycleEvent),
    Decision(Box<DecisionView>),
    /// In place of the same slots, if they were written before.
    Slots(Vec<SlotRow>),
    Mode(Mode),
}

/// What is read at the start.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Loaded {
    pub states: Vec<VmState>,
    /// Orders that are pending, or belong to a VM's present protection.
    pub orders: Vec<OrderRecord>,
    pub mode: Option<Mode>,
    pub last_decision: DecisionId,
}

/// Which events or decisions.
#[derive(Clone, PartialEq, Debug)]
pub struct Filter {
    pub vm: Option<VmId>,
    /// At this time or later.
    pub since: Option<UnixMs>,
    /// The newest so many.
    pub limit: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("store {}: {source}", .file.display())]
    Sql { file: PathBuf, source: rusqlite::Error },
    #[error("store {}: {source}", .file.display())]
    Io { file: PathBuf, source: std::io::Error },
    #[error("store {}: its schema is version {found}, this program knows {known}: it was written by a newer umbra-rps", .file.display())]
    Newer { file: PathBuf, found: i64, known: i64 },
    #[error("store {}: it is in use by another process", .file.display())]
    Locked { file: PathBuf },
    #[error("store {}: this is no umbra-rps store: {reason}", .file.display())]
    NotAStore { file: PathBuf, reason: String },
    #[error("store {}: {what} can't be read back: {reason}", .file.display())]
    Row {
        file: PathBuf,
        what: &'static str,
        reason: String,
    },
}

pub trait Store: Send {
    /// All or nothing, and on the disk when it returns.
    fn commit(&mut self, writes: &[Write]) -> Result<(), StoreError>;

    fn load(&self) -> Result<Loaded, StoreError>;

    /// Slots that start at `since` or later, oldest first.
    fn slots(&self, since: UnixMs) -> Result<Vec<SlotRow>, StoreError>;

    /// Oldest first.
    fn events(&self, filter: &Filter) -> Result<Vec<LifecycleEvent>, StoreError>;

    /// Newest first.
    fn decisions(&self, filter: &Filter) -> Result<Vec<DecisionView>, StoreError>;

    /// Forgets what is older: slots of before `slots`, events, decisions and answered orders of before `history`.
    fn prune(&mut self, slots: UnixMs, history: UnixMs) -> Result<usize, StoreError>;
}

#[cfg(test)]
mod tests;
