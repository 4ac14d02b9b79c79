//! What dies or is not there while a VM is protected, as operators meet it. What breaks between which steps of a switchover is in `matrix.rs`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use umbra_api::order::OrderKind;
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

#[test]
fn a_vm_that_exits_takes_its_shadow_along() {
    with_pair("exits", &spec(), |pair| {
        pair.protect("a", "b")?;
        wait_for("the shadow's QEMU", Duration::from_secs(60), || {
            Ok((!vm::qemus(pair.host("b")?, pair.id()).is_empty()).then_some(()))
        })?;
        pair.vm.process.kill()?;
        pair.wait_ended("a").context("the replica to end")?;
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
        let answer = pair.replicator("a")?.order(pair.id(), epoch, pair.protection("b")?)?;
        // Refused at once or ended with a reason: both are honest.
        if answer.is_ok() {
            pair.wait_ended("a")?;
        }
        ensure!(pair.wait_runs()? == "a", "the VM runs on");
        pair.restart_replicator("b")?;
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        let broken = |pair: &mut Pair| {
            pair.lab.set_uplink("b", false)?;
            wait_for("the lost link to be noticed", Duration::from_secs(60), || {
                let r = pair.replica("a", Role::Source)?;
                Ok(r.filter(|r| r.phase == Phase::Seeding && r.error.is_some()).map(|_| ()))
            })?;
            ensure!(pair.wait_runs()? == "a", "the VM runs on");
            Ok(())
        };
        // It is tried again, and that can be ended by an order.
        broken(pair)?;
        let epoch = pair.next_epoch();
        pair.order("a", epoch, OrderKind::Release)?;
        wait_for("the copy to be given up", Duration::from_secs(60), || {
            let r = pair.replica("a", Role::Source)?;
            Ok(r.filter(|r| r.phase == Phase::Released).map(|_| ()))
        })?;
        pair.lab.set_uplink("b", true)?;
        pair.wait_alone()?;
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        broken(pair)?;
        pair.lab.set_uplink("b", true)?;
        pair.wait_standby("a")?;
        pair.switchover("a")?;
        ensure!(
            pair.wait_runs()? == "b",
            "and once the link is back, all works again without an order"
        );
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
            match pair.replicator("a")?.order(pair.id(), epoch, pair.protection("b")?)? {
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
        // What it had to do it goes on with when it is back.
        pair.restart_replicator("a")?;
        pair.wait_standby("a")?;
        // The shadow's QEMU is killed under the target's hands.
        sys::kill(pair.qemu("b")?, Signal::SIGKILL)?;
        pair.wait_ended("a").context("the loss to be told")?;
        ensure!(pair.wait_runs()? == "a", "the VM runs on");
        pair.verify()
    });
}
