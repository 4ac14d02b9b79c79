//! The running RPS: the pure parts behind two locks, and the tasks that feed them.
//!
//! ```text
//!  POST /v1/samples ──> world ──every slot──> outlook ──> plan ──> ┐
//!  GET replicas, answers, operators ──────────────────────────> engine: core.step ──> commit ──> send
//! ```
//! The engine's lock is held while the store commits: nothing is sent, and nothing is answered to an operator, that a power
//! cut could make unsaid. A store that fails ends the process; VMs and shadows go on, and a restart resumes.

pub mod metrics;
mod record;
mod recover;
mod tasks;
pub mod views;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use anyhow::Context;
use tokio::sync::Notify;
use umbra_api::sample::SampleBatch;
use umbra_api::view::{Mode, ShadowRequest};
use umbra_api::{HostId, UnixMs, VmId};

use crate::config::Config;
use crate::fleet::Fleet;
use crate::ingest::{IngestError, Ingested, SeriesKey, SlotRow, World};
use crate::orchestrator::replicators::Replicators;
use crate::orchestrator::{Core, Denied, Input, Outputs, Remembered, Request};
use crate::outlook::{ForecastCache, Outlook, outlook};
use crate::planner::{self, Action, Policy, Streaks};
use crate::redirect::{AnnounceSelf, Redirect};
use crate::store::{SqliteStore, Store, StoreError, Write};

use metrics::{ActionLabel, HostLabel, Metrics, StageLabel, VmLabel};
use record::Recorder;

pub use tasks::run;

pub struct Service {
    config: Config,
    policy: Policy,
    started: UnixMs,
    world: Mutex<Foreseer>,
    engine: Mutex<Engine>,
    /// A connection of its own for questions about the past.
    reader: Mutex<SqliteStore>,
    replicators: Replicators,
    pub metrics: Metrics,
    /// Somebody should poll now: an order was just answered.
    hurry: Notify,
    broken: Notify,
}

/// The world and what its forecasts keep between slots.
struct Foreseer {
    world: World,
    cache: ForecastCache,
}

/// All that decides, and the store.
struct Engine {
    core: Core,
    store: Box<dyn Store>,
    streaks: Streaks,
    recorder: Recorder,
    outlook: Arc<Outlook>,
    slots_written: Written,
    /// How CPS is computed, for explanations.
    method: &'static str,
    failed: Option<StoreError>,
}

/// The start of the newest slot of each series that is stored.
type Written = BTreeMap<SeriesKey, UnixMs>;

/// Slots back to which a series that lags behind the others is still stored: an agent's backlog.
const BACKLOG_SLOTS: u64 = 32;

/// Why an operator's request was turned down.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("no host can hold the shadow: {0}")]
    NoTarget(String),
    #[error("{0:?} is no host of the configuration")]
    Target(String),
    #[error("{host}: {words}")]
    Asking { host: HostId, words: String },
    #[error("{host}: {words}; {done} steps were done before that")]
    Step { host: HostId, words: String, done: usize },
    #[error("the store failed, umbra-rps stops")]
    Store,
}

/// A panic elsewhere does not make these values wrong: they are changed by whole steps.
fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn wall_clock() -> UnixMs {
    UnixMs::from_system(SystemTime::now())
}

impl Service {
    /// Opens the store and resumes from it.
    pub fn open(config: Config) -> anyhow::Result<Arc<Self>> {
        let now = wall_clock();
        let store = SqliteStore::open(&config.store)?;
        let reader = SqliteStore::open_reader(&config.store)?;
        let loaded = store.load()?;
        let (world, slots_written) = resume_world(&config, &store, now)?;
        tracing::info!(vms = loaded.states.len(), "resumed from {}", config.store.display());
        let policy = config.policy();
        let remembered = Remembered {
            states: loaded.states,
            orders: loaded.orders,
        };
        let mode = loaded.mode.unwrap_or(config.mode);
        let core = Core::new(
            policy.clone(),
            config.orders,
            config.members(),
            redirects(&config),
            mode,
            remembered,
            now,
        );
        let timeout = std::time::Duration::from_millis(config.orders.answer_timeout_ms);
        let hosts = config.hosts.iter().map(|h| (&h.name, h.replicator.as_str()));
        let replicators = Replicators::new(hosts, timeout).context("hosts")?;
        let engine = Engine {
            core,
            store: Box::new(store),
            streaks: Streaks::default(),
            recorder: Recorder::new(loaded.last_decision),
            outlook: Arc::new(Outlook {
                now,
                slot_ms: config.slot_ms,
                ..Outlook::default()
            }),
            slots_written,
            method: config.contention.method.name(),
            failed: None,
        };
        Ok(Arc::new(Self {
            policy,
            started: now,
            world: Mutex::new(Foreseer {
                world,
                cache: ForecastCache::default(),
            }),
            engine: Mutex::new(engine),
            reader: Mutex::new(reader),
            replicators,
            metrics: Metrics::default(),
            hurry: Notify::new(),
            broken: Notify::new(),
            config,
        }))
    }

