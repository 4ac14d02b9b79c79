//! What the RPS expects: the one picture that the planner decides by, the API shows and the store keeps.
//!
//! [`outlook`] forecasts every series ([`ForecastCache`] keeps what stays valid between slots) and hands the bands to
//! [`Outlook::assemble`], which is all contention: joint demand a host, CPS a VM. Tests and the simulator assemble
//! outlooks from bands of their own.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use umbra_api::order::Peak;
use umbra_api::view::{ForecastView, ModelScore};
use umbra_api::{HostId, UnixMs, VmId};

use crate::contention::{Dependence, Draws, Joint, Verdict, ratio};
use crate::forecast::auto::{Auto, Speaker};
use crate::forecast::select::Selection;
use crate::forecast::{History, LEVELS, P50, P90, P99, Quantiles};
use crate::ingest::{SeriesKey, Vm, World};
use crate::series::{Series, Usage};

/// How CPS is computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The VM's predicted usage over the capacity that the others leave.
    Ratio,
    /// The probability that the VM meets contention within the horizon.
    Probability,
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ratio => "ratio",
            Self::Probability => "probability",
        }
    }
}

#[derive(Clone, PartialEq, Debug)]
pub struct Params {
    /// Slots looked ahead.
    pub horizon: usize,
    pub method: Method,
    /// Factor on the CPS, which is then cut to 0..=1.
    pub weight: f64,
    /// The CPS from which `contention_at` is told.
    pub threshold: f64,
    /// Part of a host's CPUs that demand may fill before it counts as contended.
    pub usable_share: f64,
    /// Who wants less than this does not suffer from contention.
    pub idle_cores: f64,
    /// CPU that a QEMU may use on top of its vCPUs; bounds forecasts.
    pub emulator_cores: f64,
    pub dependence: Dependence,
    /// Below this many measured slots there is no forecast.
    pub min_history: usize,
    /// Slots of history that the models see.
    pub max_history: usize,
    /// Slots between two backtests of one series.
    pub reselect_slots: usize,
    /// Whether the best expert's forecast counts, or the mix of all.
    pub speaker: Speaker,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            horizon: 30,
            method: Method::Probability,
            weight: 1.0,
            threshold: 0.5,
            usable_share: 1.0,
            idle_cores: 0.02,
            emulator_cores: 0.5,
            dependence: Dependence::default(),
            min_history: 12,
            max_history: 2_016,
            reselect_slots: 4,
            speaker: Speaker::default(),
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Outlook {
    pub now: UnixMs,
    pub slot_ms: u64,
    /// Ascending by id.
    pub vms: Vec<VmOutlook>,
    /// Ascending by name.
    pub hosts: Vec<HostOutlook>,
}

#[derive(Clone, Debug)]
pub struct VmOutlook {
    pub vm: VmId,
    pub name: String,
    /// Where it runs.
    pub host: HostId,
    pub vcpus: u32,
    /// Last measured slot: run + wait, in cores.
    pub cpu_demand: f64,
    pub wait_ms_per_s: f64,
    pub rss_bytes: u64,
    pub guest_bytes: u64,
    /// Name of the chosen model; empty while the history is too short.
    pub model: String,
    pub scores: Vec<ModelScore>,
    pub forecast: Option<ForecastView>,
    pub cps: f64,
    /// Start of the first slot by which the VM has met contention with at least `threshold` CPS.
    pub contention_at: Option<UnixMs>,
    /// p99 over the horizon.
    pub peak: Peak,
    pub peak_p50: f64,
    pub peak_p90: f64,
    /// Measured slots that the models see.
    pub history_slots: usize,
    /// What counts in the joint demand, forecast or not.
    pub bands: Quantiles,
}

#[derive(Clone, Debug)]
pub struct HostOutlook {
    pub host: HostId,
    pub cpus: f64,
    /// `cpus` × `usable_share`: what demand is held against.
    pub usable_cpus: f64,
    /// Last measured slot: its VMs' demand and its own work.
    pub cpu_demand: f64,
    pub demand_p50: Vec<f64>,
    pub demand_p90: Vec<f64>,
    /// By slot: the probability that demand exceeds `usable_cpus` in it.
    pub probability: Vec<f64>,
    /// The probability that it does in any slot of the horizon.
    pub peak_probability: f64,
    pub mem_total_bytes: u64,
    pub mem_available_bytes: u64,
    /// VMs that run here.
    pub vms: Vec<VmId>,
    /// VMs that have a copy here and run elsewhere.
    pub shadows: Vec<VmId>,
    pub last_sample: Option<UnixMs>,
    joint: Joint,
}

/// A host with one VM more, or without one that it has.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct WhatIf {
    pub demand_p50: Vec<f64>,
    pub demand_p90: Vec<f64>,
    pub probability: Vec<f64>,
    /// The probability of contention in any slot of the horizon.
    pub peak_probability: f64,
}

