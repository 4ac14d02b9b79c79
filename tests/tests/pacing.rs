//! How a copy keeps its pace: what it tells of itself, a hot host that it backs off from, and a guest that dirties its memory faster
//! than the link carries it: told with the numbers, never switched over, and dealt with by policy.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use umbra_api::order::{Lag, NotConverging, OrderKind, Pacing};
use umbra_api::replica::{Convergence, HeldBack, Phase, ReplicaStatus, Role};
use umbra_tests::lab::daemons::{REPLICATOR, Settings};
use umbra_tests::lab::pair::{Pair, with_pair, with_pair_as};
use umbra_tests::lab::process::wait_for;
use umbra_tests::lab::vm::{self, HTTP, VmSpec};

/// Nothing here is a measurement; a busy machine may take its time.
const LONG: Duration = Duration::from_secs(120);
/// Megabits a second, and pages a second: even as deltas, of about 100 bytes each, its pages are twice of what the link carries. A guest
/// that is slowed down as far as QEMU goes gets through a tenth of them.
const SLOW_MBIT: u32 = 2;
const FAST: u32 = 5_000;

fn spec() -> VmSpec {
    VmSpec {
        dirty: 200,
        // So small that QEMU gets through it, and asks what is dirty, now and then on the slow link too.
        pattern_mib: Some(8),
        ..VmSpec::new("web", 10)
    }
}

fn dirty(pair: &Pair, pages: u32) -> Result<()> {
    let ip = pair.vm.spec.ip;
    wait_for("the guest to write at another rate", LONG, || {
        let told = pair.lab.client.post((ip, HTTP), "/dirty", &pages.to_string());
        Ok(told.ok().filter(|r| r.status == 200).map(|_| ()))
    })
}

fn wait_source(pair: &Pair, what: &str, is: impl Fn(&ReplicaStatus) -> bool) -> Result<ReplicaStatus> {
    let mut last = None;
    let found = wait_for(what, LONG, || {
        last = pair.replica("a", Role::Source)?;
        Ok(last.clone().filter(|r| is(r)))
    });
    found.with_context(|| format!("the source said last: {last:?}"))
}

fn is(r: &ReplicaStatus, convergence: Convergence) -> bool {
    r.progress.pace.convergence == convergence
}

/// Warm, then on a slow link with a guest that writes as fast as it can; the source's words about that.
fn make_too_fast(pair: &mut Pair, not_converging: NotConverging) -> Result<()> {
    let pacing = Pacing {
        not_converging,
        ..Pacing::default()
    };
    pair.protect_paced("a", "b", pacing)?;
    pair.wait_standby("a")?;
    pair.lab.shape("b", Some(SLOW_MBIT))?;
    dirty(pair, FAST)
}

fn make_slow(pair: &Pair) -> Result<()> {
    dirty(pair, 200)?;
    pair.lab.shape("b", None)
}

/// A switchover's refusal, by its stable code.
fn refused(pair: &mut Pair) -> Result<(String, String)> {
    let epoch = pair.next_epoch();
    let answer = pair.replicator("a")?.order(pair.id(), epoch, OrderKind::Switchover)?;
    let problem = answer.err().context("the switchover was accepted")?;
    Ok((problem.code, problem.detail))
}

/// A figure of the copy from this host, as Prometheus gets it.
fn metric(pair: &Pair, name: &str) -> Result<f64> {
    let a = pair.host("a")?;
    let text = a.get((a.ip, REPLICATOR), "/metrics")?.ok()?.text();
    let line = text.lines().find(|l| l.starts_with(&format!("{name}{{")));
    let value = line.and_then(|l| l.rsplit_once(' ')?.1.parse().ok());
    value.with_context(|| format!("{name} in /metrics: {line:?}"))
}

#[test]
fn a_copy_tells_what_it_knows_and_backs_off_from_a_hot_host() {
    with_pair("pace", &spec(), |pair| {
        let ordered = Pacing::default();
        pair.protect_paced("a", "b", ordered)?;
        pair.wait_standby("a")?;
        let r = wait_source(pair, "some rounds", |r| {
            let p = &r.progress;
            p.rounds > 3 && p.dirty_pages_per_s > 0 && p.pace.lag_bytes > 0 && p.estimated_downtime_ms.is_some()
        })?;
        ensure!(
            is(&r, Convergence::Converging) && r.progress.pace.working_set_pages > 0,
            "{r:?}"
        );
        for name in [
            "dirty_pages_per_second",
            "working_set_pages",
            "lag_bytes",
            "link_bytes_per_second",
        ] {
            ensure!(metric(pair, &format!("umbra_replica_{name}"))? > 0.0, "{name}");
        }
        ensure!(metric(pair, "umbra_replica_estimated_downtime_seconds")? > 0.0);
        ensure!(metric(pair, "umbra_replica_converging")? == 1.0);

        // More that wants to run than there are CPUs: somebody waits all the time.
        let host = pair.host("a")?;
        let hogs = (0..8).map(|n| {
            let mut busy = Command::new("sh");
            busy.args(["-c", "while :; do :; done"]);
            host.spawn(&format!("hog-{n}"), busy)
        });
        let hogs = hogs.collect::<Result<Vec<_>>>()?;
        let r = wait_source(pair, "the copy to back off", |r| {
            r.progress.pace.held_back_by == Some(HeldBack::HotHost) && r.progress.pace.pause_ms >= 4 * ordered.round_ms
        })?;
        println!("on a hot host: {:?}", r.progress.pace);
        let rounds = r.progress.rounds;
        wait_source(pair, "a round to come all the same", |r| r.progress.rounds > rounds)?;
        // In a switchover nothing backs off.
        pair.switchover("a")?;
        ensure!(pair.wait_runs()? == "b", "it was switched over");
        drop(hogs);
        pair.verify()
    });
}