    pub fn take_samples(&self, batch: &SampleBatch) -> Result<Ingested, IngestError> {
        let taken = lock(&self.world).world.apply(batch, wall_clock());
        match &taken {
            Ok(i) if i.duplicate => self.metrics.batches_twice.inc(),
            Ok(_) => self.metrics.batches.inc(),
            Err(_) => self.metrics.batches_refused.inc(),
        };
        taken
    }

    /// What an operator asks for. The answer comes once it is stored; the work goes on.
    pub fn request(self: &Arc<Self>, vm: VmId, request: &ShadowRequest) -> Result<(), RequestError> {
        let now = wall_clock();
        let mut engine = lock(&self.engine);
        let request = match request {
            ShadowRequest::Create { host } => Request::Create {
                target: engine.target(vm, host.as_ref(), now)?,
            },
            ShadowRequest::Switchover => Request::Switchover,
            ShadowRequest::Failback => Request::Failback,
            ShadowRequest::Release => Request::Release,
        };
        let mut out = engine.core.step(Input::Request { vm, request }, now);
        let denied = out.denied.take();
        self.finish(&mut engine, out).map_err(|()| RequestError::Store)?;
        denied.map_or(Ok(()), |d| Err(d.into()))
    }

    pub fn set_mode(self: &Arc<Self>, mode: Mode) -> Result<(), RequestError> {
        tracing::info!("mode: {mode:?}");
        self.step(Input::Mode(mode)).map_err(|()| RequestError::Store)
    }

    fn step(self: &Arc<Self>, input: Input) -> Result<(), ()> {
        let mut engine = lock(&self.engine);
        let out = engine.core.step(input, wall_clock());
        self.finish(&mut engine, out)
    }

    /// Commits what was decided, and only then sends it.
    fn finish(self: &Arc<Self>, engine: &mut Engine, out: Outputs) -> Result<(), ()> {
        let Outputs {
            writes,
            send,
            edges,
            redirected,
            denied,
        } = out;
        let begun = Instant::now();
        if engine.failed.is_some() {
            return Err(());
        }
        if let Err(e) = engine.store.commit(&writes) {
            engine.failed = Some(e);
            self.broken.notify_one();
            return Err(());
        }
        if !writes.is_empty() {
            self.metrics.commit_seconds.observe(begun.elapsed().as_secs_f64());
        }
        for (vm, edge) in &edges {
            let name = engine.core.states().get(vm).map_or("", |s| s.name.as_str());
            tracing::info!(%vm, name, "{} -> {}: {}", edge.from, edge.to, edge.reason);
            self.metrics
                .edges
                .get_or_create(&StageLabel { stage: edge.to.name() })
                .inc();
        }
        for r in &redirected {
            tracing::info!(adapter = r.adapter, took_ms = r.took_ms, error = r.error, "redirected");
            self.metrics.redirect_seconds.observe(r.took_ms as f64 / 1000.0);
        }
        if let Some(d) = denied {
            tracing::warn!("not begun: {d}");
        }
        for (to, order) in send {
            tasks::send(self.clone(), to, order);
        }
        if !edges.is_empty() {
            self.hurry.notify_waiters();
        }
        Ok(())
    }

    /// Looks ahead anew. Long, with many VMs: not for a thread that serves.
    fn foresee(&self) -> Outlook {
        let now = wall_clock();
        let (told, copying) = {
            let engine = lock(&self.engine);
            let running = engine.core.running().map(|(vm, host)| (vm, host.cloned()));
            let copying = engine.core.copying(self.config.slot_ms, now);
            let copying = copying.map(|(host, since, until)| (host.clone(), since, until));
            (running.collect::<Vec<_>>(), copying.collect::<Vec<_>>())
        };
        let begun = Instant::now();
        let mut foreseer = lock(&self.world);
        let Foreseer { world, cache } = &mut *foreseer;
        for (vm, host) in told {
            match host {
                Some(host) => world.set_running(vm, host),
                None => world.clear_running(vm),
            }
        }
        for (host, since, until) in copying {
            world.disturb(&host, since, until);
        }
        world.expire(now);
        let outlook = outlook(world, cache, &self.config.outlook_params(), now);
        self.metrics.forecast_seconds.observe(begun.elapsed().as_secs_f64());
        outlook
    }

    /// A new outlook: it is counted in the streaks, its slots go to the store, and the planner decides by it.
    fn take_outlook(self: &Arc<Self>, outlook: Outlook) -> Result<(), ()> {
        let back_ms = i64::try_from(self.config.slot_ms.saturating_mul(BACKLOG_SLOTS)).unwrap_or(i64::MAX);
        let rows = lock(&self.world).world.closed_slots(outlook.now.plus_ms(-back_ms));
        let mut guard = lock(&self.engine);
        let engine = &mut *guard;
        let rows = engine.unwritten(rows);
        let now = wall_clock();
        self.show(&outlook, engine.core.fleet());
        let limit = self.config.contention.limit_ms_per_s;
        let mut out = engine.core.foreseen(&outlook, now);
        engine
            .streaks
            .observe(&outlook, engine.core.states(), &self.policy, limit);
        engine.outlook = Arc::new(outlook);
        if !rows.is_empty() {
            engine
                .slots_written
                .extend(rows.iter().map(|r| (r.key.clone(), r.start)));
            out.writes.push(Write::Slots(rows));
        }
        self.finish(engine, out)?;
        drop(guard);
        self.plan()
    }

