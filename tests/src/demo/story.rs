//! What the RPS tells of the web VM: its lifecycle as it happens, and the figures for the table.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use umbra_api::lifecycle::Stage;
use umbra_api::replica::{Role, SwitchoverReport};
use umbra_api::view::{DecisionView, LifecycleEvent, VmView};
use umbra_api::{UnixMs, VmId};

use super::figures::{Move, Protected};
use super::plan::Plan;
use super::say;
use super::scene::Scene;
use crate::lab::Lab;
use crate::lab::copies::{switchovers_ms, wall_us};
use crate::lab::daemons::{self, Replicator};

/// Events of one VM that are asked for.
const EVENTS: usize = 200;

pub struct Story<'a> {
    lab: &'a Lab,
    vm: VmId,
    /// The schedule's start by the wall clock, which is the RPS's clock too.
    start: UnixMs,
    seen: Vec<LifecycleEvent>,
    view: Option<VmView>,
    seed_ms: Option<u64>,
    switchovers: Vec<SwitchoverReport>,
    /// In how many seconds contention was expected when the shadow was ordered.
    expected_in_s: Option<f64>,
}

impl<'a> Story<'a> {
    pub fn new(lab: &'a Lab, vm: VmId) -> Self {
        Self {
            lab,
            vm,
            start: UnixMs(wall_us() / 1000),
            seen: Vec::new(),
            view: None,
            seed_ms: None,
            switchovers: Vec::new(),
            expected_in_s: None,
        }
    }

    pub fn begin(&mut self, start: Instant) {
        self.start = UnixMs(wall_us() / 1000).plus_ms(-(start.elapsed().as_millis() as i64));
    }

