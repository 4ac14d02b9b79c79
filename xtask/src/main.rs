//! `cargo xtask`: builds, tests and shows Umbra. One file a command; `setup` is called by those that need it.

mod bench;
mod build;
mod check;
mod cpio;
mod debian;
mod demo;
mod ebpf;
mod faults;
mod fuzz;
mod guest;
mod run;
mod setup;
mod steps;
mod tally;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, tests and shows Umbra", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing on this machine, step by step; does nothing where nothing is missing
    Setup(setup::Options),
    /// Build the kernel programs and every binary, release
    Build,
    /// Show it: two hosts, a real VM, a real switchover. About four minutes
    Demo(demo::Options),
    /// Run everything: setup, build, lints, unit tests, whole-system tests, a short fuzz run
    Test,
    /// Format, lints and unit tests: what needs no root
    Check,
    /// Feed libFuzzer's inputs to what Umbra parses: all targets, or one
    Fuzz(FuzzOptions),
    /// Print what must come of each fault at each step of a switchover: the table that the tests play
    Faults,
    /// Run one benchmark, ours beside its peer's
    Bench(bench::Options),
}

#[derive(clap::Args)]
struct FuzzOptions {
    target: Option<String>,
    /// For each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Setup(options) => setup::run(&options),
        Command::Build => build::run(),
        Command::Demo(options) => demo::run(&options),
        Command::Test => return test::run(),
        Command::Check => return check::run(),
        Command::Fuzz(options) => fuzz::run(options.target.as_deref(), options.seconds),
        Command::Faults => faults::run(),
        Command::Bench(options) => bench::run(&options),
    };
    // Not by returning the error: that prints a backtrace of this small program, and the cause is in another one.
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
