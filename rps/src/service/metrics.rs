//! What the RPS counts: `GET /metrics`.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub struct HostLabel {
    pub host: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub struct VmLabel {
    pub vm: String,
    pub name: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub struct StageLabel {
    pub stage: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub struct ActionLabel {
    pub action: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub struct OrderLabel {
    pub order: &'static str,
    pub answer: &'static str,
}

type Share = Gauge<f64, AtomicU64>;

/// All of them, registered once.
#[derive(Debug)]
pub struct Metrics {
    pub registry: Registry,
    pub batches: Counter,
    pub batches_twice: Counter,
    pub batches_refused: Counter,
    pub decisions: Family<ActionLabel, Counter>,
    pub edges: Family<StageLabel, Counter>,
    pub orders: Family<OrderLabel, Counter>,
    pub replicator_up: Family<HostLabel, Gauge>,
    pub cps: Family<VmLabel, Share>,
    pub host_probability: Family<HostLabel, Share>,
    pub forecast_seconds: Histogram,
    pub commit_seconds: Histogram,
    pub stopped_seconds: Histogram,
    pub redirect_seconds: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        let seconds = |steps: &[f64]| Histogram::new(steps.iter().copied());
        let mut m = Self {
            registry: Registry::with_prefix("umbra_rps"),
            batches: Counter::default(),
            batches_twice: Counter::default(),
            batches_refused: Counter::default(),
            decisions: Family::default(),
            edges: Family::default(),
            orders: Family::default(),
            replicator_up: Family::default(),
            cps: Family::default(),
            host_probability: Family::default(),
            forecast_seconds: seconds(&[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]),
            commit_seconds: seconds(&[0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]),
            stopped_seconds: seconds(&[0.003, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05, 0.1, 0.5]),
            redirect_seconds: seconds(&[0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]),
        };
        m.register();
        m
    }
}

impl Metrics {
    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("sample_batches", "Batches of samples taken in", self.batches.clone());
        r.register(
            "sample_batches_repeated",
            "Batches that had been taken in before",
            self.batches_twice.clone(),
        );
        r.register(
            "sample_batches_refused",
            "Batches that were refused",
            self.batches_refused.clone(),
        );
        r.register(
            "decisions",
            "Decisions of the planner, by action",
            self.decisions.clone(),
        );
        r.register(
            "lifecycle_edges",
            "Edges that VMs went along, by the stage they led to",
            self.edges.clone(),
        );
        r.register("orders", "Orders sent to replicators, by answer", self.orders.clone());
        r.register(
            "replicator_up",
            "Whether a host's replicator answered last",
            self.replicator_up.clone(),
        );
        r.register("vm_cps", "Contention probability score", self.cps.clone());
        r.register(
            "host_contention_probability",
            "Within the horizon",
            self.host_probability.clone(),
        );
        let s = Unit::Seconds;
        r.register_with_unit(
            "forecast",
            "Time of one outlook",
            s.clone(),
            self.forecast_seconds.clone(),
        );
        r.register_with_unit(
            "store_commit",
            "Time of one commit",
            s.clone(),
            self.commit_seconds.clone(),
        );
        r.register_with_unit(
            "guest_stopped",
            "Switchovers, STOP to RESUME",
            s.clone(),
            self.stopped_seconds.clone(),
        );
        r.register_with_unit(
            "redirect",
            "From the move to the last answer",
            s,
            self.redirect_seconds.clone(),
        );
    }
}