/// A VM as [`Outlook::assemble`] takes it.
#[derive(Clone, Debug)]
pub struct VmInput {
    pub vm: VmId,
    pub name: String,
    pub host: HostId,
    pub vcpus: u32,
    pub cpu_demand: f64,
    pub wait_ms_per_s: f64,
    pub rss_bytes: u64,
    pub guest_bytes: u64,
    /// Most memory expected within the horizon.
    pub peak_mem_bytes: u64,
    pub history_slots: usize,
    /// Chosen model and scores; `None` while the history is too short.
    pub model: Option<(String, Vec<ModelScore>)>,
    pub bands: Quantiles,
}

/// A host as [`Outlook::assemble`] takes it.
#[derive(Clone, Debug)]
pub struct HostInput {
    pub host: HostId,
    pub cpus: f64,
    /// The host's own work in the last slot, and its forecast.
    pub own_demand: f64,
    pub own: Quantiles,
    pub mem_total_bytes: u64,
    pub mem_available_bytes: u64,
    pub shadows: Vec<VmId>,
    pub last_sample: Option<UnixMs>,
}

/// What stays valid from one outlook to the next.
#[derive(Default)]
pub struct ForecastCache {
    draws: Option<Arc<Draws>>,
    forecasters: HashMap<SeriesKey, Auto>,
}

impl ForecastCache {
    /// The pool of draws for these parameters.
    fn draws(&mut self, params: &Params) -> Arc<Draws> {
        let fits = |d: &&Arc<Draws>| d.horizon() == params.horizon && d.dependence() == params.dependence;
        match self.draws.as_ref().filter(fits) {
            Some(draws) => draws.clone(),
            None => self
                .draws
                .insert(Arc::new(Draws::new(params.horizon, params.dependence)))
                .clone(),
        }
    }
}

/// Looks `params.horizon` slots ahead from the slot that contains `now`.
pub fn outlook(world: &World, cache: &mut ForecastCache, params: &Params, now: UnixMs) -> Outlook {
    let mut shadows: BTreeMap<&HostId, Vec<VmId>> = BTreeMap::new();
    let mut vms = Vec::new();
    for (id, vm) in world.vms() {
        vm.shadows().for_each(|host| shadows.entry(host).or_default().push(id));
        if let Some(host) = vm.running() {
            vms.push(vm_input(world, cache, params, now, id, vm, host));
        }
    }
    let hosts = world.hosts().map(|(id, host)| {
        let key = SeriesKey::Host(id.clone());
        let expected = expect(world, cache, params, now, key, host.own(), host.node.cpus);
        HostInput {
            host: id.clone(),
            cpus: host.node.cpus,
            own_demand: expected.last.cpu_cores,
            own: expected.bands,
            mem_total_bytes: host.node.mem_total_bytes,
            mem_available_bytes: host.node.mem_available_bytes,
            shadows: shadows.remove(id).unwrap_or_default(),
            last_sample: host.last_sample,
        }
    });
    let hosts: Vec<_> = hosts.collect();
    cache.forecasters.retain(|key, _| match key {
        SeriesKey::Vm(vm) => world.vm(*vm).is_some(),
        SeriesKey::Host(host) => world.host(host).is_some(),
    });
    let draws = cache.draws(params);
    Outlook::assemble(now, world.shape().slot_ms, params, draws, vms, hosts)
}

fn vm_input(
    world: &World,
    cache: &mut ForecastCache,
    params: &Params,
    now: UnixMs,
    id: VmId,
    vm: &Vm,
    host: &HostId,
) -> VmInput {
    let bound = f64::from(vm.vcpus) + params.emulator_cores;
    let expected = expect(world, cache, params, now, SeriesKey::Vm(id), vm.series(), bound);
    // Memory has no model yet: the most seen lately, and a twentieth for growth, within what the guest has.
    let most = (expected.rss_max * 1.05) as u64;
    VmInput {
        vm: id,
        name: vm.name.clone(),
        host: host.clone(),
        vcpus: vm.vcpus,
        cpu_demand: expected.last.cpu_cores,
        wait_ms_per_s: expected.last.wait_ms_per_s,
        rss_bytes: vm.rss_bytes,
        guest_bytes: vm.guest_bytes,
        peak_mem_bytes: if vm.guest_bytes > 0 {
            most.min(vm.guest_bytes.max(vm.rss_bytes))
        } else {
            most
        },
        history_slots: expected.history_slots,
        model: expected.model,
        bands: expected.bands,
    }
}

