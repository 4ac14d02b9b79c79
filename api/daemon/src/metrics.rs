//! Metrics are plain structs beside their owner, registered in a `prometheus_client` registry.

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use crate::http::Reply;
use crate::http::{self, status};

/// What OpenMetrics says a scraper must be told.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The answer to `GET /metrics`.
pub fn reply(registry: &Registry) -> Reply {
    let mut text = String::new();
    match encode(&mut text, registry) {
        Ok(()) => http::reply(status::OK, CONTENT_TYPE, text),
        Err(e) => http::problem(&umbra_api::problem::Problem::new(
            500,
            "metrics",
            "Metrics can't be written",
            e.to_string(),
        )),
    }
}