    /// Decides by the newest outlook and carries it out.
    fn plan(self: &Arc<Self>) -> Result<(), ()> {
        let mut guard = lock(&self.engine);
        let engine = &mut *guard;
        let (now, mode) = (wall_clock(), engine.core.mode());
        let decisions = engine.decide(now);
        let mut out = Outputs::default();
        for d in decisions {
            let view = engine.recorder.take(&d, mode, self.policy.record_every_s, now);
            let id = view.as_ref().map(|v| v.id);
            let acts = d.action != Action::Nothing;
            self.metrics
                .decisions
                .get_or_create(&ActionLabel {
                    action: d.action.name(),
                })
                .inc();
            out.writes.extend(view.map(|v| Write::Decision(Box::new(v))));
            if acts {
                out.absorb(engine.core.step(
                    Input::Decided {
                        decision: Box::new(d),
                        id,
                    },
                    now,
                ));
            }
        }
        self.finish(engine, out)
    }

    fn show(&self, outlook: &Outlook, fleet: &Fleet) {
        for v in &outlook.vms {
            let label = VmLabel {
                vm: v.vm.to_string(),
                name: v.name.clone(),
            };
            self.metrics.cps.get_or_create(&label).set(v.cps);
        }
        for h in &outlook.hosts {
            let label = HostLabel {
                host: h.host.to_string(),
            };
            self.metrics
                .host_probability
                .get_or_create(&label)
                .set(h.peak_probability);
        }
        for (host, report) in fleet {
            let label = HostLabel { host: host.to_string() };
            self.metrics
                .replicator_up
                .get_or_create(&label)
                .set(i64::from(report.up));
        }
    }

    /// Forgets what is older than the configuration says.
    fn prune(&self) -> Result<(), ()> {
        let day_ms = |days: u32| i64::from(days) * 86_400_000;
        let now = wall_clock();
        let slots = now.plus_ms(-day_ms(self.config.keep_slots_days));
        let history = now.plus_ms(-day_ms(self.config.keep_history_days));
        let mut engine = lock(&self.engine);
        let pruned = engine.store.prune(slots, history);
        match pruned {
            Ok(rows) => tracing::debug!(rows, "pruned"),
            Err(e) => {
                engine.failed = Some(e);
                self.broken.notify_one();
                return Err(());
            }
        }
        Ok(())
    }
}

impl Engine {
    /// Of closed slots, oldest first in each series, those that are not stored.
    fn unwritten(&self, rows: Vec<SlotRow>) -> Vec<SlotRow> {
        let written = &self.slots_written;
        rows.into_iter()
            .filter(|r| written.get(&r.key).is_none_or(|t| r.start > *t))
            .collect()
    }

    fn decide(&self, now: UnixMs) -> Vec<planner::Decision> {
        let busy = self.core.busy();
        planner::plan(&self.input(&busy, now))
    }

    fn input<'a>(&'a self, busy: &'a std::collections::BTreeSet<VmId>, now: UnixMs) -> planner::Input<'a> {
        planner::Input {
            now,
            outlook: &self.outlook,
            states: self.core.states(),
            fleet: self.core.fleet(),
            busy,
            streaks: &self.streaks,
            policy: self.core.policy(),
            method: self.method,
            seed_bytes_per_s: self.core.seed_bytes_per_s(),
        }
    }

    fn target(&self, vm: VmId, wish: Option<&HostId>, now: UnixMs) -> Result<HostId, RequestError> {
        let seen = self.outlook.vm(vm).ok_or(Denied::NoSuchVm(vm))?;
        let busy = self.core.busy();
        planner::target_for(&self.input(&busy, now), seen, wish).map_err(RequestError::NoTarget)
    }
}

/// The world as the store knows it, and how far each series is stored.
fn resume_world(config: &Config, store: &SqliteStore, now: UnixMs) -> Result<(World, Written), StoreError> {
    let mut world = World::new(config.world_params());
    let shape = world.shape();
    let kept_ms = i64::try_from(shape.slot_ms.saturating_mul(shape.keep_slots as u64)).unwrap_or(i64::MAX);
    let slots = store.slots(now.plus_ms(-kept_ms))?;
    let written = slots.iter().map(|row| (row.key.clone(), row.start)).collect();
    world.load(slots, now);
    Ok((world, written))
}

fn redirects(config: &Config) -> Vec<Box<dyn Redirect>> {
    let mut all: Vec<Box<dyn Redirect>> = Vec::new();
    if config.redirect.announce {
        all.push(Box::new(AnnounceSelf::default()));
    }
    all
}
