//! The orchestrator's core, its store and its replicators in one process, with a network that loses, delays and repeats.
//! Time is simulated; everything follows from the seed.

use std::collections::BTreeMap;
use std::sync::Arc;

use umbra_api::lifecycle::Stage;
use umbra_api::order::{Order, OrderKind};
use umbra_api::replica::ReplicaStatus;
use umbra_api::view::{LifecycleEvent, Mode};
use umbra_api::{Epoch, HostId, OrderId, UnixMs, VmId};
use umbra_rps::contention::Draws;
use umbra_rps::forecast::Quantiles;
use umbra_rps::lifecycle::VmState;
use umbra_rps::orchestrator::orders::{Answer, OrderRecord};
use umbra_rps::orchestrator::{Core, Denied, Input, Member, Outputs, Remembered, Request, Timing};
use umbra_rps::outlook::{HostInput, Outlook, Params, VmInput};
use umbra_rps::planner::Policy;
use umbra_rps::redirect::AnnounceSelf;
use umbra_rps::store::Write;

use super::fake::{Hosts, host};

pub const TICK_MS: i64 = 500;

pub fn vm() -> VmId {
    VmId(uuid::Uuid::from_u128(0xab))
}

/// What the store would have on its disk.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    pub states: BTreeMap<VmId, VmState>,
    pub orders: BTreeMap<OrderId, OrderRecord>,
    pub events: Vec<LifecycleEvent>,
}

/// Shares of messages, 0 to 1.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub lost: f64,
    pub late: f64,
    /// The RPS dies after a commit, before it sends.
    pub crash: f64,
    /// A replicator dies, and comes back some ticks later.
    pub host_down: f64,
}

/// When it arrives, of whom, when it was asked, what was told.
type Poll = (UnixMs, HostId, UnixMs, Result<Vec<ReplicaStatus>, String>);

pub struct Sim {
    pub hosts: Hosts,
    pub core: Core,
    pub disk: Disk,
    pub now: UnixMs,
    pub faults: Faults,
    policy: Policy,
    mode: Mode,
    rng: u64,
    wire: Vec<(UnixMs, HostId, Order)>,
    answers: Vec<(UnixMs, OrderId, Answer)>,
    polls: Vec<Poll>,
    /// Every order that left the house, in order, repetitions included.
    pub sent: Vec<(HostId, Order)>,
    pub redirects: usize,
}

pub fn timing() -> Timing {
    Timing {
        order_timeout_s: 5,
        provision_timeout_s: 20,
        seed_timeout_s: 60,
        resume_timeout_s: 30,
        switch_timeout_s: 10,
        lost_after_s: 3,
        retry_s: 2,
        resend_ms: 1_000,
        ..Timing::default()
    }
}

pub fn policy() -> Policy {
    Policy {
        cooldown_s: 2.0,
        cooldown_max_s: 8.0,
        keep_old_s: 1.0,
        ..Policy::default()
    }
}

fn core(policy: &Policy, mode: Mode, disk: &Disk, now: UnixMs) -> Core {
    let member = |name: &str| Member {
        host: host(name),
        link: format!("{name}:7402"),
    };
    let remembered = Remembered {
        states: disk.states.values().cloned().collect(),
        orders: disk.orders.values().cloned().collect(),
    };
    let members = vec![member("a"), member("b")];
    Core::new(
        policy.clone(),
        timing(),
        members,
        vec![Box::new(AnnounceSelf::default())],
        mode,
        remembered,
        now,
    )
}

impl Sim {
    pub fn new(seed: u64) -> Self {
        Self::with(seed, policy(), Mode::Act)
    }

    pub fn with(seed: u64, policy: Policy, mode: Mode) -> Self {
        let now = UnixMs(1_000_000);
        let disk = Disk::default();
        let mut sim = Self {
            hosts: Hosts::new(&["a", "b"], vm(), "a"),
            core: core(&policy, mode, &disk, now),
            disk,
            now,
            faults: Faults::default(),
            policy,
            mode,
            rng: seed | 1,
            wire: Vec::new(),
            answers: Vec::new(),
            polls: Vec::new(),
            sent: Vec::new(),
            redirects: 0,
        };
        sim.look();
        sim
    }

    pub fn chance(&mut self, share: f64) -> bool {
        (self.random() % 1_000_000) as f64 / 1e6 < share
    }

