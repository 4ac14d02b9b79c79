//! `cargo xtask bench NAME`: runs one benchmark, ours beside its peer's.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::run;

/// Name, and what cargo runs for it.
const BENCHES: &[(&str, &[&str])] = &[
    ("parse", &["-p", "umbra-replicator", "--example", "bench_parse"]),
    ("link", &["-p", "umbra-replicator", "--example", "bench_link"]),
];

#[derive(Args)]
pub struct Options {
    /// Which benchmark; without a name, lists them
    name: Option<String>,
    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fewer runs
    #[arg(long)]
    quick: bool,
}

pub fn run(options: &Options) -> Result<()> {
    let names = || BENCHES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let Some(name) = &options.name else {
        println!("benchmarks: {}", names());
        return Ok(());
    };
    let Some((_, target)) = BENCHES.iter().find(|(known, _)| known == name) else {
        bail!("there is no benchmark '{name}'; there are: {}", names());
    };
    let mut cargo = run::cargo();
    cargo.args(["run", "--quiet", "--release"]).args(*target).arg("--");
    if let Some(file) = &options.json {
        // Cargo starts it in the repository, the caller meant his own folder.
        cargo
            .arg("--json")
            .arg(std::path::absolute(file).with_context(|| file.display().to_string())?);
    }
    if options.quick {
        cargo.arg("--quick");
    }
    run::run(&mut cargo)
}
