//! Makes decisions so. The core is pure: what happened goes in, with the time; what to write and what to send comes out.
//!
//! ```text
//!   polls, answers, decisions, requests, ticks
//!        │
//!        v
//!   Core::step ──> Outputs { writes, send }      the caller commits `writes` in one transaction,
//!                                                and only then sends `send`
//! ```
//! The core is *level-triggered*: each turn it compares a VM's stage and orders with what the replicators report, and asks for
//! what is missing. So a lost answer, a repeated report or a restart needs no code of its own. In reading order: [`orders`],
//! `turn` (what a turn can do), `drive` (what each stage wants), `reconcile` (where the replicators know better),
//! [`replicators`] (the sockets).

mod drive;
pub mod orders;
mod reconcile;
pub mod replicators;
pub mod timing;
mod turn;

use std::collections::{BTreeMap, BTreeSet};

use umbra_api::lifecycle::Stage;
use umbra_api::order::{Order, Peak, Refusal, Tier};
use umbra_api::replica::{DiskProgress, Progress, ReplicaStatus, Role, ShadowMemory};
use umbra_api::view::Mode;
use umbra_api::{DecisionId, Epoch, HostId, OrderId, UnixMs, VmId};

use crate::fleet::{self, Fleet};
use crate::lifecycle::{Edge, Event, Illegal, Reason, VmState};
use crate::outlook::Outlook;
use crate::planner::{Action, Decision, Policy};
use crate::redirect::{Redirect, RedirectReport};
use crate::store::Write;

use orders::{Answer, OrderRecord};
pub use timing::Timing;
use turn::{Book, Turn, copies};

/// What can happen to the core.
#[derive(Clone, Debug)]
pub enum Input {
    /// A replicator was asked at `asked_at` and told this, or why it didn't.
    Polled {
        host: HostId,
        asked_at: UnixMs,
        replicas: Result<Vec<ReplicaStatus>, String>,
    },
    /// An order's answer came, or the wait for it ended.
    Answered {
        order: OrderId,
        answer: Answer,
    },
    /// The planner's word; carried out unless the mode is `observe`.
    Decided {
        decision: Box<Decision>,
        id: Option<DecisionId>,
    },
    /// An operator's word.
    Request {
        vm: VmId,
        request: Request,
    },
    Mode(Mode),
    /// The VM's hosts were asked, and it runs on this one.
    Found {
        vm: VmId,
        host: HostId,
        epoch: Epoch,
    },
    Tick,
}

/// What an operator can ask for, with the target found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    Create { target: HostId },
    Switchover,
    Failback,
    Release,
}

/// Why nothing was begun.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum Denied {
    #[error("VM {0} is not known")]
    NoSuchVm(VmId),
    #[error("the mode is observe: nothing is ordered")]
    Observing,
    #[error(transparent)]
    Illegal(#[from] Illegal),
    #[error("leftovers of an earlier attempt are being cleared")]
    Busy,
    /// The copy is not fit for a switchover: it would only be refused, and end the protection.
    #[error("{0}")]
    TooFast(Refusal),
    #[error("redirect {adapter} is not ready: {words}")]
    Redirect { adapter: &'static str, words: String },
}

#[derive(Clone, PartialEq, Debug, Default)]
pub struct Outputs {
    /// To be committed together, before anything is sent.
    pub writes: Vec<Write>,
    pub send: Vec<(HostId, Order)>,
    /// For logs and metrics; the events are among the writes.
    pub edges: Vec<(VmId, Edge)>,
    pub redirected: Vec<RedirectReport>,
    /// A request or decision that was not begun.
    pub denied: Option<Denied>,
}

impl Outputs {
    /// Another step's outputs after these.
    pub fn absorb(&mut self, other: Self) {
        self.writes.extend(other.writes);
        self.send.extend(other.send);
        self.edges.extend(other.edges);
        self.redirected.extend(other.redirected);
        self.denied = other.denied.or(self.denied.take());
    }
}

/// One configured host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    pub host: HostId,
    /// `address:port` of its link listener.
    pub link: String,
}

/// What the store knew.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Remembered {
    pub states: Vec<VmState>,
    pub orders: Vec<OrderRecord>,
}

pub struct Core {
    policy: Policy,
    timing: Timing,
    redirects: Vec<Box<dyn Redirect>>,
    mode: Mode,
    started: UnixMs,
    states: BTreeMap<VmId, VmState>,
    books: BTreeMap<VmId, Book>,
    fleet: Fleet,
    peaks: BTreeMap<VmId, Peak>,
    seed_bytes_per_s: Option<f64>,
}

