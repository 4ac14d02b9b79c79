//! What each stage wants: which orders must have been given, and which report leads on.
//!
//! A protection, forth (A to B) and back, with the epochs under which it is ordered:
//!
//! ```text
//!  e    Admit → B, Protect → A          provisioning, seeding (A says seeding), standby (A says standby)
//!  e    Tier → B                        standby, armed, and before the switchover
//!  e+1  Switchover → A                  switching, until B says active
//!  e+1  Announce → B                    active
//!  e+2  Admit → A, Protect → B          active, until B says standby: reverse
//!  e+2  Retire → A                      the stopped primary of before
//!  e+3  Switchover → B                  failing back, until A says active: unprotected
//!  e+3  Announce → A, Retire → B
//! ```
//! A failure takes the next epoch and releases the source first; the target's shadow is let go only when the source has said,
//! after that, that it holds nothing any more: until then the shadow may be the VM.

use umbra_api::HostId;
use umbra_api::lifecycle::Stage;
use umbra_api::order::OrderKind;
use umbra_api::replica::{Phase, Role};
use umbra_api::view::Mode;

use super::orders::Asked;
use super::timing::ms;
use super::turn::Turn;
use super::{reconcile, wanted_tier};
use crate::lifecycle::{Event, Failure, Reason};
use crate::planner::promotion;

/// More edges than a VM can go along in one turn.
const EDGES_MAX: usize = 8;

/// One VM's turn: the truth first, then what its stage wants, until nothing changes.
pub fn drive(turn: &mut Turn<'_>) {
    for _ in 0..EDGES_MAX {
        let edges = turn.out.edges.len();
        reconcile::reconcile(turn);
        stage(turn);
        if turn.out.edges.len() == edges {
            break;
        }
    }
    reconcile::clear_leftovers(turn);
    turn.redirects_done();
    turn.send();
}

fn stage(turn: &mut Turn<'_>) {
    let (host, shadow) = (turn.state.host.clone(), turn.state.shadow.clone());
    match (turn.state.stage, shadow) {
        (Stage::Provisioning, Some(shadow)) => provisioning(turn, &host, &shadow),
        (Stage::Seeding, Some(shadow)) => seeding(turn, &host, &shadow),
        (Stage::Standby | Stage::Armed | Stage::Reverse, Some(shadow)) => holding(turn, &host, &shadow),
        (Stage::Switching | Stage::FailingBack, Some(shadow)) => switching(turn, &host, &shadow),
        (Stage::Active, Some(shadow)) => way_back(turn, &host, &shadow),
        (Stage::Active, None) => active(turn),
        (Stage::Failed, shadow) => failed(turn, &host, shadow.as_ref()),
        _ => {}
    }
}

/// What the source says of the present protection.
enum Word {
    /// It is at it, in this phase.
    At(Phase),
    /// It has ended.
    Ended(Failure),
    /// It knows nothing of it. `fresh` if it was asked long enough after the last answer for that to mean something.
    Nothing,
}

fn source_word(turn: &Turn<'_>, host: &HostId, shadow: &HostId) -> Word {
    let Some(r) = turn.present(host, Role::Source) else {
        return Word::Nothing;
    };
    if r.peer != *shadow {
        return Word::Ended(Failure::Lost { host: host.clone() });
    }
    match r.phase {
        Phase::Released | Phase::Retired | Phase::Failed | Phase::Active | Phase::Prepared => {
            let words = r
                .error
                .as_ref()
                .map_or_else(|| "no reason given".to_owned(), ToString::to_string);
            Word::Ended(Failure::Ended {
                host: host.clone(),
                words,
            })
        }
        phase => Word::At(phase),
    }
}

/// The host was asked well after `since`, and answered: what it does not mention is not there.
fn silence_counts(turn: &Turn<'_>, host: &HostId, since: umbra_api::UnixMs) -> bool {
    let lost_after_ms = ms(turn.timing.lost_after_s);
    let asked_at = turn.fleet.get(host).filter(|r| r.up).and_then(|r| r.asked_at);
    asked_at.is_some_and(|t| t.since(since) > lost_after_ms)
}

fn too_long(turn: &mut Turn<'_>, limit_s: u64) -> bool {
    let over = turn.stage_ms() > ms(limit_s);
    if over {
        took_too_long(turn, limit_s);
    }
    over
}

fn took_too_long(turn: &mut Turn<'_>, limit_s: u64) {
    let stage = turn.state.stage;
    turn.fail(Failure::TookTooLong {
        stage,
        after_s: limit_s,
    });
}

fn provisioning(turn: &mut Turn<'_>, host: &HostId, shadow: &HostId) {
    let limit_s = turn.timing.provision_timeout_s;
    match build(turn, host, shadow) {
        Some(Phase::Seeding) => go(turn, Event::SeedStarted),
        Some(Phase::Standby) => go(turn, Event::SeedDone),
        _ if turn.state.stage == Stage::Provisioning => {
            too_long(turn, limit_s);
        }
        _ => {}
    }
}

