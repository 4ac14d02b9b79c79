//! Whose migration QEMU is busy with, when a copy that broke off is to begin anew.
//!
//! QEMU has one outgoing migration at a time and refuses another one meanwhile. It tells for how long its own has gone on, by the
//! host's monotonic clock. So one that began no later than ours was answered is ours, which has not ended yet, and one of
//! somebody else began later. When ours was answered is on disk: a restarted replicator recognizes it as well.
//! What is taken for ours is waited for, and never touched: a mistake would cost time, and nobody's migration.

use nix::time::{ClockId, clock_gettime};
use serde_json::Value;

use crate::qmp::{Client, QmpError};

/// QEMU's clock is read at some moment before its answer is here, and so is ours: of a busy host's time more than of an idle one's.
const SLACK_MS: u64 = 100;
/// An answer that came late tells too late a beginning: the best of some counts.
const LOOKS: usize = 5;

/// Milliseconds of the host's monotonic clock, which QEMU measures migrations by.
pub fn now_ms() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| (t.tv_sec() * 1000 + t.tv_nsec() / 1_000_000).unsigned_abs())
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Whose {
    Nobodys,
    /// The broken pass's own, or one that has not told yet when it began: in which state it is.
    Unended(String),
    Others(String),
}

/// From an answer to `query-migrate` that was here at `now_ms`. `answered_ms`: when QEMU had taken our last migration.
fn judge(migration: &Value, now_ms: u64, answered_ms: Option<u64>) -> Whose {
    let status = match migration["status"].as_str() {
        None | Some("none" | "completed" | "failed" | "cancelled") => return Whose::Nobodys,
        Some(other) => other.to_owned(),
    };
    // Its setup, a moment: somebody else's is known by the next look.
    let Some(took) = migration["total-time"].as_u64() else {
        return Whose::Unended(status);
    };
    // At the latest.
    let began = now_ms.saturating_sub(took);
    match answered_ms {
        Some(ours) if began <= ours.saturating_add(SLACK_MS) => Whose::Unended(status),
        _ => Whose::Others(status),
    }
}

/// Asks QEMU.
pub fn ask(qmp: &Client, answered_ms: Option<u64>) -> Result<Whose, QmpError> {
    let look = || {
        let migration = qmp.execute("query-migrate", Value::Null)?;
        Ok::<_, QmpError>(judge(&migration, now_ms(), answered_ms))
    };
    let mut said = look()?;
    for _ in 1..LOOKS {
        match said {
            Whose::Others(_) if answered_ms.is_some() => said = look()?,
            _ => break,
        }
    }
    Ok(said)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::qmp::client::tests::played;

    fn busy(status: &str, took_ms: u64) -> Value {
        json!({"status": status, "total-time": took_ms})
    }

    #[test]
    fn one_that_began_after_ours_was_answered_is_somebody_elses() {
        let now = 100_000;
        let of = |took, answered| judge(&busy("active", took), now, answered);
        let (ours, others) = (Whose::Unended("active".into()), Whose::Others("active".into()));
        assert_eq!(
            of(60_000, Some(40_001)),
            ours,
            "QEMU took it a moment before it answered"
        );
        assert_eq!(of(60_000, Some(40_000 - SLACK_MS)), ours);
        assert_eq!(of(60_000, Some(40_000 - SLACK_MS - 1)), others);
        assert_eq!(of(1, Some(40_000)), others);
        assert_eq!(of(60_000, None), others, "no migration of ours is known");
        assert_eq!(
            of(now + 1, Some(0)),
            ours,
            "a clock that began later makes no number wrap"
        );
        for over in ["none", "completed", "failed", "cancelled"] {
            assert_eq!(judge(&busy(over, 5), now, Some(40_000)), Whose::Nobodys);
        }
        assert_eq!(judge(&json!({}), now, None), Whose::Nobodys, "there never was one");
        let setup = judge(&json!({"status": "setup"}), now, Some(40_000));
        assert_eq!(setup, Whose::Unended("setup".into()), "it does not say yet");
    }

    /// A QEMU whose answers are slow, and one that is busy with another migration.
    #[test]
    fn qemu_is_asked_again_before_it_is_called_somebody_elses() {
        let took = |began: u64| now_ms() - began;
        let began = now_ms() - 60_000;
        let (_dir, qmp, peer) = played(move |mut peer| {
            for status in [
                "cancelling",
                "cancelling",
                "active",
                "active",
                "active",
                "active",
                "active",
            ] {
                let (command, id) = peer.command();
                assert_eq!(command["execute"], "query-migrate");
                // The first was asked long ago.
                let seems = if status == "active" { 10 } else { took(began) };
                peer.say(json!({"return": busy(status, seems), "id": id}));
            }
        });
        let ours = Whose::Unended("cancelling".into());
        // On a busy machine each answer is a while on its way; how exact it is has its own test above.
        let answered = Some(began + 30_000);
        assert_eq!(ask(&qmp, answered).unwrap(), ours);
        assert_eq!(ask(&qmp, answered).unwrap(), ours);
        assert_eq!(ask(&qmp, answered).unwrap(), Whose::Others("active".into()));
        drop(qmp);
        peer.join().unwrap();
    }
}
