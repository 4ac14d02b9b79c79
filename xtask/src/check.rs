//! `cargo xtask check`: what needs neither root nor a prepared machine: format, lints with warnings denied, unit tests.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::steps::Steps;
use crate::tally::{Reader, Tally};
use crate::{ebpf, run};

pub fn run() -> ExitCode {
    let mut steps = Steps::default();
    format_and_lints(&mut steps);
    unit_tests(&mut steps);
    steps.finish()
}

pub fn format_and_lints(steps: &mut Steps) {
    steps.single("format", || {
        run::run(run::cargo().args(["fmt", "--all", "--check", "--", "-l"]))
    });
    steps.single("lints", || {
        run::run(with_object(run::cargo().args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ])))
    });
}

/// Everything but the whole-system tests, which need root, the release binaries, and the machine for themselves.
pub fn unit_tests(steps: &mut Steps) {
    steps.tests("unit tests", || {
        let mut cargo = run::cargo();
        cargo.args([
            "test",
            "--workspace",
            "--exclude",
            "umbra-tests",
            "--no-fail-fast",
            "--",
            "--show-output",
        ]);
        cargo_test("unit tests", with_object(&mut cargo))
    });
    steps.tests("unit tests of the lab", || {
        let mut cargo = run::cargo();
        cargo.args([
            "test",
            "-p",
            "umbra-tests",
            "--lib",
            "--bins",
            "--no-fail-fast",
            "--",
            "--show-output",
        ]);
        cargo_test("unit tests of the lab", with_object(&mut cargo))
    });
}

/// Without the kernel programs' object the agent is built without them: enough to check its other code.
fn with_object(cargo: &mut Command) -> &mut Command {
    if !ebpf::target_dir(&run::root()).join("ebpf/umbra-agent.bpf.o").exists() {
        cargo.env("UMBRA_EBPF", "skip");
    }
    cargo
}

/// Runs cargo's tests, shows what they say as it comes, and counts.
pub fn cargo_test(step: &str, cargo: &mut Command) -> Result<Tally> {
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
    let Some(out) = child.stdout.take() else {
        bail!("cargo has no output")
    };
    let mut reader = Reader::default();
    let mut out = BufReader::new(out);
    let mut bytes = Vec::new();
    // By bytes: a test may print what is no UTF-8.
    while out.read_until(b'\n', &mut bytes)? > 0 {
        let line = String::from_utf8_lossy(&bytes).trim_end().to_string();
        if reader.line(&line) {
            println!("{line}");
        }
        bytes.clear();
    }
    Ok(reader.finish(step, child.wait()?.success()))
}
