//! `umbra-rps --config FILE`: TOML. Every key has a default but `[[hosts]]`; unknown keys are errors.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::Deserialize;
use umbra_api::HostId;
use umbra_api::view::Mode;
use umbra_daemon::config::{Check, Invalid};

use crate::forecast::auto::Speaker;
use crate::ingest::WorldParams;
use crate::orchestrator::{Member, Timing};
use crate::outlook::{Method, Params};
use crate::planner::Policy;
use crate::series::Shape;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the HTTP API listens.
    pub listen: SocketAddr,
    /// The SQLite file.
    pub store: PathBuf,
    /// `act` or `observe`, at the first start; later the store knows what `PUT /v1/mode` set last.
    pub mode: Mode,
    /// The forecast's time step.
    pub slot_ms: u64,
    /// Slots looked ahead.
    pub horizon_slots: usize,
    /// How long slots are kept.
    pub keep_slots_days: u32,
    /// How long events, decisions and orders are kept.
    pub keep_history_days: u32,
    pub hosts: Vec<HostConfig>,
    pub policy: Policy,
    pub orders: Timing,
    pub contention: Contention,
    pub redirect: RedirectConfig,
}

/// A host whose replicator takes orders.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// As its agent and its replicator are configured.
    pub name: HostId,
    /// `http://address:port` of its replicator.
    pub replicator: String,
    /// `address:port` of its replicator's link, as other hosts reach it.
    pub link: String,
}

/// When demand counts as contention, and how the CPS is made of it.
#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Contention {
    /// `probability` or `ratio`.
    pub method: Method,
    /// The CPS above which a VM is protected.
    pub threshold: f64,
    /// Factor on the CPS.
    pub weight: f64,
    /// A VM suffers contention in a slot in which it waits longer than this for a CPU, ms per s.
    pub limit_ms_per_s: f64,
    /// Part of a host's CPUs that demand may fill before it counts as contended.
    pub usable_share: f64,
    /// A VM that wants less than this, in cores, does not suffer.
    pub idle_cores: f64,
    /// Measured slots that a forecast needs at least, and at most looks at.
    pub min_history_slots: usize,
    pub max_history_slots: usize,
    /// Slots between two backtests of a series' models.
    pub reselect_slots: usize,
    /// Whose forecast counts: the `chosen` expert's, or the `mix` of all from hours of history on.
    pub forecast: Speaker,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RedirectConfig {
    /// QEMU's announce-self, for hosts on one L2 network.
    pub announce: bool,
}

impl Default for RedirectConfig {
    fn default() -> Self {
        Self { announce: true }
    }
}

impl Default for Contention {
    fn default() -> Self {
        let p = Params::default();
        Self {
            method: p.method,
            threshold: p.threshold,
            weight: p.weight,
            limit_ms_per_s: 50.0,
            usable_share: p.usable_share,
            idle_cores: p.idle_cores,
            min_history_slots: p.min_history,
            max_history_slots: p.max_history,
            reselect_slots: p.reselect_slots,
            forecast: p.speaker,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7400),
            store: "/var/lib/umbra/rps.db".into(),
            mode: Mode::Act,
            slot_ms: 60_000,
            horizon_slots: 30,
            keep_slots_days: 14,
            keep_history_days: 30,
            hosts: Vec::new(),
            policy: Policy::default(),
            orders: Timing::default(),
            contention: Contention::default(),
            redirect: RedirectConfig::default(),
        }
    }
}

impl Config {
    /// The policy with what other tables say about it.
    pub fn policy(&self) -> Policy {
        Policy {
            threshold: self.contention.threshold,
            ..self.policy.clone()
        }
    }

    pub fn members(&self) -> Vec<Member> {
        self.hosts
            .iter()
            .map(|h| Member {
                host: h.name.clone(),
                link: h.link.clone(),
            })
            .collect()
    }

    pub fn outlook_params(&self) -> Params {
        let c = self.contention;
        Params {
            horizon: self.horizon_slots,
            method: c.method,
            weight: c.weight,
            threshold: c.threshold,
            usable_share: c.usable_share,
            idle_cores: c.idle_cores,
            min_history: c.min_history_slots,
            max_history: c.max_history_slots,
            reselect_slots: c.reselect_slots,
            speaker: c.forecast,
            ..Params::default()
        }
    }

    pub fn world_params(&self) -> WorldParams {
        let day_ms = 86_400_000 / self.slot_ms.max(1);
        let kept = usize::try_from(day_ms.saturating_mul(u64::from(self.keep_slots_days))).unwrap_or(usize::MAX);
        // What is in memory is what forecasts look at, with the season's length to spare.
        let keep_slots = kept.clamp(64, self.contention.max_history_slots.saturating_mul(2).max(64));
        let shape = Shape {
            slot_ms: self.slot_ms,
            keep_slots,
            late_slots: 2,
        };
        WorldParams {
            shape,
            ..WorldParams::default()
        }
    }
}

