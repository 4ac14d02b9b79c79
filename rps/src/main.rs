//! `umbra-rps`: assembles the Resource Prediction Service and runs it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use tokio::net::TcpListener;
use umbra_daemon::{config, logs, stop};
use umbra_rps::backtest;
use umbra_rps::config::Config;
use umbra_rps::service::{self, Service};

/// Forecasts contention, decides, and orders shadows and switchovers.
#[derive(Parser, Debug)]
#[command(name = "umbra-rps", version, args_conflicts_with_subcommands = true)]
struct Args {
    /// The TOML file.
    #[arg(long, value_name = "FILE", default_value = "/etc/umbra/rps.toml")]
    config: PathBuf,
    /// Only check the file.
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Forecasts recorded traces as if they were passing, and scores what was said. Serves nothing.
    #[command(subcommand)]
    Backtest(Backtest),
}

#[derive(Subcommand, Debug)]
enum Backtest {
    /// Quantiles of each VM's demand: an hour ahead, from every hour of the traces.
    Demand(backtest::Args),
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("umbra-rps: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(Command::Backtest(Backtest::Demand(args))) = &args.command {
        return backtest::demand(args);
    }
    let config: Config = config::load(&args.config)?;
    if args.check {
        println!("{}: good, {} hosts", args.config.display(), config.hosts.len());
        return Ok(());
    }
    logs::init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let stop = stop::on_signals()?;
    let listen = config.listen;
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("listen on {listen}"))?;
    let service = Service::open(config)?;
    tracing::info!("listening on {listen}");
    service::run(service, listener, stop).await
}
