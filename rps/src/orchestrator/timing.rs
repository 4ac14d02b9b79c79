//! How long the orchestrator waits for what: `[orders]` in the configuration.

use serde::Deserialize;
use umbra_api::order::{Lag, NotConverging, Pacing, ROUND_MS_MAX};
use umbra_daemon::config::Invalid;

#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timing {
    /// Between two questions to a replicator …
    pub poll_ms: u64,
    /// … and while a switchover is under way.
    pub fast_poll_ms: u64,
    /// How long an HTTP answer may take.
    pub answer_timeout_ms: u64,
    /// An order that was not answered is sent again after this.
    pub resend_ms: u64,
    /// … and given up after this.
    pub order_timeout_s: u64,
    /// From the first order to the begin of the first copy.
    pub provision_timeout_s: u64,
    /// For the first copy.
    pub seed_timeout_s: u64,
    /// A warm copy that broke off goes on by itself; one that is not warm again by then is given up, and another host may do.
    pub resume_timeout_s: u64,
    /// From the switchover's order to its outcome.
    pub switch_timeout_s: u64,
    /// How long the switchover waits for the shadow's promotion, beyond the time that it was measured to take.
    pub promote_wait_ms: u64,
    /// A replication that its source no longer reports is given up after this.
    pub lost_after_s: u64,
    /// Between two attempts to clear leftovers.
    pub retry_s: u64,
    /// Pause between a source's rounds, at most 500.
    pub round_ms: u64,
    /// What a shadow may miss, at most: `{ pages = 500 }`, `{ bytes = … }` or `{ ms = … }`. Rounds come sooner to keep it.
    pub lag: Option<Lag>,
    /// No switchover that would stop the guest for longer.
    pub max_downtime_ms: u64,
    /// What to do with a guest that dirties its memory faster than the link carries it: `accept_longer`, `give_up` or `throttle`.
    pub not_converging: NotConverging,
    /// What one copy may take of the link.
    pub bandwidth_mbit: Option<u32>,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            poll_ms: 1_000,
            fast_poll_ms: 50,
            answer_timeout_ms: 2_000,
            resend_ms: 2_000,
            order_timeout_s: 15,
            provision_timeout_s: 60,
            seed_timeout_s: 1_800,
            resume_timeout_s: 300,
            switch_timeout_s: 30,
            promote_wait_ms: 1_000,
            lost_after_s: 10,
            retry_s: 5,
            round_ms: ROUND_MS_MAX,
            lag: None,
            max_downtime_ms: Pacing::default().max_downtime_ms,
            not_converging: NotConverging::default(),
            bandwidth_mbit: None,
        }
    }
}

impl Timing {
    /// What each protection is ordered with, but for what `[policy]` says of its VM.
    pub fn pacing(&self) -> Pacing {
        Pacing {
            round_ms: self.round_ms,
            lag: self.lag,
            max_downtime_ms: self.max_downtime_ms,
            not_converging: self.not_converging,
            bandwidth_mbit: self.bandwidth_mbit,
        }
    }

    pub fn check(&self) -> Result<(), Invalid> {
        let positive = [
            ("poll_ms", self.poll_ms),
            ("fast_poll_ms", self.fast_poll_ms),
            ("answer_timeout_ms", self.answer_timeout_ms),
            ("resend_ms", self.resend_ms),
            ("order_timeout_s", self.order_timeout_s),
            ("provision_timeout_s", self.provision_timeout_s),
            ("seed_timeout_s", self.seed_timeout_s),
            ("resume_timeout_s", self.resume_timeout_s),
            ("switch_timeout_s", self.switch_timeout_s),
            ("lost_after_s", self.lost_after_s),
            ("retry_s", self.retry_s),
        ];
        if let Some((key, v)) = positive.into_iter().find(|(_, v)| !(1..=86_400_000).contains(v)) {
            return Err(Invalid::new(
                format!("orders.{key}"),
                format!("{v} is not between 1 and 86400000"),
            ));
        }
        let pacing = self.pacing().check();
        pacing.map_err(|(key, reason)| Invalid::new(format!("orders.{key}"), reason))
    }
}

/// Seconds of the configuration as the clock's milliseconds.
pub fn ms(seconds: u64) -> i64 {
    i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX)
}
