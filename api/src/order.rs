//! What the RPS orders and how a replicator answers: `POST /v1/orders` on the replicator.
//!
//! An order is accepted or refused at once; its effect shows in the replica's status ([`crate::replica`]). Orders are
//! idempotent: the same order again is accepted again and does nothing new.

use serde::{Deserialize, Serialize};

use crate::recover::Way;
use crate::{Epoch, HostId, OrderId, VmId};

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    pub id: OrderId,
    pub vm: VmId,
    /// The epoch under which the order is valid. A replicator that has seen a higher one refuses.
    pub epoch: Epoch,
    pub kind: OrderKind,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields, tag = "order")]
pub enum OrderKind {
    /// To the target: a shadow of this VM may be seeded here by `source`.
    Admit { source: HostId },
    /// To the source: adopt the running VM, seed a shadow at `link`, then hold it warm.
    Protect {
        target: HostId,
        /// `address:port` of the target's link listener.
        link: String,
        pacing: Pacing,
    },
    /// To the target: give the shadow this much of its expected peak.
    Tier { tier: Tier, expected_peak: Peak },
    /// To the source: switch over. The order's epoch is the one that the shadow will run under.
    Switchover,
    /// To the target, to run after a switchover: announce the VM's addresses on its network (again).
    Announce { announce: Announce },
    /// To the source: end the hold, the primary runs on. To the target: discard the shadow. Never stops a VM that runs.
    Release,
    /// To the former source after a switchover: quit the stopped primary that was kept as the way back.
    Retire,
    /// An operator's way out of a state that ends by itself no more. `dead`: a host that runs no copy by the operator's word,
    /// which is kept, and told to that host (at `link`, where it is not known) when it is back.
    Recover {
        way: Way,
        #[serde(default)]
        dead: Option<HostId>,
        #[serde(default)]
        link: Option<String>,
    },
    /// To the host where a former shadow is the VM: forget it while it runs on, its management is somebody else's.
    HandOver,
}

impl OrderKind {
    /// The order's name, as in the JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Admit { .. } => "admit",
            Self::Protect { .. } => "protect",
            Self::Tier { .. } => "tier",
            Self::Switchover => "switchover",
            Self::Announce { .. } => "announce",
            Self::Release => "release",
            Self::Retire => "retire",
            Self::Recover { .. } => "recover",
            Self::HandOver => "hand_over",
        }
    }
}

/// How the copy of one VM is to keep up. What it may cost is its host's affair, and stands in the replicator's configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pacing {
    /// Pause between two rounds, where the host's bounds and `lag` do not want another. QEMU must not be left unread for longer
    /// than half a second.
    pub round_ms: u64,
    /// What the shadow may miss: rounds follow each other sooner to keep to it.
    pub lag: Option<Lag>,
    /// No switchover that would stop the guest for longer; one that does is given up, and the guest runs on where it was.
    pub max_downtime_ms: u64,
    /// What to do with a guest that dirties its memory faster than the link carries it.
    pub not_converging: NotConverging,
    /// What this copy may take of the link, memory and disks, beside what its host allows all of them. Not in the last pass of a switchover,
    /// where the host does not say so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_mbit: Option<u32>,
}

impl Default for Pacing {
    fn default() -> Self {
        Self {
            round_ms: 500,
            lag: None,
            max_downtime_ms: 1_000,
            not_converging: NotConverging::default(),
            bandwidth_mbit: None,
        }
    }
}

impl Pacing {
    /// The first key whose value makes no sense, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let between = |key, v: u64, most: u64| match (1..=most).contains(&v) {
            true => Ok(()),
            false => Err((key, format!("{v} is not between 1 and {most}"))),
        };
        if self.round_ms > ROUND_MS_MAX {
            return Err(("round_ms", format!("{} is above {ROUND_MS_MAX}", self.round_ms)));
        }
        between("round_ms", self.round_ms, ROUND_MS_MAX)?;
        between("max_downtime_ms", self.max_downtime_ms, DOWNTIME_MS_MAX)?;
        if let Some(Lag::Pages(n) | Lag::Bytes(n) | Lag::Ms(n)) = self.lag
            && n == 0
        {
            // A shadow always misses what was written a moment ago.
            return Err(("lag", "0 can't be kept, at least 1".to_owned()));
        }
        match self.bandwidth_mbit {
            Some(0) => Err(("bandwidth_mbit", "0 carries nothing, at least 1".to_owned())),
            _ => Ok(()),
        }
    }
}

