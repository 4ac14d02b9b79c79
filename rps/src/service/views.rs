//! What the API shows, made of states, outlook and what the replicators told.

use std::sync::Arc;

use umbra_api::lifecycle::Stage;
use umbra_api::problem::Problem;
use umbra_api::view::{DecisionView, HostView, LifecycleEvent, Mode, ModelScore, StatusView, VmSummary, VmView};
use umbra_api::{HostId, VmId};

use super::{Engine, Service, lock, wall_clock};
use crate::lifecycle::VmState;
use crate::outlook::{Outlook, VmOutlook};
use crate::store::{Filter, Store, StoreError};

/// Slots of history in a VM's view.
const HISTORY_SLOTS: usize = 240;

/// Events in a VM's view.
const EVENTS: usize = 50;

impl From<StoreError> for ReadError {
    fn from(e: StoreError) -> Self {
        Self(e)
    }
}

/// The store can't be read.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct ReadError(StoreError);

impl From<ReadError> for Problem {
    fn from(e: ReadError) -> Self {
        Self::new(500, "store", "The store can't be read", e.to_string())
    }
}

impl Service {
    pub fn mode(&self) -> Mode {
        lock(&self.engine).core.mode()
    }

    /// It has looked ahead once, and the store works.
    pub fn ready(&self) -> bool {
        let engine = lock(&self.engine);
        engine.failed.is_none() && engine.outlook.now > self.started
    }

    pub fn status(&self) -> StatusView {
        let engine = lock(&self.engine);
        StatusView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mode: engine.core.mode(),
            now: wall_clock(),
            started: self.started,
            slot_ms: self.config.slot_ms,
            hosts: engine.host_views(),
            vms: engine.shown().count(),
            shadows: engine.core.states().values().filter(|s| s.shadow.is_some()).count(),
        }
    }

    pub fn hosts(&self) -> Vec<HostView> {
        lock(&self.engine).host_views()
    }

    pub fn vms(&self) -> Vec<VmSummary> {
        let engine = lock(&self.engine);
        engine.shown().map(|s| engine.summary(s)).collect()
    }

    /// By UUID, or by a name that only one VM has.
    pub fn find(&self, word: &str) -> Result<VmId, Problem> {
        let engine = lock(&self.engine);
        let states = engine.core.states();
        if let Ok(vm) = word.parse::<VmId>() {
            let known = states.contains_key(&vm);
            return if known {
                Ok(vm)
            } else {
                Err(Problem::not_found(format!("no VM {vm}")))
            };
        }
        let mut named = engine.shown().filter(|s| s.name == word).map(|s| s.vm);
        match (named.next(), named.next()) {
            (Some(vm), None) => Ok(vm),
            (None, _) => Err(Problem::not_found(format!("no VM is named {word:?}"))),
            (Some(a), Some(b)) => {
                let detail = format!("{word:?} is the name of {a}, {b} and perhaps more: use the UUID");
                Err(Problem::new(
                    409,
                    "ambiguous_name",
                    "More than one VM has this name",
                    detail,
                ))
            }
        }
    }

    pub fn vm(&self, vm: VmId) -> Result<VmView, Problem> {
        // One lock at a time: the order in which others take them never matters then.
        let history = lock(&self.world).world.history(vm, HISTORY_SLOTS, wall_clock());
        let events = self.events(&Filter {
            vm: Some(vm),
            since: None,
            limit: EVENTS,
        })?;
        let engine = lock(&self.engine);
        let s = engine
            .core
            .states()
            .get(&vm)
            .ok_or_else(|| Problem::not_found(format!("no VM {vm}")))?;
        let seen = engine.outlook.vm(vm);
        Ok(VmView {
            summary: engine.summary(s),
            epoch: s.epoch,
            tier: s.tier,
            vcpus: seen.map_or(0, |v| v.vcpus),
            rss_bytes: seen.map_or(0, |v| v.rss_bytes),
            guest_bytes: seen.map_or(0, |v| v.guest_bytes),
            model: seen.map_or_else(String::new, |v| v.model.clone()),
            scores: seen.map_or_else(Vec::<ModelScore>::new, |v| v.scores.clone()),
            history,
            forecast: seen.and_then(|v| v.forecast.clone()),
            progress: engine.core.progress(s),
            shadow_memory: engine.core.shadow_memory(s),
            disks: engine.core.disks(s),
            last_switchover: s.last_switchover,
            last_error: s.last_error.clone(),
            events,
        })
    }

    pub fn explain(&self, vm: VmId) -> Result<DecisionView, Problem> {
        if let Some(latest) = lock(&self.engine).recorder.latest(vm) {
            return Ok(latest.clone());
        }
        let stored = self.decisions(&Filter {
            vm: Some(vm),
            since: None,
            limit: 1,
        })?;
        let none = || Problem::not_found(format!("nothing was decided about VM {vm} yet"));
        stored.into_iter().next().ok_or_else(none)
    }

    pub fn events(&self, filter: &Filter) -> Result<Vec<LifecycleEvent>, ReadError> {
        Ok(lock(&self.reader).events(filter)?)
    }

    pub fn decisions(&self, filter: &Filter) -> Result<Vec<DecisionView>, ReadError> {
        Ok(lock(&self.reader).decisions(filter)?)
    }

    pub fn outlook(&self) -> Arc<Outlook> {
        lock(&self.engine).outlook.clone()
    }
}