impl Core {
    pub fn new(
        policy: Policy,
        timing: Timing,
        members: Vec<Member>,
        redirects: Vec<Box<dyn Redirect>>,
        mode: Mode,
        remembered: Remembered,
        now: UnixMs,
    ) -> Self {
        let fleet = members.into_iter().map(|m| {
            let report = fleet::Report {
                link: m.link,
                down_since: Some(now),
                ..fleet::Report::default()
            };
            (m.host, report)
        });
        let mut books: BTreeMap<VmId, Book> = BTreeMap::new();
        for record in remembered.orders {
            books.entry(record.order.vm).or_default().orders.push(record);
        }
        books.values_mut().for_each(|b| b.orders.sort_by_key(|o| o.t));
        Self {
            policy,
            timing,
            redirects,
            mode,
            started: now,
            states: remembered.states.into_iter().map(|s| (s.vm, s)).collect(),
            books,
            fleet: fleet.collect(),
            peaks: BTreeMap::new(),
            seed_bytes_per_s: None,
        }
    }

    pub fn states(&self) -> &BTreeMap<VmId, VmState> {
        &self.states
    }

    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    pub fn seed_bytes_per_s(&self) -> f64 {
        self.seed_bytes_per_s
            .unwrap_or(self.policy.bandwidth_bytes_per_s as f64)
    }

    /// A switchover is under way somewhere: ask the replicators more often.
    pub fn hurried(&self) -> bool {
        let hurried = [Stage::Switching, Stage::FailingBack];
        self.states.values().any(|s| hurried.contains(&s.stage))
    }

    /// The copy's figures, from the source.
    pub fn progress(&self, s: &VmState) -> Option<Progress> {
        self.source(s).map(|source| source.progress)
    }

    /// Its disks' copies, from the source.
    pub fn disks(&self, s: &VmState) -> Vec<DiskProgress> {
        self.source(s).map(|source| source.disks.clone()).unwrap_or_default()
    }

    fn source(&self, s: &VmState) -> Option<&ReplicaStatus> {
        s.shadow.as_ref()?;
        let source = fleet::replica(&self.fleet, &s.host, s.vm, Role::Source)?;
        (source.epoch >= s.protection).then_some(source)
    }

    /// What the shadow takes on its host, from the target.
    pub fn shadow_memory(&self, s: &VmState) -> Option<ShadowMemory> {
        let target = fleet::replica(&self.fleet, s.shadow.as_ref()?, s.vm, Role::Target)?;
        target.memory.clone().filter(|_| target.epoch >= s.protection)
    }

    /// VMs with which nothing new may be begun: something of an earlier attempt is still about, or on its way.
    pub fn busy(&self) -> BTreeSet<VmId> {
        self.states.values().filter(|s| self.is_busy(s)).map(|s| s.vm).collect()
    }

    fn is_busy(&self, s: &VmState) -> bool {
        let resting = matches!(s.stage, Stage::Unprotected | Stage::Reverse);
        let pending = self
            .books
            .get(&s.vm)
            .is_some_and(|b| b.orders.iter().any(|o| o.pending() && o.blocks()));
        resting && (pending || reconcile::leftovers(s, &self.fleet).next().is_some())
    }

    /// Which host's samples are each VM's demand, where the RPS knows better than the agents; `None` where it does not.
    pub fn running(&self) -> impl Iterator<Item = (VmId, Option<&HostId>)> {
        self.states.values().map(|s| {
            let quiet = s.stage == Stage::Unprotected && reconcile::traces(s, &self.fleet).next().is_none();
            (s.vm, (!quiet).then_some(&s.host))
        })
    }

    /// An epoch above all that was ordered, heard of, or wished for: for an order that is not the lifecycle's.
    pub fn take_epoch(&mut self, vm: VmId, at_least: Epoch) -> (Epoch, Outputs) {
        let mut out = Outputs::default();
        let heard = fleet::highest_epoch(&self.fleet, vm);
        let Some(state) = self.states.get_mut(&vm) else {
            return (at_least.max(heard.next()), out);
        };
        let epoch = at_least.max(heard.next()).max(state.epoch.next());
        state.saw_epoch(epoch);
        out.writes.push(Write::Vm(Box::new(state.clone())));
        (epoch, out)
    }

