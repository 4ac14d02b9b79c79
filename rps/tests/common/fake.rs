//! Replicators without QEMU: hosts that obey orders, copy at a pace, hand over in the steps of the real ones, lose power at
//! any step, and keep on disk what the real ones keep. Pure: [`Hosts::tick`] is the clock.
//!
//! The model knows where VMs *really* run, and panics if ever a second copy would: that is what orders must never bring about.

use std::collections::{BTreeMap, BTreeSet};

use umbra_api::order::{Order, OrderKind, Refusal, RefusalCode};
use umbra_api::replica::{
    Convergence, Phase, Progress, ReplicaStatus, Resumption, Role, ShadowMemory, SwitchoverReport,
};
use umbra_api::{Epoch, HostId, OrderId, UnixMs, VmId};

/// Ticks that a first copy takes.
const SEED_TICKS: u32 = 4;

pub fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

#[derive(Clone, Debug)]
struct Replica {
    peer: HostId,
    epoch: Epoch,
    phase: Phase,
    /// The switchover under way: its epoch, and its step.
    switching: Option<(Epoch, u8)>,
    ticks: u32,
    /// The copy broke off, and its source goes on about it.
    broken: Option<UnixMs>,
    report: Option<SwitchoverReport>,
    error: Option<Refusal>,
}

impl Replica {
    fn new(peer: &HostId, epoch: Epoch) -> Self {
        let (peer, phase) = (peer.clone(), Phase::Provisioning);
        Self {
            peer,
            epoch,
            phase,
            switching: None,
            ticks: 0,
            broken: None,
            report: None,
            error: None,
        }
    }

    fn end(&mut self, code: RefusalCode, why: &str) {
        self.phase = Phase::Released;
        self.broken = None;
        self.switching = None;
        self.error = Some(Refusal::new(code, why));
    }

    fn undecided(&self) -> bool {
        matches!(
            self.phase,
            Phase::Provisioning | Phase::Seeding | Phase::Standby | Phase::Switching
        )
    }
}

#[derive(Clone, Debug, Default)]
struct Host {
    down: bool,
    /// Highest epoch on this host's disk.
    seen: BTreeMap<VmId, Epoch>,
    orders: BTreeSet<OrderId>,
    source: BTreeMap<VmId, Replica>,
    target: BTreeMap<VmId, Replica>,
    /// VMs whose stopped primary is kept.
    kept: BTreeSet<VmId>,
}

/// All hosts and their VMs.
#[derive(Clone, Debug, Default)]
pub struct Hosts {
    hosts: BTreeMap<HostId, Host>,
    /// Where each VM runs; none while it is being handed over.
    runs: BTreeMap<VmId, Option<HostId>>,
    now: UnixMs,
    /// The next switchovers fail in this step: 1 prepare, 2 after the source has given up (then they only take longer).
    pub fail_switch: Option<u8>,
    /// What targets tell of their shadows' RAM.
    pub memory: Option<ShadowMemory>,
    /// Guests dirty their memory faster than links carry it.
    pub too_fast: bool,
    /// Orders that were carried out, for assertions.
    pub done: Vec<(HostId, Order)>,
}

impl Hosts {
    pub fn new(hosts: &[&str], vm: VmId, at: &str) -> Self {
        let hosts = hosts.iter().map(|h| (host(h), Host::default())).collect();
        Self {
            hosts,
            runs: BTreeMap::from([(vm, Some(host(at)))]),
            ..Self::default()
        }
    }

    pub fn runs_on(&self, vm: VmId) -> Option<&HostId> {
        self.runs.get(&vm)?.as_ref()
    }

    pub fn is_up(&self, h: &HostId) -> bool {
        !self.hosts[h].down
    }

    /// The replicator dies, or comes back and finds what its disk says.
    pub fn set_down(&mut self, h: &HostId, down: bool) {
        let this = self.hosts.get_mut(h).unwrap();
        if this.down && !down {
            // One that had given the VM up asks its target how it ended, and goes on.
            let open = |s: &&mut Replica| s.undecided() && !matches!(s.switching, Some((_, 2..)));
            for s in this.source.values_mut().filter(open) {
                s.end(RefusalCode::Local, "the source's replicator was restarted");
            }
            this.target.values_mut().filter(|t| t.undecided()).for_each(|t| {
                t.end(RefusalCode::Local, "the target's replicator was restarted");
            });
        }
        this.down = down;
    }

