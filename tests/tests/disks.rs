//! Private disks go with the VM, on real QEMUs: whatever the guest was told to be on its disk is there where it runs.
//!
//! The guest writes a journal on each disk and counts a record when fdatasync has confirmed it; here the images are read.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use umbra_api::order::OrderKind;
use umbra_api::replica::{Phase, ReplicaStatus, Role};
use umbra_tests::lab::disk::{self, Bus, DiskSpec, Journal};
use umbra_tests::lab::pair::{Pair, with_pair};
use umbra_tests::lab::process::wait_for;
use umbra_tests::lab::sys;
use umbra_tests::lab::vm::{self, VmSpec};

const MIB: u64 = 64;

fn disk(bus: Bus, format: &'static str) -> DiskSpec {
    DiskSpec { bus, format, mib: MIB }
}

fn spec() -> VmSpec {
    VmSpec {
        dirty: 500,
        disks: vec![
            disk(Bus::VirtioBlk, "raw"),
            disk(Bus::VirtioBlk, "qcow2"),
            disk(Bus::VirtioScsi, "qcow2"),
        ],
        ..VmSpec::new("web", 10)
    }
}

fn acknowledged(pair: &Pair) -> Result<BTreeMap<String, u64>> {
    Ok(vm::stats(&pair.lab.client, pair.vm.spec.ip)?.disks)
}

/// Waits until each journal is so many records further.
fn writes_on(pair: &Pair, records: u64) -> Result<()> {
    let before = acknowledged(pair)?;
    ensure!(before.len() == pair.vm.spec.disks.len(), "a journal a disk: {before:?}");
    wait_for(
        "the guest to write on all of its disks",
        Duration::from_secs(60),
        || {
            let now = acknowledged(pair)?;
            let further = |(name, n): (&String, &u64)| now.get(name).is_some_and(|m| *m >= n + records);
            let all = before.iter().all(further);
            std::thread::sleep(Duration::from_millis(100));
            Ok(all.then_some(()))
        },
    )
}

/// Images that the replicator of a host has made.
fn images(pair: &Pair, host: &str) -> Result<Vec<PathBuf>> {
    let mut found: Vec<_> = std::fs::read_dir(pair.host(host)?.folder("disks")?)?
        .map(|e| Ok(e?.path()))
        .collect::<Result<_>>()?;
    // Beside them: notes of what is kept.
    found.retain(|p| p.extension().is_some_and(|e| e == "img"));
    found.sort();
    Ok(found)
}

/// Images, and which files they really are.
fn with_inodes(images: &[PathBuf]) -> Result<Vec<(PathBuf, u64)>> {
    images
        .iter()
        .map(|p| Ok((p.clone(), std::fs::metadata(p)?.ino())))
        .collect()
}

/// Storage daemons that run on a host.
fn storage_daemons(pair: &Pair, host: &str) -> Result<usize> {
    let is = |pid: &i32| {
        sys::cmdline(*pid)
            .first()
            .is_some_and(|p| p.ends_with("qemu-storage-daemon"))
    };
    Ok(pair.host(host)?.pids().iter().filter(|p| is(p)).count())
}

/// Each journal is whole on these images, up to what was acknowledged.
fn check(pair: &Pair, images: &[PathBuf], acknowledged: &BTreeMap<String, u64>) -> Result<()> {
    let disks = &pair.vm.spec.disks;
    ensure!(images.len() == disks.len(), "an image a disk: {images:?}");
    for ((name, spec), image) in disk::names(disks).iter().zip(disks).zip(images) {
        let journal = Journal::read(image, spec.format)?;
        let told = acknowledged.get(name).copied().unwrap_or(0);
        println!(
            "{name} ({}): {told} acknowledged, {} on {}",
            spec.format,
            journal.last,
            image.display()
        );
        ensure!(
            journal.last >= told,
            "records {} to {told} of {name} were acknowledged and are lost",
            journal.last + 1
        );
    }
    Ok(())
}

fn go(pair: &mut Pair, from: &str, to: &str) -> Result<()> {
    pair.protect(from, to)?;
    let warm = pair.wait_standby(from)?;
    ensure!(warm.disks.len() == 3, "each disk's copy is told: {:?}", warm.disks);
    ensure!(
        warm.disks.iter().all(|d| d.ready),
        "warm only with all disks: {:?}",
        warm.disks
    );
    wait_for("figures of the copies", Duration::from_secs(60), || {
        let r = pair
            .replica(from, Role::Source)?
            .context("the source forgot its replica")?;
        let told = |d: &umbra_api::replica::DiskProgress| d.copied_bytes > 0 && d.total_bytes >= d.copied_bytes;
        Ok(r.disks.iter().all(told).then_some(()))
    })?;
    ensure!(storage_daemons(pair, to)? == 1, "one daemon a shadow");
    writes_on(pair, 60)?;
    let before = acknowledged(pair)?;
    let report = pair.switchover(from)?;
    ensure!(pair.wait_runs()? == to, "after the switchover it runs on {to}");
    println!(
        "{from} to {to}: guest stopped {:.1} ms, of which {:.1} ms for its disks; {report:?}",
        report.guest_stopped_us as f64 / 1e3,
        report.disks_us as f64 / 1e3,
    );
    ensure!(storage_daemons(pair, to)? == 0, "the shadow has its disks for itself");
    // Past half a ring the guest has read back what it had written on the other host.
    writes_on(pair, 300)?;
    ensure!(pair.errors()? == 0, "no error in memory or on a disk");
    let after = acknowledged(pair)?;
    ensure!(
        before.iter().all(|(name, n)| after.get(name).is_some_and(|m| m > n)),
        "{before:?} {after:?}"
    );
    Ok(())
}