    /// Hosts on which copies and moves are under way or were so a slot ago, and from when until when.
    pub fn copying(&self, slot_ms: u64, now: UnixMs) -> impl Iterator<Item = (&HostId, UnixMs, UnixMs)> {
        let slot = i64::try_from(slot_ms).unwrap_or(i64::MAX);
        let fresh = move |until: UnixMs| now.0 <= until.0.saturating_add(slot.saturating_mul(2));
        let stages = self.states.values().flat_map(move |s| {
            let busy = copies(s.stage);
            // One that ended before a restart is known by when the next stage began.
            let was = s.stage != Stage::Failed && fresh(s.since);
            let until = if busy { now } else { s.since };
            let hosts = std::iter::once(&s.host).chain(&s.shadow);
            hosts
                .filter(move |_| busy || was)
                .map(move |host| (host, s.since, until))
        });
        let ended = self.books.values().flat_map(|b| &b.copied);
        let ended = ended.filter(move |c| fresh(c.until));
        stages.chain(ended.flat_map(|c| c.hosts.iter().map(|host| (host, c.since, c.until))))
    }

    /// Takes note of VMs that the agents tell of.
    pub fn foreseen(&mut self, outlook: &Outlook, now: UnixMs) -> Outputs {
        let mut out = Outputs::default();
        for v in &outlook.vms {
            self.peaks.insert(v.vm, v.peak);
            let known = self.states.contains_key(&v.vm);
            let state = self
                .states
                .entry(v.vm)
                .or_insert_with(|| VmState::new(v.vm, &v.name, &v.host, now));
            let before = state.clone();
            if !v.name.is_empty() {
                state.name.clone_from(&v.name);
            }
            if reconcile::traces(state, &self.fleet).next().is_none() {
                state.relocate(&v.host);
            }
            if !known || *state != before {
                out.writes.push(Write::Vm(Box::new(state.clone())));
            }
        }
        out
    }

    /// Moves the core on. Outputs must be committed before they are sent.
    pub fn step(&mut self, input: Input, now: UnixMs) -> Outputs {
        let mut out = Outputs::default();
        match input {
            Input::Polled {
                host,
                asked_at,
                replicas,
            } => self.polled(&host, asked_at, replicas, now),
            Input::Answered { order, answer } => self.answered(order, &answer, now, &mut out),
            Input::Decided { decision, id } => {
                let (vm, begun) = (decision.vm, self.decided(*decision));
                if let Some(event) = begun {
                    self.begin(vm, event, id, now, &mut out);
                }
            }
            Input::Request { vm, request } => self.requested(vm, request, now, &mut out),
            Input::Mode(mode) => {
                self.mode = mode;
                out.writes.push(Write::Mode(mode));
            }
            Input::Found { vm, host, epoch } => {
                self.turn(vm, None, now, &mut out, |turn| {
                    let home = turn.state.home.clone();
                    if let Err(e) = turn.go(Event::Found { host, home, epoch }) {
                        tracing::warn!(%vm, "{e}");
                    }
                });
            }
            Input::Tick => {}
        }
        for vm in self.lively() {
            self.turn(vm, None, now, &mut out, drive::drive);
        }
        out
    }

    /// VMs for which a turn could do anything; of many VMs most have no shadow and nothing said about them.
    fn lively(&self) -> Vec<VmId> {
        let mentioned: BTreeSet<VmId> = self.fleet.values().flat_map(|r| &r.replicas).map(|r| r.vm).collect();
        let waits = |vm: &VmId| self.books.get(vm).is_some_and(Book::waits);
        let lively = |s: &&VmState| s.stage != Stage::Unprotected || mentioned.contains(&s.vm) || waits(&s.vm);
        self.states.values().filter(lively).map(|s| s.vm).collect()
    }

    fn polled(&mut self, host: &HostId, asked_at: UnixMs, replicas: Result<Vec<ReplicaStatus>, String>, now: UnixMs) {
        let Some(report) = self.fleet.get_mut(host) else { return };
        match replicas {
            // An answer that was overtaken by a later one says nothing new.
            Ok(_) if report.asked_at.is_some_and(|t| t > asked_at) => {}
            Ok(replicas) => {
                report.replicas = replicas;
                report.asked_at = Some(asked_at);
                (report.up, report.down_since, report.error) = (true, None, None);
            }
            Err(error) => {
                report.up = false;
                report.down_since.get_or_insert(now);
                report.error = Some(error);
            }
        }
        self.measure_seeds(host);
    }

