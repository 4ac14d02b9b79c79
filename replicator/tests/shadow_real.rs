//! Adoption and launch against real QEMUs. They have no guest system: SeaBIOS looking for a disk is guest enough.

mod support;

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{
    CGROUP, PATIENCE, Primary, Site, assert_gone, bridge_and_tap, in_namespace, new_vm, on_site, skipped, status,
};
use umbra_api::VmId;
use umbra_api::order::{Peak, RefusalCode, Tier};
use umbra_replicator::adopt::{Storage, adopt};
use umbra_replicator::launch::{Images, discard, launch, records, reopen};
use umbra_replicator::proc::Scope;
use umbra_replicator::qmp::{Client, QmpError};
use umbra_replicator::tap;
use umbra_replicator::tier::{Group, Hierarchy, remove_group, remove_parent};

#[test]
fn a_plain_qemu_is_adopted_and_its_shadow_comes_and_goes_whole() {
    on_site(|site, vm| {
        bridge_and_tap("qbr0", "qt0");
        let serial = site.path("web.ser");
        let primary = Primary::start(
            &site,
            vm,
            "web",
            &format!(
                "-M q35 -m 64 -netdev tap,id=n0,ifname=qt0,script=no,downscript=no \
                 -device virtio-net-pci,netdev=n0,mac=52:54:00:00:99:02,romfile= -serial file:{}",
                serial.display()
            ),
        );
        let adopted = adopt(vm, Scope::Netns, Storage::Private).unwrap();
        assert_eq!((adopted.process.id.pid, adopted.name.as_str()), (primary.pid(), "web"));
        assert_eq!(adopted.spec.nics[0].bridge.as_deref(), Some("qbr0"));
        assert!(adopted.spec.machine.starts_with("pc-q35-"), "{}", adopted.spec.machine);
        assert_eq!(adopted.spec.ram[0].bytes, 64 << 20);

        let shadow = launch(&adopted.spec, &site.cfg, vm, 7).unwrap();
        assert_eq!(status(&shadow.qmp), "inmigrate");
        assert!(shadow.record.alive() && shadow.incoming.is_some());
        let pid = nix::unistd::Pid::from_raw(shadow.record.process.unwrap().pid);
        assert_eq!(nix::unistd::getsid(Some(pid)).unwrap(), pid, "a session of its own");
        assert_eq!(std::fs::metadata(&shadow.record.ram[0].1).unwrap().len(), 64 << 20);
        assert_eq!(tap::bridge_of(&shadow.record.taps[0]).unwrap().as_deref(), Some("qbr0"));
        assert!(tap::link(&shadow.record.taps[0]).unwrap().unwrap().up);
        assert_eq!(records(&site.cfg).unwrap(), std::slice::from_ref(&shadow.record));
        // The name is taken, and a second attempt must not harm the first.
        let again = launch(&adopted.spec, &site.cfg, vm, 7).map(|_| ()).unwrap_err();
        assert_eq!(again.code, RefusalCode::Local, "{again}");
        assert_eq!(status(&shadow.qmp), "inmigrate");

        let record = shadow.record.clone();
        let incoming = shadow.incoming;
        drop(shadow.qmp);
        let found = reopen(record.clone(), PATIENCE).unwrap();
        assert_eq!(status(&found.qmp), "inmigrate");
        discard(&record, Images::Remove).unwrap();
        discard(&record, Images::Remove).unwrap();
        assert_gone(&record);
        assert!(site.is_clean());
        drop(incoming);
        assert!(found.qmp.is_closed() || found.qmp.execute("query-status", Value::Null).is_err());
        assert_eq!(status(&adopted.qmp), "running", "the primary did not notice");
    });
}

