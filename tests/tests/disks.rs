//! Private disks go with the VM, on real QEMUs: whatever the guest was told to be on its disk is there where it runs.
//!
//! The guest writes a journal on each disk and counts a record when fdatasync has confirmed it; here the images are read.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use umbra_api::order::OrderKind;
use umbra_api::replica::{DiskProgress, Phase, ReplicaStatus, Role};
use umbra_tests::lab::disk::{self, Bus, DiskSpec, Journal};
use umbra_tests::lab::pair::{Pair, with_pair};
use umbra_tests::lab::process::wait_for;
use umbra_tests::lab::qmp::Qmp;
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
        let told = |d: &DiskProgress| d.copied_bytes > 0 && d.total_bytes >= d.copied_bytes;
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

/// Parts of a disk on which the guest's journal has nothing: the second half of each stride.
const FILL: usize = 64 << 10;

fn fill(n: u64) -> Vec<u8> {
    let mut x = n + 1;
    let mut next = || {
        x = x
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        (x >> 56) as u8
    };
    (0..FILL).map(|_| next()).collect()
}

/// Where nothing is ever written.
const HOLE: u64 = 201 * FILL as u64;

/// Where parts of a disk of [`MIB`] are filled.
fn filled() -> impl Iterator<Item = u64> {
    let all = (0..(MIB << 20) / (2 * FILL as u64)).map(|n| (2 * n + 1) * FILL as u64);
    all.filter(|at| *at != HOLE)
}

/// The disks' copies once nothing is left to be copied.
fn copied(pair: &Pair) -> Result<Vec<DiskProgress>> {
    wait_for("the disks to be equal", Duration::from_secs(60), || {
        let r = pair.replica("a", Role::Source)?.context("no replica")?;
        let equal = r.phase == Phase::Standby && r.disks.iter().all(|d| d.ready && d.copied_bytes == d.total_bytes);
        Ok((equal && r.disks.len() == 2).then_some(r.disks))
    })
}

fn went_again(pair: &Pair) -> Result<()> {
    wait_for("the copy to break off", Duration::from_secs(60), || {
        let r = pair.replica("a", Role::Source)?;
        Ok(r.is_none_or(|r| r.phase == Phase::Seeding).then_some(()))
    })
}

/// Two raw disks that hold something; the second one's copy goes to an image that was set aside for it.
fn with_full_disks(name: &str, body: impl FnOnce(&mut Pair, PathBuf) -> Result<()>) {
    let spec = VmSpec {
        dirty: 200,
        disks: vec![disk(Bus::VirtioBlk, "raw"), disk(Bus::VirtioScsi, "raw")],
        disk_rate: Some(2),
        ..VmSpec::new("web", 10)
    };
    with_pair(name, &spec, |pair| {
        for n in 0..2 {
            let file = File::options()
                .write(true)
                .open(vm::image_of(pair.host("a")?, "web", n))?;
            filled().try_for_each(|at| file.write_all_at(&fill(at), at))?;
        }
        let aside = pair.host("b")?.file("set-aside.img");
        disk::create(&aside, "raw", MIB << 20)?;
        let mapped = (vm::image_of(pair.host("a")?, "web", 1), aside.clone());
        pair.binaries.settings.disks.extend([mapped]);
        pair.kill_replicator("b")?;
        pair.restart_replicator("b")?;
        body(pair, aside)
    });
}

#[test]
fn after_a_break_only_what_was_written_meanwhile_travels() {
    let whole = MIB << 19;
    with_full_disks("disks_again", |pair, aside| {
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        let mut before = copied(pair)?;
        ensure!(
            before.iter().all(|d| d.link_bytes > whole),
            "the first copy is counted: {before:?}"
        );
        for broken in [
            "the link",
            "the target's replicator",
            "the source's replicator",
            "nothing that is trusted",
        ] {
            let records = acknowledged(pair)?;
            match broken {
                "the link" => {
                    pair.lab.set_uplink("b", false)?;
                    went_again(pair)?;
                    pair.lab.set_uplink("b", true)?;
                }
                "the target's replicator" => {
                    pair.kill_replicator("b")?;
                    went_again(pair)?;
                    pair.restart_replicator("b")?;
                }
                // As an upgrade of the package does.
                _ => {
                    let status = pair.replicator_process("a")?.stop(Duration::from_secs(60))?;
                    ensure!(status.success(), "it ends well: {status}");
                    writes_on(pair, 2)?;
                    before.iter_mut().for_each(|d| d.link_bytes = 0);
                }
            }
            if broken == "nothing that is trusted" {
                wait_for("the images to be put by", Duration::from_secs(60), || {
                    Ok((storage_daemons(pair, "b")? == 0).then_some(()))
                })?;
                // A byte of it is another one, behind everybody's back.
                File::options()
                    .write(true)
                    .open(&aside)?
                    .write_all_at(b"?", FILL as u64 + 5)?;
            }
            if broken.starts_with("the source") || broken.starts_with("nothing") {
                pair.restart_replicator("a")?;
            }
            pair.wait_standby("a")?;
            let after = copied(pair)?;
            let now = acknowledged(pair)?;
            for (n, (name, (was, is))) in now.keys().zip(before.iter().zip(&after)).enumerate() {
                // A record is a block of the mirror's bitmap; some were on their way twice.
                let written = now[name] - records[name] + 64;
                let travelled = is.link_bytes - was.link_bytes;
                println!("{broken}: disk {n}: {travelled} bytes again, {written} records");
                match broken {
                    "nothing that is trusted" => {
                        ensure!(travelled > whole, "a touched image is copied whole: {travelled}")
                    }
                    _ => ensure!(
                        travelled < written * (FILL as u64 + 512) && travelled < whole,
                        "{broken}: disk {n} was copied again: {travelled} bytes for {written} records"
                    ),
                }
            }
            before = after;
        }
        pair.switchover("a")?;
        ensure!(pair.wait_runs()? == "b", "after the switchover it runs on b");
        for image in [images(pair, "b")?.swap_remove(0), aside] {
            let (file, mut found) = (File::open(&image)?, vec![0; FILL]);
            for at in filled() {
                file.read_exact_at(&mut found, at)?;
                ensure!(found == fill(at), "{} at {at} is not what it was", image.display());
            }
        }
        ensure!(pair.errors()? == 0, "no error in memory or on a disk");
        Ok(())
    });
}

