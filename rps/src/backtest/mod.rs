//! `umbra-rps backtest demand`: the product's forecasts on recorded traces, exported and scored.
//!
//! In reading order: the files become series ([`traces`]), each series is walked from origin to origin by the protocol
//! ([`walk`]), and what was forecast is held against what came ([`score`]). Here they are put together: threads, the
//! export's file, the table. Series are independent of each other and written in the files' order, so the output does not
//! depend on the number of threads.

pub mod score;
pub mod traces;
pub mod walk;

use std::collections::BTreeMap;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use anyhow::Context;

use score::{Score, Walked};
use traces::Trace;
use walk::{BASELINES, Model};

/// What the command line says.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Folder of zstd-compressed CSV traces: bitbrains_rnd*, azure*, planetlab_*.
    #[arg(long, value_name = "DIR")]
    pub traces: PathBuf,
    /// Where the predictions go, as CSV.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// `auto` is what the running RPS forecasts with; else one expert alone, by name.
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub model: String,
    /// Only this trace or this one of its metrics, e.g. `bitbrains` or `bitbrains.cpu`.
    #[arg(long, value_name = "NAME")]
    pub only: Option<String>,
    /// Threads; all CPUs if it is not given. The output is the same.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Also scores halves: every other VM, and the first and second half of the origins.
    #[arg(long)]
    pub folds: bool,
}

/// Runs the protocol, writes the export, prints the scores.
pub fn demand(args: &Args) -> anyhow::Result<()> {
    let model = Model::by_name(&args.model)?;
    let mut traces = traces::load(&args.traces)?;
    if let Some(only) = &args.only {
        traces.retain(|t| t.name == *only || t.title() == *only);
        anyhow::ensure!(!traces.is_empty(), "no trace {only} in {}", args.traces.display());
    }
    let file = std::fs::File::create(&args.out).with_context(|| format!("create {}", args.out.display()))?;
    let mut out = BufWriter::new(file);
    let written = || format!("write {}", args.out.display());
    out.write_all(walk::HEADER.as_bytes()).with_context(written)?;
    let threads = args
        .threads
        .or_else(|| std::thread::available_parallelism().ok().map(usize::from))
        .unwrap_or(1)
        .max(1);
    println!("{}", score::heading());
    for trace in &traces {
        let walked = walk_all(trace, &model, threads, |csv| out.write_all(csv).with_context(written))?;
        print_scores(trace, &args.model, &walked, args.folds);
    }
    out.flush().with_context(written)
}

/// All VMs of one trace and metric, `write` called in their order.
fn walk_all(
    trace: &Trace,
    model: &Model,
    threads: usize,
    mut write: impl FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Walked>> {
    let next = AtomicUsize::new(0);
    // Bounded, so that a slow disk holds the walkers back and not the memory.
    let (done, walked) = mpsc::sync_channel(4 * threads);
    let mut progress = Progress::new(trace);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (next, done) = (&next, done.clone());
            scope.spawn(move || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(vm) = trace.vms.get(i) else { return };
                    if done.send((i, walk::walk(trace, vm, model))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(done);
        let mut out_of_turn = BTreeMap::new();
        let mut all = Vec::with_capacity(trace.vms.len());
        for (i, result) in walked {
            out_of_turn.insert(i, result);
            while let Some((csv, vm)) = out_of_turn.remove(&all.len()) {
                write(&csv)?;
                all.push(vm);
                progress.show(all.len());
            }
        }
        progress.clear();
        Ok(all)
    })
}

fn print_scores(trace: &Trace, model: &str, walked: &[Walked], folds: bool) {
    let title = trace.title();
    let everything = |_: usize| true;
    println!(
        "{}",
        Score::of(walked, 0, everything, score::BOTH_HALVES).row(&title, model)
    );
    for (i, baseline) in BASELINES.iter().enumerate() {
        let score = Score::of(walked, i + 1, everything, score::BOTH_HALVES);
        println!("{}", score.row(&title, &format!("({baseline})")));
    }
    if !folds {
        return;
    }
    for (name, rest) in [("even VMs", 0), ("odd VMs", 1)] {
        let score = Score::of(walked, 0, |vm| vm % 2 == rest, score::BOTH_HALVES);
        println!("{}", score.row(&title, &format!("{model}: {name}")));
    }
    for (name, half) in [("first half", 0), ("second half", 1)] {
        let score = Score::of(walked, 0, everything, half..half + 1);
        println!("{}", score.row(&title, &format!("{model}: {name}")));
    }
}

/// A line on standard error that is overwritten; nothing where that is not a terminal.
struct Progress {
    title: String,
    vms: usize,
    shown: bool,
}

impl Progress {
    fn new(trace: &Trace) -> Self {
        Self {
            title: trace.title(),
            vms: trace.vms.len(),
            shown: std::io::stderr().is_terminal(),
        }
    }

    fn show(&mut self, done: usize) {
        if self.shown {
            eprint!("\r\x1b[K{}: {done} of {} VMs", self.title, self.vms);
        }
    }

    fn clear(&mut self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}
