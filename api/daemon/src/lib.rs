//! What every Umbra daemon has, so that all of them behave alike: a configuration that is checked before any work
//! ([`config`]), logs ([`logs`]), an HTTP server and client over hyper ([`http`], [`client`]), metrics as text
//! ([`metrics`]), and a stop that is asked for once and heard everywhere ([`stop`]).

pub mod client;
pub mod config;
pub mod http;
pub mod logs;
pub mod metrics;
pub mod stop;
