//! `cargo xtask fuzz`: libFuzzer against what Umbra parses, with the stable compiler.
//!
//! cargo-fuzz asks for a nightly compiler only for its address sanitizer. Safe code gains little from that, and the coverage
//! that guides libFuzzer needs no more than LLVM's own pass, which stable rustc runs when it is named. libfuzzer-sys brings
//! libFuzzer itself and needs a C++ compiler.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;

/// The fuzz package's binaries are these, with `fuzz_` before.
const TARGETS: [&str; 4] = ["stream", "frames", "qmp", "adopt"];

/// Largest input: two dozen pages, so that streams of several sections fit.
const MAX_LEN: usize = 100_000;

/// Builds all targets and runs one, or each, for so many seconds. Inputs that found something new are kept in target/fuzz,
/// and the next run begins with them.
pub fn run(target: Option<&str>, seconds: u64) -> Result<()> {
    let targets: Vec<&str> = TARGETS
        .into_iter()
        .filter(|t| target.is_none_or(|want| want == *t))
        .collect();
    if targets.is_empty() {
        bail!("no such fuzz target; there are {}", TARGETS.join(", "));
    }
    let out = crate::ebpf::target_dir(&run::root());
    let folder = out.join("fuzz");
    build(&folder)?;
    for target in targets {
        let binary = out.join("release").join(format!("fuzz_{target}"));
        fuzz(&folder, &binary, target, seconds)?;
    }
    Ok(())
}

/// Builds the targets and writes their first inputs.
fn build(folder: &Path) -> Result<()> {
    let mut cargo = run::cargo();
    cargo.args(["build", "--release", "-p", "umbra-fuzz", "--bins"]);
    cargo.env(
        "RUSTC_WORKSPACE_WRAPPER",
        run::root().join("tests/fuzz/rustc-with-coverage"),
    );
    run::run(&mut cargo).context("building the fuzz targets")?;
    let mut corpus = run::cargo();
    corpus
        .args(["run", "--quiet", "-p", "umbra-fuzz", "--example", "corpus", "--"])
        .arg(folder.join("corpus"));
    run::run(&mut corpus).context("writing the first inputs")
}

fn fuzz(folder: &Path, binary: &Path, target: &str, seconds: u64) -> Result<()> {
    let (corpus, artifacts) = (
        folder.join("corpus").join(target),
        folder.join("artifacts").join(target),
    );
    std::fs::create_dir_all(&artifacts).with_context(|| format!("cannot make {}", artifacts.display()))?;
    let mut fuzzer = Command::new(binary);
    fuzzer.arg(&corpus).args([
        format!("-max_total_time={seconds}"),
        format!("-max_len={MAX_LEN}"),
        format!("-artifact_prefix={}/", artifacts.display()),
        "-rss_limit_mb=1024".into(),
        "-timeout=10".into(),
        "-print_final_stats=1".into(),
        "-verbosity=0".into(),
    ]);
    println!("  fuzz     {target}, {seconds} s");
    run::run(&mut fuzzer).with_context(|| format!("{target} failed; the input is in {}", artifacts.display()))
}