    pub fn random(&mut self) -> u64 {
        // xorshift64*
        self.rng ^= self.rng >> 12;
        self.rng ^= self.rng << 25;
        self.rng ^= self.rng >> 27;
        self.rng.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The agents tell where the VM runs.
    pub fn look(&mut self) {
        let Some(at) = self.hosts.runs_on(vm()).cloned() else {
            return;
        };
        let out = self.core.foreseen(&outlook(&at, self.now), self.now);
        self.take(out);
    }

    pub fn state(&self) -> &VmState {
        &self.core.states()[&vm()]
    }

    pub fn stage(&self) -> Stage {
        self.state().stage
    }

    pub fn stages(&self) -> Vec<Stage> {
        self.disk.events.iter().map(|e| e.to).collect()
    }

    /// The RPS dies and comes back with what its disk has.
    pub fn restart(&mut self) {
        self.core = core(&self.policy, self.mode, &self.disk, self.now);
        self.answers.clear();
        self.polls.clear();
    }

    pub fn forget(&mut self) {
        self.disk = Disk::default();
        self.restart();
        self.look();
    }

    fn take(&mut self, out: Outputs) -> Option<Denied> {
        for w in out.writes {
            match w {
                Write::Vm(s) => {
                    self.disk.states.insert(s.vm, *s);
                }
                Write::Order(o) => {
                    self.disk.orders.insert(o.order.id, *o);
                }
                Write::Event(e) => self.disk.events.push(e),
                _ => {}
            }
        }
        self.redirects += out.redirected.len();
        if self.chance(self.faults.crash) {
            self.restart();
            return out.denied;
        }
        for (to, order) in out.send {
            self.check(&to, &order);
            self.sent.push((to.clone(), order.clone()));
            if self.chance(self.faults.lost) {
                continue;
            }
            let due = self.later();
            self.wire.push((due, to, order));
        }
        out.denied
    }

    /// No order may leave before it is on the disk, and none that could make a second copy.
    fn check(&self, to: &HostId, order: &Order) {
        assert!(
            self.disk.orders.contains_key(&order.id),
            "{order:?} was sent before it was stored"
        );
        let starts = |k: &OrderKind| matches!(k, OrderKind::Switchover | OrderKind::Protect { .. });
        if !starts(&order.kind) {
            return;
        }
        for (other_to, other) in self.sent.iter().filter(|(_, o)| starts(&o.kind) && o.id != order.id) {
            let same = other.kind.name() == order.kind.name() && other.epoch == order.epoch;
            assert!(
                !same,
                "two orders under one epoch: {other:?} to {other_to}, {order:?} to {to}"
            );
        }
        // One that starts a copy is never older than one that was sent before; repetitions are.
        let newest = self
            .sent
            .iter()
            .filter(|(_, o)| starts(&o.kind))
            .map(|(_, o)| o.epoch)
            .max();
        let repeated = self.sent.iter().any(|(_, o)| o.id == order.id);
        assert!(
            repeated || order.epoch >= newest.unwrap_or(Epoch(0)),
            "{order:?} is older than one that was sent"
        );
    }

    fn later(&mut self) -> UnixMs {
        let late = self.chance(self.faults.late);
        let ticks = if late { (self.random() % 12) as i64 } else { 0 };
        self.now.plus_ms(ticks * TICK_MS)
    }

    pub fn input(&mut self, input: Input) -> Option<Denied> {
        let out = self.core.step(input, self.now);
        self.take(out)
    }

    pub fn request(&mut self, request: Request) -> Result<(), Denied> {
        self.input(Input::Request { vm: vm(), request }).map_or(Ok(()), Err)
    }

    pub fn create(&mut self) -> Result<(), Denied> {
        let target = if self.state().host == host("a") {
            host("b")
        } else {
            host("a")
        };
        self.request(Request::Create { target })
    }

    pub fn tick(&mut self) {
        self.now = self.now.plus_ms(TICK_MS);
        self.break_hosts();
        self.deliver();
        self.hosts.tick(self.now);
        self.poll();
        if self.chance(0.1) {
            self.look();
        }
        self.input(Input::Tick);
    }

    fn break_hosts(&mut self) {
        for name in ["a", "b"] {
            let (h, down) = (host(name), self.faults.host_down);
            let up = self.hosts.is_up(&h);
            if up && self.chance(down) {
                self.hosts.set_down(&h, true);
            } else if !up && (down == 0.0 || self.chance(0.2)) {
                self.hosts.set_down(&h, false);
            }
        }
    }

    fn deliver(&mut self) {
        let now = self.now;
        let (due, wait): (Vec<_>, Vec<_>) = std::mem::take(&mut self.wire)
            .into_iter()
            .partition(|(t, ..)| *t <= now);
        self.wire = wait;
        for (_, to, order) in due {
            let answer = match self.hosts.is_up(&to) {
                false => Answer::Unknown("connection refused".into()),
                true => match self.hosts.order(&to, &order) {
                    Ok(()) => Answer::Accepted,
                    Err(refusal) => Answer::Refused(refusal),
                },
            };
            let lost = self.chance(self.faults.lost);
            let answer = if lost {
                Answer::Unknown("timeout".into())
            } else {
                answer
            };
            let due = self.later();
            self.answers.push((due, order.id, answer));
        }
        let (due, wait): (Vec<_>, Vec<_>) = std::mem::take(&mut self.answers)
            .into_iter()
            .partition(|(t, ..)| *t <= now);
        self.answers = wait;
        for (_, order, answer) in due {
            self.input(Input::Answered { order, answer });
        }
    }

    fn poll(&mut self) {
        for name in ["a", "b"] {
            let h = host(name);
            let told = match self.chance(self.faults.lost) {
                true => Err("timeout".to_owned()),
                false => self.hosts.replicas(&h),
            };
            let due = self.later();
            self.polls.push((due, h, self.now, told));
        }
        let now = self.now;
        let (due, wait): (Vec<_>, Vec<_>) = std::mem::take(&mut self.polls)
            .into_iter()
            .partition(|(t, ..)| *t <= now);
        self.polls = wait;
        for (_, host, asked_at, replicas) in due {
            self.input(Input::Polled {
                host,
                asked_at,
                replicas,
            });
        }
    }

    pub fn ticks(&mut self, n: usize) {
        (0..n).for_each(|_| self.tick());
    }

    /// Ticks until the stage is reached; panics with the story if it is not.
    pub fn until(&mut self, stage: Stage) {
        for _ in 0..400 {
            if self.stage() == stage {
                return;
            }
            self.tick();
        }
        panic!("{stage} was not reached: {}", self.tale());
    }

    /// What happened, for a failing test.
    pub fn tale(&self) -> String {
        let edge = |e: &LifecycleEvent| format!("{} {} -> {}: {}", e.t, e.from, e.to, e.reason);
        let edges: Vec<String> = self.disk.events.iter().map(edge).collect();
        let orders = self
            .disk
            .orders
            .values()
            .filter(|o| o.pending())
            .map(|o| format!("{o:?}"));
        let orders: Vec<String> = orders.collect();
        let holding: Vec<String> = self.hosts.holding().iter().map(|h| format!("{h:?}")).collect();
        let at = self.hosts.runs_on(vm());
        let (edges, holding, orders) = (edges.join("\n"), holding.join("\n"), orders.join("\n"));
        format!(
            "{}\n{edges}\n{:?}\nruns: {at:?}\nholding: {holding}\npending: {orders}",
            self.now,
            self.state()
        )
    }
}

/// One VM of half a core on `at`; both hosts have four.
pub fn outlook(at: &HostId, now: UnixMs) -> Outlook {
    let params = Params {
        horizon: 4,
        ..Params::default()
    };
    let bands = Quantiles::flat(0.5, 0.05, 4, 2.0);
    let web = VmInput {
        vm: vm(),
        name: "web".into(),
        host: at.clone(),
        vcpus: 1,
        cpu_demand: 0.5,
        wait_ms_per_s: 0.0,
        rss_bytes: 200 << 20,
        guest_bytes: 256 << 20,
        peak_mem_bytes: 256 << 20,
        history_slots: 100,
        model: Some(("last".into(), Vec::new())),
        bands,
    };
    let idle = |name: &str| HostInput {
        host: host(name),
        cpus: 4.0,
        own_demand: 0.1,
        own: Quantiles::flat(0.1, 0.01, 4, 4.0),
        mem_total_bytes: 8 << 30,
        mem_available_bytes: 6 << 30,
        shadows: Vec::new(),
        last_sample: Some(now),
    };
    let draws = Arc::new(Draws::new(4, params.dependence));
    Outlook::assemble(now, 1_000, &params, draws, vec![web], vec![idle("a"), idle("b")])
}