impl Engine {
    /// VMs that agents report now, and those that are protected although none does.
    fn shown(&self) -> impl Iterator<Item = &VmState> {
        let states = self.core.states().values();
        states.filter(|s| s.stage != Stage::Unprotected || self.outlook.vm(s.vm).is_some())
    }

    fn summary(&self, s: &VmState) -> VmSummary {
        let policy = self.core.policy();
        let seen = self.outlook.vm(s.vm);
        let figure = |f: fn(&VmOutlook) -> f64| seen.map_or(0.0, f);
        VmSummary {
            vm: s.vm,
            name: s.name.clone(),
            host: s.host.clone(),
            home: s.home.clone(),
            stage: s.stage,
            cpu_demand: figure(|v| v.cpu_demand),
            wait_ms_per_s: figure(|v| v.wait_ms_per_s),
            cps: figure(|v| v.cps),
            threshold: policy.threshold_of(s.vm, &s.name),
            shadow: s.shadow.clone(),
            protect: policy.protects(s.vm, &s.name),
        }
    }

    fn host_views(&self) -> Vec<HostView> {
        let fleet = self.core.fleet();
        let mut names: Vec<&HostId> = fleet.keys().collect();
        names.extend(
            self.outlook
                .hosts
                .iter()
                .map(|h| &h.host)
                .filter(|h| !fleet.contains_key(h)),
        );
        names.sort();
        names.into_iter().map(|h| self.host_view(h)).collect()
    }

    fn host_view(&self, host: &HostId) -> HostView {
        let peak = |slots: &[f64]| slots.iter().copied().fold(0.0, f64::max);
        let seen = self.outlook.host(host);
        let states = self.core.states().values();
        HostView {
            host: host.clone(),
            cpus: seen.map_or(0.0, |h| h.cpus),
            cpu_demand: seen.map_or(0.0, |h| h.cpu_demand),
            cpu_predicted_p50: seen.map_or(0.0, |h| peak(&h.demand_p50)),
            cpu_predicted_p90: seen.map_or(0.0, |h| peak(&h.demand_p90)),
            mem_total_bytes: seen.map_or(0, |h| h.mem_total_bytes),
            mem_available_bytes: seen.map_or(0, |h| h.mem_available_bytes),
            contention_probability: seen.map_or(0.0, |h| h.peak_probability),
            vms: seen.map_or(0, |h| h.vms.len()),
            shadows: states.filter(|s| s.shadow.as_ref() == Some(host)).count(),
            last_sample: seen.and_then(|h| h.last_sample),
            replicator_up: self.core.fleet().get(host).is_some_and(|r| r.up),
        }
    }
}
