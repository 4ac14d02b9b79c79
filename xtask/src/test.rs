//! `cargo xtask test`: everything, on a machine that it makes ready itself. Ends with one line: `N passed, N failed, N skipped`.

use std::process::ExitCode;

use crate::steps::Steps;
use crate::{build, check, faults, fuzz, run, setup};

/// For each fuzz target: enough to see that it runs and that no old finding came back.
const FUZZ_SECONDS: u64 = 10;

pub fn run() -> ExitCode {
    let mut steps = Steps::default();
    let ready = steps.single("setup", || setup::run(&setup::Options::default())) && steps.single("build", build::run);
    check::format_and_lints(&mut steps);
    check::unit_tests(&mut steps);
    if ready {
        // One at a time: each is several hosts, and they share this machine's cores.
        steps.tests("whole-system tests", || {
            let mut cargo = run::cargo();
            cargo.args(["test", "-p", "umbra-tests", "--test", "*", "--no-fail-fast"]);
            check::cargo_test(
                "whole-system tests",
                cargo.args(["--", "--show-output", "--test-threads=1"]),
            )
        });
        // What was played is worth a look, passed or not.
        steps.single("the crash matrix", faults::run);
    }
    steps.single("fuzz", || fuzz::run(None, FUZZ_SECONDS));
    steps.finish()
}
