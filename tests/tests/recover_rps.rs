//! The one command that leads out of every state, through an RPS that lives: afterwards its record agrees with the world, and it
//! goes on protecting.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use umbra_api::lifecycle::Stage;
use umbra_tests::lab::daemons::RPS;
use umbra_tests::lab::process::wait_for;
use umbra_tests::lab::qmp::Qmp;
use umbra_tests::lab::world::{World, with_world};
use umbra_tests::lab::{sys, vm};

const PATIENCE: Duration = Duration::from_secs(60);
/// After a move no way back is built, and the stopped primary stays.
const POLICY: &str = "reverse_standby = false\nkeep_old_s = 3600.0\ncooldown_s = 1.0\n";

fn recover(world: &World, more: &[&str]) -> Result<String> {
    let control = &world.lab.control;
    let rps = format!("http://{}:{RPS}", control.ip);
    let mut arguments = vec!["recover", "web", "--rps", &rps];
    arguments.extend(more);
    let (code, said) = world.binaries.umbra(control, &arguments)?;
    ensure!(code == 0, "exit code {code}: {said}");
    Ok(said)
}

fn qemu(world: &World, host: &str) -> Result<i32> {
    let all = vm::qemus(world.lab.host(host)?, world.id());
    all.first().copied().with_context(|| format!("no QEMU on {host}"))
}

fn wait_stands_still(world: &World) -> Result<()> {
    wait_for("no copy to run", PATIENCE, || {
        Ok(world.copies.running().is_empty().then_some(()))
    })
}

/// Protected, and moved to b.
fn away(world: &World) -> Result<()> {
    world.wait_known()?;
    world.ask("create")?;
    world.wait_stage("a warm shadow", |s| matches!(s, Stage::Standby | Stage::Armed))?;
    world.ask("switchover")?;
    world.wait_record("the VM to have settled away", "b", Stage::Unprotected)?;
    world.wait_runs_on("b")
}

/// The VM runs on a, the RPS says so, and its guest is whole.
fn back_on_a(world: &World) -> Result<()> {
    world.wait_runs_on("a")?;
    world.wait_record("the RPS to take note", "a", Stage::Unprotected)?;
    let errors = vm::stats(&world.lab.client, world.vm.spec.ip)?.errors;
    ensure!(errors == 0, "{errors} errors in the guest's memory");
    Ok(())
}

/// And the RPS goes on with it.
fn is_protected_again(world: &World) -> Result<()> {
    // The RPS has to hear of b once more: that it is up, and keeps nothing.
    world.ask_while("create", &["busy", "no_target"])?;
    let view = world.wait_stage("another warm shadow", |s| matches!(s, Stage::Standby | Stage::Armed))?;
    ensure!(view.summary.host.as_str() == "a", "{:?}", view.summary);
    let said = recover(world, &[])?;
    ensure!(
        said.contains("standby on a"),
        "the RPS and its replicators agree: {said}"
    );
    world.wait_runs_on("a")
}

#[test]
fn the_rps_takes_note_of_a_primary_that_runs_again() {
    with_world("recover_rps", POLICY, |world| {
        away(world)?;
        sys::kill(qemu(world, "b")?, Signal::SIGKILL)?;
        wait_stands_still(world)?;
        wait_for("b to notice", PATIENCE, || {
            Ok(recover(world, &[])?.contains("with --yes").then_some(()))
        })?;
        ensure!(world.copies.running().is_empty(), "what is only shown is not done");
        recover(world, &["--yes"])?;
        back_on_a(world)?;
        is_protected_again(world)
    });
}

#[test]
fn the_rps_takes_an_operators_word_that_a_host_is_dead() {
    with_world("recover_rps_dead", POLICY, |world| {
        away(world)?;
        // b is a host that does not answer, and its copy stands still.
        let monitor = vm::monitor_of(qemu(world, "b")?, 0).context("a monitor of the shadow")?;
        let frozen = Qmp::connect(&monitor, PATIENCE)?;
        frozen.execute("stop", json!({}), PATIENCE)?;
        world.kill_replicator("b")?;
        wait_stands_still(world)?;
        let shown = recover(world, &["--yes"])?;
        ensure!(shown.contains("--host-is-dead b"), "{shown}");
        ensure!(
            world.copies.running().is_empty(),
            "a host that does not answer may run its copy"
        );
        recover(world, &["--yes", "--host-is-dead", "b"])?;
        back_on_a(world)?;
        // It is back, is told, and is a target like any other.
        drop(frozen);
        world.restart_replicator("b")?;
        wait_for("b to end its copy", PATIENCE, || {
            Ok(vm::qemus(world.lab.host("b")?, world.id()).is_empty().then_some(()))
        })?;
        back_on_a(world)?;
        is_protected_again(world)
    });
}
