//! `cargo xtask bench NAME`: runs one benchmark, ours beside its peer's.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::debian::{self, Apt};
use crate::{build, ebpf, run, setup};

enum Runner {
    /// What cargo runs. Needs no prepared machine.
    Cargo(&'static [&'static str]),
    /// `umbra-bench NAME`: whole systems, on a machine that is made ready like for the demo, and Debian packages that it needs: the peer, mostly.
    Lab(&'static [&'static str]),
}

const BENCHES: &[(&str, Runner)] = &[
    (
        "parse",
        Runner::Cargo(&["-p", "umbra-replicator", "--example", "bench_parse"]),
    ),
    (
        "link",
        Runner::Cargo(&["-p", "umbra-replicator", "--example", "bench_link"]),
    ),
    (
        "pages",
        Runner::Cargo(&["-p", "umbra-replicator", "--example", "bench_pages"]),
    ),
    ("switchover", Runner::Lab(&[])),
    ("standby", Runner::Lab(&[])),
    ("tier", Runner::Lab(&[])),
    ("reseed", Runner::Lab(&[])),
    ("agent", Runner::Lab(&["prometheus-process-exporter"])),
    ("wire", Runner::Lab(&["busybox-static", "sqlite3"])),
    ("seed", Runner::Lab(&[])),
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
    /// switchover: with a private disk on virtio-blk
    #[arg(long)]
    disk: bool,
    /// wire: how long a standby's rounds are counted, a load; an hour is 3600
    #[arg(long, value_name = "SECONDS")]
    window: Option<u64>,
}

pub fn run(options: &Options) -> Result<()> {
    let names = || BENCHES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let Some(name) = &options.name else {
        println!("benchmarks: {}", names());
        return Ok(());
    };
    let Some((_, runner)) = BENCHES.iter().find(|(known, _)| known == name) else {
        bail!("there is no benchmark '{name}'; there are: {}", names());
    };
    let mut command = match runner {
        Runner::Cargo(target) => {
            let mut cargo = run::cargo();
            cargo.args(["run", "--quiet", "--release"]).args(*target).arg("--");
            cargo
        }
        Runner::Lab(packages) => lab(name, packages)?,
    };
    if let Some(file) = &options.json {
        // Cargo starts it in the repository, the caller meant his own folder.
        command
            .arg("--json")
            .arg(std::path::absolute(file).with_context(|| file.display().to_string())?);
    }
    if options.quick {
        command.arg("--quick");
    }
    if options.disk {
        if name != "switchover" {
            bail!("--disk belongs to the benchmark 'switchover'");
        }
        command.arg("--disk");
    }
    if let Some(seconds) = options.window {
        if name != "wire" {
            bail!("--window belongs to the benchmark 'wire'");
        }
        command.arg("--window").arg(seconds.to_string());
    }
    run::run(&mut command)
}

fn lab(name: &str, packages: &[&'static str]) -> Result<Command> {
    setup::run(&setup::Options::default())?;
    build::run()?;
    for package in packages.iter().filter(|p| debian::installed(p).is_none()) {
        println!("  missing  {package}: what this benchmark compares with, or measures");
        // Without a peer ours are measured all the same; the benchmark says if it can't do without.
        if let Err(error) = Apt::default().install(&[package], None) {
            println!("    {error:#}");
        }
    }
    let mut command = Command::new(ebpf::target_dir(&run::root()).join("release/umbra-bench"));
    command.arg(name);
    Ok(command)
}