/// The stock stream instead of ours: what is tested is that the command line fits and that a former shadow is adoptable.
#[test]
fn a_shadow_takes_over_and_is_adopted_in_turn() {
    on_site(|site, vm| {
        let ram = site.ram("primary");
        std::fs::File::create(&ram).unwrap().set_len(64 << 20).unwrap();
        let primary = Primary::start(
            &site,
            vm,
            "hop",
            &format!(
                "-object memory-backend-file,id=pc.ram,size=64M,share=on,mem-path={} -M q35,memory-backend=pc.ram -m 64",
                ram.display()
            ),
        );
        let adopted = adopt(vm, Scope::Netns, Storage::Private).unwrap();
        let shadow = launch(&adopted.spec, &site.cfg, vm, 1).unwrap();
        let old = &adopted.qmp;
        old.execute("stop", Value::Null).unwrap();
        std::fs::copy(&ram, &shadow.record.ram[0].1).unwrap();
        let capability = |name: &str| json!({"capability": name, "state": true});
        let both = json!({"capabilities": [capability("x-ignore-shared"), capability("events")]});
        old.execute("migrate-set-capabilities", both).unwrap();
        let fd = shadow.incoming.as_ref().unwrap();
        old.execute_with_fd("getfd", json!({"fdname": "out"}), fd.as_fd())
            .unwrap();
        let mark = shadow.qmp.mark();
        old.execute("migrate", json!({"uri": "fd:out"})).unwrap();
        let ended = |e: &umbra_replicator::qmp::Event| {
            e.status()
                .filter(|s| matches!(*s, "completed" | "failed"))
                .map(str::to_owned)
        };
        let how = shadow
            .qmp
            .wait(mark, PATIENCE, ended)
            .unwrap_or_else(|e| panic!("{e}: {}", shadow.record.last_words()));
        assert_eq!(how, "completed");
        assert_eq!(status(&shadow.qmp), "paused");
        // Two QEMUs have the UUID now, and neither runs.
        drop(shadow.qmp);
        drop(adopted.qmp);
        let none = adopt(vm, Scope::Netns, Storage::Private).unwrap_err();
        assert_eq!(none.code, RefusalCode::NoSuchVm, "{none}");
        assert!(
            none.detail.contains("postmigrate") && none.detail.contains("paused"),
            "{none}"
        );

        let shadow = reopen(shadow.record, PATIENCE).unwrap();
        let mark = shadow.qmp.mark();
        shadow.qmp.execute("cont", Value::Null).unwrap();
        let resumed = shadow
            .qmp
            .wait(mark, PATIENCE, |e| (e.name == "RESUME").then_some(e.unix_us))
            .unwrap();
        assert!(resumed > 0);
        drop(shadow.qmp);
        let back = adopt(vm, Scope::Netns, Storage::Private).unwrap();
        assert_eq!(Some(back.process.id), shadow.record.process);
        assert_ne!(back.process.id.pid, primary.pid());
        assert_eq!(back.spec, adopted.spec);
        discard(&shadow.record, Images::Remove).unwrap();
        assert_gone(&shadow.record);
    });
}

#[test]
fn monitors_that_are_busy_gone_or_missing() {
    on_site(|site, vm| {
        let second = site.path("second.qmp");
        let args = format!("-M q35 -m 32 -qmp unix:{},server=on,wait=off", second.display());
        let mut primary = Primary::start(&site, vm, "busy", &args);
        let held = Client::connect(&primary.qmp, PATIENCE).unwrap();
        let adopted = adopt(vm, Scope::Netns, Storage::Private).unwrap();
        assert_eq!(adopted.qmp.path(), second, "the free one of two is taken");
        let busy = adopt(vm, Scope::Netns, Storage::Private).unwrap_err();
        assert_eq!(busy.code, RefusalCode::QmpUnavailable);
        assert!(
            busy.detail.contains("is busy") && busy.detail.contains("second"),
            "{busy}"
        );
        drop(held);
        std::fs::remove_file(&primary.qmp).unwrap();
        drop(adopted);
        std::fs::remove_file(&second).unwrap();
        let gone = adopt(vm, Scope::Netns, Storage::Private).unwrap_err();
        assert_eq!(gone.code, RefusalCode::QmpUnavailable);
        assert!(gone.detail.contains("busy.qmp"), "{gone}");
        primary.kill();
        assert_eq!(
            adopt(vm, Scope::Netns, Storage::Private).unwrap_err().code,
            RefusalCode::NoSuchVm
        );
    });
}

#[test]
fn a_killed_qemu_wakes_who_waits_for_it() {
    on_site(|site, vm| {
        let mut primary = Primary::start(&site, vm, "dies", "-M q35 -m 32");
        let client = Client::connect(&primary.qmp, PATIENCE).unwrap();
        let mark = client.mark();
        let waiter = client.clone();
        let waiting = std::thread::spawn(move || waiter.wait(mark, PATIENCE, |_| None::<()>));
        primary.kill();
        assert!(matches!(waiting.join().unwrap(), Err(QmpError::Closed)));
        assert!(matches!(
            client.execute("query-status", Value::Null),
            Err(QmpError::Closed)
        ));
    });
}

