//! What the RPS shows under `/v1`, and what the CLI reads.

use serde::{Deserialize, Serialize};

use crate::lifecycle::Stage;
use crate::order::Tier;
use crate::replica::{DiskProgress, Progress, ShadowMemory, SwitchoverReport};
use crate::{DecisionId, Epoch, HostId, UnixMs, VmId};

/// `observe` decides and records, and does nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    Observe,
    Act,
}

/// `GET /v1/status`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StatusView {
    pub version: String,
    pub mode: Mode,
    pub now: UnixMs,
    pub started: UnixMs,
    pub slot_ms: u64,
    pub hosts: Vec<HostView>,
    pub vms: usize,
    pub shadows: usize,
}

/// One element of `GET /v1/hosts`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct HostView {
    pub host: HostId,
    pub cpus: f64,
    /// CPU cores that the host's VMs used and wanted in the last slot.
    pub cpu_demand: f64,
    /// Highest median and 0.9 quantile of the summed demand over the horizon.
    pub cpu_predicted_p50: f64,
    pub cpu_predicted_p90: f64,
    pub mem_total_bytes: u64,
    pub mem_available_bytes: u64,
    pub contention_probability: f64,
    pub vms: usize,
    pub shadows: usize,
    pub last_sample: Option<UnixMs>,
    /// The replicator answered the last time it was asked.
    pub replicator_up: bool,
}

/// One element of `GET /v1/vms`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VmSummary {
    pub vm: VmId,
    pub name: String,
    pub host: HostId,
    pub home: HostId,
    pub stage: Stage,
    pub cpu_demand: f64,
    pub wait_ms_per_s: f64,
    pub cps: f64,
    pub threshold: f64,
    pub shadow: Option<HostId>,
    pub protect: bool,
}

/// `GET /v1/vms/{vm}`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VmView {
    #[serde(flatten)]
    pub summary: VmSummary,
    pub epoch: Epoch,
    pub tier: Option<Tier>,
    pub vcpus: u32,
    pub rss_bytes: u64,
    pub guest_bytes: u64,
    pub model: String,
    pub scores: Vec<ModelScore>,
    pub history: Vec<HistoryPoint>,
    pub forecast: Option<ForecastView>,
    pub progress: Option<Progress>,
    /// What the shadow takes on its host.
    #[serde(default)]
    pub shadow_memory: Option<ShadowMemory>,
    /// The copies of its private disks.
    #[serde(default)]
    pub disks: Vec<DiskProgress>,
    pub last_switchover: Option<SwitchoverReport>,
    pub last_error: Option<String>,
    pub events: Vec<LifecycleEvent>,
}

/// Mean pinball loss of a model in the last backtest, in CPU cores.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ModelScore {
    pub model: String,
    pub pinball: f64,
    pub chosen: bool,
}

/// One slot of history; a gap is a slot that is not there.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct HistoryPoint {
    pub t: UnixMs,
    pub cpu_cores: f64,
    pub wait_ms_per_s: f64,
}

/// Quantiles of CPU demand in cores, a row a quantile, a column a slot; the first slot ends at `from + slot_ms`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ForecastView {
    pub from: UnixMs,
    pub slot_ms: u64,
    pub quantiles: Vec<f64>,
    pub cpu_cores: Vec<Vec<f64>>,
}

/// One edge of the lifecycle, as stored.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct LifecycleEvent {
    pub t: UnixMs,
    pub vm: VmId,
    pub from: Stage,
    pub to: Stage,
    pub reason: String,
    pub decision: Option<DecisionId>,
}

/// `GET /v1/decisions?vm=…`, and `GET /v1/vms/{vm}/explain` for the latest one.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DecisionView {
    pub id: DecisionId,
    pub t: UnixMs,
    pub vm: VmId,
    pub mode: Mode,
    pub stage: Stage,
    /// `provision`, `arm`, `switch`, `fail_back`, `release`, `nothing`, …
    pub action: String,
    /// One sentence: 'nothing, because …'.
    pub because: String,
    pub inputs: DecisionInputs,
    pub hosts: Vec<HostVerdict>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct DecisionInputs {
    pub cps: f64,
    pub threshold: f64,
    pub method: String,
    pub model: String,
    /// Seconds until contention is expected, if it is.
    pub contention_in_s: Option<f64>,
    pub copy_s: f64,
    /// For the shadow to get back the RAM that its tier takes, before the switchover.
    #[serde(default)]
    pub promotion_s: f64,
    /// What is left of `contention_in_s` after both.
    pub lead_s: Option<f64>,
    pub peak_cpu_p50: f64,
    pub peak_cpu_p90: f64,
    pub peak_cpu_p99: f64,
    pub host_capacity: f64,
    pub host_demand_p50: f64,
    pub host_demand_p90: f64,
}

/// Why a host was or was not chosen.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct HostVerdict {
    pub host: HostId,
    pub chosen: bool,
    pub reason: String,
}

/// `POST /v1/vms/{vm}/shadow`: what the operator asks for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields, tag = "action")]
pub enum ShadowRequest {
    /// Make a shadow, on `host` if given.
    Create {
        #[serde(default)]
        host: Option<HostId>,
    },
    Switchover,
    Failback,
    Release,
}

/// `PUT /v1/mode`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModeRequest {
    pub mode: Mode,
}