#[test]
fn the_first_copy_keeps_to_the_bounds_on_cpu_time_and_ends_all_the_same() {
    let settings = Settings {
        // Which would be a thousand times as long as it takes.
        cpu_pct: Some(0.1),
        ..Settings::default()
    };
    // Whose memory is full, so that its copy takes longer than a look.
    let full = VmSpec {
        dirty: 200,
        ..VmSpec::new("web", 10)
    };
    with_pair_as("seed_bounds", &full, settings, |pair| {
        let pacing = Pacing {
            lag: Some(Lag::Ms(400)),
            max_downtime_ms: 5_000,
            not_converging: NotConverging::GiveUp,
            bandwidth_mbit: Some(10_000),
            ..Pacing::default()
        };
        pair.protect_paced("a", "b", pacing)?;
        let r = wait_source(pair, "the first copy to be held back", |r| {
            let held = r.progress.pace.held_back_by;
            r.phase == Phase::Seeding && matches!(held, Some(HeldBack::QemuCpu | HeldBack::OwnCpu))
        })?;
        println!("held back: {:?}", r.progress);
        let pace = r.progress.pace;
        ensure!(
            (pace.max_lag, pace.max_downtime_ms) == (pacing.lag, pacing.max_downtime_ms)
                && (pace.when_too_fast, pace.max_bandwidth_mbit) == (pacing.not_converging, pacing.bandwidth_mbit),
            "what was ordered: {pace:?}"
        );
        let r = pair.wait_standby("a")?;
        println!("warm after {:?} ms", r.progress.seed_ms);
        pair.switchover("a")?;
        ensure!(pair.wait_runs()? == "b", "it was switched over");
        pair.verify()
    });
}

#[test]
fn a_guest_that_is_too_fast_is_told_with_the_numbers_and_not_switched_over() {
    with_pair("too_fast", &spec(), |pair| {
        make_too_fast(pair, NotConverging::AcceptLonger)?;
        let r = wait_source(pair, "the round that does not end to be told", |r| {
            is(r, Convergence::NotConverging)
        })?;
        println!("told first: {:?}", r.progress.pace);
        ensure!(r.phase == Phase::Standby, "it goes on: {r:?}");
        let p = r.progress;
        ensure!(
            p.dirty_pages_per_s > 0 && p.pace.round_pages > 0 && p.pace.round_ms > 0,
            "{p:?}"
        );
        let (code, detail) = refused(pair)?;
        println!("refused: {code}: {detail}");
        ensure!(code == "not_converging", "{code}: {detail}");
        ensure!(detail.contains("pages/s") && detail.contains("MB/s"), "{detail}");
        ensure!(metric(pair, "umbra_replica_converging")? == 0.0);
        ensure!(pair.wait_runs()? == "a", "the guest runs on");

        // What made it too fast is over: the same protection goes on, and its switchover works.
        make_slow(pair)?;
        wait_source(pair, "rounds to end again", |r| is(r, Convergence::Converging))?;
        pair.switchover("a")?;
        ensure!(pair.wait_runs()? == "b", "it was switched over");
        pair.verify()
    });
}

#[test]
fn a_guest_that_is_too_fast_is_slowed_down_as_ordered_and_no_longer_than_that() {
    with_pair("throttle", &spec(), |pair| {
        make_too_fast(pair, NotConverging::Throttle)?;
        let r = wait_source(pair, "the guest to be slowed down", |r| {
            r.progress.pace.throttle_pct.is_some()
        })?;
        println!("slowed down: {:?}", r.progress);
        let r = wait_source(pair, "rounds to end again", |r| is(r, Convergence::Converging))?;
        println!("converges: {:?}", r.progress);
        ensure!(pair.wait_runs()? == "a", "a guest that is slowed down runs");
        pair.release()?;
        pair.lab.shape("b", None)?;
        pair.wait_alone()?;
        // The next protection may throttle too: QEMU would tell of one that was left.
        dirty(pair, 200)?;
        let pacing = Pacing {
            not_converging: NotConverging::Throttle,
            lag: Some(Lag::Pages(100)),
            ..Pacing::default()
        };
        pair.protect_paced("a", "b", pacing)?;
        pair.wait_standby("a")?;
        let r = wait_source(pair, "some rounds", |r| r.progress.rounds > 2)?;
        ensure!(
            r.progress.pace.throttle_pct.is_none(),
            "nothing is left of the throttle: {r:?}"
        );
        pair.switchover("a")?;
        ensure!(pair.wait_runs()? == "b", "it was switched over");
        let epoch = pair.next_epoch();
        pair.order("a", epoch, OrderKind::Retire)?;
        pair.wait_alone()?;
        pair.verify()
    });
}

#[test]
fn a_guest_that_is_too_fast_is_let_go_as_ordered() {
    with_pair("give_up", &spec(), |pair| {
        make_too_fast(pair, NotConverging::GiveUp)?;
        let r = wait_source(pair, "the protection to end", |r| r.phase == Phase::Released)?;
        let error = r.error.context("it says why")?;
        println!("let go: {error}");
        ensure!(error.code.to_string() == "not_converging", "{error}");
        make_slow(pair)?;
        ensure!(pair.wait_runs()? == "a", "the guest runs on");
        ensure!(vm::stats(&pair.lab.client, pair.vm.spec.ip)?.errors == 0);
        pair.wait_alone()
    });
}
