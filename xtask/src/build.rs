//! `cargo xtask build`: the kernel programs, then every binary in one call of cargo.

use anyhow::{Context, Result};

use crate::{ebpf, run};

const PACKAGES: [&str; 5] = [
    "umbra-agent",
    "umbra-replicator",
    "umbra-rps",
    "umbra-cli",
    "umbra-tests",
];

pub fn run() -> Result<()> {
    let root = run::root();
    // The agent embeds this object, so it comes first.
    let object = ebpf::build(&root).context("building the kernel programs")?;
    println!("  ok       kernel programs: {}", object.display());
    let mut cargo = run::cargo();
    cargo.args(["build", "--release", "--bins"]);
    for package in PACKAGES {
        cargo.args(["-p", package]);
    }
    run::run(&mut cargo).context("building the binaries")?;
    println!(
        "  ok       binaries: {}",
        ebpf::target_dir(&root).join("release").display()
    );
    Ok(())
}