    fn ask<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        let rps = &self.lab.control;
        let reply = rps.get((rps.ip, daemons::RPS), path)?;
        // It does not know the VM before the agent's first sample.
        if reply.status == 404 {
            Ok(None)
        } else {
            reply.ok()?.json().map(Some)
        }
    }

    /// Asks the RPS, and prints what is new.
    pub fn poll(&mut self) -> Result<()> {
        let Some(view) = self
            .ask::<VmView>(&format!("/v1/vms/{}", self.vm))
            .context("asking the RPS about the web VM")?
        else {
            return Ok(());
        };
        let mut events = view.events.clone();
        events.sort_by_key(|e| e.t);
        let fresh: Vec<LifecycleEvent> = events
            .into_iter()
            .filter(|e| !self.seen.contains(e))
            .take(EVENTS)
            .collect();
        if let Some(report) = view
            .last_switchover
            .filter(|r| self.switchovers.iter().all(|s| s.epoch != r.epoch))
        {
            say!("            {}", say::dim(&steps(&report)));
            self.switchovers.push(report);
        }
        if self.seed_ms.is_none() && view.summary.shadow.is_some() {
            self.seed_ms = self.seed_ms()?;
        }
        self.view = Some(view);
        for e in fresh {
            self.tell(&e)?;
            self.seen.push(e);
        }
        Ok(())
    }

    /// How long the first copy took: the source's replicator keeps the figure, whatever came after.
    fn seed_ms(&self) -> Result<Option<u64>> {
        let replicas = Replicator {
            host: self.lab.host("a")?,
        }
        .replicas()?;
        let source = replicas.into_iter().find(|r| r.vm == self.vm && r.role == Role::Source);
        Ok(source.and_then(|r| r.progress.seed_ms))
    }

    /// Why the planner does nothing although one might wait for it: contention is foreseen and there is no shadow, or the
    /// VM is away from home.
    pub fn hesitation(&self) -> Result<Option<String>> {
        let hesitates = |v: &VmView| match v.summary.stage {
            Stage::Unprotected => v.summary.cps > v.summary.threshold,
            stage => stage == Stage::Reverse,
        };
        if !self.view.as_ref().is_some_and(hesitates) {
            return Ok(None);
        }
        let why = self.ask::<DecisionView>(&format!("/v1/vms/{}/explain", self.vm))?;
        Ok(why.map(|d| d.because))
    }

    fn tell(&mut self, e: &LifecycleEvent) -> Result<()> {
        let stage = say::bold(&format!("{:<12}", e.to.name()));
        let standing = self.standing();
        say!("  {:>6.1} s  {stage} {}{standing}", self.since_start_s(e.t), e.reason);
        if e.to == Stage::Provisioning && self.expected_in_s.is_none() {
            self.explain(e)?;
        }
        Ok(())
    }

    /// The decision behind an edge, as the RPS keeps it.
    fn explain(&mut self, e: &LifecycleEvent) -> Result<()> {
        let path = format!("/v1/decisions?vm={}", self.vm);
        let decisions: Vec<DecisionView> = self.ask(&path)?.unwrap_or_default();
        let Some(d) = decisions.into_iter().find(|d| Some(d.id) == e.decision) else {
            return Ok(());
        };
        self.expected_in_s = d.inputs.contention_in_s;
        say!("            {}", say::dim(&d.because));
        for h in &d.hosts {
            let mark = if h.chosen { "is chosen" } else { "is not chosen" };
            say!(
                "            {}",
                say::dim(&format!("host {} {mark}: {}", h.host, h.reason))
            );
        }
        Ok(())
    }

    /// CPS and lag, for the end of a line.
    pub fn standing(&self) -> String {
        let Some(view) = &self.view else { return String::new() };
        let s = &view.summary;
        let warm = matches!(s.stage, Stage::Standby | Stage::Armed | Stage::Reverse);
        let lag = view.progress.filter(|_| warm).map_or_else(String::new, |p| {
            format!(", lag {} pages ({:.1} s)", p.lag_pages, p.lag_ms as f64 / 1e3)
        });
        format!("  [on {}, {}, CPS {:.2}{lag}]", s.host, s.stage, s.cps)
    }

    fn since_start_s(&self, t: UnixMs) -> f64 {
        t.since(self.start) as f64 / 1e3
    }

    /// When the VM first went along this edge, in seconds since the start.
    fn edge_s(&self, from: Option<Stage>, to: Stage) -> Option<f64> {
        let is = |e: &&LifecycleEvent| e.to == to && from.is_none_or(|f| f == e.from);
        self.seen.iter().find(is).map(|e| self.since_start_s(e.t))
    }

    /// It was away and is home again.
    pub fn is_home(&self) -> bool {
        self.home_s().is_some()
    }

    fn home_s(&self) -> Option<f64> {
        self.edge_s(Some(Stage::FailingBack), Stage::Unprotected)
    }

    /// All figures, once the guest has verified its whole memory a last time.
    pub fn finish(mut self, scene: &mut Scene<'_>, plan: &Plan) -> Result<Protected> {
        self.poll()?;
        let bill = scene.bill(plan);
        say!("The guest verifies each page of its memory once more …");
        scene.verify(Duration::from_secs(40))?;
        let errors = scene.pattern_errors(&self.consoles(scene))?;
        let watched = switchovers_ms(&scene.turns());
        let moved = |n: usize| {
            self.switchovers.get(n).map(|r| Move {
                reported_ms: r.guest_stopped_us as f64 / 1e3,
                watched_ms: watched.get(n).copied(),
                order_to_told_ms: r.order_to_told_us as f64 / 1e3,
                wire_bytes: r.wire_bytes,
            })
        };
        let predicted_s = self.edge_s(None, Stage::Provisioning);
        Ok(Protected {
            bill,
            errors,
            predicted_s,
            expected_s: predicted_s.zip(self.expected_in_s).map(|(at, in_s)| at + in_s),
            ready_s: self.edge_s(None, Stage::Standby),
            moved_s: self.edge_s(Some(Stage::Switching), Stage::Active),
            home_s: self.home_s(),
            seed_s: self.seed_ms.map(|ms| ms as f64 / 1e3),
            away: moved(0),
            back: moved(1),
        })
    }

    /// Serial consoles of the shadows, which the replicators keep in their run folders.
    fn consoles(&self, scene: &Scene<'_>) -> Vec<PathBuf> {
        scene
            .hosts()
            .iter()
            .flat_map(|h| crate::lab::vm::consoles_below(&h.file("run")))
            .collect()
    }
}

/// Where the time went in which the guest stood still.
fn steps(r: &SwitchoverReport) -> String {
    let ms = |us: u64| us as f64 / 1e3;
    format!(
        "stood still {:.1} ms: last pass {:.1} ({} pages), device state {:.1}, load {:.1}, relinquish {:.1}, SHUT {:.1}, resume {:.1}",
        ms(r.guest_stopped_us),
        ms(r.last_pass_us),
        r.last_pass_pages,
        ms(r.device_state_us),
        ms(r.load_us),
        ms(r.relinquish_us),
        ms(r.shut_us),
        ms(r.resume_us),
    )
}