#[test]
fn disks_go_there_and_back_under_writes() {
    with_pair("disks", &spec(), |pair| {
        writes_on(pair, 20)?;
        let first: Vec<_> = (0..3)
            .map(|n| Ok(vm::image_of(pair.host("a")?, "web", n)))
            .collect::<Result<_>>()?;
        let before = acknowledged(pair)?;
        go(pair, "a", "b")?;
        // The primary keeps its images as they were when the guest stopped.
        check(pair, &first, &before)?;
        pair.retire("a")?;
        let before = acknowledged(pair)?;
        let on_b = images(pair, "b")?;
        go(pair, "b", "a")?;
        check(pair, &on_b, &before)?;
        pair.retire("b")?;
        ensure!(
            images(pair, "b")?.is_empty(),
            "images of a copy that was given up go with it"
        );
        pair.verify()?;
        // A VM that dies takes none of its disks along: the images of a shadow that ran are kept.
        let last = acknowledged(pair)?;
        for pid in vm::qemus(pair.host("a")?, pair.id()) {
            sys::kill(pid, Signal::SIGKILL)?;
        }
        wait_for("the dead VM to be noticed", Duration::from_secs(60), || {
            let r = pair.replica("a", Role::Target)?;
            Ok(r.is_none_or(|r| r.phase == Phase::Released).then_some(()))
        })?;
        check(pair, &images(pair, "a")?, &last)
    });
}

#[test]
fn a_target_that_dies_takes_no_disk_along() {
    with_pair("disks_dead_target", &spec(), |pair| {
        let mut before: Vec<(PathBuf, u64)> = Vec::new();
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        for victim in ["b", "a", "b"] {
            let files = with_inodes(&images(pair, "b")?)?;
            ensure!(files.len() == 3, "an image a disk");
            ensure!(
                before.is_empty() || files == before,
                "after a break the copy goes on in the same images: {before:?} {files:?}"
            );
            before = files;
            let now = pair.replica("a", Role::Source)?;
            // A replicator that was restarted counts from 0.
            let past = now.filter(|_| victim == "b").map_or(0, |r| r.progress.resume.passes);
            pair.kill_replicator(victim)?;
            // The guest writes on as if nothing had been.
            writes_on(pair, 60)?;
            pair.restart_replicator(victim)?;
            wait_for(
                "the copy to be warm again without an order",
                Duration::from_secs(120),
                || {
                    let r = pair.replica("a", Role::Source)?;
                    let again = |r: &ReplicaStatus| r.phase == Phase::Standby && r.progress.resume.passes > past;
                    Ok(r.filter(again).map(|_| ()))
                },
            )?;
            ensure!(
                with_inodes(&images(pair, "b")?)? == before,
                "it goes on in the images that it had"
            );
            writes_on(pair, 60)?;
            ensure!(pair.wait_runs()? == "a", "it runs where it ran");
        }
        // What was gone on with is exact, on the host that it went to.
        let told = acknowledged(pair)?;
        pair.switchover("a")?;
        ensure!(pair.wait_runs()? == "b", "after the switchover it runs on b");
        writes_on(pair, 280)?;
        ensure!(pair.errors()? == 0, "no error in memory or on a disk");
        let now = acknowledged(pair)?;
        ensure!(
            told.iter().all(|(d, n)| now.get(d).is_some_and(|m| m > n)),
            "{told:?} {now:?}"
        );
        let epoch = pair.next_epoch();
        pair.order("a", epoch, OrderKind::Retire)?;
        pair.wait_alone()?;
        // And a copy that is not wanted any more leaves nothing.
        pair.protect("b", "a")?;
        pair.wait_standby("b")?;
        pair.release()?;
        pair.wait_alone()?;
        wait_for(
            "the released shadow's images and daemon to be gone",
            Duration::from_secs(60),
            || Ok((images(pair, "a")?.is_empty() && storage_daemons(pair, "a")? == 0).then_some(())),
        )?;
        writes_on(pair, 60)?;
        ensure!(pair.errors()? == 0, "no error in memory or on a disk");
        let told = acknowledged(pair)?;
        for pid in vm::qemus(pair.host("b")?, pair.id()) {
            sys::kill(pid, Signal::SIGKILL)?;
        }
        wait_for("the dead VM to be noticed", Duration::from_secs(60), || {
            let r = pair.replica("b", Role::Target)?;
            Ok(r.is_none_or(|r| r.phase == Phase::Released).then_some(()))
        })?;
        check(pair, &images(pair, "b")?, &told)
    });
}

#[test]
fn a_target_without_room_is_refused_before_anything_starts() {
    let huge = VmSpec {
        disks: vec![DiskSpec {
            bus: Bus::VirtioBlk,
            format: "qcow2",
            mib: 16 << 20,
        }],
        ..VmSpec::new("web", 10)
    };
    with_pair("disks_no_room", &huge, |pair| {
        pair.protect("a", "b")?;
        let refused = wait_for("the refusal", Duration::from_secs(60), || {
            let r = pair.replica("a", Role::Source)?;
            Ok(r.filter(|r| r.phase == Phase::Released).and_then(|r| r.error))
        })?;
        for words in ["16777216 MiB", "disk_dir", "MiB free"] {
            ensure!(refused.detail.contains(words), "{words}: {refused}");
        }
        ensure!(
            vm::qemus(pair.host("b")?, pair.id()).is_empty(),
            "no shadow was started"
        );
        ensure!(
            storage_daemons(pair, "b")? == 0 && images(pair, "b")?.is_empty(),
            "nothing of a disk was made"
        );
        writes_on(pair, 20)?;
        ensure!(pair.wait_runs()? == "a", "it runs where it ran");
        Ok(())
    });
}