/// The same in the other direction, after a move.
fn way_back(turn: &mut Turn<'_>, host: &HostId, shadow: &HostId) {
    let limit_s = turn
        .timing
        .provision_timeout_s
        .saturating_add(turn.timing.seed_timeout_s);
    match build(turn, host, shadow) {
        Some(Phase::Standby) => go(turn, Event::WayBackReady),
        _ if turn.state.stage == Stage::Active => {
            too_long(turn, limit_s);
        }
        _ => {}
    }
}

/// Admits the shadow, then protects; the source's phase once it has begun.
fn build(turn: &mut Turn<'_>, host: &HostId, shadow: &HostId) -> Option<Phase> {
    match source_word(turn, host, shadow) {
        Word::At(phase) => return Some(phase),
        Word::Ended(failure) => {
            turn.fail(failure);
            return None;
        }
        Word::Nothing => {}
    }
    let epoch = turn.state.protection;
    let admit = OrderKind::Admit { source: host.clone() };
    accepted(turn, shadow, admit, epoch)?;
    let link = turn.fleet.get(shadow).map(|r| r.link.clone()).unwrap_or_default();
    let common = turn.timing.pacing();
    let pacing = turn.policy.pacing_of(turn.state.vm, &turn.state.name, common);
    let protect = OrderKind::Protect {
        target: shadow.clone(),
        link,
        pacing,
    };
    let at = accepted(turn, host, protect, epoch)?;
    if silence_counts(turn, host, at.max(turn.started)) {
        turn.fail(Failure::Lost { host: host.clone() });
    }
    None
}

/// When an order was accepted. A refusal or a silence that is too long fails the protection.
fn accepted(turn: &mut Turn<'_>, to: &HostId, kind: OrderKind, epoch: umbra_api::Epoch) -> Option<umbra_api::UnixMs> {
    let name = kind.name();
    let failure = match turn.ask(to, epoch, kind) {
        Asked::Waiting => return None,
        Asked::Accepted { at } => return Some(at),
        Asked::Refused { refusal, .. } => Failure::Refused {
            host: to.clone(),
            order: name,
            refusal,
        },
        Asked::Unanswered => Failure::Unanswered {
            host: to.clone(),
            order: name,
            after_s: turn.timing.order_timeout_s,
        },
    };
    turn.fail(failure);
    None
}

fn seeding(turn: &mut Turn<'_>, host: &HostId, shadow: &HostId) {
    match source_word(turn, host, shadow) {
        Word::At(Phase::Standby) => go(turn, Event::SeedDone),
        Word::At(_) => {
            let limit_s = turn.timing.seed_timeout_s;
            too_long(turn, limit_s);
        }
        word => ended(turn, host, word),
    }
}

fn holding(turn: &mut Turn<'_>, host: &HostId, shadow: &HostId) {
    match source_word(turn, host, shadow) {
        Word::At(_) => match broken_too_long(turn, host) {
            Some(failure) => turn.fail(failure),
            None => {
                ask_tier(turn, shadow);
            }
        },
        word => ended(turn, host, word),
    }
}

/// A copy that broke off is no loss as long as its source goes on about it.
fn broken_too_long(turn: &Turn<'_>, host: &HostId) -> Option<Failure> {
    let source = turn.present(host, Role::Source)?;
    let since = source.progress.resume.broken_since?;
    let limit_s = turn.timing.resume_timeout_s;
    (turn.now.since(since.max(turn.started)) > ms(limit_s)).then(|| {
        let why = source.error.as_ref().map_or_else(String::new, |e| format!(": {e}"));
        Failure::Ended {
            host: host.clone(),
            words: format!("the copy broke off, and was not warm again within {limit_s} s{why}"),
        }
    })
}

/// The replication ended by itself, or is not known any more.
fn ended(turn: &mut Turn<'_>, host: &HostId, word: Word) {
    match word {
        Word::Ended(failure) => turn.fail(failure),
        Word::Nothing if silence_counts(turn, host, turn.state.since.max(turn.started)) => {
            turn.fail(Failure::Lost { host: host.clone() });
        }
        _ => {}
    }
}

/// Gives the shadow its tier. A refusal is not worth a shadow: it is only slower then.
fn ask_tier(turn: &mut Turn<'_>, shadow: &HostId) -> Option<Asked> {
    let tier = wanted_tier(turn.state.stage)?;
    let (epoch, expected_peak) = (turn.state.protection, turn.peak);
    Some(turn.ask(shadow, epoch, OrderKind::Tier { tier, expected_peak }))
}

