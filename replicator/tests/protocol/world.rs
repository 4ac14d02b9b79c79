//! All that the protocol's exploration keeps of two replicators, two QEMUs, their link and their disks, and what can happen next.

use std::collections::VecDeque;

use umbra_api::Epoch;
use umbra_replicator::source::machine as source;
use umbra_replicator::target::machine as target;

const PROTECT: Epoch = Epoch(1);
const SWITCH: Epoch = Epoch(2);
/// Of an operator's recovery.
const FENCE: Epoch = Epoch(3);

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Primary {
    Runs,
    /// Stopped, and waits for its replicator to make the disks equal. Its socket's end does not wake it.
    PreSwitchover,
    /// Stopped at the end of its migration; runs again if the migration's socket closes.
    Device,
    /// Its migration is complete.
    Postmigrate,
    Gone,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Shadow {
    Waits,
    /// It has all of the stream.
    Fed,
    Loaded,
    Runs,
    Gone,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum ToTarget {
    Prepare,
    StreamEnd,
    Commit,
    Abort,
    Resolve,
    Goodbye,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum ToSource {
    Prepared,
    Running,
    Aborted,
    Refused,
}

/// A replicator: its machine, and the actions that it has yet to carry out. `None` while it is dead.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Side<M, A> {
    alive: Option<(M, VecDeque<A>)>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct World {
    source: Side<source::Machine, source::Action>,
    source_disk: source::Durable,
    target: Side<target::Machine, target::Action>,
    target_disk: target::Durable,
    pub primary: Primary,
    /// The source holds the migration's socket.
    socket: bool,
    acked: bool,
    /// The shadow's image has all that the guest has written.
    equal: bool,
    /// The daemon has the shadow's image.
    daemon: bool,
    pub shadow: Shadow,
    /// It was the VM, however shortly.
    pub ran: bool,
    /// Its replicator died before it had written that down.
    unrecorded: bool,
    /// The source's connection to the target, with what is on its way.
    link: Option<(VecDeque<ToTarget>, VecDeque<ToSource>)>,
    /// What a side has yet to notice: its driver is one thread, and hears of it when it has carried out what it was about.
    source_lost: bool,
    target_lost: bool,
    primary_news: bool,
    shadow_news: bool,
    /// A prepared target must be told of an abort by a source that asks again.
    abort_due: bool,
    /// Faults that may still happen.
    crashes: u8,
    cuts: u8,
    timeouts: u8,
    primary_deaths: u8,
    shadow_deaths: u8,
    load_failures: u8,
    mirror_failures: u8,
    /// Recoveries that an operator may still order.
    recoveries: u8,
    /// How far a fence is that the source asked the target for.
    fence: Fence,
    /// An operator gave up what a shadow did that ran and died: until a recovery ends, nothing may run.
    pub given_up: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Fence {
    No,
    Asked,
    Granted,
    Refused,
}

impl World {
    pub fn new(crashes: u8, cuts: u8, recoveries: u8) -> Self {
        let mut m = source::Machine::new();
        m.apply(source::Input::Begun);
        m.apply(source::Input::Seeded);
        let mut t = target::Machine::new(PROTECT);
        t.apply(target::Input::Seeded);
        Self {
            source: Side {
                alive: Some((m, VecDeque::new())),
            },
            source_disk: source::Durable::Protecting,
            target: Side {
                alive: Some((t, VecDeque::new())),
            },
            target_disk: target::Durable::Shadow,
            primary: Primary::Runs,
            socket: true,
            acked: false,
            equal: false,
            daemon: true,
            shadow: Shadow::Waits,
            ran: false,
            unrecorded: false,
            link: Some((VecDeque::new(), VecDeque::new())),
            source_lost: false,
            target_lost: false,
            primary_news: false,
            shadow_news: false,
            abort_due: false,
            crashes,
            cuts,
            timeouts: 1,
            primary_deaths: 1,
            shadow_deaths: 1,
            load_failures: 1 - recoveries,
            mirror_failures: 1 - recoveries,
            recoveries,
            fence: Fence::No,
            given_up: false,
        }
    }

    fn tell_source(&mut self, input: source::Input) {
        if let Some((m, todo)) = &mut self.source.alive {
            todo.extend(m.apply(input));
        }
    }

    fn tell_target(&mut self, input: target::Input) {
        if let Some((m, todo)) = &mut self.target.alive {
            todo.extend(m.apply(input));
        }
    }

    fn send_target(&mut self, m: ToTarget) {
        match &mut self.link {
            Some((q, _)) => q.push_back(m),
            None => self.tell_source(source::Input::LinkLost("no link".into())),
        }
    }

    fn send_source(&mut self, m: ToSource) {
        if let Some((_, q)) = &mut self.link {
            q.push_back(m);
        }
    }

    fn cut(&mut self) {
        if self.link.take().is_some() {
            self.source_lost = self.source.alive.is_some();
            self.target_lost = self.target.alive.is_some();
        }
    }

    /// QEMU's rule: a migration whose socket closes before SHUT(0) fails, and the guest runs on.
    fn close_socket(&mut self) {
        self.socket = false;
        if self.primary == Primary::Device {
            self.primary_runs();
        }
    }

    /// It writes on its own disk from here on.
    fn primary_runs(&mut self) {
        // The one exception: a host that is gone as a whole within the few milliseconds in which its record is written.
        assert!(
            !self.ran || self.unrecorded,
            "an old primary comes back although the shadow ran"
        );
        self.primary = Primary::Runs;
        self.equal = false;
    }

    /// What a replicator does that lets go of a primary, or finds it after a restart: a paused migration is cancelled.
    fn cancel_pause(&mut self) {
        if self.primary == Primary::PreSwitchover {
            self.primary_runs();
        }
    }

    fn source_acts(&mut self, action: source::Action) {
        use source::Action as A;
        match action {
            A::Write(d) => {
                self.source_disk = d;
                self.tell_source(source::Input::Written);
            }
            A::Stop { .. } => {
                self.send_target(ToTarget::Prepare);
                self.acked = true;
            }
            A::Shut if self.primary == Primary::Device && self.socket => self.primary = Primary::Postmigrate,
            A::Shut => {}
            A::Commit { .. } => self.send_target(ToTarget::Commit),
            A::Abort { .. } => {
                self.abort_due = true;
                if self.link.is_some() {
                    self.send_target(ToTarget::Abort);
                }
            }
            A::Abandon => {
                self.close_socket();
                self.cancel_pause();
            }
            // Done by the step `resolve`, which may happen at any time later.
            A::Resolve { .. } => {}
            A::Kill => {
                self.primary = Primary::Gone;
                self.acked = false;
            }
            A::TakeBack => {
                if self.primary == Primary::Postmigrate {
                    self.primary_runs();
                }
                self.tell_source(source::Input::TakenBack);
            }
            A::Goodbye { .. } => {
                if self.link.is_some() {
                    self.send_target(ToTarget::Goodbye);
                }
            }
            A::HangUp => {
                self.cut();
                self.source_lost = false;
            }
            A::Begin => self.hello(),
        }
    }

    /// A source comes again. A target that has not noticed yet that it was gone, or is not there, has it try once more.
    fn hello(&mut self) {
        let expected = self.target_idle() && self.target_disk == target::Durable::Held && self.shadow == Shadow::Gone;
        if !expected {
            if self.target_idle() && self.target_disk == target::Durable::Shadow {
                self.tell_target(target::Input::LinkLost("anew".into()));
            }
            return self.tell_source(source::Input::LinkLost("not yet".into()));
        }
        assert_eq!(self.primary, Primary::Runs, "a copy is begun of what does not run");
        let mut machine = target::Machine::new(PROTECT);
        machine.apply(target::Input::Seeded);
        self.target.alive = Some((machine, VecDeque::new()));
        self.target_disk = target::Durable::Shadow;
        self.shadow = Shadow::Waits;
        self.link = Some((VecDeque::new(), VecDeque::new()));
        (self.socket, self.acked, self.equal, self.daemon) = (true, false, false, true);
        // The old session's end is the old session's.
        self.target_lost = false;
        self.tell_source(source::Input::Begun);
        self.tell_source(source::Input::Seeded);
    }

    fn target_acts(&mut self, action: target::Action) {
        use target::Action as A;
        match action {
            A::Write(d) => {
                if d == (target::Durable::Aborted { epoch: FENCE }) {
                    self.given_up |= self.ran;
                    self.ran = false;
                }
                self.target_disk = d;
                self.tell_target(target::Input::Written);
            }
            A::SayPrepared { .. } => self.send_source(ToSource::Prepared),
            A::SayRunning { .. } => self.send_source(ToSource::Running),
            A::SayAborted { epoch: FENCE } => self.fence = Fence::Granted,
            A::SayAborted { .. } => self.send_source(ToSource::Aborted),
            A::Refuse(_) if self.fence == Fence::Asked => self.fence = Fence::Refused,
            A::Refuse(_) => self.send_source(ToSource::Refused),
            A::Resume => match self.shadow {
                Shadow::Loaded | Shadow::Runs => {
                    assert!(
                        self.equal || self.shadow == Shadow::Runs,
                        "a shadow runs on an old disk"
                    );
                    assert!(!self.daemon, "a shadow runs on a disk that another process writes");
                    self.shadow = Shadow::Runs;
                    self.ran = true;
                    self.tell_target(target::Input::Resumed);
                }
                // It was killed, and said no RESUME before.
                Shadow::Gone => self.tell_target(target::Input::ShadowGone),
                other => panic!("cont of a shadow that is {other:?}"),
            },
            A::Kill => {
                (self.daemon, self.shadow) = (false, Shadow::Gone);
            }
            A::Discard | A::Hold => {
                assert_ne!(self.shadow, Shadow::Runs, "a running VM is discarded");
                self.daemon = false;
                self.shadow = Shadow::Gone;
            }
        }
    }

    fn deliver_target(&mut self, m: ToTarget) {
        let epoch = SWITCH;
        match m {
            ToTarget::Prepare => self.tell_target(target::Input::Prepare { epoch }),
            ToTarget::StreamEnd => {
                if self.shadow == Shadow::Waits {
                    self.shadow = Shadow::Fed;
                    // Its end is waited for before 'streamed' is told.
                    self.daemon = false;
                }
                self.tell_target(target::Input::Streamed);
            }
            ToTarget::Commit => self.tell_target(target::Input::Commit { epoch }),
            ToTarget::Abort => self.tell_target(target::Input::Abort { epoch }),
            ToTarget::Resolve => self.tell_target(target::Input::Resolve { epoch }),
            ToTarget::Goodbye => self.tell_target(target::Input::Goodbye("over".into())),
        }
    }

    fn deliver_source(&mut self, m: ToSource) {
        let epoch = SWITCH;
        if m == ToSource::Aborted {
            self.abort_due = false;
        }
        self.tell_source(match m {
            ToSource::Prepared => source::Input::Prepared { epoch },
            ToSource::Running => source::Input::Running { epoch },
            ToSource::Aborted => source::Input::Aborted { epoch },
            ToSource::Refused => source::Input::Refused(umbra_api::order::Refusal::new(
                umbra_api::order::RefusalCode::Local,
                "no",
            )),
        });
    }

    fn source_is(&self, f: impl Fn(&source::State) -> bool) -> bool {
        matches!(&self.source.alive, Some((m, todo)) if todo.is_empty() && f(&m.state))
    }

    fn source_idle(&self) -> bool {
        self.source_is(|_| true)
    }

    fn target_idle(&self) -> bool {
        matches!(&self.target.alive, Some((_, todo)) if todo.is_empty())
    }

    /// All that can happen next, by name.
    pub fn steps(&self) -> Vec<(&'static str, World)> {
        let mut out = Vec::new();
        self.replicators(&mut out);
        self.messages(&mut out);
        self.qemus(&mut out);
        self.faults(&mut out);
        self.operator(&mut out);
        out
    }

    fn then(&self, name: &'static str, out: &mut Vec<(&'static str, World)>, f: impl FnOnce(&mut World)) {
        let mut w = self.clone();
        f(&mut w);
        out.push((name, w));
    }

    fn replicators(&self, out: &mut Vec<(&'static str, World)>) {
        if matches!(&self.source.alive, Some((_, todo)) if !todo.is_empty()) {
            self.then("source acts", out, |w| {
                let action = w.source.alive.as_mut().and_then(|(_, todo)| todo.pop_front());
                w.source_acts(action.expect("checked above"));
            });
        }
        if matches!(&self.target.alive, Some((_, todo)) if !todo.is_empty()) {
            self.then("target acts", out, |w| {
                let action = w.target.alive.as_mut().and_then(|(_, todo)| todo.pop_front());
                w.target_acts(action.expect("checked above"));
            });
        }
        if self.source.alive.is_none() {
            self.then("source restarts", out, |w| {
                w.cancel_pause();
                let (stopped, gone) = (w.primary == Primary::Postmigrate, w.primary == Primary::Gone);
                let (m, actions) = source::Machine::resume(w.source_disk, stopped, gone);
                w.source.alive = Some((m, actions.into()));
            });
        }
        if self.target.alive.is_none() {
            self.then("target restarts", out, |w| {
                let shadow = match w.shadow {
                    Shadow::Gone => target::Shadow::Gone,
                    Shadow::Waits | Shadow::Fed => target::Shadow::Waits,
                    Shadow::Loaded => target::Shadow::Loaded,
                    Shadow::Runs => target::Shadow::Runs,
                };
                let (m, actions) = target::Machine::resume(w.target_disk, PROTECT, shadow);
                w.target.alive = Some((m, actions.into()));
                w.shadow_news = false;
            });
        }
        if self.source_is(|s| *s == source::State::Standby) {
            self.then("a switchover is ordered", out, |w| {
                w.tell_source(source::Input::Switchover { epoch: SWITCH });
            });
        }
        if self.source_is(|s| matches!(s, source::State::Broken { .. })) {
            self.then("source begins anew", out, |w| w.tell_source(source::Input::Again));
        }
        let resolving = self.source_is(|s| matches!(s, source::State::Resolving { .. }));
        let ended = self.source_is(|s| matches!(s, source::State::Ended { .. }));
        if resolving && self.link.is_none() && !self.source_lost && self.target.alive.is_some() {
            self.then("source asks", out, |w| {
                w.link = Some(([ToTarget::Resolve].into(), VecDeque::new()))
            });
        }
        let quiet = self.link.as_ref().is_some_and(|(a, b)| a.is_empty() && b.is_empty());
        if resolving && quiet && !self.source_lost && self.target_idle() {
            self.then("source asks anew", out, |w| {
                w.link = Some(([ToTarget::Resolve].into(), VecDeque::new()))
            });
        }
        if ended && self.abort_due && self.link.is_none() && self.target.alive.is_some() {
            self.then("source tells of the abort", out, |w| {
                w.link = Some(([ToTarget::Abort].into(), VecDeque::new()))
            });
        }
    }

    fn messages(&self, out: &mut Vec<(&'static str, World)>) {
        if self.source_lost && self.source_idle() {
            self.then("source notices the lost link", out, |w| {
                w.source_lost = false;
                w.tell_source(source::Input::LinkLost("lost".into()));
            });
        }
        if self.target_lost && self.target_idle() {
            self.then("target notices the lost link", out, |w| {
                w.target_lost = false;
                w.tell_target(target::Input::LinkLost("lost".into()));
            });
        }
        let Some((to_target, to_source)) = &self.link else {
            return;
        };
        if self.target_idle() && !to_target.is_empty() {
            self.then("target hears", out, |w| {
                let m = w.link.as_mut().and_then(|(q, _)| q.pop_front());
                w.deliver_target(m.expect("checked above"));
            });
        }
        if self.source_idle() && !to_source.is_empty() {
            self.then("source hears", out, |w| {
                let m = w.link.as_mut().and_then(|(_, q)| q.pop_front());
                w.deliver_source(m.expect("checked above"));
            });
        }
    }

    fn qemus(&self, out: &mut Vec<(&'static str, World)>) {
        if self.acked && self.socket && self.primary == Primary::Runs && self.source_idle() {
            self.then("guest stops", out, |w| {
                w.primary = Primary::PreSwitchover;
                w.acked = false;
            });
        }
        // Whether it still is about to switch is what the driver asks before it lets QEMU go on.
        if self.primary == Primary::PreSwitchover && self.source_is(|s| matches!(s, source::State::Stopping { .. })) {
            if self.link.is_some() && !self.source_lost {
                self.then("disks are equal, stream ends", out, |w| {
                    w.equal = true;
                    w.primary = Primary::Device;
                    w.send_target(ToTarget::StreamEnd);
                    w.tell_source(source::Input::Streamed);
                });
            }
            if self.mirror_failures > 0 {
                self.then("a mirror fails", out, |w| {
                    w.mirror_failures -= 1;
                    let why = umbra_api::order::Refusal::new(umbra_api::order::RefusalCode::Local, "no room");
                    w.tell_source(source::Input::Failed(why));
                });
            }
        }
        if self.primary == Primary::PreSwitchover
            && self.source_idle()
            && !self.source_is(|s| matches!(s, source::State::Stopping { .. }))
        {
            self.then("the pause is heard too late", out, |w| {
                w.tell_source(source::Input::MigrationFailed("unasked".into()));
                w.cancel_pause();
            });
        }
        if self.primary == Primary::Postmigrate && self.source_is(|s| matches!(s, source::State::Shutting { .. })) {
            self.then("migration completes", out, |w| w.tell_source(source::Input::Completed));
        }
        if self.primary_news && self.source_idle() {
            self.then("source notices that the primary is gone", out, |w| {
                w.primary_news = false;
                w.tell_source(source::Input::PrimaryGone);
            });
        }
        if self.shadow_news && self.target_idle() {
            self.then("target notices that the shadow is gone", out, |w| {
                w.shadow_news = false;
                w.tell_target(target::Input::ShadowGone);
            });
        }
        if self.shadow == Shadow::Fed && self.target_idle() {
            self.then("shadow loads", out, |w| {
                w.shadow = Shadow::Loaded;
                w.tell_target(target::Input::Loaded);
            });
            if self.load_failures > 0 {
                self.then("shadow can't load", out, |w| {
                    w.load_failures -= 1;
                    w.shadow = Shadow::Gone;
                    w.tell_target(target::Input::LoadFailed("no".into()));
                    w.tell_target(target::Input::ShadowGone);
                });
            }
        }
    }

    fn faults(&self, out: &mut Vec<(&'static str, World)>) {
        if self.crashes > 0 && self.source.alive.is_some() {
            self.then("source dies", out, |w| {
                w.crashes -= 1;
                w.source.alive = None;
                w.close_socket();
                w.acked = false;
                // An answer that it waited for is lost with it.
                w.fence = Fence::No;
                (w.source_lost, w.primary_news) = (false, false);
                w.target_lost |= w.link.take().is_some() && w.target.alive.is_some();
            });
        }
        if self.crashes > 0 && self.target.alive.is_some() {
            self.then("target dies", out, |w| {
                w.crashes -= 1;
                w.target.alive = None;
                // QEMU ends by itself when its incoming migration breaks off; once it has all, it may load it.
                if w.shadow == Shadow::Waits {
                    w.shadow = Shadow::Gone;
                } else if w.shadow == Shadow::Fed {
                    w.shadow = Shadow::Loaded;
                }
                w.unrecorded |= w.ran && matches!(w.target_disk, target::Durable::Prepared { .. });
                (w.target_lost, w.shadow_news) = (false, false);
                if w.fence == Fence::Asked {
                    w.fence = Fence::No;
                }
                w.source_lost |= w.link.take().is_some() && w.source.alive.is_some();
            });
        }
        if self.cuts > 0 && self.link.is_some() {
            self.then("link is cut", out, |w| {
                w.cuts -= 1;
                w.cut();
            });
        }
        // A commit that is not answered is not waited for for ever.
        let unanswered = self.source_is(|s| matches!(s, source::State::Committing { .. }));
        if (self.timeouts > 0 || unanswered)
            && self.source_idle()
            && !self.source_is(|s| matches!(s, source::State::Ended { .. }))
        {
            self.then("time is up", out, |w| {
                w.timeouts = w.timeouts.saturating_sub(1);
                w.tell_source(source::Input::TimedOut);
            });
        }
        if self.shadow_deaths > 0 && matches!(self.shadow, Shadow::Loaded | Shadow::Runs) {
            self.then("shadow dies", out, |w| {
                w.shadow_deaths -= 1;
                w.shadow = Shadow::Gone;
                w.shadow_news = w.target.alive.is_some();
            });
        }
        if self.primary_deaths > 0 && matches!(self.primary, Primary::Device | Primary::PreSwitchover) {
            self.then("primary dies while stopped", out, |w| {
                w.primary_deaths -= 1;
                w.primary = Primary::Gone;
                w.primary_news = w.source.alive.is_some();
            });
        }
    }

    /// What an operator has a replicator do.
    fn operator(&self, out: &mut Vec<(&'static str, World)>) {
        let stopped =
            self.source_is(|s| matches!(s, source::State::HandedOver { .. } | source::State::Resolving { .. }));
        if self.recoveries > 0 && stopped && self.primary == Primary::Postmigrate && self.target_idle() {
            self.then(
                "operator wants the primary back: the target is asked to write that down",
                out,
                |w| {
                    w.recoveries -= 1;
                    w.fence = Fence::Asked;
                    w.tell_target(target::Input::Fence {
                        epoch: FENCE,
                        dead: false,
                    });
                },
            );
        }
        if self.fence == Fence::Granted && self.source_idle() {
            self.then("source hears that the target's copy never runs", out, |w| {
                w.fence = Fence::No;
                w.tell_source(source::Input::Fenced { epoch: FENCE });
            });
        }
        if self.recoveries > 0 && self.source_is(|s| matches!(s, source::State::Orphaned { .. })) {
            self.then("operator wants the shadow run", out, |w| {
                w.recoveries -= 1;
                w.tell_source(source::Input::Ask);
            });
        }
    }

    pub fn running(&self) -> usize {
        usize::from(self.primary == Primary::Runs) + usize::from(self.shadow == Shadow::Runs)
    }
}
