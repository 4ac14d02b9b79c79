//! From facts to steps: first where the VM runs or could, then what is left over.

use super::{Copy, Decided, HostFacts, Missing, Plan, SideFacts, Step, Way};
use crate::order::OrderKind;
use crate::replica::Phase;
use crate::{Epoch, HostId, VmId};

/// What the operator adds to the facts.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Wishes {
    pub dead: Vec<HostId>,
    pub discard_shadow: bool,
}

struct Planner<'a> {
    hosts: &'a [HostFacts],
    wishes: &'a Wishes,
    steps: Vec<Step>,
    by_hand: Vec<String>,
}

/// The steps that bring a VM back to a state in which it runs once, and nothing else of it is left.
pub fn plan(vm: VmId, hosts: &[HostFacts], missing: &[Missing], wishes: &Wishes) -> Plan {
    let mut planner = Planner {
        hosts,
        wishes,
        steps: Vec::new(),
        by_hand: Vec::new(),
    };
    let running: Vec<&HostFacts> = hosts.iter().filter(|h| h.runs()).collect();
    match running.as_slice() {
        [] => planner.revive(),
        [one] => planner.around(one),
        many => planner.twice(many),
    }
    if running.len() < 2 {
        planner.clean();
    }
    let mut found: Vec<String> = hosts.iter().flat_map(told).collect();
    found.extend(
        missing
            .iter()
            .map(|m| format!("{}: does not answer: {}", m.host, m.why)),
    );
    let seen = hosts.iter().map(|h| h.epoch).max().unwrap_or_default();
    Plan {
        vm,
        epoch: seen.next(),
        found,
        steps: planner.steps,
        by_hand: planner.by_hand,
        done: Vec::new(),
    }
}

