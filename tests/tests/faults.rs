//! What dies while a VM is protected, and when: the VM runs on on one side, never on both, and its memory is whole.
//!
//! Killed in a row on one lab, as a long life would have it: after each case the VM may be on either host, and the next case
//! starts from there.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use umbra_api::order::{OrderKind, Pacing};
use umbra_api::replica::{Phase, Role};
use umbra_tests::lab::pair::{Pair, with_pair};
use umbra_tests::lab::process::wait_for;
use umbra_tests::lab::qmp::Qmp;
use umbra_tests::lab::sys;
use umbra_tests::lab::vm::{self, VmSpec};

fn spec() -> VmSpec {
    VmSpec {
        dirty: 500,
        ..VmSpec::new("web", 10)
    }
}

fn other(host: &str) -> &'static str {
    if host == "a" { "b" } else { "a" }
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Who {
    Source,
    Target,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum When {
    /// So many milliseconds after the order to protect was accepted.
    Seeding(u64),
    Standby,
    /// So many milliseconds after the order to switch over was accepted.
    Switching(u64),
    /// The source has handed over.
    After,
}

/// One case: protects, kills, restarts, and finds the VM running once.
fn case(pair: &mut Pair, who: Who, when: When) -> Result<()> {
    let from = pair.wait_runs()?;
    let to = other(&from).to_owned();
    let victim = if who == Who::Source { &from } else { &to };
    pair.protect(&from, &to)?;
    if !matches!(when, When::Seeding(_)) {
        pair.wait_standby(&from)?;
    }
    match when {
        When::Seeding(ms) => std::thread::sleep(Duration::from_millis(ms)),
        When::Standby => {}
        When::Switching(ms) => {
            let epoch = pair.next_epoch();
            pair.order(&from, epoch, OrderKind::Switchover)?;
            std::thread::sleep(Duration::from_millis(ms));
        }
        When::After => {
            pair.switchover(&from)?;
        }
    }
    let phase = pair.replica(&from, Role::Source)?.map(|r| r.phase);
    pair.kill_replicator(victim)?;
    // While it is dead nothing may run twice; before a commit the VM runs on without any help.
    if matches!(when, When::Seeding(_) | When::Standby) {
        ensure!(pair.wait_runs()? == from, "the VM runs on where it was");
    }
    pair.restart_replicator(victim)?;
    let now = pair.wait_runs()?;
    if when == When::After {
        ensure!(now == to, "a switchover that is over stays so");
    }
    println!("{who:?} killed in {when:?} (the source was {phase:?}): it was on {from} and runs on {now}");
    ensure!(pair.errors()? == 0, "no pattern error");
    tidy(pair)
}

/// Nothing but the VM that runs is left; both replicators can start anew.
fn tidy(pair: &mut Pair) -> Result<()> {
    let runs = pair.wait_runs()?;
    pair.release()?;
    let epoch = pair.next_epoch();
    // The former source, if there was a switchover, keeps its stopped primary until it is told so.
    let _ = pair
        .replicator(other(&runs))?
        .order(pair.id(), epoch, OrderKind::Retire)?;
    pair.wait_alone()?;
    ensure!(pair.wait_runs()? == runs, "clearing up moves nothing");
    Ok(())
}

#[test]
fn either_replicator_is_killed_in_each_phase() {
    with_pair("killed", &spec(), |pair| {
        for who in [Who::Source, Who::Target] {
            let seeding = [0, 150, 400].map(When::Seeding);
            let switching = [0, 4, 8, 12, 18, 30].map(When::Switching);
            for when in seeding
                .into_iter()
                .chain([When::Standby])
                .chain(switching)
                .chain([When::After])
            {
                case(pair, who, when).with_context(|| format!("{who:?} killed in {when:?}"))?;
            }
        }
        pair.verify()
    });
}

#[test]
fn a_vm_that_exits_takes_its_shadow_along() {
    with_pair("exits", &spec(), |pair| {
        pair.protect("a", "b")?;
        wait_for("the shadow's QEMU", Duration::from_secs(60), || {
            Ok((!vm::qemus(pair.host("b")?, pair.id()).is_empty()).then_some(()))
        })?;
        pair.vm.process.kill()?;
        wait_for("the replica to end", Duration::from_secs(60), || {
            let r = pair.replica("a", Role::Source)?;
            Ok(
                r.filter(|r| matches!(r.phase, Phase::Released | Phase::Failed) && r.error.is_some())
                    .map(|_| ()),
            )
        })?;
        wait_for("the shadow to be gone", Duration::from_secs(60), || {
            Ok((vm::qemus(pair.host("b")?, pair.id()).is_empty() && pair.ram_files("b")?.is_empty()).then_some(()))
        })?;
        pair.wait_stands_still()?;
        let ran = pair
            .copies
            .turns()
            .into_iter()
            .find(|t| t.host == "b" && t.event == "RESUME");
        ensure!(ran.is_none(), "a shadow without state never runs: {ran:?}");
        Ok(())
    });
}

#[test]
fn a_target_that_is_down_or_cut_off_harms_nothing() {
    with_pair("target_down", &spec(), |pair| {
        pair.kill_replicator("b")?;
        let epoch = pair.next_epoch();
        let link = pair.replicator("b")?.link();
        let protect = OrderKind::Protect {
            target: "b".parse()?,
            link,
            pacing: Pacing::default(),
        };
        let answer = pair.replicator("a")?.order(pair.id(), epoch, protect)?;
        // Refused at once or ended with a reason: both are honest.
        if answer.is_ok() {
            wait_for("the attempt to end", Duration::from_secs(60), || {
                let r = pair.replica("a", Role::Source)?;
                Ok(
                    r.filter(|r| matches!(r.phase, Phase::Released | Phase::Failed) && r.error.is_some())
                        .map(|_| ()),
                )
            })?;
        }
        ensure!(pair.wait_runs()? == "a", "the VM runs on");
        pair.restart_replicator("b")?;
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        pair.lab.set_uplink("b", false)?;
        wait_for("the lost link to be noticed", Duration::from_secs(60), || {
            let r = pair.replica("a", Role::Source)?;
            Ok(
                r.filter(|r| matches!(r.phase, Phase::Released | Phase::Failed) && r.error.is_some())
                    .map(|_| ()),
            )
        })?;
        ensure!(pair.wait_runs()? == "a", "the VM runs on");
        pair.lab.set_uplink("b", true)?;
        pair.wait_alone()?;
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        pair.switchover("a")?;
        ensure!(pair.wait_runs()? == "b", "and once the link is back, all works again");
        ensure!(pair.errors()? == 0, "no pattern error");
        Ok(())
    });
}

#[test]
fn a_qmp_socket_that_is_busy_or_gone_is_told() {
    with_pair("qmp", &spec(), |pair| {
        let refused = |pair: &mut Pair| -> Result<String> {
            let epoch = pair.next_epoch();
            pair.order("b", epoch, OrderKind::Admit { source: "a".parse()? })?;
            let link = pair.replicator("b")?.link();
            let protect = OrderKind::Protect {
                target: "b".parse()?,
                link,
                pacing: Pacing::default(),
            };
            match pair.replicator("a")?.order(pair.id(), epoch, protect)? {
                Err(problem) => Ok(problem.code),
                Ok(()) => wait_for("the attempt to end", Duration::from_secs(60), || {
                    let r = pair.replica("a", Role::Source)?;
                    Ok(r.filter(|r| r.epoch == epoch)
                        .and_then(|r| r.error)
                        .map(|e| e.code.to_string()))
                }),
            }
        };
        // The watcher has the second socket already; this takes the first.
        let busy = Qmp::connect(&pair.vm.qmp, Duration::from_secs(5))?;
        let code = refused(pair)?;
        ensure!(code == "qmp_unavailable", "busy sockets were answered with {code}");
        ensure!(busy.status()? == "running", "and the VM runs");
        drop(busy);
        std::fs::remove_file(&pair.vm.qmp)?;
        let code = refused(pair)?;
        ensure!(code == "qmp_unavailable", "a missing socket was answered with {code}");
        ensure!(pair.wait_runs()? == "a", "the VM runs on");
        Ok(())
    });
}

#[test]
fn a_replicator_that_is_stopped_leaves_the_vm_as_it_found_it() {
    with_pair("stopped", &spec(), |pair| {
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        let status = pair.replicator_process("a")?.stop(Duration::from_secs(60))?;
        ensure!(status.success(), "it ends well: {status}");
        ensure!(pair.wait_runs()? == "a", "the VM runs on");
        pair.wait_alone()?;
        pair.restart_replicator("a")?;
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        // The shadow's QEMU is killed under the target's hands.
        let shadow = *vm::qemus(pair.host("b")?, pair.id())
            .first()
            .context("there is a shadow")?;
        sys::kill(shadow, Signal::SIGKILL)?;
        wait_for("the loss to be told", Duration::from_secs(60), || {
            let r = pair.replica("a", Role::Source)?;
            Ok(
                r.filter(|r| matches!(r.phase, Phase::Released | Phase::Failed) && r.error.is_some())
                    .map(|_| ()),
            )
        })?;
        ensure!(pair.wait_runs()? == "a", "the VM runs on");
        pair.verify()
    });
}
