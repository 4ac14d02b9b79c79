//! What somebody else does to a VM while it is copied: stop, cancel, plug, reset, shut down. The copy ends with a reason that
//! names it, or goes on, a cancelled one with a new pass; the VM is as whoever did it wants it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use umbra_api::order::RefusalCode;
use umbra_api::replica::{Phase, Role};
use umbra_tests::lab::copies::wall_us;
use umbra_tests::lab::pair::Pair;
use umbra_tests::lab::process::wait_for;
use umbra_tests::lab::vm::{self, VmSpec};
use umbra_tests::lab::{skips, sys};

const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until the copy has ended, by the named reason, and nothing is left of the shadow.
fn ended(pair: &Pair, from: &str, to: &str, word: &str) -> Result<()> {
    named(pair, from, word)?;
    gone(pair, to)
}

fn named(pair: &Pair, from: &str, word: &str) -> Result<()> {
    let error = pair.wait_ended(from)?;
    println!("{error}");
    ensure!(error.code == RefusalCode::Interfered, "{error}");
    ensure!(error.detail.contains(word), "{error}");
    Ok(())
}

fn gone(pair: &Pair, to: &str) -> Result<()> {
    wait_for("the shadow's files to be gone", PATIENCE, || {
        Ok(pair.ram_files(to)?.is_empty().then_some(()))
    })
}

fn counts(pair: &Pair) -> Result<()> {
    let before = vm::stats(&pair.lab.client, pair.vm.spec.ip)?.counter;
    wait_for("the guest to go on", PATIENCE, || {
        let now = vm::stats(&pair.lab.client, pair.vm.spec.ip).ok();
        Ok(now.filter(|s| s.counter > before).map(|_| ()))
    })
}

fn standby(pair: &mut Pair, from: &str, to: &str) -> Result<()> {
    pair.protect(from, to)?;
    pair.wait_standby(from).map(|_| ())
}

fn run(pair: &mut Pair) -> Result<()> {
    let watch = pair.vm.watch()?;
    let tell = |command: &str, arguments| watch.execute(command, arguments, PATIENCE);

    standby(pair, "a", "b")?;
    tell("stop", json!({}))?;
    ended(pair, "a", "b", "stopped")?;
    wait_for("the guest to stay stopped", PATIENCE, || {
        Ok((watch.status()? == "paused").then_some(()))
    })?;
    tell("cont", json!({}))?;
    counts(pair)?;

    standby(pair, "a", "b")?;
    // QEMU itself refuses what would make the shadow's command line untrue, and whoever tries is told why.
    let plug = tell("device_add", json!({"driver": "virtio-rng-pci", "id": "late"})).err();
    let plug = plug.context("a device was plugged in while the VM was copied")?;
    ensure!(format!("{plug:#}").contains("migrating"), "{plug:#}");
    ensure!(
        pair.replica("a", Role::Source)?
            .is_some_and(|r| r.phase == Phase::Standby),
        "and the copy goes on"
    );
    let second = tell("migrate", json!({"uri": "exec:cat"})).err();
    ensure!(second.is_some(), "a second migration was begun");
    // Nothing of the VM has changed: the copy is wanted still, and is taken up again by itself.
    tell("migrate_cancel", json!({}))?;
    let again = wait_for("the copy to be taken up again", PATIENCE, || {
        let r = pair.replica("a", Role::Source)?.context("a replica")?;
        ensure!(!matches!(r.phase, Phase::Released | Phase::Failed), "it ended: {r:?}");
        Ok((r.progress.resume.passes > 0 && r.phase == Phase::Standby).then_some(r.progress.resume))
    })?;
    println!("after a cancel: {again:?}");
    ensure!(again.sent_pages < again.skipped_pages, "{again:?}");
    counts(pair)?;

    // Unless whoever cancelled it needs the VM for something of his own.
    tell("migrate_cancel", json!({}))?;
    tell("stop", json!({}))?;
    named(pair, "a", "stopped")?;
    tell("cont", json!({}))?;
    // The target, to which nobody spoke by then, has its memory until it is told, or for some minutes.
    pair.release()?;
    gone(pair, "b")?;
    counts(pair)
}

/// A reset is the guest's own business: the rounds bring what it wrote.
fn reset(pair: &mut Pair) -> Result<()> {
    let watch = pair.vm.watch()?;
    let tell = |command: &str, arguments| watch.execute(command, arguments, PATIENCE);
    // The lab's guests end instead of rebooting.
    tell("set-action", json!({"reboot": "reset"}))?;
    standby(pair, "a", "b")?;
    let before = wall_us();
    tell("system_reset", json!({}))?;
    // Until then the guest of before may answer.
    watch.wait("RESET", before, PATIENCE)?;
    pair.vm.wait_up(&pair.lab.client)?;
    let after = pair.replica("a", Role::Source)?.context("a replica")?.progress.rounds;
    wait_for("rounds after the reset", PATIENCE, || {
        let r = pair.replica("a", Role::Source)?.context("a replica")?;
        ensure!(r.phase == Phase::Standby, "the copy ended: {r:?}");
        Ok((r.progress.rounds >= after + 2).then_some(()))
    })?;
    pair.switchover("a")?;
    counts(pair)?;
    pair.verify()?;

    // And a shutdown ends the copy with its name.
    pair.retire("a")?;
    standby(pair, "b", "a")?;
    sys::kill(pair.qemu("b")?, Signal::SIGTERM)?;
    ended(pair, "b", "a", "shuts down")
}

fn test(name: &str, body: impl FnOnce(&mut Pair) -> Result<()>) {
    if skips(&["umbra", "umbra-replicator"]) {
        return;
    }
    let spec = VmSpec {
        dirty: 500,
        ..VmSpec::new("web", 10)
    };
    // Unwatched: the watcher would hold the monitor over which this interferes.
    let result = Pair::start_unwatched(&spec).and_then(|mut pair| body(&mut pair));
    if let Err(e) = result {
        panic!("{name}: {e:#}");
    }
}

#[test]
fn a_stop_is_named_a_cancelled_copy_goes_on_and_a_device_is_not_plugged() {
    test("interference", run);
}

#[test]
fn a_reset_is_followed_and_a_shutdown_is_named() {
    test("reset", reset);
}
