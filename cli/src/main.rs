//! `umbra`: the operator's command. It knows nothing but the RPS's HTTP API; certificates it makes by itself, and the host on which it
//! stands it looks at itself.
//!
//! In reading order: [`args`], [`commands`] (one request, one answer), [`rps`] and [`vms`] (asking, and finding a VM by
//! what was typed), [`render`] (views to text, pure), [`recover`] (the way out, without an RPS if
//! need be), [`pki`], [`doctor`], [`error`] (exit codes).

mod args;
mod commands;
mod doctor;
mod error;
mod pki;
mod recover;
mod render;
mod rps;
mod vms;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::error::Error;
use crate::render::Look;

fn main() -> ExitCode {
    let args = args::Args::parse();
    let result = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::from)
        .and_then(|runtime| runtime.block_on(commands::run(&args, &Look::of_this_terminal())));
    match result {
        Ok(answer) => match print(&mut std::io::stdout().lock(), &answer.text) {
            Ok(()) if answer.good => ExitCode::SUCCESS,
            Ok(()) => ExitCode::FAILURE,
            Err(e) => {
                tell(&format!("umbra: standard output: {e}"));
                ExitCode::FAILURE
            }
        },
        Err(e) => {
            match (args.json, serde_json::to_string(&e.problem())) {
                (true, Ok(problem)) => tell(&problem),
                _ => tell(&format!("umbra: {}", render::words::clean(&e.to_string()))),
            }
            ExitCode::from(e.exit_code())
        }
    }
}

/// The text and one line end. A reader that has seen enough (`| head`) is no failure.
fn print(out: &mut impl Write, text: &str) -> std::io::Result<()> {
    match writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// To standard error; if that is closed there is nobody left to tell.
fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