struct Expected {
    last: Usage,
    rss_max: f64,
    history_slots: usize,
    model: Option<(String, Vec<ModelScore>)>,
    bands: Quantiles,
}

/// One series' bands from the slot that contains `now` on.
fn expect(
    world: &World,
    cache: &mut ForecastCache,
    params: &Params,
    now: UnixMs,
    key: SeriesKey,
    series: &Series,
    bound: f64,
) -> Expected {
    let shape = world.shape();
    let from = shape.slot_of(now);
    let last = series
        .newest_before(from)
        .and_then(|n| series.get(n))
        .unwrap_or_default();
    let newest = series.newest_undisturbed(from);
    let window = newest.map(|n| series.demand(n, params.max_history)).unwrap_or_default();
    let cpu: Vec<_> = window.iter().map(|s| s.map(|u| u.cpu_cores)).collect();
    let rss_max = window
        .iter()
        .rev()
        .take(params.horizon.max(1))
        .flatten()
        .map(|u| u.rss_bytes)
        .fold(0.0, f64::max);
    let end = newest.map_or(from, |n| n + 1);
    let history = History::new(&cpu, shape.start_of(end), shape.slot_ms, bound);
    let history_slots = history.measured();
    // Slots between the last measured one and `now` are forecast too, and then left out.
    let lag = usize::try_from(from - end).unwrap_or(0);
    let forecast = (history_slots >= params.min_history && lag <= params.horizon)
        .then(|| {
            let forecaster = cache.forecasters.entry(key).or_default();
            forecaster.forecast(params.speaker, &history, params.horizon + lag, params.reselect_slots)
        })
        .flatten();
    match forecast {
        Some(Selection {
            model,
            scores,
            quantiles,
        }) => {
            let bands = quantiles.skip(lag);
            Expected {
                last,
                rss_max,
                history_slots,
                model: Some((model, scores)),
                bands,
            }
        }
        None => Expected {
            last,
            rss_max,
            history_slots,
            model: None,
            bands: guess(&history, params.horizon),
        },
    }
}

/// For the joint demand only, where there is no forecast: what was seen so far, and a spread that admits how little
/// that is.
fn guess(history: &History, horizon: usize) -> Quantiles {
    let values = history.values();
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    let sigma = variance.sqrt().max(0.25 * mean);
    Quantiles::flat(values.last().copied().unwrap_or(0.0), sigma, horizon, history.bound)
}

impl Outlook {
    /// Joint demand and CPS from bands. Each of `vms` counts on the host it names; bands shorter than the draws' horizon
    /// count as nothing beyond their end.
    pub fn assemble(
        now: UnixMs,
        slot_ms: u64,
        params: &Params,
        draws: Arc<Draws>,
        mut vms: Vec<VmInput>,
        mut hosts: Vec<HostInput>,
    ) -> Self {
        vms.sort_by_key(|v| v.vm);
        hosts.sort_by(|a, b| a.host.cmp(&b.host));
        let mut by_host: BTreeMap<HostId, Vec<&VmInput>> = BTreeMap::new();
        vms.iter()
            .for_each(|v| by_host.entry(v.host.clone()).or_default().push(v));
        let hosts: Vec<_> = hosts
            .into_iter()
            .map(|h| {
                let here = by_host.remove(&h.host).unwrap_or_default();
                host_outlook(h, &here, params, &draws)
            })
            .collect();
        let from = UnixMs(now.0 - now.0.rem_euclid(i64::try_from(slot_ms).unwrap_or(i64::MAX).max(1)));
        let vms = vms.into_iter().map(|vm| {
            let host = hosts
                .binary_search_by(|h| h.host.cmp(&vm.host))
                .ok()
                .and_then(|i| hosts.get(i));
            vm_outlook(vm, host, params, from, slot_ms)
        });
        Self {
            now,
            slot_ms,
            vms: vms.collect(),
            hosts,
        }
    }

    pub fn vm(&self, vm: VmId) -> Option<&VmOutlook> {
        self.vms
            .binary_search_by_key(&vm, |v| v.vm)
            .ok()
            .and_then(|i| self.vms.get(i))
    }

