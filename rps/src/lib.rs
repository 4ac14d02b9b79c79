//! The Resource Prediction Service: forecasts demand, foresees contention, decides.
//!
//! In reading order: what agents tell becomes [`ingest::World`] and its [`series`]; [`forecast`] gives every series
//! quantiles; [`contention`] joins them per host; [`outlook`] is the picture that all others read.

pub mod contention;
pub mod forecast;
pub mod ingest;
pub mod outlook;
pub mod series;
