//! A source comes, or comes again after its copy broke off: what is left of its shadow makes way, and its memory waits.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::ShadowSpec;
use umbra_api::{Epoch, HostId, VmId};

use super::{Engine, Entry, local, unix_ms, wrong_phase};
use crate::journal::VmRecord;
use crate::launch::{self, Images, kept};
use crate::link::Identity;
use crate::resume::held;
use crate::target;
use crate::target::feed::Feed;
use crate::target::gate::Gate;
use crate::target::handover::HandOver;
use crate::target::machine::{Durable, Input};
use crate::target::session::Reply;

/// For the shadow of a source that comes again to go: its QEMU, and the intake of its pages.
const MAKE_WAY_TIMEOUT: Duration = Duration::from_secs(15);
/// A session that is in the way may have come since.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// A source's first message.
pub struct Hello {
    pub vm: VmId,
    pub name: String,
    pub epoch: Epoch,
    pub host: HostId,
    /// Where the source's own link listener is, if it has one.
    pub link: Option<String>,
    pub spec: ShadowSpec,
    pub resume: Option<u64>,
}

/// What it is answered.
pub struct Welcome {
    pub session: u64,
    pub resumed: bool,
    pub events: Sender<target::session::Event>,
}

impl Engine {
    /// A source wants its shadow here.
    pub fn hello(&self, hello: Hello, control: Reply) -> Result<Welcome, Refusal> {
        let (vm, epoch) = (hello.vm, hello.epoch);
        let mut vms = self.make_way(&hello)?;
        let tier = match self.core.journal.get(vm) {
            Some(r) if expects(&r, &hello) => r.target.and_then(|t| t.tier),
            _ => {
                let detail = format!(
                    "no shadow of VM {vm} from {} in epoch {epoch} was admitted here",
                    hello.host
                );
                return Err(wrong_phase(detail));
            }
        };
        // Unique on this host over restarts, and no secret.
        let session = unix_ms().0.unsigned_abs();
        let cfg = self.core.config.launch();
        let images = kept::claim(&cfg, vm, hello.resume, &hello.host, &hello.spec.disks);
        let resumed = images.is_some();
        let left: Vec<_> = images.iter().flat_map(|(_, images)| images.clone()).collect();
        let launched = launch::launch_on(&hello.spec, &cfg, vm, session, images);
        let mut shadow = launched.inspect_err(|_| kept::remove(&left))?;
        for warning in &shadow.warnings {
            tracing::warn!(%vm, "{warning}");
        }
        let begun = (|| {
            let noted = self.core.journal.update(vm, |r| {
                r.name.clone_from(&hello.name);
                if let Some(t) = r.target.as_mut() {
                    t.durable = Durable::Shadow;
                    t.link.clone_from(&hello.link);
                    t.shadow = Some(shadow.record.clone());
                }
            });
            noted.map_err(|e| local(&e))?;
            let incoming = shadow
                .incoming
                .take()
                .ok_or_else(|| local(&"the shadow has no incoming socket"))?;
            let mark = shadow.qmp.mark();
            let plan = target::session::Plan {
                vm,
                name: hello.name,
                epoch,
                peer: hello.host,
                disks: HandOver::default(),
            };
            let (peer, disks, gate) = (plan.peer.clone(), plan.disks.clone(), Arc::<Gate>::default());
            let handle = target::Session::start(self.core.clone(), plan, &shadow, control, gate.clone())
                .map_err(|e| local(&e))?;
            let events = handle.events.clone();
            let feed = Feed {
                peer,
                files: shadow.record.ram.clone(),
                incoming,
                qmp: shadow.qmp.clone(),
                mark,
                events: events.clone(),
                record: shadow.record.clone(),
                disks,
                gate,
                scrub_swap: self.core.config.tiers.scrub_swap(),
            };
            let mut feeds = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
            // Of an attempt that broke off before its ram connection came.
            feeds.retain(|_, f| f.record.vm != vm);
            feeds.insert(session, feed);
            drop(feeds);
            if let Some((tier, peak)) = tier {
                let _ = handle.events.send(target::session::Event::Tier { tier, peak });
            }
            vms.entry(vm).or_default().target = Some(handle);
            Ok(Welcome {
                session,
                resumed,
                events,
            })
        })();
        begun.inspect_err(|_| {
            if let Err(e) = launch::discard(&shadow.record, Images::Remove) {
                tracing::warn!(%vm, "the shadow is not cleaned up: {e}");
            }
        })
    }

    /// The intake of a session, which only its own source may have.
    pub fn take_feed(&self, session: u64, from: &Identity) -> Result<Feed, String> {
        let mut feeds = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        let feed = feeds.get(&session).ok_or("no session waits for this ram connection")?;
        from.is(&feed.peer)?;
        feeds.remove(&session).ok_or_else(|| "gone".to_owned())
    }

    /// A source that comes again has noticed sooner than this side that the link was lost, or comes while another of its attempts is
    /// still at it: what is undecided goes first. Until then it is as if nobody were here.
    fn make_way(&self, hello: &Hello) -> Result<MutexGuard<'_, HashMap<VmId, Entry>>, Refusal> {
        let not_yet = |why: &str| Err(Refusal::new(RefusalCode::PeerUnreachable, why));
        let deadline = Instant::now() + MAKE_WAY_TIMEOUT;
        let mut told: Option<Instant> = None;
        loop {
            let vms = self.lock();
            if self.stopping.load(Ordering::Relaxed) {
                return not_yet("the target's replicator ends");
            }
            if !self.in_the_way(hello) {
                return Ok(vms);
            }
            if Instant::now() >= deadline {
                return not_yet("what is left of the shadow before is still in the way");
            }
            let session = vms.get(&hello.vm).and_then(|e| e.target.as_ref());
            if told.is_none_or(|t| t.elapsed() >= TELL_EVERY)
                && let Some(session) = session
            {
                told = Some(Instant::now());
                let why = "the source begins anew";
                // Ignored by a shadow that is more than a copy: then it stays, and the source is refused.
                let _ = session
                    .events
                    .send(target::session::Event::Input(Input::LinkLost(why.into())));
            }
            drop(vms);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether there is an undecided shadow for this source, or one whose memory is just being put aside.
    fn in_the_way(&self, hello: &Hello) -> bool {
        let target = self.core.journal.get(hello.vm).and_then(|r| r.target);
        let mine = target.filter(|t| t.peer == hello.host && t.epoch == hello.epoch);
        mine.is_some_and(|t| t.durable == Durable::Shadow || t.durable == Durable::Held && t.shadow.is_some())
    }

    /// Drops what sources did not come back for.
    pub fn expire_held(&self) {
        held::expire(&self.core.config.ram_dir, unix_ms());
    }
}

/// Whether a shadow for this source may be started: it was admitted, or is held and nothing has happened since.
fn expects(r: &VmRecord, hello: &Hello) -> bool {
    let Some(t) = r
        .target
        .as_ref()
        .filter(|t| t.peer == hello.host && t.epoch == hello.epoch)
    else {
        return false;
    };
    match t.durable {
        Durable::Admitted => true,
        Durable::Held => t.shadow.is_none() && r.epoch <= hello.epoch,
        _ => false,
    }
}