fn ask(qmp: &Qmp, command: &str, arguments: Value) -> Result<Value> {
    qmp.execute(command, arguments, Duration::from_secs(5))
}

#[test]
fn a_mirror_that_is_not_on_record_is_not_touched() {
    with_full_disks("disks_strange", |pair, _| {
        let strange = pair.host("a")?.file("strange.img");
        disk::create(&strange, "raw", MIB << 20)?;
        let qmp = Qmp::connect(&pair.vm.qmp, Duration::from_secs(5))?;
        let node =
            json!({"driver": "raw", "node-name": "umbra-nbd-19af-0", "file": {"driver": "file", "filename": strange}});
        ask(&qmp, "blockdev-add", node)?;
        ask(
            &qmp,
            "blockdev-mirror",
            json!({"job-id": "umbra-mirror-19af-0", "device": "d0", "target": "umbra-nbd-19af-0", "sync": "none"}),
        )?;
        drop(qmp);
        pair.protect("a", "b")?;
        let refused = pair.wait_ended("a")?;
        ensure!(refused.detail.contains("umbra-mirror-19af-0"), "it is named: {refused}");
        let qmp = Qmp::connect(&pair.vm.qmp, Duration::from_secs(5))?;
        let jobs = ask(&qmp, "query-block-jobs", json!({}))?;
        ensure!(jobs[0]["device"] == "umbra-mirror-19af-0", "it is still there: {jobs}");
        // Ended as the refusal says, it is in nobody's way.
        ask(
            &qmp,
            "block-job-cancel",
            json!({"device": "umbra-mirror-19af-0", "force": true}),
        )?;
        wait_for("the job's end", Duration::from_secs(20), || {
            let jobs = ask(&qmp, "query-block-jobs", json!({}))?;
            Ok((jobs.as_array().is_some_and(Vec::is_empty)).then_some(()))
        })?;
        ask(&qmp, "blockdev-del", json!({"node-name": "umbra-nbd-19af-0"}))?;
        drop(qmp);
        pair.wait_alone()?;
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        Ok(())
    });
}

/// What the source tells of each disk's scrub.
fn scrubbed(pair: &Pair, until: impl Fn(&[DiskProgress]) -> bool) -> Result<Vec<DiskProgress>> {
    wait_for("the scrub of the disks", Duration::from_secs(400), || {
        let r = pair.replica("a", Role::Source)?.context("no replica")?;
        ensure!(
            r.phase == Phase::Standby,
            "a scrub ends no copy: {:?} {:?}",
            r.phase,
            r.error
        );
        Ok(until(&r.disks).then_some(r.disks))
    })
}

#[test]
fn damaged_images_of_a_shadow_are_found_and_mended_while_the_guest_writes() {
    with_full_disks("disks_scrub", |pair, aside| {
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        copied(pair)?;
        let whole = MIB << 20;
        // A guest that writes all the time is no damage.
        let clean = scrubbed(pair, |d| d.iter().all(|d| d.scrubbed_bytes >= whole))?;
        ensure!(
            clean.iter().all(|d| d.differing_ranges == 0),
            "nothing is damaged: {clean:?}"
        );
        let own = images(pair, "b")?.swap_remove(0);
        // Behind the daemon's back: a bit in a full range of each image, and a byte where nothing was ever written.
        let (first, last) = (
            filled().next().context("no range")?,
            filled().last().context("no range")?,
        );
        let ranges = [(&own, first, 1), (&aside, last, 1), (&aside, HOLE, 0)];
        for (image, at, bit) in ranges {
            let (file, mut byte) = (File::options().read(true).write(true).open(image)?, [0]);
            file.read_exact_at(&mut byte, at + 4711)?;
            ensure!(bit == 1 || byte == [0], "a hole");
            file.write_all_at(&[byte[0] ^ 0x10], at + 4711)?;
        }
        let found = scrubbed(pair, |d| d.iter().map(|d| d.mended_ranges).sum::<u64>() == 3)?;
        println!("{found:?}");
        let differing: Vec<u64> = found.iter().map(|d| d.differing_ranges).collect();
        ensure!(differing == [1, 2], "each is counted once, by disk: {found:?}");
        for (image, at, bit) in ranges {
            let mut found = vec![0; FILL];
            File::open(image)?.read_exact_at(&mut found, at)?;
            match bit {
                1 => ensure!(found == fill(at), "{} at {at} is what it was", image.display()),
                _ => ensure!(found[4711] == 0, "{} at {at} is empty again", image.display()),
            }
        }
        // Its QEMU's NBD server is somebody else's to have, most of the time; and a switchover finds mirrors that go on.
        let told = acknowledged(pair)?;
        pair.switchover("a")?;
        ensure!(pair.wait_runs()? == "b", "after the switchover it runs on b");
        check(pair, &[own, aside], &told)?;
        ensure!(pair.errors()? == 0, "no error in memory or on a disk");
        Ok(())
    });
}
