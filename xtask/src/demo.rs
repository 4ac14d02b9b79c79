//! `cargo xtask demo`: makes the machine ready, builds, and becomes the demo.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{build, ebpf, run, setup};

#[derive(Args)]
pub struct Options {
    /// What the demo itself takes, `--json FILE` say; `-- --help` lists it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub fn run(options: &Options) -> Result<()> {
    setup::run(&setup::Options::default())?;
    build::run()?;
    let program = ebpf::target_dir(&run::root()).join("release/umbra-demo");
    if !program.exists() {
        bail!("{} is not there: the build made no demo", program.display());
    }
    // Replaces this process, so that Ctrl-C and the exit status belong to the demo alone.
    Err(Command::new(&program).args(&options.arguments).exec())
        .with_context(|| format!("cannot start {}", program.display()))
}
