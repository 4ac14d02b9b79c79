//! A waiting shadow's tier, and what its replicator and the kernel say of its memory.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use umbra_api::order::{OrderKind, Peak, Tier};
use umbra_api::replica::{Role, ShadowMemory};

use super::pair::Pair;
use super::process::wait_for;
use super::sys;

/// A disk with swap on it is slow, the replicator looks each few seconds, and the machine may be busy.
const SOON: Duration = Duration::from_secs(240);

/// The shadow on a host, or what was one until a moment ago.
pub struct Shadow<'a> {
    pub pair: &'a Pair,
    pub host: &'a str,
}

impl Shadow<'_> {
    /// Cores enough that the CPU's quota is not what is tried. Of the guest's memory nobody has told: what it uses counts.
    pub fn order(&self, tier: Tier) -> Result<()> {
        let expected_peak = Peak {
            cpu_cores: 8.0,
            mem_bytes: 0,
        };
        let order = OrderKind::Tier { tier, expected_peak };
        self.pair.order(self.host, self.pair.epoch(), order)
    }

    pub fn memory(&self) -> Result<Option<ShadowMemory>> {
        Ok(self.pair.replica(self.host, Role::Target)?.and_then(|r| r.memory))
    }

    /// Its memory once it is so.
    pub fn wait(&self, what: &str, so: impl Fn(&ShadowMemory) -> bool) -> Result<ShadowMemory> {
        let mut last = None;
        let waited = wait_for(what, SOON, || {
            last = self.memory()?;
            Ok(last.clone().filter(&so))
        });
        waited.with_context(|| format!("it is {last:?}"))
    }

    /// At the limit of its tier, or nearly: rounds go on meanwhile.
    pub fn wait_shrunk(&self) -> Result<ShadowMemory> {
        self.wait("the shadow to be shrunk", |m| {
            m.not_shrunk.is_none() && m.limit_bytes.is_some_and(|l| m.resident_bytes < l + l / 4)
        })
    }

    /// What of it is in RAM, by the kernel's word and not the replicator's.
    pub fn in_ram(&self) -> Result<u64> {
        let files = self.pair.ram_files(self.host)?;
        ensure!(!files.is_empty(), "no RAM files on {}", self.host);
        files.iter().map(|f| Ok(sys::resident_bytes(f)?)).sum()
    }
}
