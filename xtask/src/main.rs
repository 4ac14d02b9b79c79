//! `cargo xtask`: builds, tests and shows Umbra. One file a command; `setup` is called by those that need it.

mod cpio;
mod debian;
mod guest;
mod run;
mod setup;

use anyhow::Result;
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
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Setup(options) => setup::run(&options),
    }
}
