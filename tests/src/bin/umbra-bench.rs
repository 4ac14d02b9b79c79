//! Benchmarks that need whole systems: see [`umbra_tests::bench`].

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use umbra_tests::{bench, matrix};

/// Measures Umbra beside its peers.
#[derive(Parser)]
#[command(name = "umbra-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// How long a guest stands still when it changes hosts, beside QEMU's own migration
    Switchover(Run),
    /// What a waiting shadow costs the guest and both hosts
    Standby(Run),
    /// What a shadow keeps in RAM at tier 0, and how fast it is back
    Tier(Run),
    /// What travels again after a broken link, beside the first copy
    Reseed(Run),
    /// What measuring costs, beside process-exporter
    Agent(Run),
    /// Bytes on the link, beside QEMU's own migration plain and with multifd and zstd
    Wire(Run),
    /// How fast a first copy is, beside QEMU's own migration
    Seed(Run),
    /// Print the crash matrix, which the tests play
    Faults,
    /// Asks a guest until it is told to end; what the other commands start
    #[command(hide = true)]
    Probe {
        #[arg(long)]
        ip: Ipv4Addr,
        #[arg(long)]
        out: PathBuf,
    },
}

#[derive(Args)]
struct Run {
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fewer runs
    #[arg(long)]
    quick: bool,
    /// Ours only: no figures to compare with
    #[arg(long)]
    alone: bool,
    /// With a private disk on virtio-blk (switchover)
    #[arg(long)]
    disk: bool,
    /// How long a standby's rounds are counted, a load (wire); an hour is 3600
    #[arg(long, value_name = "SECONDS")]
    window: Option<u64>,
    /// Only this case; may be given several times
    #[arg(long = "case", value_name = "NAME")]
    cases: Vec<String>,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Switchover(r) => run("switchover", r),
        Command::Standby(r) => run("standby", r),
        Command::Tier(r) => run("tier", r),
        Command::Reseed(r) => run("reseed", r),
        Command::Agent(r) => run("agent", r),
        Command::Wire(r) => run("wire", r),
        Command::Seed(r) => run("seed", r),
        Command::Faults => faults(),
        Command::Probe { ip, out } => bench::probe::run(ip, &out),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "umbra-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn faults() -> anyhow::Result<()> {
    use std::io::Write;
    Ok(std::io::stdout().lock().write_all(matrix::markdown().as_bytes())?)
}

fn run(name: &str, r: Run) -> anyhow::Result<()> {
    bench::run(
        name,
        &bench::Options {
            json: r.json,
            quick: r.quick,
            alone: r.alone,
            disk: r.disk,
            window: r.window.map(Duration::from_secs),
            cases: r.cases,
        },
    )
}
