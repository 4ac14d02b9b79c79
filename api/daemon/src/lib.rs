//! What every Umbra daemon has, so that all of them behave alike: a configuration that is checked before any work
//! ([`config`]), logs ([`logs`]), an HTTP server and client over hyper ([`http`], [`client`]), metrics as text
//! ([`metrics`]), and a stop that is asked for once and heard everywhere ([`stop`]).

pub mod client;
pub mod config;
pub mod http;
pub mod logs;
pub mod metrics;
pub mod stop;

/// An error and its sources in one line, each said once: the reason often stands in the last one.
pub fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = source.source();
    }
    text
}