impl Planner<'_> {
    fn step(&mut self, host: &HostId, way: Way, dead: Option<&HostId>, does: String, risk: Option<String>) {
        self.steps.push(Step {
            host: host.clone(),
            order: OrderKind::Recover {
                way,
                dead: dead.cloned(),
                link: None,
            },
            does,
            risk,
        });
    }

    fn facts(&self, host: &HostId) -> Option<&HostFacts> {
        self.hosts.iter().find(|h| h.host == *host)
    }

    fn is_dead(&self, host: &HostId) -> bool {
        self.wishes.dead.contains(host)
    }

    /// Nobody runs it. The newest decision counts: whoever stopped last has the VM's latest state.
    fn revive(&mut self) {
        let hosts = self.hosts;
        let stopped = hosts
            .iter()
            .filter_map(|h| Some((h, h.source.as_ref()?)))
            .filter(|(_, s)| matches!(s.copy, Copy::Stopped | Copy::Switching | Copy::Silent))
            .filter(|(_, s)| matches!(s.decided, Decided::Ready | Decided::Done | Decided::TakingBack));
        let shadows = hosts
            .iter()
            .filter_map(|h| Some((h, h.target.as_ref()?)))
            .filter(|(_, t)| t.decided == Decided::Ready && t.copy != Copy::Gone);
        let source = stopped.max_by_key(|(_, s)| s.epoch);
        let shadow = shadows.max_by_key(|(_, t)| t.epoch);
        match (source, shadow) {
            (Some((h, s)), Some((_, t))) if s.epoch < t.epoch => self.shadow(h, t),
            (Some((h, s)), _) => self.primary(h, s),
            (None, Some((h, t))) => self.shadow(h, t),
            (None, None) => self.nothing(),
        }
    }

    /// A stopped primary is what is left, or the shadow that it waits for.
    fn primary(&mut self, h: &HostFacts, s: &SideFacts) {
        let (peer, epoch) = (s.peer.clone(), s.epoch);
        let since = match s.decided {
            Decided::Done => format!(
                "all that the VM did on {peer} since it was switched there (epoch {epoch}) is lost, its disks' writes too"
            ),
            _ => format!("if the shadow on {peer} ran after all, what the VM did there is lost"),
        };
        let does = format!("runs the stopped primary on {} again", h.host);
        if self.is_dead(&peer) {
            let risk = format!(
                "{since}; {peer} ends its copy when it is back, and until then nothing but your word says that it does not run"
            );
            return self.step(&h.host, Way::TakeBack, Some(&peer), does, Some(risk));
        }
        let Some(other) = self.facts(&peer) else {
            return self.unreachable(&peer, &h.host);
        };
        let waits = other
            .target
            .as_ref()
            .is_some_and(|t| t.decided == Decided::Ready && t.copy != Copy::Gone);
        if waits && !self.wishes.discard_shadow {
            self.by_hand.push(format!(
                "{} asks {peer} how epoch {epoch} ended until it is told, and the shadow there is ready: if this does not end by itself, \
                 look why the link between the two is down; to run the primary instead: --discard-shadow",
                h.host
            ));
            return;
        }
        if waits {
            let risk = "none: it has not run".to_owned();
            self.step(
                &peer,
                Way::Discard,
                None,
                format!("ends the shadow on {peer}, which has not run"),
                Some(risk),
            );
        }
        let does = format!("{does}, once {peer} has written down that its copy never will");
        self.step(&h.host, Way::TakeBack, None, does, Some(since));
    }

    /// A prepared shadow is what is left.
    fn shadow(&mut self, h: &HostFacts, t: &SideFacts) {
        let (source, epoch) = (t.peer.clone(), t.epoch);
        let aged = format!(
            "the shadow is as old as epoch {epoch}; what the VM did on {source} after that, if QEMU let it run on there, is lost, and \
             that host's disks may be newer than the shadow's"
        );
        let dead = self.is_dead(&source);
        let gone = self
            .facts(&source)
            .is_some_and(|f| f.qemus.iter().all(|q| q.copy == Copy::Gone));
        if self.wishes.discard_shadow {
            if !dead && !gone {
                return self.unreachable(&source, &h.host);
            }
            let does = format!("ends the shadow on {} and removes its images", h.host);
            let risk = format!(
                "the shadow's memory and images are lost: the VM must be started from its disks on {source}, where it was last"
            );
            self.step(&h.host, Way::Discard, None, does, Some(risk));
            if gone {
                self.step(&source, Way::Ask, None, format!("has {source} take note of it"), None);
            }
            return;
        }
        let does = format!("runs the prepared shadow on {}", h.host);
        if dead {
            let risk = format!(
                "{aged}; {source} ends its copy when it is back, and until then nothing but your word says that it does not run"
            );
            return self.step(&h.host, Way::RunShadow, Some(&source), does, Some(risk));
        }
        match self.facts(&source) {
            None => self.unreachable(&source, &h.host),
            Some(f) if gone && f.source.as_ref().is_some_and(|s| s.decided == Decided::Ready) => {
                let does = format!("{does}: {source}, where no QEMU of it is left, commits epoch {epoch}");
                self.step(&source.clone(), Way::Ask, None, does, Some(aged));
            }
            Some(_) if gone => {
                let does = format!(
                    "{does}, once {source}, which knows nothing of it, has written down that no copy runs there"
                );
                self.step(&h.host, Way::RunShadow, None, does, Some(aged));
            }
            Some(_) => self.by_hand.push(format!(
                "the VM is on {source}, neither running nor gone: see the line of {source} above"
            )),
        }
    }

    fn unreachable(&mut self, peer: &HostId, here: &HostId) {
        self.by_hand.push(format!(
            "what {here} has may not run before it is known that {peer} runs no copy: start the replicator on {peer}, or, if that host \
             is lost for ever or switched off, say so: --host-is-dead {peer}"
        ));
    }

    fn nothing(&mut self) {
        let paused: Vec<String> = self
            .hosts
            .iter()
            .flat_map(|h| h.qemus.iter().map(move |q| (h, q)))
            .filter(|(_, q)| matches!(q.copy, Copy::Paused | Copy::Silent | Copy::Stopped))
            .map(|(h, q)| match q.copy {
                Copy::Silent => format!("process {} on {} does not say how it is: look there", q.pid, h.host),
                _ => format!(
                    "the VM is paused on {} (process {}): whoever stopped it lets it go on with QMP 'cont'",
                    h.host, q.pid
                ),
            })
            .collect();
        match paused.is_empty() {
            true => self.by_hand.push(
                "no copy of the VM is left on the hosts that answer: start it from its disks, as its own management does".into(),
            ),
            false => self.by_hand.extend(paused),
        }
    }

    fn twice(&mut self, many: &[&HostFacts]) {
        let names: Vec<String> = many.iter().map(|h| h.host.to_string()).collect();
        self.by_hand.push(format!(
            "copies run on {} at once: Umbra ends none of them, since only you can say which one has what must be kept; end the other \
             by its QMP 'quit', then ask again",
            names.join(" and ")
        ));
    }

    /// It runs on one host: what is in its way elsewhere.
    fn around(&mut self, runs: &HostFacts) {
        let here = runs.host.clone();
        let ran_since = runs
            .target
            .as_ref()
            .filter(|t| t.decided == Decided::Done)
            .map(|t| t.epoch);
        let hosts = self.hosts;
        for h in hosts {
            if h.host != here
                && let Some(s) = &h.source
            {
                self.old_primary(h, s, &here, ran_since);
            }
            if let Some(t) = h.target.as_ref().filter(|_| h.host != here) {
                self.old_shadow(h, t, runs);
            }
        }
    }

    fn old_primary(&mut self, h: &HostFacts, s: &SideFacts, here: &HostId, ran_since: Option<Epoch>) {
        match s.decided {
            Decided::Done if s.copy != Copy::Gone && ran_since.is_some_and(|e| e >= s.epoch) => self.steps.push(Step {
                host: h.host.clone(),
                order: OrderKind::Retire,
                does: format!(
                    "quits the stopped primary that is kept on {} since epoch {}",
                    h.host, s.epoch
                ),
                risk: Some(format!("it is the way back, should the copy on {here} be lost")),
            }),
            Decided::Ready if ran_since == Some(s.epoch) && s.copy == Copy::Gone => {
                let does = format!("has {} take note that epoch {} was completed", h.host, s.epoch);
                self.step(&h.host, Way::Ask, None, does, None);
            }
            _ => {}
        }
    }

    /// A shadow that its source does not feed any more.
    fn old_shadow(&mut self, h: &HostFacts, t: &SideFacts, runs: &HostFacts) {
        if t.copy == Copy::Gone || t.peer != runs.host || matches!(t.decided, Decided::Done | Decided::Over) {
            return;
        }
        let fed = runs.source.as_ref().is_some_and(|s| {
            s.peer == h.host
                && matches!(
                    s.phase,
                    Some(Phase::Provisioning | Phase::Seeding | Phase::Standby | Phase::Switching)
                )
        });
        if !fed {
            let does = format!(
                "ends the shadow on {}, of epoch {}: the VM runs on {}",
                h.host, t.epoch, runs.host
            );
            self.step(&h.host, Way::Discard, None, does, None);
        }
    }

    fn clean(&mut self) {
        for h in self.hosts.iter().filter(|h| !h.leftovers.is_empty()) {
            let does = format!("removes what no record knows on {}: {}", h.host, h.leftovers.join(", "));
            self.steps.push(Step {
                host: h.host.clone(),
                order: OrderKind::Recover {
                    way: Way::Clean,
                    dead: None,
                    link: None,
                },
                does,
                risk: None,
            });
        }
    }
}