/// Whether the switchover waits for the shadow to be promoted. A target that does not answer, or takes much longer than it
/// did, must not keep a VM where it suffers.
fn promoting(turn: &mut Turn<'_>, shadow: &HostId) -> bool {
    let remaining_s = match ask_tier(turn, shadow) {
        Some(Asked::Waiting) => Some(0.0),
        Some(Asked::Accepted { .. }) => promotion::remaining_s(turn.fleet, turn.state, shadow),
        // It is only slower then.
        _ => None,
    };
    let patience_ms = i64::try_from(turn.timing.promote_wait_ms).unwrap_or(i64::MAX);
    remaining_s.is_some_and(|s| turn.stage_ms() < patience_ms.saturating_add((s * 1000.0) as i64))
}

fn switching(turn: &mut Turn<'_>, host: &HostId, shadow: &HostId) {
    let epoch = turn.state.epoch;
    let word = source_word(turn, host, shadow);
    if let Word::Ended(failure) = word {
        return turn.fail(failure);
    }
    let begun = turn.last_order(host, epoch, OrderKind::Switchover.name()).is_some();
    // A copy that broke off in this moment may be warm again before the time is up.
    if !begun && matches!(word, Word::At(Phase::Provisioning | Phase::Seeding)) {
        let limit_s = turn.timing.switch_timeout_s;
        too_long(turn, limit_s);
        return;
    }
    if !begun && promoting(turn, shadow) {
        return;
    }
    let Some(at) = accepted(turn, host, OrderKind::Switchover, epoch) else {
        return;
    };
    // A source that holds again, asked after it had accepted, and names an error: it came to nothing.
    let asked_at = turn.fleet.get(host).and_then(|r| r.asked_at);
    let back = turn
        .present(host, Role::Source)
        .filter(|r| r.phase == Phase::Standby && asked_at > Some(at));
    if let Some(refusal) = back.and_then(|r| r.error.clone()) {
        let words = refusal.to_string();
        return turn.fail(Failure::Ended {
            host: host.clone(),
            words,
        });
    }
    let limit_s = turn.timing.switch_timeout_s;
    if turn.now.since(at.max(turn.started)) > ms(limit_s) {
        took_too_long(turn, limit_s);
    }
}

/// It runs away from home and there is no way back yet.
fn active(turn: &mut Turn<'_>) {
    let announcing = |o: &super::OrderRecord| o.pending() && matches!(o.order.kind, OrderKind::Announce { .. });
    // The next epoch would make the announcement a stale order.
    if turn.book.orders.iter().any(announcing) || turn.mode == Mode::Observe {
        return;
    }
    if !turn.policy.reverse_standby {
        let host = turn.state.host.clone();
        return go(
            turn,
            Event::Release {
                reason: Reason::Settled { host },
            },
        );
    }
    let pausing = turn.state.failures > 0 && turn.state.cooling(turn.now).is_some();
    let home = turn.fleet.get(&turn.state.home);
    // A home that is down would fail the attempt; it is waited for instead.
    if !pausing && home.is_some_and(|r| r.up) {
        go(turn, Event::BuildWayBack);
    }
}

/// Clears both sides of a protection that failed.
fn failed(turn: &mut Turn<'_>, host: &HostId, shadow: Option<&HostId>) {
    let epoch = turn.state.epoch;
    let released = turn.ask(host, epoch, OrderKind::Release);
    let Some(answered) = released.answered() else { return };
    let report = turn.fleet.get(host);
    // Only a word that is newer than the answer tells what the release did.
    if !report.is_some_and(|r| r.up && r.asked_at > Some(answered)) {
        return;
    }
    let target = shadow.and_then(|s| turn.present(s, Role::Target)).map(|r| r.phase);
    match turn.present(host, Role::Source).map(|r| r.phase) {
        None | Some(Phase::Released | Phase::Retired) => {}
        // It can't go on by itself. If the shadow could still be the VM, neither can we.
        Some(Phase::Failed) if !matches!(target, Some(Phase::Prepared | Phase::Switching | Phase::Active)) => {}
        Some(Phase::Provisioning | Phase::Seeding | Phase::Standby) => {
            return turn.ask_again(host, epoch, OrderKind::Release);
        }
        _ => return,
    }
    if let Some(shadow) = shadow {
        let there = turn.fleet.contains_key(shadow);
        if there && turn.ask(shadow, epoch, OrderKind::Release) == Asked::Waiting {
            return;
        }
    }
    let cooldown_ms = turn.policy.cooldown_ms(turn.state.failures);
    go(turn, Event::Cleaned { cooldown_ms });
}

/// An edge that the stage is known to have.
fn go(turn: &mut Turn<'_>, event: Event) {
    let name = event.name();
    if let Err(e) = turn.go(event) {
        tracing::warn!(vm = %turn.state.vm, "{name}: {e}");
    }
}