impl Check for Config {
    fn check(&self) -> Result<(), Invalid> {
        let bad = |key: &str, reason: String| Err(Invalid::new(key, reason));
        if !(100..=3_600_000).contains(&self.slot_ms) {
            return bad("slot_ms", format!("{} is not between 100 and 3600000", self.slot_ms));
        }
        if !(1..=10_000).contains(&self.horizon_slots) {
            return bad(
                "horizon_slots",
                format!("{} is not between 1 and 10000", self.horizon_slots),
            );
        }
        if self.keep_slots_days == 0 || self.keep_history_days == 0 {
            let key = if self.keep_slots_days == 0 {
                "keep_slots_days"
            } else {
                "keep_history_days"
            };
            return bad(key, "0 days keep nothing, at least 1".into());
        }
        self.contention.check()?;
        self.policy().check()?;
        self.orders.check()?;
        check_hosts(&self.hosts)?;
        let known: BTreeSet<&HostId> = self.hosts.iter().map(|h| &h.name).collect();
        match self.policy.maintenance.iter().position(|h| !known.contains(h)) {
            Some(i) => {
                let name = self
                    .policy
                    .maintenance
                    .get(i)
                    .map(ToString::to_string)
                    .unwrap_or_default();
                bad(
                    &format!("policy.maintenance[{i}]"),
                    format!("{name} is none of [[hosts]]"),
                )
            }
            None => Ok(()),
        }
    }
}

impl Contention {
    fn check(&self) -> Result<(), Invalid> {
        let positive = [
            ("threshold", self.threshold),
            ("weight", self.weight),
            ("limit_ms_per_s", self.limit_ms_per_s),
            ("usable_share", self.usable_share),
        ];
        let bad = |key: &str, reason: String| Err(Invalid::new(format!("contention.{key}"), reason));
        if let Some((key, v)) = positive.into_iter().find(|(_, v)| !(v.is_finite() && *v > 0.0)) {
            return bad(key, format!("{v} is not above 0"));
        }
        // A CPS is cut to 1: above it nothing would ever be protected.
        if self.threshold >= 1.0 {
            return bad("threshold", format!("{} is not below 1", self.threshold));
        }
        if !(self.idle_cores.is_finite() && self.idle_cores >= 0.0) {
            return bad("idle_cores", format!("{} is below 0", self.idle_cores));
        }
        if self.min_history_slots < 2 || self.max_history_slots < self.min_history_slots {
            let (min, max) = (self.min_history_slots, self.max_history_slots);
            return bad(
                "min_history_slots",
                format!("{min} is below 2, or above max_history_slots, {max}"),
            );
        }
        match self.reselect_slots {
            0 => bad("reselect_slots", "0 is too few, at least 1".into()),
            _ => Ok(()),
        }
    }
}

