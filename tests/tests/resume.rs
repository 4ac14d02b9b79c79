//! A copy that breaks off goes on by itself, and little of it travels again; memory that is damaged while it waits is found.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use umbra_api::order::OrderKind;
use umbra_api::replica::{Phase, ReplicaStatus, Resumption, Role};
use umbra_tests::lab::pair::{Pair, with_pair};
use umbra_tests::lab::process::wait_for;
use umbra_tests::lab::vm::VmSpec;

const NOTICED: Duration = Duration::from_secs(60);
const STANDBY: Duration = Duration::from_secs(120);
/// A pass over the shadow's memory takes a quarter of this on an idle machine.
const SCRUBBED: Duration = Duration::from_secs(180);
const PAGE: usize = 4096;

fn spec() -> VmSpec {
    VmSpec {
        dirty: 10,
        pattern_mib: Some(96),
        ..VmSpec::new("web", 10)
    }
}

fn source(pair: &Pair, host: &str) -> Result<ReplicaStatus> {
    pair.replica(host, Role::Source)?.context("there is no replica")
}

/// Waits until the source says that its copy broke off, and goes on about it.
fn broken(pair: &Pair) -> Result<()> {
    wait_for("the break to be noticed", NOTICED, || {
        let r = source(pair, "a")?;
        ensure!(
            !matches!(r.phase, Phase::Released | Phase::Failed),
            "it was given up: {:?}",
            r.error
        );
        Ok((r.phase == Phase::Seeding && r.error.is_some()).then_some(()))
    })
}

/// Waits until the shadow is warm after more than `passes` new passes, and returns what the last one was.
fn warm_again(pair: &Pair, passes: u64) -> Result<Resumption> {
    wait_for("the copy to be warm again without an order", STANDBY, || {
        let r = source(pair, "a")?;
        ensure!(
            !matches!(r.phase, Phase::Released | Phase::Failed),
            "it was given up: {:?}",
            r.error
        );
        let again = r.progress.resume;
        Ok((r.phase == Phase::Standby && again.passes > passes).then_some(again))
    })
}

#[test]
fn a_copy_that_breaks_off_goes_on_and_few_pages_travel_again() {
    with_pair("resume", &spec(), |pair| {
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        let first = source(pair, "a")?.progress.resume;
        ensure!(
            first.passes == 0 && first.sent_pages > 10_000,
            "the first copy: {first:?}"
        );
        // Pages that the guest and its kernel write in a minute of a slow machine, and nothing like a copy.
        let few = |what: &str, again: Resumption| {
            println!("{what}: {again:?}, at first {} pages", first.sent_pages);
            ensure!(
                again.sent_pages * 5 < first.sent_pages,
                "{what}: too many pages travelled: {again:?}"
            );
            ensure!(
                again.skipped_pages > first.sent_pages / 2,
                "{what}: few pages were known: {again:?}"
            );
            Ok(())
        };

        pair.lab.set_uplink("b", false)?;
        broken(pair)?;
        ensure!(pair.wait_runs()? == "a", "the VM runs on");
        pair.lab.set_uplink("b", true)?;
        let again = warm_again(pair, 0)?;
        few("after a cut", again)?;

        pair.kill_replicator("b")?;
        broken(pair)?;
        pair.restart_replicator("b")?;
        let again = warm_again(pair, again.passes)?;
        few("after the target's restart", again)?;

        pair.kill_replicator("a")?;
        pair.restart_replicator("a")?;
        few("after the source's restart", warm_again(pair, 0)?)?;

        pair.switchover("a")?;
        ensure!(pair.wait_runs()? == "b", "and it can move");
        pair.verify()
    });
}

