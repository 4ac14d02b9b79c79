//! The way out of every state of a VM: what the replicators tell goes in, the steps of `umbra recover` come out. Pure, and
//! shared by the RPS and by the command, which needs no RPS for it.
//!
//! ```text
//!  GET /v1/vms/{vm}/facts   of each replicator ──> plan() ──> steps, each an order to one replicator
//!                                                               with what it does and what it costs
//! ```
//! A copy is started by a step only where the other copy is proven not to run ever again: the replicator that is told to start it
//! asks the other one to write that down first, or an operator says that the other host is dead. That word is kept too, and
//! repeated to the host until it is back and has ended its copy.

mod plan;

use serde::{Deserialize, Serialize};

use crate::order::OrderKind;
use crate::replica::Phase;
use crate::{Epoch, HostId, UnixMs, VmId};

pub use plan::{Wishes, plan};

/// What an operator can have a replicator do with a VM that can't go on by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// To the source: run the stopped primary again.
    TakeBack,
    /// To the source: its primary is gone undecided; ask the target, and have a prepared shadow run.
    Ask,
    /// To the target: run the prepared shadow, whose source can't say anything any more.
    RunShadow,
    /// To the target: end a shadow that has not run.
    Discard,
    /// Remove what no record knows.
    Clean,
}

/// A copy of the VM, as its host sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Copy {
    /// There is no such process.
    Gone,
    Runs,
    /// After a migration; it runs again if it is told to.
    Stopped,
    /// By somebody's `stop`, or by an error of a disk.
    Paused,
    /// A shadow, started to be migrated into.
    Waits,
    /// In the middle of a switchover.
    Switching,
    /// It does not say.
    Silent,
}

/// How far a record on disk says that its side is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decided {
    /// Copying, or nothing begun.
    Nothing,
    /// A switchover began: source 'preparing' or 'aborting'.
    Begun,
    /// Source: given up. Target: prepared.
    Ready,
    /// Source: handed over. Target: it runs.
    Done,
    /// Source: to be run again.
    TakingBack,
    /// Over: released, retired, aborted, discarded.
    Over,
    /// Over by an operator's word, which declared this host dead.
    Fenced,
}

/// One side of a protection, on its host.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SideFacts {
    pub peer: HostId,
    /// Of the decision.
    pub epoch: Epoch,
    pub decided: Decided,
    /// What the replica reports, if it is one still.
    pub phase: Option<Phase>,
    pub since: UnixMs,
    pub copy: Copy,
}

/// A QEMU with the VM's UUID.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct QemuFacts {
    pub pid: i32,
    pub copy: Copy,
    /// A record of this host's knows it.
    pub known: bool,
    pub args: Vec<String>,
    pub qmp: Vec<String>,
}

/// `GET /v1/vms/{vm}/facts` on a replicator.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct HostFacts {
    pub host: HostId,
    pub vm: VmId,
    pub name: String,
    /// The highest seen here.
    pub epoch: Epoch,
    pub source: Option<SideFacts>,
    pub target: Option<SideFacts>,
    pub qemus: Vec<QemuFacts>,
    /// Files and processes of shadows that no record knows.
    pub leftovers: Vec<String>,
    /// What was made for the copy on record here: directory, RAM files, images, taps.
    pub belongings: Vec<String>,
    /// A host that was declared dead, and is still to be told that its copy must go.
    pub fence: Option<HostId>,
}

impl HostFacts {
    /// Whether a copy runs here.
    pub fn runs(&self) -> bool {
        let sides = self.source.iter().chain(&self.target).map(|s| s.copy);
        sides.chain(self.qemus.iter().map(|q| q.copy)).any(|c| c == Copy::Runs)
    }
}

/// A host that did not answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Missing {
    /// Its name, or the URL where it was asked.
    pub host: String,
    pub why: String,
}

/// `POST /v1/vms/{vm}/recover` on the RPS; `?dry_run=true` only shows the plan.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoverRequest {
    /// Hosts that the operator knows to be dead, or to have been cut off from their VMs' disks and networks.
    #[serde(default)]
    pub dead: Vec<HostId>,
    /// Rather lose a shadow of unknown age than run it.
    #[serde(default)]
    pub discard_shadow: bool,
}

/// One thing that will be done.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Step {
    pub host: HostId,
    pub order: OrderKind,
    pub does: String,
    /// What it costs, in words; `None` if nothing can be lost by it.
    pub risk: Option<String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Plan {
    pub vm: VmId,
    /// The orders' epoch: above all that anybody has seen.
    pub epoch: Epoch,
    /// What was found, a line a fact.
    pub found: Vec<String>,
    pub steps: Vec<Step>,
    /// What only a person can do, and what to know.
    pub by_hand: Vec<String>,
    /// How far `steps` got; absent in a dry run.
    #[serde(default)]
    pub done: Vec<String>,
}
