//! The Resource Prediction Service, the one place where decisions are made.
//!
//! In reading order: samples become slots ([`ingest`], [`series`]), slots become forecasts ([`forecast`]) and these the picture
//! of what is coming ([`contention`], [`outlook`]). The [`planner`] decides by it, VM by VM, along the [`lifecycle`]; the
//! [`orchestrator`] makes it so with the replicators, whose words the [`fleet`] keeps, and leads the traffic over ([`redirect`]).
//! What a restart needs is in the [`store`]. The [`service`] ties it together by the [`config`], and [`http`] shows it.

pub mod backtest;
pub mod config;
pub mod contention;
pub mod fleet;
pub mod forecast;
pub mod http;
pub mod ingest;
pub mod lifecycle;
pub mod orchestrator;
pub mod outlook;
pub mod planner;
pub mod redirect;
pub mod series;
pub mod service;
pub mod store;
