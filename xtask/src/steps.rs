//! A run of several steps: each is timed, all are run even if one fails, and one line at the end sums them up.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::tally::Tally;

#[derive(Default)]
pub struct Steps {
    total: Tally,
    times: Vec<(String, Duration, String)>,
}

impl Steps {
    /// A step that passes or fails as a whole.
    pub fn single(&mut self, name: &str, body: impl FnOnce() -> Result<()>) -> bool {
        self.tests(name, || {
            body().map(|()| Tally {
                passed: 1,
                ..Tally::default()
            })
        })
    }

    /// A step that counts for itself. One that could not even run counts as one failure. Whether nothing failed.
    pub fn tests(&mut self, name: &str, body: impl FnOnce() -> Result<Tally>) -> bool {
        println!("== {name}");
        let start = Instant::now();
        let tally = body().unwrap_or_else(|error| {
            eprintln!("{name}: {error:#}");
            Tally {
                failed: vec![format!("{name}: {error:#}")],
                ..Tally::default()
            }
        });
        let good = tally.failed.is_empty();
        self.times.push((name.to_string(), start.elapsed(), tally.summary()));
        self.total.add(tally);
        good
    }

    /// Prints the steps, what failed, what was skipped and why, and last the one line of the sum. The exit status says the same: an
    /// error message would follow the line that must be the last.
    pub fn finish(self) -> ExitCode {
        println!("\nstep                        seconds");
        for (name, time, summary) in &self.times {
            println!("{name:<26} {:>8.1}  {summary}", time.as_secs_f64());
        }
        for name in &self.total.failed {
            println!("failed   {name}");
        }
        for (name, reason) in &self.total.skipped {
            println!("skipped  {name}: {reason}");
        }
        println!("{}", self.total.summary());
        if self.total.failed.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}
