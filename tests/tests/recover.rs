//! The one command that leads out of every state, with the RPS gone; and a VM that is handed over to its own management.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use umbra_api::order::OrderKind;
use umbra_api::recover::{Decided, HostFacts};
use umbra_api::replica::{Phase, Role};
use umbra_tests::lab::daemons::REPLICATOR;
use umbra_tests::lab::pair::{Pair, with_pair};
use umbra_tests::lab::process::wait_for;
use umbra_tests::lab::qmp::Qmp;
use umbra_tests::lab::sys;
use umbra_tests::lab::vm::{self, VmSpec};

const PATIENCE: Duration = Duration::from_secs(60);

fn spec() -> VmSpec {
    VmSpec {
        dirty: 500,
        ..VmSpec::new("web", 10)
    }
}

/// Runs the operator's command where an operator would.
fn umbra(pair: &Pair, arguments: &[&str]) -> Result<(i32, String)> {
    pair.binaries.umbra(&pair.lab.client, arguments)
}

fn recover(pair: &Pair, more: &[&str]) -> Result<String> {
    let (a, b) = (url(pair, "a")?, url(pair, "b")?);
    let mut arguments = vec!["recover", "web", "--replicator", &a, "--replicator", &b];
    arguments.extend(more);
    let (code, said) = umbra(pair, &arguments)?;
    ensure!(code == 0, "exit code {code}: {said}");
    Ok(said)
}

fn url(pair: &Pair, host: &str) -> Result<String> {
    Ok(format!("http://{}:{REPLICATOR}", pair.host(host)?.ip))
}

fn away(pair: &mut Pair) -> Result<()> {
    pair.protect("a", "b")?;
    pair.wait_standby("a")?;
    pair.switchover("a")?;
    ensure!(pair.wait_runs()? == "b", "it runs on b");
    Ok(())
}

/// Whether a's VM could be shadowed on b.
fn ask_of<'a>(replicator: &'a str, link: &'a str) -> [&'a str; 9] {
    [
        "adopt",
        "web",
        "--check",
        "--replicator",
        replicator,
        "--host",
        "b",
        "--link",
        link,
    ]
}

#[test]
fn a_stopped_primary_runs_again_when_its_target_is_lost() {
    with_pair("recover", &spec(), |pair| {
        let (a, link) = (url(pair, "a")?, pair.replicator("b")?.link());
        let (code, said) = umbra(pair, &ask_of(&a, &link))?;
        ensure!(code == 0 && said.contains("can be shadowed on b"), "{code}: {said}");
        away(pair)?;
        let all_is_well = recover(pair, &[])?;
        ensure!(all_is_well.contains("quits the stopped primary"), "{all_is_well}");

        // The VM's QEMU dies on b: the way back is the stopped primary.
        sys::kill(pair.qemu("b")?, Signal::SIGKILL)?;
        pair.wait_stands_still()?;
        wait_for("b to notice", PATIENCE, || {
            let gone = pair
                .replica("b", Role::Target)?
                .is_none_or(|r| r.phase == Phase::Released);
            Ok(gone.then_some(()))
        })?;
        let shown = recover(pair, &[])?;
        ensure!(shown.contains("risk:") && shown.contains("with --yes"), "{shown}");
        ensure!(pair.running_on().is_empty(), "what is only shown is not done");
        recover(pair, &["--yes"])?;
        ensure!(pair.wait_runs()? == "a", "it runs on a again");
        ensure!(pair.errors()? == 0, "no pattern error");
        wait_for("the record of it", PATIENCE, || {
            let r = pair.replica("a", Role::Source)?;
            Ok(r.is_some_and(|r| r.phase == Phase::Released).then_some(()))
        })?;

        // Once more, and b is a host that does not answer: its VM stands still, its replicator is gone.
        pair.catch_up()?;
        away(pair)?;
        // The shadow's counterpart of the primary's first monitor, which nobody holds there.
        let monitor = vm::monitor_of(pair.qemu("b")?, 0).context("a monitor of the shadow")?;
        let frozen = Qmp::connect(&monitor, PATIENCE)?;
        frozen.execute("stop", json!({}), PATIENCE)?;
        pair.kill_replicator("b")?;
        pair.wait_stands_still()?;
        let shown = recover(pair, &["--yes"])?;
        ensure!(shown.contains("--host-is-dead b"), "{shown}");
        ensure!(
            pair.running_on().is_empty(),
            "a host that does not answer may run its copy"
        );
        recover(pair, &["--yes", "--host-is-dead", "b"])?;
        ensure!(pair.wait_runs()? == "a", "by an operator's word");
        ensure!(
            !vm::qemus(pair.host("b")?, pair.id()).is_empty(),
            "b has its copy still"
        );
        let (code, said) = umbra(pair, &ask_of(&a, &link))?;
        ensure!(
            code == 4 && said.contains("b: "),
            "a target that does not answer is a finding: {code}: {said}"
        );
        // It is back, and is told.
        drop(frozen);
        pair.restart_replicator("b")?;
        pair.wait_alone()?;
        ensure!(pair.wait_runs()? == "a", "the copy that was chosen runs on");
        pair.catch_up()?;
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        ensure!(pair.errors()? == 0, "no pattern error");
        Ok(())
    });
}

