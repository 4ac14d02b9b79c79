//! `cargo xtask faults`: the crash matrix, as the whole-system tests play it and FAULTS.md has it.

use anyhow::Result;

use crate::run;

pub fn run() -> Result<()> {
    let mut bench = run::cargo();
    bench.args([
        "run",
        "--quiet",
        "-p",
        "umbra-tests",
        "--bin",
        "umbra-bench",
        "--",
        "faults",
    ]);
    run::run(&mut bench)
}
