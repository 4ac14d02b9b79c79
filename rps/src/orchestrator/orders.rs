//! Orders as they are remembered: written before they are sent, sent again until they are answered.
//!
//! ```text
//!  pending ──> accepted          answered: 202
//!     │ └────> refused           answered: problem+json
//!     └──────> dropped           no longer wanted; its epoch is below the VM's, so that it can do no harm
//! ```

use std::hash::Hasher;

use serde::{Deserialize, Serialize};
use umbra_api::order::{Order, OrderKind, Refusal, RefusalCode};
use umbra_api::{Epoch, HostId, OrderId, UnixMs, VmId};

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct OrderRecord {
    pub order: Order,
    pub to: HostId,
    /// When it was written.
    pub t: UnixMs,
    pub state: OrderState,
    pub answered: Option<UnixMs>,
    /// When it was last sent by this process.
    #[serde(skip)]
    pub sent: Option<UnixMs>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum OrderState {
    Pending,
    Accepted,
    Refused { refusal: Refusal },
    Dropped,
}

/// What came back for an order.
#[derive(Clone, PartialEq, Debug)]
pub enum Answer {
    Accepted,
    Refused(Refusal),
    /// Nothing, or nothing that tells whether it was carried out.
    Unknown(String),
}

/// How it stands with an order that a step waits for.
#[derive(Clone, PartialEq, Debug)]
pub enum Asked {
    Waiting,
    Accepted {
        at: UnixMs,
    },
    Refused {
        refusal: Refusal,
        at: UnixMs,
    },
    /// Not answered in time. It may have been carried out all the same.
    Unanswered,
}

impl Asked {
    /// The answer is in, whichever it is.
    pub fn answered(&self) -> Option<UnixMs> {
        match self {
            Self::Accepted { at } | Self::Refused { at, .. } => Some(*at),
            _ => None,
        }
    }
}

impl OrderRecord {
    pub fn new(vm: VmId, epoch: Epoch, to: &HostId, kind: OrderKind, now: UnixMs) -> Self {
        let order = Order {
            id: order_id(vm, epoch, to, &kind, now),
            vm,
            epoch,
            kind,
        };
        Self {
            order,
            to: to.clone(),
            t: now,
            state: OrderState::Pending,
            answered: None,
            sent: None,
        }
    }

    pub fn pending(&self) -> bool {
        self.state == OrderState::Pending
    }

    /// How it stands at `now`. The wait begins at `started` if the order is older than this process.
    pub fn asked(&self, now: UnixMs, started: UnixMs, timeout_ms: i64) -> Asked {
        let at = self.answered.unwrap_or(self.t);
        match &self.state {
            OrderState::Accepted => Asked::Accepted { at },
            OrderState::Refused { refusal } => Asked::Refused {
                refusal: refusal.clone(),
                at,
            },
            OrderState::Pending if now.since(self.t.max(started)) <= timeout_ms => Asked::Waiting,
            OrderState::Pending | OrderState::Dropped => Asked::Unanswered,
        }
    }

    /// Takes an answer in; `false` if it changes nothing.
    pub fn answer(&mut self, answer: &Answer, now: UnixMs) -> bool {
        if !self.pending() {
            return false;
        }
        self.state = match answer {
            Answer::Accepted => OrderState::Accepted,
            Answer::Refused(refusal) => OrderState::Refused {
                refusal: refusal.clone(),
            },
            Answer::Unknown(_) => return false,
        };
        self.answered = Some(now);
        true
    }

    pub fn refused_as(&self, code: RefusalCode) -> bool {
        matches!(&self.state, OrderState::Refused { refusal } if refusal.code == code)
    }
}

/// Derived from what the order says and when, so that the core needs no dice. The time keeps two orders apart that say the
/// same: a replicator ignores an id that it has seen.
fn order_id(vm: VmId, epoch: Epoch, to: &HostId, kind: &OrderKind, now: UnixMs) -> OrderId {
    let half = |salt: u8| {
        let mut h = std::hash::DefaultHasher::new();
        h.write_u8(salt);
        h.write(vm.0.as_bytes());
        h.write_u64(epoch.0);
        h.write(to.as_str().as_bytes());
        h.write_u8(0xff);
        h.write(format!("{kind:?}").as_bytes());
        h.write_i64(now.0);
        h.finish()
    };
    let id = u128::from(half(1)) << 64 | u128::from(half(2));
    OrderId(uuid::Builder::from_custom_bytes(id.to_be_bytes()).into_uuid())
}

#[cfg(test)]
mod tests {
    use umbra_api::order::{Peak, Tier};

    use super::*;

    fn tier(tier: Tier, now: i64) -> OrderRecord {
        let kind = OrderKind::Tier {
            tier,
            expected_peak: Peak::default(),
        };
        OrderRecord::new(
            VmId(uuid::Uuid::nil()),
            Epoch(3),
            &"b".parse().unwrap(),
            kind,
            UnixMs(now),
        )
    }

    #[test]
    fn the_same_words_at_another_time_are_another_order() {
        assert_eq!(tier(Tier::Armed, 5).order.id, tier(Tier::Armed, 5).order.id);
        assert_ne!(tier(Tier::Armed, 5).order.id, tier(Tier::Armed, 6).order.id);
        assert_ne!(tier(Tier::Armed, 5).order.id, tier(Tier::Standby, 5).order.id);
    }

    #[test]
    fn the_first_answer_counts() {
        let mut r = tier(Tier::Armed, 0);
        assert!(!r.answer(&Answer::Unknown("timeout".into()), UnixMs(1)));
        assert_eq!(r.asked(UnixMs(10), UnixMs(0), 10), Asked::Waiting);
        assert_eq!(r.asked(UnixMs(11), UnixMs(0), 10), Asked::Unanswered);
        // A process that just started gives the peer its time.
        assert_eq!(r.asked(UnixMs(1_009), UnixMs(1_000), 10), Asked::Waiting);
        assert!(r.answer(&Answer::Accepted, UnixMs(12)));
        let refusal = Refusal::new(RefusalCode::Local, "late");
        assert!(!r.answer(&Answer::Refused(refusal), UnixMs(13)));
        assert_eq!(r.asked(UnixMs(99), UnixMs(0), 10), Asked::Accepted { at: UnixMs(12) });
    }
}
