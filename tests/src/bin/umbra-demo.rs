//! Shows Umbra at work on this machine: see [`umbra_tests::demo`].

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use umbra_tests::demo;

/// A real VM is measured, forecast, shadowed before its host is contended, switched over and failed back.
#[derive(Parser)]
#[command(name = "umbra-demo", version)]
struct Args {
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only the run without Umbra
    #[arg(long)]
    plain_only: bool,
    /// Only the run with Umbra: no comparison, no bars
    #[arg(long, conflicts_with = "plain_only")]
    umbra_only: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match demo::run(&demo::Options {
        json: args.json,
        plain_only: args.plain_only,
        umbra_only: args.umbra_only,
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "umbra-demo: {e:#}");
            ExitCode::FAILURE
        }
    }
}