#[test]
fn what_the_target_lacks_is_named_and_nothing_stays() {
    on_site(|site, vm| {
        bridge_and_tap("qbr1", "qt1");
        let primary = Primary::start(
            &site,
            vm,
            "lack",
            "-M q35 -m 32 -netdev tap,id=n0,ifname=qt1,script=no,downscript=no",
        );
        let spec = adopt(vm, Scope::Netns, Storage::Private).unwrap().spec;
        let refused = |change: &dyn Fn(&mut umbra_api::wire::control::ShadowSpec), words: &[&str]| {
            let mut spec = spec.clone();
            change(&mut spec);
            let refusal = launch(&spec, &site.cfg, vm, 1).map(|_| ()).unwrap_err();
            assert_eq!(refusal.code, RefusalCode::TargetLacks, "{refusal}");
            words
                .iter()
                .for_each(|w| assert!(refusal.detail.contains(w), "{w}: {refusal}"));
            assert!(site.is_clean(), "{refusal}");
        };
        refused(
            &|s| s.files.push("/boot/no-such-kernel".into()),
            &["/boot/no-such-kernel"],
        );
        refused(&|s| s.binary = "qemu-system-vax".into(), &["qemu-system-vax"]);
        refused(&|s| s.nics[0].bridge = Some("nobridge".into()), &["nobridge", "NIC 0"]);
        refused(&|s| s.ram[0].bytes = 1 << 50, &["1073741824 MiB", "free"]);
        // QEMU's own words, after a tap and files were made.
        let machine = |s: &mut umbra_api::wire::control::ShadowSpec| {
            s.args[1] = umbra_api::wire::control::Arg::Plain("pc-q35-77.0,memory-backend=pc.ram".into());
        };
        refused(&machine, &["pc-q35-77.0", "QEMU does not start"]);
        assert!(!tap::links().unwrap().iter().any(|l| l.name.starts_with("um")));
        drop(primary);
    });
}

#[test]
fn taps_are_new_or_refused() {
    if skipped() {
        return;
    }
    in_namespace(|| {
        bridge_and_tap("qbr2", "qt2");
        assert!(tap::create("qt2", false).is_err(), "never another's tap");
        tap::create("qt3", true).unwrap();
        assert!(tap::plug("qt3", "lo").is_err());
        assert!(tap::plug("qt3", "no-such").unwrap_err().to_string().contains("no-such"));
        tap::remove("qt3").unwrap();
        tap::remove("qt3").unwrap();
        assert_eq!(tap::link("qt3").unwrap(), None);
    });
}

#[test]
fn tiers_are_quotas_of_the_kernel() {
    if skipped() {
        return;
    }
    if let Err(e) = Hierarchy::detect("cpu") {
        println!("SKIPPED: {e}");
        return;
    }
    let name = format!("q-tier-{}", std::process::id());
    let group = Group::create(CGROUP, &name).unwrap();
    let read = |file: &str| std::fs::read_to_string(group.path().join(file)).ok();
    let quota = || match (read("cpu.max"), read("cpu.cfs_quota_us")) {
        (Some(v2), _) => v2.split(' ').next().unwrap().to_owned(),
        (None, v1) => v1.unwrap().trim().to_owned(),
    };
    let peak = Peak {
        cpu_cores: 2.0,
        mem_bytes: 0,
    };
    group.set(Tier::Standby.share(), peak).unwrap();
    assert_eq!(quota(), "20000");
    group.set(Tier::Armed.share(), peak).unwrap();
    assert_eq!(quota(), "100000");
    group.lift().unwrap();
    assert!(["max", "-1"].contains(&quota().as_str()));
    let path = group.path().to_owned();
    assert_eq!(Group::open(&path), group);
    remove_group(&path).unwrap();
    assert!(!path.exists());
    let _ = remove_parent(CGROUP);
}

const CHILD: &str = "UMBRA_TEST_CHILD";

/// Not a test of its own: what [`a_dead_replicator_leaves_nothing_that_is_not_on_record`] runs as the replicator that dies.
#[test]
fn child_that_launches_a_shadow_and_waits() {
    let Some(config) = std::env::var_os(CHILD) else { return };
    let text = config.into_string().unwrap();
    let [vm, run_dir, ram_dir]: [String; 3] = serde_json::from_str(&text).unwrap();
    let cfg = umbra_replicator::launch::LaunchConfig {
        run_dir: run_dir.into(),
        ram_dir: ram_dir.into(),
        cgroup: Some(CGROUP.into()),
        ..Default::default()
    };
    let vm: VmId = vm.parse().unwrap();
    let adopted = adopt(vm, Scope::All, Storage::Private).unwrap();
    let _shadow = launch(&adopted.spec, &cfg, vm, 5).unwrap();
    println!("LAUNCHED");
    let _ = std::io::stdin().read_line(&mut String::new());
}