#[test]
fn the_end_of_a_copy_reaches_its_target_when_the_link_is_back() {
    with_pair("farewell", &spec(), |pair| {
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        pair.lab.set_uplink("b", false)?;
        broken(pair)?;
        let held = |pair: &Pair| {
            let files = pair.ram_files("b")?;
            Ok::<_, anyhow::Error>(files.iter().any(|f| f.extension().is_some_and(|e| e == "held")))
        };
        wait_for("the target to put the memory aside", NOTICED, || {
            Ok(held(pair)?.then_some(()))
        })?;
        let epoch = source(pair, "a")?.epoch;
        pair.order("a", epoch, OrderKind::Release)?;
        wait_for("the copy to end", NOTICED, || {
            Ok((source(pair, "a")?.phase == Phase::Released).then_some(()))
        })?;
        // What is owed to the target is on disk.
        pair.kill_replicator("a")?;
        pair.restart_replicator("a")?;
        ensure!(held(pair)?, "the target can't know yet");

        pair.lab.set_uplink("b", true)?;
        wait_for("the target to free the memory", NOTICED, || {
            Ok(pair.ram_files("b")?.is_empty().then_some(()))
        })?;
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        pair.switchover("a")?;
        ensure!(pair.wait_runs()? == "b", "it can be copied again, and move");
        pair.verify()
    });
}

/// The shadow's RAM file.
fn ram(pair: &Pair) -> Result<PathBuf> {
    let files = pair.ram_files("b")?;
    let file = files.into_iter().find(|f| f.extension().is_some_and(|e| e == "ram"));
    file.context("there is no RAM file")
}

/// Pages that have something in them and do not change, spread over the guest's memory.
fn cold_pages(pair: &Pair, n: usize) -> Result<Vec<(usize, Vec<u8>)>> {
    let read = || Ok::<_, anyhow::Error>(std::fs::read(ram(pair)?)?);
    let rounds = |more| {
        let from = source(pair, "a")?.progress.rounds;
        wait_for("more rounds", STANDBY, || {
            Ok((source(pair, "a")?.progress.rounds >= from + more).then_some(()))
        })
    };
    let before = read()?;
    rounds(4)?;
    let after = read()?;
    let same = before.chunks(PAGE).zip(after.chunks(PAGE)).enumerate();
    let cold: Vec<_> = same
        .filter(|(_, (a, b))| a == b && a.iter().any(|x| *x != 0))
        .map(|(i, (a, _))| (i, a.to_vec()))
        .collect();
    ensure!(cold.len() > 1000, "{} pages are cold", cold.len());
    Ok(cold.iter().step_by(cold.len() / n).cloned().collect())
}

#[test]
fn damaged_memory_of_a_shadow_is_found_and_repaired() {
    with_pair("scrub", &spec(), |pair| {
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        let pages = cold_pages(pair, 20)?;
        let file = std::fs::File::options().write(true).open(ram(pair)?)?;
        for (page, bytes) in &pages {
            file.write_all_at(&[bytes[1000] ^ 0x10], (page * PAGE + 1000) as u64)?;
        }
        drop(file);
        let found = wait_for("the damage to be found", SCRUBBED, || {
            let again = source(pair, "a")?.progress.resume;
            Ok((again.differing_pages > 0).then_some(again))
        })?;
        println!("found: {found:?}");
        let again = warm_again(pair, 0)?;
        println!("repaired: {again:?}");
        ensure!(
            again.sent_pages < again.skipped_pages,
            "only what differs travels: {again:?}"
        );
        let now = std::fs::read(ram(pair)?)?;
        let repaired = pages
            .iter()
            .filter(|(page, bytes)| now.get(page * PAGE..(page + 1) * PAGE).is_some_and(|p| p == bytes))
            .count();
        ensure!(
            repaired > 0,
            "the damaged pages are what they were: {repaired} of {}",
            pages.len()
        );
        ensure!(pair.wait_runs()? == "a", "the VM ran all the time");
        pair.switchover("a")?;
        ensure!(pair.wait_runs()? == "b", "and it can move");
        pair.verify()
    });
}
