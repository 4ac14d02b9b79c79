//! Logs go to stderr, one line an event. Levels, the same everywhere: `error` an operator must act, `warn` something
//! went wrong and was handled, `info` a state changed, `debug` every message, `trace` every round.

use tracing_subscriber::EnvFilter;

/// Starts logging. `UMBRA_LOG` has the filter in tracing's own syntax (`info,umbra_replicator=debug`); default `info`.
pub fn init() {
    let filter = EnvFilter::try_from_env("UMBRA_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .try_init();
    if let Err(e) = started {
        eprintln!("logging was started before: {e}");
    }
}