    pub fn host(&self, host: &HostId) -> Option<&HostOutlook> {
        self.hosts
            .binary_search_by(|h| h.host.cmp(host))
            .ok()
            .and_then(|i| self.hosts.get(i))
    }

    /// `host` with `vm` added, or without it if it runs there. `None` if either is unknown.
    pub fn what_if(&self, vm: VmId, host: &HostId) -> Option<WhatIf> {
        let vm = self.vm(vm)?;
        let host = self.host(host)?;
        let mut joint = host.joint.clone();
        let key = member_key(vm.vm);
        if vm.host == host.host {
            joint.remove(&key, &vm.bands);
        } else {
            joint.add(&key, &vm.bands);
        }
        let Verdict {
            demand_p50,
            demand_p90,
            probability,
            peak_probability,
        } = joint.verdict(host.usable_cpus);
        Some(WhatIf {
            demand_p50,
            demand_p90,
            probability,
            peak_probability,
        })
    }
}

fn member_key(vm: VmId) -> [u8; 16] {
    *vm.0.as_bytes()
}

fn host_outlook(host: HostInput, here: &[&VmInput], params: &Params, draws: &Arc<Draws>) -> HostOutlook {
    let mut joint = Joint::new(draws.clone());
    joint.add(host.host.as_str().as_bytes(), &host.own);
    here.iter().for_each(|v| joint.add(&member_key(v.vm), &v.bands));
    let usable_cpus = host.cpus * params.usable_share;
    let verdict = joint.verdict(usable_cpus);
    HostOutlook {
        cpus: host.cpus,
        usable_cpus,
        cpu_demand: host.own_demand + here.iter().map(|v| v.cpu_demand).sum::<f64>(),
        demand_p50: verdict.demand_p50,
        demand_p90: verdict.demand_p90,
        probability: verdict.probability,
        peak_probability: verdict.peak_probability,
        mem_total_bytes: host.mem_total_bytes,
        mem_available_bytes: host.mem_available_bytes,
        vms: here.iter().map(|v| v.vm).collect(),
        shadows: host.shadows,
        last_sample: host.last_sample,
        host: host.host,
        joint,
    }
}

fn vm_outlook(vm: VmInput, host: Option<&HostOutlook>, params: &Params, from: UnixMs, slot_ms: u64) -> VmOutlook {
    // By slot, the CPS if the horizon ended there.
    let by_slot: Vec<f64> = match (host, params.method) {
        (None, _) => Vec::new(),
        (Some(h), Method::Probability) => {
            h.joint
                .met_by(&member_key(vm.vm), &vm.bands, h.usable_cpus, params.idle_cores)
        }
        (Some(h), Method::Ratio) => running_max(ratio(&vm.bands, P90, &h.demand_p50, h.usable_cpus)),
    };
    let by_slot: Vec<f64> = by_slot
        .into_iter()
        .map(|p| (p * params.weight).clamp(0.0, 1.0))
        .collect();
    let slot_start = |i: usize| from.plus_ms(i64::try_from(i as u64 * slot_ms).unwrap_or(i64::MAX));
    let forecast = vm.model.is_some().then(|| ForecastView {
        from,
        slot_ms,
        quantiles: LEVELS.to_vec(),
        cpu_cores: (0..LEVELS.len())
            .map(|l| vm.bands.slots().iter().map(|b| b[l]).collect())
            .collect(),
    });
    let (model, scores) = vm.model.unwrap_or_default();
    VmOutlook {
        cps: by_slot.last().copied().unwrap_or(0.0),
        contention_at: by_slot.iter().position(|p| *p >= params.threshold).map(slot_start),
        peak: Peak {
            cpu_cores: vm.bands.peak(P99),
            mem_bytes: vm.peak_mem_bytes,
        },
        peak_p50: vm.bands.peak(P50),
        peak_p90: vm.bands.peak(P90),
        model,
        scores,
        forecast,
        vm: vm.vm,
        name: vm.name,
        host: vm.host,
        vcpus: vm.vcpus,
        cpu_demand: vm.cpu_demand,
        wait_ms_per_s: vm.wait_ms_per_s,
        rss_bytes: vm.rss_bytes,
        guest_bytes: vm.guest_bytes,
        history_slots: vm.history_slots,
        bands: vm.bands,
    }
}

fn running_max(mut values: Vec<f64>) -> Vec<f64> {
    let mut most = 0.0f64;
    values.iter_mut().for_each(|v| {
        most = most.max(*v);
        *v = most;
    });
    values
}

#[cfg(test)]
#[path = "outlook_tests.rs"]
mod tests;
