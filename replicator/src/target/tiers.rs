//! What a shadow may use while it waits: CPU by its cgroup's quota, RAM by a [`Keeper`] once there is something to keep.

use std::sync::{Arc, Mutex, PoisonError};

use umbra_api::VmId;
use umbra_api::order::{Peak, Tier};
use umbra_api::replica::{ReplicaStatus, ShadowMemory};

use crate::launch::ShadowRecord;
use crate::memory::group::MemoryGroup;
use crate::memory::keeper::{Keeper, Shares};
use crate::memory::pages::Pages;
use crate::tier::{Group, TierError};

pub struct Tiers {
    vm: VmId,
    cpu: Option<Group>,
    memory: Option<MemoryGroup>,
    shares: Shares,
    keeper: Option<Keeper>,
    /// Ordered before the RAM was there.
    wanted: Option<(Tier, Peak)>,
    ran: bool,
}

impl Tiers {
    pub fn new(record: &ShadowRecord, shares: Shares) -> Self {
        Self {
            vm: record.vm,
            cpu: record.cgroup.as_deref().map(Group::open),
            memory: record.memory_cgroup.as_deref().map(MemoryGroup::open),
            shares,
            keeper: None,
            wanted: None,
            ran: false,
        }
    }

    /// The shadow's RAM is being written from now on. Its state is told in `status`.
    pub fn keep(&mut self, files: Vec<Arc<Pages>>, status: Arc<Mutex<ReplicaStatus>>) {
        let tell = move |memory: &_| {
            let mut status = status.lock().unwrap_or_else(PoisonError::into_inner);
            status.memory = Some(ShadowMemory::clone(memory));
        };
        match Keeper::start(self.vm, files, self.memory.clone(), self.shares, tell) {
            Ok(keeper) => {
                if let Some((tier, peak)) = self.wanted {
                    keeper.set(tier, peak);
                }
                self.keeper = Some(keeper);
            }
            Err(e) => tracing::warn!(vm = %self.vm, "the shadow's RAM has no tiers: {e}"),
        }
    }

    pub fn set(&mut self, tier: Tier, peak: Peak) -> Result<(), TierError> {
        self.wanted = Some((tier, peak));
        // A VM that runs has all of its RAM.
        if let Some(keeper) = self.keeper.as_ref().filter(|_| !self.ran) {
            keeper.set(tier, peak);
        }
        match &self.cpu {
            Some(group) if tier == Tier::Active => group.lift(),
            Some(group) => group.set(self.shares.of(tier), peak),
            None => Ok(()),
        }
    }

    /// A guest may stand still from now on: no limit of a tier may stretch that, and nothing is swapped.
    pub fn lift(&self) {
        if let Some(keeper) = &self.keeper {
            keeper.hold();
        }
        if let Some(Err(e)) = self.cpu.as_ref().map(Group::lift) {
            tracing::warn!(vm = %self.vm, "the shadow's CPU limit stays: {e}");
        }
    }

    /// The VM runs here, and has all that it had.
    pub fn runs(&mut self) {
        if let Some(keeper) = self.keeper.as_ref().filter(|_| !self.ran) {
            keeper.runs();
        }
        self.ran = true;
    }

    /// The shadow's RAM is of no use any more.
    pub fn end(&mut self) {
        self.keeper = None;
    }

    /// After a restart of the replicator, which may have died over a limit that it had set for a moment.
    pub fn restore(&self) {
        if let Some(Err(e)) = self.memory.as_ref().map(MemoryGroup::lift) {
            tracing::warn!(vm = %self.vm, "the shadow's memory limit stays: {e}");
        }
    }
}
