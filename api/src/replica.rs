//! How a replicator reports: `GET /v1/replicas` on the replicator gives a list of [`ReplicaStatus`].

use serde::{Deserialize, Serialize};

use crate::order::{Lag, NotConverging, Refusal, Tier};
use crate::{Epoch, HostId, UnixMs, VmId};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Source,
    Target,
}

/// Where one side of a replication stands. The state machines that move it are drawn in the replicator's `source` and
/// `target` modules.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Target: admitted, the source has not come yet. Source: adopting, connecting.
    Provisioning,
    /// The first full copy is under way.
    Seeding,
    /// Warm, rounds are running.
    Standby,
    /// The guest is stopped or about to be; the outcome is not yet decided.
    Switching,
    /// Target: the shadow has loaded and waits, paused, for commit or abort.
    Prepared,
    /// Source: given up durably; the stopped primary is kept as the way back.
    Relinquished,
    /// Target: the shadow is the VM now, and runs.
    Active,
    /// Ended without a switchover; the primary runs on. `error` says why if it was not ordered.
    Released,
    /// Source: the handed-over primary's process is gone. Nothing is left of the replica here.
    Retired,
    /// Neither side can go on by itself; `error` says why, and the guide says what to do.
    Failed,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ReplicaStatus {
    pub vm: VmId,
    pub name: String,
    pub role: Role,
    pub peer: HostId,
    pub epoch: Epoch,
    /// The highest epoch that its host has seen of this VM: orders below it are refused there.
    #[serde(default)]
    pub seen: Epoch,
    pub phase: Phase,
    pub since: UnixMs,
    pub tier: Option<Tier>,
    /// The shadow's RAM, told by the target while it waits and until all of it is back after a switchover.
    #[serde(default)]
    pub memory: Option<ShadowMemory>,
    pub progress: Progress,
    /// The last completed switchover, told by the source.
    pub report: Option<SwitchoverReport>,
    /// The private disks' copies, told by the source while it copies.
    #[serde(default)]
    pub disks: Vec<DiskProgress>,
    /// Why the last attempt ended, in the words of whoever refused.
    pub error: Option<Refusal>,
}

/// How much RAM a waiting shadow takes on its host, and how fast it got back what its tier had taken.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ShadowMemory {
    /// What the guest uses: all pages that are not zero.
    pub used_bytes: u64,
    /// Of it, what is in RAM; the rest waits in swap.
    pub resident_bytes: u64,
    /// What the tier leaves it; `null`: all. More can be resident: pages that the rounds change all the time stay.
    pub limit_bytes: Option<u64>,
    /// Why less than that can't be had: this host has no swap, or its pages can't be swapped.
    pub not_shrunk: Option<String>,
    /// The last rise to a higher tier.
    pub promotion: Option<Promotion>,
}

#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Promotion {
    pub at: UnixMs,
    pub tier: Tier,
    /// Read back from swap.
    pub read_bytes: u64,
    /// From the order until the tier's RAM was there.
    pub took_ms: u64,
}

/// What a replicator keeps to while it runs: `GET` and `PUT /v1/limits`, and again from its configuration at SIGHUP.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Megabits (10⁶) a second that the host's protections may send together; `null`: as fast as it goes.
    pub bandwidth_mbit: Option<u32>,
}

/// How far the copy of one private disk is.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DiskProgress {
    /// The primary's image.
    pub path: String,
    /// What is to be copied by now: what the disk holds (its unallocated parts cost nothing), and what the guest wrote since.
    pub total_bytes: u64,
    pub copied_bytes: u64,
    /// What travelled of it to the target, since the protection began or the source's replicator was restarted: also what travelled
    /// a second time after a break.
    #[serde(default)]
    pub link_bytes: u64,
    /// Bytes of both sides that were compared in standby; ranges of 64 KiB that differed for good, and those of them that were mended.
    #[serde(default)]
    pub scrubbed_bytes: u64,
    #[serde(default)]
    pub differing_ranges: u64,
    #[serde(default)]
    pub mended_ranges: u64,
    /// The first full copy is complete; what the guest writes follows.
    pub ready: bool,
}

/// Figures of the copy. The source knows them best; the target leaves at zero what it can't know.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    pub ram_bytes: u64,
    /// Bytes of guest RAM sent so far, in the first pass.
    pub seeded_bytes: u64,
    /// How long the first pass took, once it is done.
    pub seed_ms: Option<u64>,
    /// Bytes that travelled on the link, headers included.
    pub wire_bytes: u64,
    pub rounds: u64,
    /// Pages of the last round: what the shadow missed when it was drawn.
    pub lag_pages: u64,
    /// Time since the end of the last complete round.
    pub lag_ms: u64,
    pub dirty_pages_per_s: u64,
    /// How long a switchover ordered now would stop the guest; `None` as long as the link's speed is not known.
    pub estimated_downtime_ms: Option<f64>,
    /// How the pages travelled that QEMU sent so far.
    pub pages: PageKinds,
    pub pace: Pace,
    pub resume: Resumption,
}

/// How pages travelled, by kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PageKinds {
    /// Nothing but zeros: a number.
    pub zero: PageCount,
    /// QEMU sent it again as it was: nothing travelled.
    pub same: PageCount,
    /// Another page of the target has its bytes: that one's number.
    pub known: PageCount,
    /// The change of the version sent before.
    pub delta: PageCount,
    /// Whole, in compressed batches.
    pub zstd: PageCount,
    /// Whole, in batches that did not get smaller.
    pub raw: PageCount,
}