    pub fn replicas(&self, h: &HostId) -> Result<Vec<ReplicaStatus>, String> {
        let this = self.hosts.get(h).filter(|h| !h.down).ok_or("connection refused")?;
        let sources = this.source.iter().map(|(vm, r)| {
            let mut s = status(*vm, Role::Source, r);
            if self.too_fast {
                s.progress.pace.convergence = Convergence::NotConverging;
            }
            s
        });
        let targets = this.target.iter().map(|(vm, r)| ReplicaStatus {
            memory: self.memory.clone(),
            ..status(*vm, Role::Target, r)
        });
        Ok(sources.chain(targets).collect())
    }

    /// An order arrives. `Err` is a refusal; the caller has checked that the host is up.
    pub fn order(&mut self, h: &HostId, order: &Order) -> Result<(), Refusal> {
        let vm = order.vm;
        let runs = self.runs.get(&vm).cloned().flatten();
        let this = self.hosts.get_mut(h).unwrap();
        if this.orders.contains(&order.id) {
            return Ok(());
        }
        let seen = this.seen.get(&vm).copied().unwrap_or_default();
        if order.epoch < seen {
            return Err(Refusal::new(
                RefusalCode::StaleEpoch,
                format!("{} below {seen}", order.epoch),
            ));
        }
        this.obey(h, order, runs.as_ref())?;
        this.seen.insert(vm, order.epoch.max(seen));
        this.orders.insert(order.id);
        self.done.push((h.clone(), order.clone()));
        Ok(())
    }

    /// Time passes.
    pub fn tick(&mut self, now: UnixMs) {
        self.now = now;
        let pairs: Vec<(HostId, VmId)> = self
            .hosts
            .iter()
            .flat_map(|(h, this)| this.source.keys().map(|vm| (h.clone(), *vm)))
            .collect();
        for (h, vm) in pairs {
            if self.hosts[&h].down {
                continue;
            }
            let s = self.hosts[&h].source[&vm].clone();
            if s.broken.is_some() {
                continue;
            }
            match (s.phase, s.switching) {
                (Phase::Provisioning, _) => self.connect(&h, vm, &s),
                (Phase::Seeding | Phase::Standby, _) if !self.fed(&s.peer, vm, s.epoch) => {
                    self.source(&h, vm)
                        .end(RefusalCode::PeerUnreachable, "the link is lost");
                }
                (Phase::Seeding, _) => self.seed(&h, vm, &s),
                (Phase::Switching, Some((epoch, step))) => self.hand_over(&h, vm, &s, epoch, step),
                _ => {}
            }
        }
        self.discard();
    }

    /// The copy breaks off, and the shadow goes; the source tries again by itself.
    pub fn break_copy(&mut self, h: &HostId, vm: VmId) {
        let now = self.now;
        let source = self.source(h, vm);
        (source.phase, source.broken) = (Phase::Seeding, Some(now));
        let peer = source.peer.clone();
        self.target(&peer, vm).phase = Phase::Released;
    }

    /// The new pass is complete.
    pub fn resume_copy(&mut self, h: &HostId, vm: VmId) {
        let source = self.source(h, vm);
        (source.phase, source.broken) = (Phase::Standby, None);
        let peer = source.peer.clone();
        self.target(&peer, vm).phase = Phase::Standby;
    }

    fn source(&mut self, h: &HostId, vm: VmId) -> &mut Replica {
        self.hosts.get_mut(h).unwrap().source.get_mut(&vm).unwrap()
    }

    fn target(&mut self, h: &HostId, vm: VmId) -> &mut Replica {
        self.hosts.get_mut(h).unwrap().target.get_mut(&vm).unwrap()
    }

    /// A live shadow of this protection is there and can be reached.
    fn fed(&self, peer: &HostId, vm: VmId, epoch: Epoch) -> bool {
        let peer = self.hosts.get(peer).filter(|p| !p.down);
        let shadow = peer.and_then(|p| p.target.get(&vm));
        shadow.is_some_and(|t| t.epoch == epoch && (t.undecided() || t.phase == Phase::Prepared))
    }