    /// The speed of first copies, as the sources measured it.
    fn measure_seeds(&mut self, host: &HostId) {
        let Some(report) = self.fleet.get(host) else { return };
        let speeds = report
            .replicas
            .iter()
            .filter(|r| r.role == Role::Source)
            .filter_map(|r| {
                let ms = r.progress.seed_ms.filter(|ms| *ms > 0)?;
                // Zero pages cost next to nothing: what counts is RAM in use a second, and a tiny guest tells nothing.
                (r.progress.seeded_bytes > 16 << 20).then(|| r.progress.seeded_bytes as f64 * 1000.0 / ms as f64)
            });
        if let Some(slowest) = speeds.min_by(f64::total_cmp) {
            self.seed_bytes_per_s = Some(slowest);
        }
    }

    fn answered(&mut self, id: OrderId, answer: &Answer, now: UnixMs, out: &mut Outputs) {
        let record = self
            .books
            .values_mut()
            .flat_map(|b| &mut b.orders)
            .find(|o| o.order.id == id);
        if let Some(record) = record
            && record.answer(answer, now)
        {
            out.writes.push(Write::Order(Box::new(record.clone())));
        }
    }

    /// The event that a decision asks for, if it may.
    fn decided(&self, decision: Decision) -> Option<Event> {
        if self.mode == Mode::Observe {
            return None;
        }
        let reason = decision.reason?;
        Some(match decision.action {
            Action::Nothing => return None,
            Action::Provision { target } => Event::Provision { target, reason },
            Action::Arm => Event::Arm { reason },
            Action::Disarm => Event::Disarm,
            Action::Switch => Event::Switch { reason },
            Action::FailBack => Event::FailBack { reason },
            Action::Release => Event::Release { reason },
        })
    }

    fn requested(&mut self, vm: VmId, request: Request, now: UnixMs, out: &mut Outputs) {
        if self.mode == Mode::Observe {
            out.denied = Some(Denied::Observing);
            return;
        }
        let reason = Reason::Operator;
        let event = match request {
            Request::Create { target } => Event::Provision { target, reason },
            Request::Switchover => Event::Switch { reason },
            Request::Failback => Event::FailBack { reason },
            Request::Release => Event::Release { reason },
        };
        self.begin(vm, event, None, now, out);
    }

    fn begin(&mut self, vm: VmId, event: Event, id: Option<DecisionId>, now: UnixMs, out: &mut Outputs) {
        let busy = self.states.get(&vm).is_some_and(|s| match &event {
            Event::Provision { target, .. } => self.is_busy(s) || s.kept.contains(target),
            Event::FailBack { .. } => s.shadow.as_ref().is_some_and(|h| s.kept.contains(h)),
            _ => false,
        });
        let mut denied = None;
        let known = self.turn(vm, id, now, out, |turn| {
            // A wrong stage is the better answer of the two.
            let legal = turn.would(&event);
            denied = match legal {
                Ok(()) if busy => Some(Denied::Busy),
                Ok(()) => turn.begin(event).err(),
                Err(e) => Some(e.into()),
            };
        });
        out.denied = if known { denied } else { Some(Denied::NoSuchVm(vm)) };
    }

    /// One VM's turn; `false` if it is not known.
    fn turn(
        &mut self,
        vm: VmId,
        decision: Option<DecisionId>,
        now: UnixMs,
        out: &mut Outputs,
        act: impl FnOnce(&mut Turn<'_>),
    ) -> bool {
        let Some(state) = self.states.get_mut(&vm) else {
            return false;
        };
        let mut turn = Turn {
            now,
            started: self.started,
            policy: &self.policy,
            timing: &self.timing,
            redirects: &self.redirects,
            fleet: &self.fleet,
            mode: self.mode,
            peak: self.peaks.get(&vm).copied().unwrap_or_default(),
            decision,
            state,
            book: self.books.entry(vm).or_default(),
            out,
        };
        act(&mut turn);
        true
    }
}

/// The tier that a shadow should have in this stage.
fn wanted_tier(stage: Stage) -> Option<Tier> {
    match stage {
        Stage::Standby | Stage::Reverse => Some(Tier::Standby),
        Stage::Armed => Some(Tier::Armed),
        Stage::Switching | Stage::FailingBack => Some(Tier::Active),
        _ => None,
    }
}