/// Pages of one kind, and their share of the batches' bytes: what a batch takes, its head included, is shared out by what its
/// pages took before compression.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PageCount {
    pub pages: u64,
    pub bytes: u64,
}

impl PageCount {
    pub fn add(&mut self, bytes: u64) {
        self.pages += 1;
        self.bytes += bytes;
    }
}

impl PageKinds {
    pub fn all(&self) -> [(&'static str, PageCount); 6] {
        [
            ("zero", self.zero),
            ("same", self.same),
            ("known", self.known),
            ("delta", self.delta),
            ("zstd", self.zstd),
            ("raw", self.raw),
        ]
    }

    pub fn all_mut(&mut self) -> [&mut PageCount; 6] {
        [
            &mut self.zero,
            &mut self.same,
            &mut self.known,
            &mut self.delta,
            &mut self.zstd,
            &mut self.raw,
        ]
    }

    pub fn pages(&self) -> u64 {
        self.all().iter().map(|(_, c)| c.pages).sum()
    }

    pub fn bytes(&self) -> u64 {
        self.all().iter().map(|(_, c)| c.bytes).sum()
    }
}

impl std::ops::AddAssign for PageKinds {
    fn add_assign(&mut self, other: Self) {
        for (to, (_, more)) in self.all_mut().into_iter().zip(other.all()) {
            to.pages += more.pages;
            to.bytes += more.bytes;
        }
    }
}

/// How the copy keeps up, and what it costs.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Pace {
    pub convergence: Convergence,
    /// The last round as guest memory.
    pub lag_bytes: u64,
    /// Distinct pages written in the last 20 rounds.
    pub working_set_pages: u64,
    /// What the link was seen to carry; `None` until it had enough to do to tell.
    pub link_bytes_per_s: Option<u64>,
    /// Bytes on the link that a page costs, compressed.
    pub wire_bytes_per_page: Option<f64>,
    /// The round that is under way, if it does not end: since when, and how many pages by now.
    pub round_ms: u64,
    pub round_pages: u64,
    /// Before the next round.
    pub pause_ms: u64,
    /// Why that is longer than wanted.
    pub held_back_by: Option<HeldBack>,
    /// Of one CPU, by QEMU's migration threads and by the thread that carries the pages.
    pub qemu_cpu_pct: f64,
    pub own_cpu_pct: f64,
    /// Share of time in which somebody on this host waited for a CPU.
    pub host_wait_pct: Option<f64>,
    /// How much the guest is slowed down.
    pub throttle_pct: Option<u8>,
    /// What was ordered for this VM.
    pub max_downtime_ms: u64,
    pub max_lag: Option<Lag>,
    pub when_too_fast: NotConverging,
    pub max_bandwidth_mbit: Option<u32>,
}

/// Whether rounds end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Convergence {
    /// No round was complete yet, and none was too long.
    #[default]
    Unknown,
    Converging,
    NotConverging,
}

/// What makes a pause longer than the pacing wants.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldBack {
    /// The bound on QEMU's CPU time.
    QemuCpu,
    /// The bound on the replicator's own.
    OwnCpu,
    /// Others wait for a CPU on this host.
    HotHost,
}

/// How a copy that broke off went on, and what was found about its shadow's memory. Counts since the protection began, or its
/// replicator was restarted.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Resumption {
    /// The copy broke off then, and is not warm again yet: it goes on by itself.
    pub broken_since: Option<UnixMs>,
    /// Attempts at a new pass after a break.
    pub passes: u64,
    /// Pages of the latest first pass that travelled (zeros not counted), and those that the target had already.
    pub sent_pages: u64,
    pub skipped_pages: u64,
    /// Pages that were compared with what was sent, and those that differed.
    pub scrubbed_pages: u64,
    /// Those of the first that were read back from swap for it.
    pub scrubbed_swap_pages: u64,
    /// CPU time that this side has spent on it.
    pub scrub_cpu_us: u64,
    pub differing_pages: u64,
}

/// One switchover, as the source saw it. Times that compare two hosts' clocks say so.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct SwitchoverReport {
    pub at: UnixMs,
    pub epoch: Epoch,
    /// From QEMU's STOP on the primary to RESUME on the shadow, by the two QEMUs' own event times. Compares two
    /// clocks if the hosts are two machines.
    pub guest_stopped_us: u64,
    /// The same, from the STOP to the arrival of 'running' at the source: one clock, and half a round trip too long.
    pub stopped_to_told_us: u64,
    /// From the order to the arrival of 'running'.
    pub order_to_told_us: u64,
    pub last_pass_us: u64,
    pub device_state_us: u64,
    /// While the guest was stopped: until its private disks were equal on both sides.
    #[serde(default)]
    pub disks_us: u64,
    pub load_us: u64,
    pub relinquish_us: u64,
    pub shut_us: u64,
    pub resume_us: u64,
    pub last_pass_pages: u64,
    pub device_state_bytes: u64,
    /// Link bytes of this protection, seed and rounds and switchover.
    pub wire_bytes: u64,
}