    fn connect(&mut self, h: &HostId, vm: VmId, s: &Replica) {
        if !self.fed(&s.peer, vm, s.epoch) {
            return self
                .source(h, vm)
                .end(RefusalCode::PeerUnreachable, "the target can't be reached");
        }
        self.source(h, vm).phase = Phase::Seeding;
        self.target(&s.peer, vm).phase = Phase::Seeding;
    }

    fn seed(&mut self, h: &HostId, vm: VmId, s: &Replica) {
        let source = self.source(h, vm);
        source.ticks += 1;
        if source.ticks >= SEED_TICKS {
            source.phase = Phase::Standby;
            self.target(&s.peer, vm).phase = Phase::Standby;
        }
    }

    /// 0: prepare the shadow. 1: give the primary up. 2: the shadow runs.
    fn hand_over(&mut self, h: &HostId, vm: VmId, s: &Replica, epoch: Epoch, step: u8) {
        if step < 2 && (self.fail_switch == Some(1) || !self.fed(&s.peer, vm, s.epoch)) {
            return self
                .source(h, vm)
                .end(RefusalCode::PeerRefused, "the shadow failed to load");
        }
        match step {
            0 => {
                let shadow = self.target(&s.peer, vm);
                shadow.phase = Phase::Prepared;
                shadow.switching = Some((epoch, 0));
            }
            1 => {
                assert_eq!(
                    self.runs_on(vm),
                    Some(h),
                    "the source gives up a VM that it does not have"
                );
                self.runs.insert(vm, None);
                self.hosts.get_mut(h).unwrap().kept.insert(vm);
            }
            _ if self.hosts[&s.peer].down || self.fail_switch == Some(2) => return,
            _ => return self.commit(h, vm, s, epoch),
        }
        self.source(h, vm).switching = Some((epoch, step + 1));
    }

    fn commit(&mut self, h: &HostId, vm: VmId, s: &Replica, epoch: Epoch) {
        let peer = self.hosts.get_mut(&s.peer).unwrap();
        let shadow = peer.target.get_mut(&vm).unwrap();
        assert_eq!(
            shadow.phase,
            Phase::Prepared,
            "a shadow that was not prepared is told to run"
        );
        (shadow.phase, shadow.epoch, shadow.switching) = (Phase::Active, epoch, None);
        peer.seen.insert(vm, epoch);
        let before = self.runs.insert(vm, Some(s.peer.clone()));
        assert_eq!(before, Some(None), "two copies of {vm} run");
        let at = self.now;
        let this = self.hosts.get_mut(h).unwrap();
        this.seen.insert(vm, epoch);
        // Handed on: this host's own time as a target is over.
        this.target.remove(&vm);
        let source = this.source.get_mut(&vm).unwrap();
        (source.phase, source.epoch, source.switching) = (Phase::Relinquished, epoch, None);
        source.report = Some(SwitchoverReport {
            at,
            epoch,
            guest_stopped_us: 9_000,
            ..Default::default()
        });
    }

    /// Shadows that nobody feeds any more, and that were never prepared, go by themselves.
    fn discard(&mut self) {
        let mut gone = Vec::new();
        for (h, this) in self.hosts.iter().filter(|(_, t)| !t.down) {
            for (vm, t) in &this.target {
                let source = self
                    .hosts
                    .get(&t.peer)
                    .filter(|p| !p.down)
                    .and_then(|p| p.source.get(vm));
                let fed = source.is_some_and(|s| s.epoch >= t.epoch && s.phase != Phase::Released);
                let orphan = matches!(t.phase, Phase::Seeding | Phase::Standby) && !fed;
                // A prepared one waits for its source's word: here 'aborted', durable.
                let word = source.is_some_and(|s| s.phase == Phase::Released);
                if orphan || (t.phase == Phase::Prepared && word) {
                    gone.push((h.clone(), *vm));
                }
            }
        }
        for (h, vm) in gone {
            self.target(&h, vm)
                .end(RefusalCode::PeerUnreachable, "the source is gone");
        }
    }