fn told(h: &HostFacts) -> Vec<String> {
    let side = |role: &str, s: &SideFacts| {
        format!(
            "{}: {role} of a copy {} {}: {} under epoch {}, its QEMU {}",
            h.host,
            if role == "source" { "to" } else { "from" },
            s.peer,
            words(role, s.decided),
            s.epoch,
            state(s.copy)
        )
    };
    let mut out = Vec::new();
    out.extend(h.source.iter().map(|s| side("source", s)));
    out.extend(h.target.iter().map(|t| side("target", t)));
    for q in h.qemus.iter().filter(|q| !q.known) {
        out.push(format!(
            "{}: QEMU process {} {}, which no record knows",
            h.host,
            q.pid,
            state(q.copy)
        ));
    }
    if let Some(host) = &h.fence {
        out.push(format!(
            "{}: has still to tell {host}, which was declared dead, to end its copy",
            h.host
        ));
    }
    if out.is_empty() {
        out.push(format!("{}: nothing of the VM is here", h.host));
    }
    out
}

fn words(role: &str, decided: Decided) -> &'static str {
    match (role, decided) {
        (_, Decided::Nothing) => "undecided",
        (_, Decided::Begun) => "a switchover was begun",
        ("source", Decided::Ready) => "given up",
        (_, Decided::Ready) => "prepared",
        ("source", Decided::Done) => "handed over",
        (_, Decided::Done) => "taken over",
        (_, Decided::TakingBack) => "to be run again",
        (_, Decided::Over) => "over",
        (_, Decided::Fenced) => "ended, since the host was declared dead",
    }
}

fn state(copy: Copy) -> &'static str {
    match copy {
        Copy::Gone => "is gone",
        Copy::Runs => "runs",
        Copy::Stopped => "is stopped",
        Copy::Paused => "is paused",
        Copy::Waits => "waits",
        Copy::Switching => "is in the middle of a switchover",
        Copy::Silent => "does not say how it is",
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
