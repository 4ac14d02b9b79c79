//! The report before adoption, on real QEMUs: everything that stands in the way, here and on a target, and nothing is started.

mod support;

use support::{Primary, bridge_and_tap, on_site, status};
use umbra_api::adopt::Finding;
use umbra_api::order::RefusalCode;
use umbra_api::wire::control::HostCpu;
use umbra_replicator::adopt::{Storage, adopt, check};
use umbra_replicator::launch::lacks;
use umbra_replicator::proc::Scope;

#[test]
fn everything_that_stands_in_the_way_is_told_at_once() {
    on_site(|site, vm| {
        let _primary = Primary::start(
            &site,
            vm,
            "odd",
            "-M q35 -m 64 -nic user -object memory-backend-ram,id=shm,size=1M -device ivshmem-plain,memdev=shm \
             -device usb-ehci -audio none",
        );
        let report = check(vm, Scope::Netns, Storage::Private).unwrap();
        let host = "a".parse().unwrap();
        let findings: Vec<Finding> = report.refusals.iter().map(|r| Finding::new(&host, r)).collect();
        let named = |word: &str| {
            let found = findings.iter().find(|f| f.reason.contains(word));
            let found = found.unwrap_or_else(|| panic!("{word} is not among {findings:#?}"));
            assert!(found.remedy.is_some(), "{found:?}");
        };
        named("user");
        named("ivshmem");
        named("-audio");
        assert!(report.spec.is_none() && findings.len() >= 3, "{findings:#?}");
        assert!(report.qemu.contains("pc-q35-"), "{}", report.qemu);
        assert_eq!(
            adopt(vm, Scope::Netns, Storage::Private).unwrap_err(),
            report.refusals[0]
        );
    });
}

#[test]
fn what_a_target_lacks_is_told_at_once_and_nothing_is_started() {
    on_site(|site, vm| {
        bridge_and_tap("qbr0", "qt0");
        let _primary = Primary::start(
            &site,
            vm,
            "web",
            "-M q35 -m 64 -netdev tap,id=n0,ifname=qt0,script=no,downscript=no \
             -device virtio-net-pci,netdev=n0,romfile=",
        );
        let adopted = adopt(vm, Scope::Netns, Storage::Private).unwrap();
        assert_eq!(lacks(&adopted.spec, &site.cfg, vm), []);

        let mut spec = adopted.spec.clone();
        spec.machine = "pc-q35-99.0".into();
        spec.nics[0].bridge = Some("umbra-none".into());
        spec.files.push("/nowhere/kernel".into());
        spec.ram[0].bytes = 1 << 60;
        spec.host_cpu = Some(HostCpu {
            vendor: "Zilog".into(),
            family: "80".into(),
            model: "0".into(),
            name: "Z80".into(),
            flags: String::new(),
        });
        let found = lacks(&spec, &site.cfg, vm);
        for word in ["pc-q35-99.0", "umbra-none", "/nowhere/kernel", "MiB", "Z80"] {
            let one = found.iter().find(|r| r.detail.contains(word));
            assert_eq!(
                one.map(|r| r.code),
                Some(RefusalCode::TargetLacks),
                "{word} is not among {found:#?}"
            );
        }
        assert_eq!(found.len(), 5, "{found:#?}");
        assert!(site.is_clean(), "nothing was made");
        assert_eq!(status(&adopted.qmp), "running");
    });
}