/// A lag, by what it is told in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lag {
    Pages(u64),
    /// Of guest memory.
    Bytes(u64),
    /// Between the ends of two rounds.
    Ms(u64),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NotConverging {
    /// Copy on, and refuse a switchover for as long as it lasts.
    #[default]
    #[serde(alias = "accept-longer")]
    AcceptLonger,
    /// End the protection.
    #[serde(alias = "give-up")]
    GiveUp,
    /// Slow the guest's CPUs down until its memory can be followed.
    Throttle,
}

/// Longest pause between rounds: longer ones make QEMU's main loop hang on some commands.
pub const ROUND_MS_MAX: u64 = 500;

/// A guest that stands still for longer has lost its clients anyway.
pub const DOWNTIME_MS_MAX: u64 = 60_000;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Warm, 10 % of the expected peak.
    Standby,
    /// Contention is near, 50 %.
    Armed,
    /// It runs, or is about to, 100 %.
    Active,
}

impl Tier {
    /// Share of the expected peak, by default.
    pub fn share(self) -> f64 {
        match self {
            Self::Standby => 0.10,
            Self::Armed => 0.50,
            Self::Active => 1.0,
        }
    }
}

/// The forecast's p99 over the horizon.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peak {
    pub cpu_cores: f64,
    pub mem_bytes: u64,
}

/// QEMU's `announce-self` parameters, all in milliseconds but `rounds`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announce {
    pub initial_ms: u32,
    pub max_ms: u32,
    pub rounds: u32,
    pub step_ms: u32,
}

impl Default for Announce {
    fn default() -> Self {
        Self {
            initial_ms: 10,
            max_ms: 200,
            rounds: 8,
            step_ms: 20,
        }
    }
}

/// Why a replicator refused an order, or could not go on. The code is stable; `detail` carries the peer's own words.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {detail}")]
pub struct Refusal {
    pub code: RefusalCode,
    pub detail: String,
}

impl Refusal {
    pub fn new(code: RefusalCode, detail: impl Into<String>) -> Self {
        Self {
            code,
            detail: detail.into(),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// The order's epoch is below the highest one seen.
    StaleEpoch,
    /// No running QEMU with this UUID on this host.
    NoSuchVm,
    /// There is no replica of this VM here, or not in a phase in which the order makes sense.
    WrongPhase,
    /// QEMU is older than 8.1.
    QemuTooOld,
    /// The QMP socket is missing, busy, or closed.
    QmpUnavailable,
    /// The VM has a device, disk or chardev that cannot be shadowed.
    Unsupported,
    /// The target has not the RAM, or lacks a file, bridge or machine type.
    TargetLacks,
    /// The peer's replicator can't be reached.
    PeerUnreachable,
    /// The peer refused; `detail` has its words.
    PeerRefused,
    /// The peer's certificate is not that of the host in whose name it speaks.
    PeerIdentity,
    /// The order itself makes no sense (a bad address, a round longer than half a second).
    BadOrder,
    /// Somebody else stopped, changed, shut down or migrated the VM while it was copied.
    Interfered,
    /// The guest dirties its memory faster than the link carries it.
    NotConverging,
    /// The guest would stand still, or has stood still, for longer than `max_downtime_ms`.
    DowntimeTooLong,
    /// Something on this host failed: a full disk, a missing permission.
    Local,
}

impl std::fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_have_a_flat_and_named_form() {
        let order = Order {
            id: OrderId(uuid::Uuid::nil()),
            vm: VmId(uuid::Uuid::nil()),
            epoch: Epoch(3),
            kind: OrderKind::Protect {
                target: "b".parse().unwrap(),
                link: "10.0.0.2:7402".into(),
                pacing: Pacing::default(),
            },
        };
        let json = serde_json::to_value(&order).unwrap();
        assert_eq!(json["kind"]["order"], "protect");
        assert_eq!(serde_json::from_value::<Order>(json).unwrap(), order);
        assert!(
            serde_json::from_str::<OrderKind>(r#"{"order":"explode"}"#)
                .unwrap_err()
                .to_string()
                .contains("explode")
        );
    }

    #[test]
    fn pacing_that_says_little_means_the_rest_by_default() {
        let p: Pacing = serde_json::from_str(r#"{"lag": {"pages": 300}, "not_converging": "give-up"}"#).unwrap();
        let want = Pacing {
            lag: Some(Lag::Pages(300)),
            not_converging: NotConverging::GiveUp,
            ..Pacing::default()
        };
        assert_eq!(p, want);
        assert!(serde_json::from_str::<Pacing>(r#"{"round": 3}"#).is_err());
    }

    #[test]
    fn refusals_print_their_stable_code() {
        let r = Refusal::new(RefusalCode::QemuTooOld, "QEMU 7.2.0");
        assert_eq!(r.to_string(), "qemu_too_old: QEMU 7.2.0");
    }
}