fn check_hosts(hosts: &[HostConfig]) -> Result<(), Invalid> {
    let mut names = BTreeSet::new();
    for (i, h) in hosts.iter().enumerate() {
        let bad = |key: &str, reason: String| Err(Invalid::new(format!("hosts[{i}].{key}"), reason));
        if !names.insert(&h.name) {
            return bad("name", format!("{} is there twice", h.name));
        }
        if !h.replicator.starts_with("http://") {
            return bad("replicator", format!("{:?} is not http://address:port", h.replicator));
        }
        let port = h
            .link
            .rsplit_once(':')
            .map(|(host, port)| (host.is_empty(), port.parse::<u16>()));
        if !matches!(port, Some((false, Ok(1..)))) {
            return bad("link", format!("{:?} is not address:port", h.link));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use umbra_api::VmId;
    use umbra_api::order::{Lag, NotConverging, Pacing};
    use uuid::Uuid;

    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        umbra_daemon::config::parse(Path::new("rps.toml"), text).map_err(|e| e.to_string())
    }

    #[test]
    fn an_empty_file_is_a_good_one() {
        let c = parse("").unwrap();
        assert_eq!(c.listen.to_string(), "127.0.0.1:7400");
        assert_eq!(c.policy().threshold, 0.5);
        c.orders.check().unwrap();
    }

    #[test]
    fn every_table_is_read() {
        let c = parse(
            "listen = '10.0.0.1:7400'\nstore = '/tmp/x.db'\nmode = 'observe'\nslot_ms = 1000\nhorizon_slots = 60\n\
             [policy]\nlate = 'refuse'\nvms = [{ vm = 'n', protect = false }, { vm = 'm', lag = { pages = 300 }, \
             max_downtime_ms = 200, not_converging = 'give_up', bandwidth_mbit = 800 }]\nanti_affinity = [{ vms = ['a', 'b'] }]\n\
             maintenance = ['b']\n[orders]\npoll_ms = 200\n[contention]\nmethod = 'ratio'\nthreshold = 0.8\n\
             [redirect]\nannounce = false\n\
             [[hosts]]\nname = 'a'\nreplicator = 'http://10.0.0.1:7403'\nlink = '10.0.0.1:7402'\n\
             [[hosts]]\nname = 'b'\nreplicator = 'http://10.0.0.2:7403'\nlink = '[::1]:7402'\n",
        )
        .unwrap();
        assert_eq!((c.mode, c.slot_ms, c.hosts.len()), (Mode::Observe, 1000, 2));
        assert_eq!((c.policy().threshold, c.outlook_params().threshold), (0.8, 0.8));
        assert_eq!(c.outlook_params().horizon, 60);
        assert!(!c.policy.vms[0].protect && c.orders.poll_ms == 200 && !c.redirect.announce);
        let common = c.orders.pacing();
        let of = |name| c.policy.pacing_of(VmId(Uuid::nil()), name, common);
        let own = Pacing {
            lag: Some(Lag::Pages(300)),
            max_downtime_ms: 200,
            not_converging: NotConverging::GiveUp,
            bandwidth_mbit: Some(800),
            ..common
        };
        assert_eq!((of("m"), of("n"), of("unnamed")), (own, common, common));
    }

    #[test]
    fn errors_name_file_key_and_reason() {
        let cases = [
            ("slot_ms = 5", "rps.toml: slot_ms: 5 is not between"),
            ("slots = 5", "unknown field `slots`"),
            ("[policy]\narms = 1", "unknown field `arms`"),
            ("[policy]\nthreshold = 0.4", "unknown field `threshold`"),
            ("[policy]\narm_s = -1.0", "rps.toml: policy.arm_s: -1 is not above 0"),
            (
                "[policy]\nmaintenance = ['z']",
                "policy.maintenance[0]: z is none of [[hosts]]",
            ),
            (
                "[policy]\nrelease_threshold = 0.9",
                "policy.release_threshold: 0.9 is not below contention.threshold",
            ),
            ("[orders]\nround_ms = 900", "orders.round_ms: 900 is above 500"),
            (
                "[orders]\nmax_downtime_ms = 0",
                "orders.max_downtime_ms: 0 is not between 1 and 60000",
            ),
            (
                "[policy]\nvms = [{ vm = 'a' }, { vm = 'b', max_downtime_ms = 60001 }]",
                "policy.vms[1].max_downtime_ms: 60001 is not between 1 and 60000",
            ),
            (
                "[policy]\nvms = [{ vm = 'a', lag = { ms = 0 } }]",
                "policy.vms[0].lag: 0 can't be kept",
            ),
            (
                "[policy]\nvms = [{ vm = 'a', bandwidth_mbit = 0 }]",
                "policy.vms[0].bandwidth_mbit: 0 carries nothing",
            ),
            (
                "[policy]\nvms = [{ vm = 'a', not_converging = 'wait' }]",
                "policy.vms[0].not_converging",
            ),
            (
                "[policy]\nvms = [{ vm = 'a' }, { vm = 'a' }]",
                "policy.vms[1].vm: a is there twice",
            ),
            ("[orders]\nlag = { pages = 0 }", "orders.lag: 0 can't be kept"),
            (
                "[contention]\nthreshold = 1.5",
                "contention.threshold: 1.5 is not below 1",
            ),
            ("[contention]\nmethod = 'magic'", "contention.method"),
            ("mode = 'sleep'", "mode"),
            (
                "[[hosts]]\nname = 'a b'\nreplicator = 'http://x'\nlink = 'x:1'",
                "hosts[0].name",
            ),
            (
                "[[hosts]]\nname = 'a'\nreplicator = 'x:1'\nlink = 'x:1'",
                "hosts[0].replicator",
            ),
            (
                "[[hosts]]\nname = 'a'\nreplicator = 'http://x:1'\nlink = 'x'",
                "hosts[0].link",
            ),
            ("[[hosts]]\nname = 'a'\nreplicator = 'http://x:1'", "link"),
        ];
        for (text, want) in cases {
            let e = parse(text).unwrap_err();
            assert!(e.starts_with("rps.toml: ") && e.contains(want), "{text}: {e}");
        }
    }
}
