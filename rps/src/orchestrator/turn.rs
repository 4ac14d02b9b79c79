//! What one VM can do in its turn: ask for orders, go along edges, lead the traffic over. Everything it does is
//! in the outputs.

use std::collections::VecDeque;

use umbra_api::lifecycle::Stage;
use umbra_api::order::{OrderKind, Peak, RefusalCode};
use umbra_api::pace;
use umbra_api::replica::{ReplicaStatus, Role};
use umbra_api::view::{LifecycleEvent, Mode};
use umbra_api::{DecisionId, Epoch, HostId, OrderId, UnixMs};

use super::orders::{Asked, OrderRecord, OrderState};
use super::timing::{Timing, ms};
use super::{Denied, Outputs};
use crate::fleet::{self, Fleet};
use crate::lifecycle::{Event, Failure, Illegal, VmState, apply};
use crate::planner::Policy;
use crate::redirect::{Effect, Move, Redirect, RedirectReport};
use crate::store::Write;

/// Orders kept in memory per VM; the store keeps them all.
const ORDERS_KEPT: usize = 64;

/// One VM's orders, and the traffic that is being led over.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Book {
    pub orders: Vec<OrderRecord>,
    /// The newest last.
    pub copied: VecDeque<Copied>,
    redirecting: Vec<Redirecting>,
}

/// Copies and moves of a VM that are remembered.
const COPIED_KEPT: usize = 16;

/// A stage in which Umbra itself loaded the VM's hosts, and has ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Copied {
    pub hosts: Vec<HostId>,
    pub since: UnixMs,
    pub until: UnixMs,
}

/// Umbra loads a VM's hosts in this stage.
pub fn copies(stage: Stage) -> bool {
    use Stage::{Active, FailingBack, Provisioning, Seeding, Switching};
    matches!(stage, Provisioning | Seeding | Switching | Active | FailingBack)
}

impl Book {
    /// Something is still to be answered or reported.
    pub fn waits(&self) -> bool {
        !self.redirecting.is_empty() || self.orders.iter().any(OrderRecord::pending)
    }
}

#[derive(Clone, PartialEq, Debug)]
struct Redirecting {
    adapter: &'static str,
    at: UnixMs,
    orders: Vec<OrderId>,
}

pub struct Turn<'a> {
    pub now: UnixMs,
    pub started: UnixMs,
    pub policy: &'a Policy,
    pub timing: &'a Timing,
    pub redirects: &'a [Box<dyn Redirect>],
    pub fleet: &'a Fleet,
    pub mode: Mode,
    pub peak: Peak,
    pub decision: Option<DecisionId>,
    pub state: &'a mut VmState,
    pub book: &'a mut Book,
    pub out: &'a mut Outputs,
}

impl OrderRecord {
    /// Whether it must be answered before something new is begun. Announcements and tiers need not; what is to be retired
    /// is in the state.
    pub fn blocks(&self) -> bool {
        !matches!(
            self.order.kind,
            OrderKind::Announce { .. } | OrderKind::Tier { .. } | OrderKind::Retire
        )
    }
}

