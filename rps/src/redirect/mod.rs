//! Leading traffic to where the VM runs now. An adapter says what is to be done at each step of a move, the orchestrator
//! does it; so an adapter is as pure as the rest, and its effects go through the same store as every order.
//!
//! ```text
//!  prepare ──> (switchover) ──> commit       the VM runs on `to`
//!     │              └────────> rollback     it runs on `from` as before
//!     └─ refused: the move does not begin
//! ```

mod announce;

pub use announce::AnnounceSelf;

use serde::{Deserialize, Serialize};
use umbra_api::order::OrderKind;
use umbra_api::{Epoch, HostId, UnixMs, VmId};

/// One VM changes hosts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Move {
    pub vm: VmId,
    pub name: String,
    pub from: HostId,
    pub to: HostId,
    /// The epoch under which it runs on `to`.
    pub epoch: Epoch,
}

/// What an adapter wants done.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// An order to a host's replicator.
    Order { to: HostId, kind: OrderKind },
}

/// How long it took to lead the traffic over, and whether it worked.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RedirectReport {
    pub adapter: String,
    pub at: UnixMs,
    /// From the commit to the last answer.
    pub took_ms: u64,
    pub error: Option<String>,
}

pub trait Redirect: Send + Sync {
    /// As in the configuration and in reports: `announce`.
    fn name(&self) -> &'static str;

    /// Before the switchover is ordered. A refusal, in the adapter's words, keeps the VM where it is.
    fn prepare(&self, mv: &Move) -> Result<Vec<Effect>, String>;

    /// The VM runs on `mv.to`.
    fn commit(&self, mv: &Move) -> Vec<Effect>;

    /// The switchover came to nothing, the VM runs on `mv.from`.
    fn rollback(&self, mv: &Move) -> Vec<Effect>;
}
