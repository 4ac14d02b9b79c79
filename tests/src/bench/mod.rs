//! `cargo xtask bench`: what needs whole systems. Ours and the peer's are measured in turns in one call, so that whatever
//! else the machine does meets both.
//!
//! In reading order: [`rows`] (figures, table, JSON), [`probe`] (who asks the guest, in a process of its own), [`ours`] and
//! [`stock`] (one hop of a VM each), [`switchover`], [`standby`] (what a waiting shadow costs), [`tier`] (and at
//! tier 0), [`reseed`] (what travels again after a break), [`agent`], [`wire`] (what travels), [`seed`] (how fast the first
//! copy is).

pub mod agent;
pub mod cpu;
pub mod ours;
pub mod probe;
pub mod reseed;
pub mod rows;
pub mod seed;
pub mod standby;
pub mod stock;
pub mod switchover;
pub mod tier;
pub mod wire;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::lab;
use rows::Row;

#[derive(Clone, Debug)]
pub struct Options {
    pub json: Option<PathBuf>,
    pub quick: bool,
    /// Without the peer.
    pub alone: bool,
    /// With a disk, where that makes a difference.
    pub disk: bool,
    /// How long something is watched, where it says so; by default as long as seems enough.
    pub window: Option<Duration>,
    /// Only these cases; all if empty.
    pub cases: Vec<String>,
}

impl Options {
    pub fn wants(&self, case: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|c| c == case)
    }
}

type Bench = fn(&Options) -> Result<Vec<Row>>;

pub const BENCHES: &[(&str, Bench)] = &[
    ("switchover", switchover::run),
    ("standby", standby::run),
    ("tier", tier::run),
    ("reseed", reseed::run),
    ("agent", agent::run),
    ("wire", wire::run),
    ("seed", seed::run),
];

pub fn run(name: &str, options: &Options) -> Result<()> {
    let names = || BENCHES.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(", ");
    let Some((_, bench)) = BENCHES.iter().find(|(n, _)| *n == name) else {
        bail!("there is no benchmark '{name}' here; there are: {}", names());
    };
    if let Some(reason) = lab::missing() {
        bail!("it cannot run here: {reason}");
    }
    let rows = bench(options)?;
    println!("{}", rows::table(&rows));
    if let Some(file) = &options.json {
        rows::write(file, name, &rows).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}