#[test]
fn a_dead_replicator_leaves_nothing_that_is_not_on_record() {
    if skipped() {
        return;
    }
    let site = Site::new();
    let vm = new_vm();
    let _primary = Primary::start(&site, vm, "survives", "-M q35 -m 32");
    let config = json!([vm.to_string(), site.cfg.run_dir, site.cfg.ram_dir]);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_launches_a_shadow_and_waits", "--nocapture"])
        .env(CHILD, config.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let launched = lines.map_while(Result::ok).any(|l| l.contains("LAUNCHED"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(launched);
    let [record] = records(&site.cfg).unwrap().try_into().unwrap();
    // Its migration broke off before it was loaded, so that QEMU gives up by itself.
    let deadline = Instant::now() + PATIENCE;
    while record.alive() {
        assert!(Instant::now() < deadline, "the shadow stays: {}", record.last_words());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(
        reopen(record.clone(), PATIENCE)
            .map(|_| ())
            .unwrap_err()
            .detail
            .contains("gone")
    );
    discard(&record, Images::Remove).unwrap();
    assert_gone(&record);
    assert!(site.is_clean());
    let adopted = adopt(vm, Scope::All, Storage::Private).unwrap();
    assert_eq!(status(&adopted.qmp), "running");
}

fn image(path: &std::path::Path, format: &str, mib: u64) {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", format])
        .arg(path)
        .arg(format!("{mib}M"))
        .status();
    assert!(made.unwrap().success());
}

#[test]
fn images_of_a_shadow_come_and_go_with_it_and_wrong_ones_are_refused() {
    on_site(|mut site, vm| {
        let (raw, qcow2) = (site.path("a.img"), site.path("b.qcow2"));
        image(&raw, "raw", 8);
        image(&qcow2, "qcow2", 16);
        let disks = format!(
            "-M q35 -m 32 -drive file={},if=virtio,format=raw -drive file={},if=none,id=d1 -device virtio-blk-pci,drive=d1",
            raw.display(),
            qcow2.display()
        );
        let _primary = Primary::start(&site, vm, "disks", &disks);
        let spec = adopt(vm, Scope::Netns, Storage::Private).unwrap().spec;
        let bytes: Vec<_> = spec.disks.iter().map(|d| (d.format.name(), d.bytes >> 20)).collect();
        assert_eq!(bytes, [("raw", 8), ("qcow2", 16)]);

        let shadow = launch(&spec, &site.cfg, vm, 1).unwrap();
        let daemon = shadow.record.storage.unwrap();
        assert!(daemon.alive() && shadow.record.disks.iter().all(|d| d.path.is_file()));
        let active = || shadow.qmp.execute("blockdev-set-active", json!({"active": true}));
        match active() {
            Err(QmpError::Qemu { class, .. }) if class == "CommandNotFound" => println!("QEMU before 10: not asked"),
            Err(e) => {
                assert!(e.to_string().contains("lock"), "the daemon has them: {e}");
                umbra_replicator::launch::disks::stop(&shadow.record).unwrap();
                assert!(!daemon.alive());
                active().unwrap();
            }
            Ok(_) => panic!("two processes have the images for writing"),
        }
        discard(&shadow.record, Images::Keep).unwrap();
        assert!(
            shadow.record.disks.iter().all(|d| d.path.is_file()),
            "those of a VM that ran stay"
        );
        discard(&shadow.record, Images::Remove).unwrap();
        assert!(!daemon.alive() && !shadow.record.disks.iter().any(|d| d.path.exists()));

        // One that an operator set aside: as it must be, then in every way in which it may be wrong.
        let mine = site.path("set-aside.qcow2");
        site.cfg.disks.insert(qcow2.display().to_string(), mine.clone());
        let refused = |site: &Site, words: &str| {
            let refusal = launch(&spec, &site.cfg, vm, 2).map(|_| ()).unwrap_err();
            assert_eq!(refusal.code, RefusalCode::TargetLacks, "{refusal}");
            assert!(refusal.detail.contains(words), "{words}: {refusal}");
            assert!(site.is_clean() && mine.exists() == (words != "no file"), "{refusal}");
        };
        refused(&site, "no file");
        image(&mine, "qcow2", 15);
        refused(&site, "15728640 bytes, the VM's disk has 16777216");
        image(&mine, "qcow2", 16);
        let user = Primary::start(
            &site,
            new_vm(),
            "user",
            &format!("-M q35 -drive file={}", mine.display()),
        );
        refused(&site, "lock");
        drop(user);
        let shadow = launch(&spec, &site.cfg, vm, 3).unwrap();
        assert_eq!(shadow.record.disks[1].path, mine);
        discard(&shadow.record, Images::Remove).unwrap();
        assert!(mine.exists(), "an operator's image is never removed");
        assert!(site.is_clean());
    });
}