impl Turn<'_> {
    /// The replica of this VM on `host` that belongs to the present protection.
    pub fn present(&self, host: &HostId, role: Role) -> Option<&ReplicaStatus> {
        fleet::replica(self.fleet, host, self.state.vm, role).filter(|r| r.epoch >= self.state.protection)
    }

    /// Time in this stage, not counting what passed while this process was not running.
    pub fn stage_ms(&self) -> i64 {
        self.now.since(self.state.since.max(self.started))
    }

    pub fn asks_ms(&self) -> i64 {
        ms(self.timing.order_timeout_s)
    }

    /// The newest order of this kind to this host under this epoch.
    pub fn last_order(&self, to: &HostId, epoch: Epoch, kind: &str) -> Option<&OrderRecord> {
        let fits = |o: &&OrderRecord| o.to == *to && o.order.epoch == epoch && o.order.kind.name() == kind;
        self.book.orders.iter().rev().find(fits)
    }

    /// How it stands with this order; it is written and sent if it was not yet.
    pub fn ask(&mut self, to: &HostId, epoch: Epoch, kind: OrderKind) -> Asked {
        let last = self.last_order(to, epoch, kind.name());
        // A tier is asked for again whenever another one was the last.
        let same = last.filter(|o| match (&o.order.kind, &kind) {
            (OrderKind::Tier { tier: a, .. }, OrderKind::Tier { tier: b, .. }) => a == b,
            _ => true,
        });
        match same {
            Some(o) => o.asked(self.now, self.started, self.asks_ms()),
            None => {
                self.order(to, epoch, kind);
                Asked::Waiting
            }
        }
    }

    /// Asks once more if the last answer is older than the retry interval: for what may be refused now and possible later.
    pub fn ask_again(&mut self, to: &HostId, epoch: Epoch, kind: OrderKind) {
        let last = self.last_order(to, epoch, kind.name());
        let wait = |o: &OrderRecord| o.pending() || self.now.since(o.answered.unwrap_or(o.t)) < ms(self.timing.retry_s);
        if !last.is_some_and(wait) {
            self.order(to, epoch, kind);
        }
    }

    /// Writes a new order; [`Turn::send`] sends it.
    pub fn order(&mut self, to: &HostId, epoch: Epoch, kind: OrderKind) -> OrderId {
        let record = OrderRecord::new(self.state.vm, epoch, to, kind, self.now);
        let id = record.order.id;
        self.out.writes.push(Write::Order(Box::new(record.clone())));
        self.book.orders.push(record);
        id
    }

    /// Sends what is pending and was not sent lately.
    pub fn send(&mut self) {
        let resend_ms = i64::try_from(self.timing.resend_ms).unwrap_or(i64::MAX);
        for o in self.book.orders.iter_mut().filter(|o| o.pending()) {
            if o.sent.is_none_or(|t| self.now.since(t) >= resend_ms) {
                o.sent = Some(self.now);
                self.out.send.push((o.to.clone(), o.order.clone()));
            }
        }
        let spare = self.book.orders.len().saturating_sub(ORDERS_KEPT);
        let mut left = spare;
        self.book.orders.retain(|o| {
            o.pending() || left == 0 || {
                left -= 1;
                false
            }
        });
    }

    /// Gives up orders that wait for an answer and match.
    pub fn drop_orders(&mut self, which: impl Fn(&OrderRecord) -> bool) {
        for o in self.book.orders.iter_mut().filter(|o| o.pending() && which(o)) {
            o.state = OrderState::Dropped;
            self.out.writes.push(Write::Order(Box::new(o.clone())));
        }
    }

    /// Whether the event has an edge from here.
    pub fn would(&self, event: &Event) -> Result<(), Illegal> {
        apply(self.state, event.clone(), self.now).map(|_| ())
    }

    /// Goes along an edge. What it leads to is driven in the same step.
    pub fn go(&mut self, event: Event) -> Result<(), Illegal> {
        let before = self.state.clone();
        let (next, edge) = apply(self.state, event, self.now)?;
        *self.state = next;
        if copies(before.stage) {
            self.book.copied.push_back(Copied {
                hosts: std::iter::once(&before.host).chain(&before.shadow).cloned().collect(),
                since: before.since,
                until: self.now,
            });
            let spare = self.book.copied.len().saturating_sub(COPIED_KEPT);
            self.book.copied.drain(..spare);
        }
        if self.state.host != before.host {
            let ms = self.policy.cooldown_ms(0);
            self.state.cooldown_until = Some(self.now.plus_ms(i64::try_from(ms).unwrap_or(i64::MAX)));
        }
        if self.state.epoch > before.epoch {
            // What is still out was meant for the stage that ended; the epoch makes it harmless where it arrives.
            self.drop_orders(|_| true);
        }
        self.save();
        self.out.writes.push(Write::Event(LifecycleEvent {
            t: edge.t,
            vm: self.state.vm,
            from: edge.from,
            to: edge.to,
            reason: edge.reason.to_string(),
            decision: self.decision.take(),
        }));
        self.out.edges.push((self.state.vm, edge));
        if self.state.host != before.host {
            self.redirect_commit(&before.host);
        } else if matches!(before.stage, Stage::Switching | Stage::FailingBack) {
            self.redirect_rollback(before.shadow.as_ref());
        }
        Ok(())
    }

    /// Begins what was decided or asked for.
    pub fn begin(&mut self, event: Event) -> Result<(), Denied> {
        if matches!(event, Event::Switch { .. } | Event::FailBack { .. }) {
            let host = self.state.host.clone();
            if let Some(source) = self.present(&host, Role::Source) {
                pace::gate(&source.progress).map_err(Denied::TooFast)?;
            }
            self.redirect_prepare()?;
        }
        Ok(self.go(event)?)
    }

    /// A step failed; both sides are cleared from here on.
    pub fn fail(&mut self, failure: Failure) {
        let stale = matches!(&failure, Failure::Refused { refusal, .. } if refusal.code == RefusalCode::StaleEpoch);
        if self.go(Event::Fail { failure }).is_ok() && stale {
            // Somebody has seen a higher epoch than we know of, and can't tell which: the store is older than
            // the world. Steps that double find it soon, and gaps in epochs do no harm.
            let step = 1u64 << self.state.failures.min(32);
            self.state.saw_epoch(Epoch(self.state.epoch.0.saturating_add(step)));
            self.save();
        }
    }

    pub fn save(&mut self) {
        self.out.writes.push(Write::Vm(Box::new(self.state.clone())));
    }

    fn mv(&self, from: &HostId, to: &HostId) -> Move {
        let s = &self.state;
        Move {
            vm: s.vm,
            name: s.name.clone(),
            from: from.clone(),
            to: to.clone(),
            epoch: s.epoch,
        }
    }

    fn redirect_prepare(&mut self) -> Result<(), Denied> {
        let Some(to) = self.state.shadow.clone() else {
            return Ok(());
        };
        let mv = self.mv(&self.state.host.clone(), &to);
        let redirects = self.redirects;
        for r in redirects {
            let effects = r.prepare(&mv).map_err(|words| Denied::Redirect {
                adapter: r.name(),
                words,
            })?;
            self.effects(effects);
        }
        Ok(())
    }

    fn redirect_commit(&mut self, from: &HostId) {
        let mv = self.mv(from, &self.state.host.clone());
        let redirects = self.redirects;
        for r in redirects {
            let orders = self.effects(r.commit(&mv));
            self.book.redirecting.push(Redirecting {
                adapter: r.name(),
                at: self.now,
                orders,
            });
        }
    }

    fn redirect_rollback(&mut self, to: Option<&HostId>) {
        let Some(to) = to else { return };
        let mv = self.mv(&self.state.host.clone(), to);
        let redirects = self.redirects;
        for r in redirects {
            self.effects(r.rollback(&mv));
        }
    }

    fn effects(&mut self, effects: Vec<Effect>) -> Vec<OrderId> {
        let epoch = self.state.epoch;
        effects
            .into_iter()
            .map(|Effect::Order { to, kind }| self.order(&to, epoch, kind))
            .collect()
    }

    /// Reports on traffic that was led over, once all of an adapter's orders are answered or given up.
    pub fn redirects_done(&mut self) {
        let (started, timeout_ms) = (self.started, self.asks_ms());
        let mut done = Vec::new();
        let book = &mut *self.book;
        let orders = &book.orders;
        book.redirecting.retain(|r| {
            let mine = orders.iter().filter(|o| r.orders.contains(&o.order.id));
            let asked: Vec<Asked> = mine.map(|o| o.asked(self.now, started, timeout_ms)).collect();
            if asked.contains(&Asked::Waiting) {
                return true;
            }
            done.push(report(r, &asked, self.now));
            false
        });
        for report in done {
            self.state.last_redirect = Some(report.clone());
            self.out.redirected.push(report);
            self.save();
        }
        // An announcement that nobody hears is not worth repeating for ever.
        let (now, asks_ms) = (self.now, timeout_ms);
        self.drop_orders(|o| {
            matches!(o.order.kind, OrderKind::Announce { .. }) && now.since(o.t.max(started)) > asks_ms
        });
    }
}

fn report(r: &Redirecting, asked: &[Asked], now: UnixMs) -> RedirectReport {
    let error = asked.iter().find_map(|a| match a {
        Asked::Refused { refusal, .. } => Some(refusal.to_string()),
        Asked::Unanswered => Some("not answered in time".to_owned()),
        _ => None,
    });
    let end = asked.iter().filter_map(Asked::answered).max().unwrap_or(now);
    let took_ms = u64::try_from(end.since(r.at)).unwrap_or(0);
    RedirectReport {
        adapter: r.adapter.to_owned(),
        at: r.at,
        took_ms,
        error,
    }
}