#[test]
fn a_vm_that_was_handed_over_is_nobodys_but_its_owners() {
    with_pair("handover", &spec(), |pair| {
        away(pair)?;
        // The old primary is kept until it is retired, also while the way back is built.
        let epoch = pair.next_epoch();
        let early = pair
            .replicator("a")?
            .order(pair.id(), epoch, OrderKind::Admit { source: "b".parse()? })?;
        ensure!(early.is_ok(), "{early:?}");
        pair.order("b", epoch, pair.protection("a")?)?;
        pair.wait_standby("b")?;
        ensure!(
            vm::qemus(pair.host("a")?, pair.id()).len() == 2,
            "beside the new standby the old primary is still there"
        );
        let (code, said) = umbra(pair, &["shadow", "handover", "web", "--replicator", &url(pair, "b")?])?;
        ensure!(code == 4 && said.contains("release it first"), "{code}: {said}");
        pair.release()?;
        pair.retire("a")?;

        let (code, said) = umbra(pair, &["shadow", "handover", "web", "--replicator", &url(pair, "b")?])?;
        ensure!(code == 0, "{code}: {said}");
        for word in ["-uuid", "RAM pc.ram", "QMP:", "tap:"] {
            ensure!(said.contains(word), "{word} is told: {said}");
        }
        ensure!(pair.replica("b", Role::Target)?.is_none(), "the replicator forgot it");
        // Not even a restart, which clears up, touches it.
        pair.kill_replicator("b")?;
        pair.restart_replicator("b")?;
        ensure!(pair.wait_runs()? == "b", "it runs on");
        // And it is a VM like any other.
        pair.catch_up()?;
        pair.protect("b", "a")?;
        pair.wait_standby("b")?;
        pair.switchover("b")?;
        ensure!(pair.wait_runs()? == "a", "it runs on a");
        pair.verify()
    });
}

fn facts(pair: &Pair, host: &str) -> Result<HostFacts> {
    let host = pair.host(host)?;
    host.get((host.ip, REPLICATOR), "/v1/vms/web/facts")?.ok()?.json()
}

/// Switches over, and loses the primary and its replicator when both sides have written down what binds, and nothing is decided:
/// the shadow, which was held up, is prepared afterwards.
fn lose_undecided(pair: &mut Pair, from: &str, to: &str) -> Result<()> {
    let primary = pair.qemu(from)?;
    pair.protect(from, to)?;
    pair.wait_standby(from)?;
    let shadow = pair.qemu(to)?;
    sys::kill(shadow, Signal::SIGSTOP)?;
    let epoch = pair.next_epoch();
    pair.order(from, epoch, OrderKind::Switchover)?;
    wait_for("both sides to have written it down", PATIENCE, || {
        let (source, target) = (facts(pair, from)?.source, facts(pair, to)?.target);
        let ready = |side: Option<umbra_api::recover::SideFacts>| side.is_some_and(|s| s.decided == Decided::Ready);
        Ok((ready(source) && ready(target)).then_some(()))
    })?;
    sys::kill(primary, Signal::SIGKILL)?;
    pair.kill_replicator(from)?;
    sys::kill(shadow, Signal::SIGCONT)?;
    wait_for("the shadow to be prepared", PATIENCE, || {
        let r = pair.replica(to, Role::Target)?;
        Ok(r.is_some_and(|r| r.phase == Phase::Prepared).then_some(()))
    })?;
    pair.wait_stands_still()
}

#[test]
fn a_shadow_whose_primary_died_undecided_runs_by_an_operators_word() {
    with_pair("undecided", &spec(), |pair| {
        lose_undecided(pair, "a", "b")?;
        let shown = recover(pair, &["--yes"])?;
        ensure!(shown.contains("--host-is-dead a"), "{shown}");
        // The replicator is back, and knows that nothing was decided.
        pair.restart_replicator("a")?;
        let shown = recover(pair, &[])?;
        ensure!(shown.contains("as old as epoch"), "{shown}");
        ensure!(pair.running_on().is_empty(), "nobody runs it unasked");
        recover(pair, &["--yes"])?;
        ensure!(pair.wait_runs()? == "b", "the shadow runs");
        ensure!(pair.errors()? == 0, "no pattern error");

        // And back, where the other host never comes back before it is declared dead.
        pair.catch_up()?;
        lose_undecided(pair, "b", "a")?;
        recover(pair, &["--yes", "--host-is-dead", "b"])?;
        ensure!(pair.wait_runs()? == "a", "the shadow runs");
        ensure!(pair.errors()? == 0, "no pattern error");
        pair.restart_replicator("b")?;
        wait_for("b to be told", PATIENCE, || {
            Ok(facts(pair, "a")?.fence.is_none().then_some(()))
        })?;
        let shown = recover(pair, &["--yes"])?;
        ensure!(shown.contains("take note"), "{shown}");
        wait_for("b to know how it ended", PATIENCE, || {
            let r = pair.replica("b", Role::Source)?;
            Ok(r.is_some_and(|r| r.phase == Phase::Relinquished).then_some(()))
        })?;
        ensure!(pair.wait_runs()? == "a", "it runs on");
        pair.verify()
    });
}