    /// Replicas that still hold something, with their hosts, but for the one that runs the VM.
    pub fn holding(&self) -> Vec<(HostId, Role, Phase, Epoch)> {
        let mut out = Vec::new();
        for (h, this) in &self.hosts {
            let sources = this
                .source
                .values()
                .map(|r| (h.clone(), Role::Source, r.phase, r.epoch));
            let targets = this
                .target
                .values()
                .map(|r| (h.clone(), Role::Target, r.phase, r.epoch));
            out.extend(
                sources
                    .chain(targets)
                    .filter(|(_, _, p, _)| !matches!(p, Phase::Released | Phase::Retired | Phase::Active)),
            );
        }
        out
    }
}

impl Host {
    fn obey(&mut self, h: &HostId, order: &Order, runs: Option<&HostId>) -> Result<(), Refusal> {
        let vm = order.vm;
        let wrong = |why: &str| Err(Refusal::new(RefusalCode::WrongPhase, why));
        match &order.kind {
            OrderKind::Admit { source } => match self.target.get(&vm) {
                Some(t) if t.phase != Phase::Released => return wrong("there is a shadow here already"),
                _ => {
                    self.target.insert(vm, Replica::new(source, order.epoch));
                }
            },
            OrderKind::Protect { target, .. } => {
                if runs != Some(h) {
                    return Err(Refusal::new(RefusalCode::NoSuchVm, "no such VM runs here"));
                }
                match self.source.get(&vm).map(|s| s.phase) {
                    None | Some(Phase::Released | Phase::Retired) => {}
                    _ => return wrong("this VM is protected already, or its old primary is kept"),
                }
                self.source.insert(vm, Replica::new(target, order.epoch));
            }
            OrderKind::Tier { .. } => {
                if !self.target.contains_key(&vm) {
                    return wrong("there is no shadow here");
                }
            }
            OrderKind::Switchover => match self.source.get_mut(&vm) {
                Some(s) if s.phase == Phase::Standby && order.epoch > s.epoch => {
                    (s.phase, s.switching) = (Phase::Switching, Some((order.epoch, 0)));
                }
                _ => return wrong("a switchover needs a standby"),
            },
            OrderKind::Recover { .. } | OrderKind::HandOver => return wrong("the simulation has no operator for that"),
            OrderKind::Announce { .. } => {
                if self.target.get(&vm).is_none_or(|t| t.phase != Phase::Active) {
                    return wrong("no shadow became active here");
                }
            }
            OrderKind::Release => return self.release(vm),
            OrderKind::Retire => match self.source.get_mut(&vm) {
                Some(s) if s.phase == Phase::Relinquished => {
                    assert_ne!(runs, Some(h), "a host that runs the VM is told to quit it");
                    assert!(runs.is_some(), "the way back is quit while nobody runs the VM");
                    s.phase = Phase::Retired;
                    self.kept.remove(&vm);
                }
                Some(s) if s.phase == Phase::Retired => {}
                _ => return wrong("nothing to retire"),
            },
        }
        Ok(())
    }

    fn release(&mut self, vm: VmId) -> Result<(), Refusal> {
        if let Some(s) = self.source.get_mut(&vm).filter(|s| s.undecided()) {
            match s.switching {
                // Given up already: too late.
                Some((_, 2..)) => {}
                _ => {
                    s.phase = Phase::Released;
                    s.switching = None;
                }
            }
            return Ok(());
        }
        match self.target.get_mut(&vm) {
            Some(t) if matches!(t.phase, Phase::Active | Phase::Prepared) => {
                Err(Refusal::new(RefusalCode::WrongPhase, "a release never stops a VM"))
            }
            Some(t) => {
                t.phase = Phase::Released;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

fn status(vm: VmId, role: Role, r: &Replica) -> ReplicaStatus {
    ReplicaStatus {
        vm,
        name: "web".into(),
        role,
        peer: r.peer.clone(),
        epoch: r.epoch,
        seen: r.epoch,
        phase: r.phase,
        since: UnixMs(0),
        tier: None,
        memory: None,
        progress: Progress {
            ram_bytes: 256 << 20,
            resume: Resumption {
                broken_since: r.broken,
                ..Resumption::default()
            },
            ..Progress::default()
        },
        report: r.report,
        disks: Vec::new(),
        error: r.error.clone(),
    }
}
