//! The agent's configuration file.
//!
//! ```toml
//! host = "kvm-07"                    # as the RPS knows it
//! listen = "127.0.0.1:7401"          # /metrics, /healthz, /readyz
//! interval_ms = 1000
//! scope = "all"                      # or "netns": only QEMUs in the agent's own network namespace
//! cpus = "0-3"                       # CPUs that VMs may use; default: all that are online
//! max_vms = 1024
//! [rps]                              # without it samples are only shown in /metrics
//! url = "http://127.0.0.1:7400"
//! timeout_ms = 5000
//! buffer_batches = 600               # kept while the RPS is away, the oldest dropped first
//! ```

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde::Deserialize;
use umbra_api::HostId;
use umbra_api::sample::VMS_MAX;
use umbra_daemon::client::Client;
use umbra_daemon::config::{Check, Invalid};

use crate::cpulist::CpuList;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub host: HostId,
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    #[serde(default = "default_interval_ms")]
    pub interval_ms: u64,
    #[serde(default)]
    pub scope: Scope,
    pub cpus: Option<CpuList>,
    #[serde(default = "default_max_vms")]
    pub max_vms: u32,
    pub rps: Option<Rps>,
}

/// Which QEMUs are this host's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    #[default]
    All,
    /// Several 'hosts' share one machine as network namespaces.
    Netns,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rps {
    pub url: String,
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
    #[serde(default = "default_buffer_batches")]
    pub buffer_batches: usize,
}

impl Rps {
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}

fn default_listen() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 7401).into()
}

fn default_interval_ms() -> u64 {
    1000
}

fn default_max_vms() -> u32 {
    1024
}

fn default_timeout_ms() -> u64 {
    5000
}

fn default_buffer_batches() -> usize {
    600
}

impl Config {
    pub fn interval(&self) -> Duration {
        Duration::from_millis(self.interval_ms)
    }
}

impl Check for Config {
    fn check(&self) -> Result<(), Invalid> {
        within("interval_ms", self.interval_ms, 100, 600_000)?;
        within("max_vms", u64::from(self.max_vms), 1, VMS_MAX as u64)?;
        let Some(rps) = &self.rps else { return Ok(()) };
        within("rps.timeout_ms", rps.timeout_ms, 10, 600_000)?;
        within("rps.buffer_batches", rps.buffer_batches as u64, 1, 100_000)?;
        match Client::new(&rps.url, rps.timeout()) {
            Ok(_) => Ok(()),
            Err(e) => Err(Invalid::new("rps.url", e.to_string())),
        }
    }
}

fn within(key: &str, value: u64, min: u64, max: u64) -> Result<(), Invalid> {
    match (min..=max).contains(&value) {
        true => Ok(()),
        false => Err(Invalid::new(key, format!("{value} is not between {min} and {max}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        umbra_daemon::config::parse(Path::new("agent.toml"), text).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults() {
        let c = parse("host = 'a'").unwrap();
        assert_eq!((c.interval_ms, c.max_vms, c.scope), (1000, 1024, Scope::All));
        assert_eq!(c.listen.to_string(), "127.0.0.1:7401");
        assert!(c.rps.is_none() && c.cpus.is_none());
        let c = parse("host = 'a'\nscope = 'netns'\ncpus = '0-1'\n[rps]\nurl = 'http://10.0.0.1:7400'").unwrap();
        assert_eq!(
            (c.scope, c.cpus.unwrap().len(), c.rps.unwrap().buffer_batches),
            (Scope::Netns, 2, 600)
        );
    }

    #[test]
    fn errors_name_the_key() {
        for (text, key) in [
            ("", "host"),
            ("host = 'a b'", "host"),
            ("host = 'a'\ninterval_ms = 5", "interval_ms: 5 is not between"),
            ("host = 'a'\nscope = 'some'", "scope"),
            ("host = 'a'\ncpus = '3-1'", "cpus: the range 3-1 runs backwards"),
            ("host = 'a'\nmax_vms = 0", "max_vms"),
            ("host = 'a'\nlisten = 'here'", "listen"),
            ("host = 'a'\n[rps]\nurl = 'ftp://x'", "rps.url"),
            ("host = 'a'\n[rps]\nurl = 'http://x'\nbuffer = 1", "buffer"),
        ] {
            let e = parse(text).unwrap_err();
            assert!(e.starts_with("agent.toml: ") && e.contains(key), "{text:?}: {e}");
        }
    }
}
