//! Where the replicators know better than the store: where the VM runs, which epochs are taken, what is left over from
//! earlier attempts, and how the last switchover went.

use umbra_api::HostId;
use umbra_api::lifecycle::Stage;
use umbra_api::order::OrderKind;
use umbra_api::replica::{Phase, ReplicaStatus, Role};

use super::turn::Turn;
use crate::fleet::{self, Fleet, Witness};
use crate::lifecycle::{Event, VmState};

/// Something that an earlier attempt or move left on a host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leftover {
    pub host: HostId,
    pub clear: Clear,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Clear {
    /// A hold, or a shadow that nobody feeds.
    Release,
    /// The stopped primary that was kept after a move.
    Retire,
}

/// Takes in what the replicators know better.
pub fn reconcile(turn: &mut Turn<'_>) {
    if let Some(event) = correction(turn) {
        let name = event.name();
        if let Err(e) = turn.go(event) {
            tracing::warn!(vm = %turn.state.vm, "{name}: {e}");
        }
    }
    let seen = fleet::highest_epoch(turn.fleet, turn.state.vm);
    if seen > turn.state.epoch {
        turn.state.saw_epoch(seen);
        turn.save();
    }
    take_report(turn);
    note_kept(turn);
}

/// The edge that leads to the truth, if the state is not there already.
fn correction(turn: &Turn<'_>) -> Option<Event> {
    let s = &*turn.state;
    if let Some(Witness { host, epoch, active }) = fleet::runs_on(turn.fleet, s.vm) {
        let found = Event::Found {
            host: host.clone(),
            home: s.home.clone(),
            epoch,
        };
        let elsewhere = host != s.host;
        // A move that the store does not know of; or a protection from elsewhere, of which it knows nothing either.
        let unknown = if active { epoch > s.ran_since } else { epoch > s.epoch };
        match s.stage {
            Stage::Switching | Stage::FailingBack => {
                return (epoch > s.protection && s.shadow.as_ref() == Some(&host)).then_some(Event::Moved);
            }
            // Its own epoch is above that of a switchover that succeeded after all.
            Stage::Failed => return (elsewhere && epoch > s.protection).then_some(found),
            _ if elsewhere && unknown => return Some(found),
            _ => {}
        }
    }
    let bare = s.shadow.is_none() && matches!(s.stage, Stage::Unprotected | Stage::Active);
    let source = fleet::replica(turn.fleet, &s.host, s.vm, Role::Source)?;
    let warm = source.phase == Phase::Standby;
    let alive = warm || source.phase == Phase::Seeding;
    let unknown = source.epoch > s.epoch && source.peer != s.host && turn.fleet.contains_key(&source.peer);
    let adopt = Event::Adopt {
        shadow: source.peer.clone(),
        epoch: source.epoch,
        warm,
    };
    (bare && alive && unknown).then_some(adopt)
}

/// Which hosts still keep a stopped primary, as far as they can be heard.
fn note_kept(turn: &mut Turn<'_>) {
    let before = turn.state.kept.clone();
    let moved_at = turn.state.moved_at;
    for (host, report) in turn.fleet.iter().filter(|(_, r)| r.up) {
        let phase = report.replica(turn.state.vm, Role::Source).map(|r| r.phase);
        match phase {
            Some(Phase::Relinquished) if *host != turn.state.host => turn.state.keeps_old(host),
            // It is about to give up, or has: the next word tells.
            Some(Phase::Switching) => {}
            // Only a word that is newer than the move tells that nothing is kept.
            _ if report.asked_at > moved_at => turn.state.kept.retain(|h| h != host),
            _ => {}
        }
    }
    // A host that is no longer ours can't be told anything.
    turn.state.kept.retain(|h| turn.fleet.contains_key(h));
    if turn.state.kept != before {
        turn.save();
    }
}

/// The newest switchover's figures.
fn take_report(turn: &mut Turn<'_>) {
    let vm = turn.state.vm;
    let reports = turn
        .fleet
        .values()
        .flat_map(|r| &r.replicas)
        .filter(|r| r.vm == vm)
        .filter_map(|r| r.report);
    let Some(newest) = reports.max_by_key(|r| r.epoch) else {
        return;
    };
    if turn.state.last_switchover.is_none_or(|old| newest.epoch > old.epoch) {
        turn.state.last_switchover = Some(newest);
        turn.save();
    }
}

/// What lies about of earlier attempts, on hosts that answer.
pub fn leftovers<'a>(s: &'a VmState, fleet: &'a Fleet) -> impl Iterator<Item = Leftover> + 'a {
    let up = fleet.iter().filter(|(_, r)| r.up);
    up.flat_map(move |(host, report)| {
        let roles = [Role::Source, Role::Target]
            .into_iter()
            .filter_map(|role| report.replica(s.vm, role));
        roles.filter_map(move |r| {
            clear(s, fleet, host, r).map(|clear| Leftover {
                host: host.clone(),
                clear,
            })
        })
    })
}

fn clear(s: &VmState, fleet: &Fleet, host: &HostId, r: &ReplicaStatus) -> Option<Clear> {
    let alive = matches!(r.phase, Phase::Provisioning | Phase::Seeding | Phase::Standby);
    // While there is a shadow, or an attempt is being cleared, a hold is somebody's business already; and an order
    // under the present epoch could hit it.
    let bare = s.shadow.is_none() && matches!(s.stage, Stage::Unprotected | Stage::Active);
    let known = r.epoch <= s.epoch;
    match r.role {
        Role::Source if r.phase == Phase::Relinquished => {
            let decided = !matches!(s.stage, Stage::Switching | Stage::FailingBack | Stage::Failed);
            let proven = fleet::runs_on(fleet, s.vm).is_some_and(|w| w.host == s.host && w.epoch >= r.epoch);
            (decided && known && proven && *host != s.host).then_some(Clear::Retire)
        }
        Role::Source => (alive && bare && known).then_some(Clear::Release),
        // A shadow is not needed once its source says so, or is long past it.
        Role::Target => {
            let source = fleet.get(&r.peer)?;
            let fed = source
                .replica(s.vm, Role::Source)
                .is_some_and(|o| o.epoch >= r.epoch && !matches!(o.phase, Phase::Released | Phase::Retired));
            (alive && bare && known && source.up && !fed).then_some(Clear::Release)
        }
    }
}

/// Replicas that still matter for where the VM runs.
pub fn traces<'a>(s: &'a VmState, fleet: &'a Fleet) -> impl Iterator<Item = &'a ReplicaStatus> + 'a {
    let all = fleet.values().flat_map(|r| &r.replicas).filter(|r| r.vm == s.vm);
    all.filter(|r| !matches!(r.phase, Phase::Released | Phase::Retired))
}

/// Orders the leftovers away.
pub fn clear_leftovers(turn: &mut Turn<'_>) {
    let all: Vec<Leftover> = leftovers(turn.state, turn.fleet).collect();
    let kept_ms = turn.state.moved_at.map_or(i64::MAX, |t| turn.now.since(t));
    let proven = kept_ms as f64 >= turn.policy.keep_old_s * 1000.0;
    // While the way back is built the old primary stays, unless it seems to be in the way.
    let wanted = turn.state.stage == Stage::Active && turn.policy.reverse_standby && turn.state.failures == 0;
    let epoch = turn.state.epoch;
    for Leftover { host, clear } in all {
        match clear {
            Clear::Release => turn.ask_again(&host, epoch, OrderKind::Release),
            Clear::Retire if proven && !wanted => turn.ask_again(&host, epoch, OrderKind::Retire),
            Clear::Retire => {}
        }
    }
}
