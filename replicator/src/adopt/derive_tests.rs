//! Realistic command lines and what becomes of them.

use proptest::prelude::*;
use umbra_api::VmId;

use super::*;
use crate::adopt::ability::{Ability, NEEDED};
use crate::adopt::facts::{Memdev, Tap};
use crate::launch::ShadowRecord;
use crate::launch::command;

const UUID: &str = "6e3a0b3e-6f3d-4a83-9a55-0f6a3d1f2c11";

/// Splits at blanks; `~` stands for a blank within an argument.
pub(in crate::adopt) fn line(text: &str) -> Vec<String> {
    text.split_whitespace().map(|a| a.replace('~', " ")).collect()
}

pub(in crate::adopt) fn demo() -> Vec<String> {
    line(&format!(
        "/usr/bin/qemu-system-x86_64 -uuid {UUID} -name web,debug-threads=on -nodefaults -no-user-config -display none \
         -accel tcg -M q35 -m 256 -smp 1 -kernel vmlinuz -initrd /boot/initrd -append console=ttyS0~rate=1,000 \
         -netdev tap,id=n0,ifname=t0,script=no,downscript=no -device virtio-net-pci,netdev=n0,mac=52:54:00:00:99:02 \
         -serial file:/tmp/web.ser -qmp unix:/tmp/web.qmp,server=on,wait=off"
    ))
}

fn libvirt() -> Vec<String> {
    line(&format!(
        r#"/usr/bin/qemu-system-x86_64 -name guest=db,debug-threads=on -S
        -object {{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/master-key.aes"}}
        -machine pc-q35-10.0,usb=off,dump-guest-core=off,memory-backend=pc.ram,acpi=on -accel kvm
        -cpu host,migratable=on -m size=4194304k
        -object {{"qom-type":"memory-backend-memfd","id":"pc.ram","share":true,"x-use-canonical-path-for-ramblock-id":false,"size":4294967296}}
        -overcommit mem-lock=off -smp 2,sockets=2,cores=1,threads=1 -uuid {UUID} -display none -no-user-config -nodefaults
        -chardev socket,id=charmonitor,fd=22,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control
        -rtc base=utc -no-shutdown -boot strict=on
        -device {{"driver":"pcie-root-port","port":8,"chassis":1,"id":"pci.1","bus":"pcie.0","addr":"0x1"}}
        -blockdev {{"driver":"file","filename":"/srv/iso/debian.iso","node-name":"libvirt-1-storage","read-only":true}}
        -blockdev {{"node-name":"libvirt-1-format","read-only":true,"driver":"raw","file":"libvirt-1-storage"}}
        -device {{"driver":"ide-cd","bus":"ide.0","drive":"libvirt-1-format","id":"sata0-0-0","bootindex":1}}
        -netdev {{"type":"tap","fd":"25","vhost":true,"vhostfd":"27","id":"hostnet0"}}
        -device {{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:aa:bb:cc","bus":"pci.1"}}
        -chardev socket,id=charserial0,path=/run/db.serial,server=on,wait=on
        -device {{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}}
        -audiodev {{"id":"audio1","driver":"none"}} -vnc 127.0.0.1:0,audiodev=audio1
        -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -msg timestamp=on
        -qmp unix:/run/umbra-db.qmp,server=on,wait=off"#
    ))
}

/// What QEMU 10.0 can.
pub(in crate::adopt) fn able() -> Ability {
    Ability {
        capabilities: NEEDED.map(|name| (name.to_owned(), false)).into(),
        told_bandwidth: true,
        ..Ability::default()
    }
}

pub(in crate::adopt) fn facts() -> Facts {
    Facts {
        version: Version {
            major: 10,
            minor: 0,
            micro: 2,
        },
        ability: able(),
        machine: "pc-q35-10.0".into(),
        default_ram_id: "pc.ram".into(),
        memdevs: vec![Memdev {
            id: "pc.ram".into(),
            bytes: 256 << 20,
            by_path: false,
        }],
        devices: vec![],
        taps: vec![
            Tap {
                fd: 9,
                name: "t0".into(),
                bridge: Some("br0".into()),
            },
            Tap {
                fd: 25,
                name: "vnet3".into(),
                bridge: Some("virbr0".into()),
            },
        ],
        disks: vec![],
        cwd: "/home/op".into(),
        storage: Storage::Private,
    }
}

fn libvirt_facts() -> Facts {
    Facts {
        devices: ["pci.1", "sata0-0-0", "net0", "serial0"].map(str::to_owned).into(),
        ..facts()
    }
}

/// The spec's command line, with what the target fills in shown in brackets.
pub(in crate::adopt) fn shown(spec: &ShadowSpec) -> String {
    let show = |a: &Arg| match a {
        Arg::Plain(text) => text.clone(),
        Arg::Netdev { nic, prefix, suffix } => format!("{prefix}[{nic}]{suffix}"),
        Arg::Disk { disk, prefix, suffix } => format!("{prefix}[disk{disk}]{suffix}"),
        Arg::RunFile { prefix, file, suffix } => format!("{prefix}[{file}]{suffix}"),
    };
    spec.args.iter().map(show).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_plain_command_line() {
    let Derived { spec, warnings } = derive(&demo(), &facts()).unwrap();
    assert_eq!(
        shown(&spec),
        format!(
            "-machine pc-q35-10.0,memory-backend=pc.ram -uuid {UUID} -name web,debug-threads=on -nodefaults \
             -no-user-config -display none -accel tcg -m 256 -smp 1 -kernel /home/op/vmlinuz -initrd /boot/initrd \
             -append console=ttyS0 rate=1,000 -netdev tap,ifname=[0],script=no,downscript=no,id=n0 \
             -device virtio-net-pci,netdev=n0,mac=52:54:00:00:99:02 -serial file:[serial0.log] \
             -qmp unix:[qmp0.sock],server=on,wait=off"
        )
    );
    assert_eq!(spec.binary, "qemu-system-x86_64");
    assert_eq!(spec.files, ["/boot/initrd", "/home/op/vmlinuz"]);
    assert_eq!(
        spec.nics,
        [Nic {
            bridge: Some("br0".into()),
            tap: "t0".into()
        }]
    );
    assert_eq!(
        spec.ram,
        [RamBlock {
            name: "pc.ram".into(),
            bytes: 256 << 20
        }]
    );
    assert!(warnings.is_empty(), "{warnings:?}");
    command::check(&spec).unwrap();
}

#[test]
fn a_libvirt_command_line() {
    let Derived { spec, warnings } = derive(&libvirt(), &libvirt_facts()).unwrap();
    let text = shown(&spec);
    let start = "-machine pc-q35-10.0,memory-backend=pc.ram,usb=off,dump-guest-core=off,acpi=on -name guest=db";
    assert!(text.starts_with(start), "{text}");
    for gone in ["masterKey0", "memory-backend-memfd", "fd=", "vhostfd", "wait=on", "-S "] {
        assert!(!text.contains(gone), "{gone}: {text}");
    }
    for there in [
        "-chardev socket,id=charmonitor,server=on,wait=off,path=[chr-charmonitor.sock]",
        "-chardev socket,id=charserial0,server=on,wait=off,path=[chr-charserial0.sock]",
        "-netdev tap,ifname=[0],script=no,downscript=no,id=hostnet0,vhost=on",
        "-vnc 127.0.0.1:0,audiodev=audio1,to=99",
        r#""mac":"52:54:00:aa:bb:cc""#,
    ] {
        assert!(text.contains(there), "{there}: {text}");
    }
    assert_eq!(
        spec.nics,
        [Nic {
            bridge: Some("virbr0".into()),
            tap: "vnet3".into()
        }]
    );
    assert_eq!(spec.files, ["/srv/iso/debian.iso"]);
    // The target compares it with its own.
    assert_eq!(spec.host_cpu, super::cpu::this());
    assert!(warnings.iter().all(|w| !w.contains("-cpu host")), "{warnings:?}");
    command::check(&spec).unwrap();
}

/// What the shadow is started with yields the same spec again: failback takes the same road.
#[test]
fn a_former_shadow_yields_the_spec_that_it_came_from() {
    for (args, facts) in [(demo(), facts()), (libvirt(), libvirt_facts())] {
        let spec = derive(&args, &facts).unwrap().spec;
        let record = ShadowRecord {
            vm: VmId(UUID.parse().unwrap()),
            session: 3,
            process: None,
            dir: "/run/u/x-3".into(),
            qmp_path: "/run/u/x-3/umbra.qmp".into(),
            log: "/run/u/x-3/qemu.log".into(),
            ram: spec
                .ram
                .iter()
                .map(|r| (r.name.clone(), format!("/dev/shm/u/{}.ram", r.name).into()))
                .collect(),
            taps: vec!["um0123456789n0".into()],
            run_files: vec![],
            cgroup: None,
            memory_cgroup: None,
            disks: vec![],
            storage: None,
            token: 0,
        };
        let mut line = vec!["/opt/qemu/qemu-system-x86_64".to_owned()];
        line.extend(command::build(&spec, &record));
        let taps = vec![Tap {
            fd: 7,
            name: "um0123456789n0".into(),
            bridge: spec.nics[0].bridge.clone(),
        }];
        let mut again = derive(
            &line,
            &Facts {
                taps,
                cwd: "/".into(),
                ..facts
            },
        )
        .unwrap()
        .spec;
        assert_eq!(again.nics[0].tap, "um0123456789n0");
        again.nics[0].tap.clone_from(&spec.nics[0].tap);
        assert_eq!(again, spec);
    }
}

#[test]
fn what_cannot_be_shadowed_is_refused_with_its_reason() {
    let table = [
        ("-netdev user,id=n1", "lives in QEMU's process"),
        ("-nic user,model=e1000", "lives in QEMU's process"),
        ("-netdev socket,id=n1,listen=:1", "only taps"),
        ("-netdev vhost-user,id=n1,chardev=c", "outside QEMU"),
        ("-serial stdio", "terminal"),
        ("-serial mon:stdio", "terminal"),
        ("-serial /dev/ttyS0", "terminal"),
        ("-serial tcp:1.2.3.4:5", "server=on"),
        ("-monitor unix:/run/m", "server=on"),
        ("-chardev pty,id=c", "terminal"),
        ("-chardev stdio,id=c", "terminal"),
        ("-chardev socket,id=c,host=1.2.3.4,port=5,server=on", "server=on"),
        ("-chardev socket,id=c,path=/x,reconnect=1", "server=on"),
        ("-chardev udp,id=c,port=1", "other end"),
        ("-device vfio-pci,host=0000:01:00.0", "hardware"),
        (
            r#"-device {"driver":"vhost-user-fs-pci","chardev":"c"}"#,
            "another process",
        ),
        ("-device usb-host", "plugged into this host"),
        ("-device virtio-9p-pci,fsdev=f", "shared directory"),
        ("-fsdev local,id=f,path=/srv", "shared directory"),
        ("-virtfs local,path=/srv", "shared directory"),
        ("-drive file=/srv/a.qcow2,if=virtio", "storage = \"shared\""),
        (
            r#"-blockdev {"driver":"qcow2","node-name":"d","file":"f"}"#,
            "storage = \"shared\"",
        ),
        ("-hda /srv/a.img", "write it as -drive"),
        ("/srv/a.img", "write it as -drive"),
        ("-snapshot", "temporary file"),
        ("-object memory-backend-epc,id=e,size=1M", "not tried"),
        ("-object sev-guest,id=s", "not tried"),
        ("-xen-domid 3", "not known"),
        ("-curses", "terminal"),
        ("-display gtk", "terminal"),
        ("-spice port=1", "SPICE"),
        ("-tpmdev emulator,id=t,chardev=c", "another process"),
        ("-add-fd fd=3,set=1", "descriptor"),
        ("-netdev", "without a value"),
    ];
    for (extra, reason) in table {
        let mut args = demo();
        args.extend(line(extra));
        let refusal = derive(&args, &facts()).expect_err(extra);
        assert_eq!(refusal.code, RefusalCode::Unsupported, "{extra}");
        assert!(
            refusal.detail.to_lowercase().contains(&reason.to_lowercase()),
            "{extra}: {}",
            refusal.detail
        );
        let option = extra.split(' ').next().unwrap();
        assert!(
            refusal.detail.contains(option.trim_start_matches('-')) || option == "-device",
            "{}",
            refusal.detail
        );
    }
}

#[test]
fn an_old_qemu_is_refused_with_its_version() {
    let old = Facts {
        version: Version {
            major: 7,
            minor: 2,
            micro: 9,
        },
        ..facts()
    };
    let refusal = derive(&demo(), &old).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::QemuTooOld);
    assert!(refusal.detail.contains("7.2.9"), "{}", refusal.detail);
}

#[test]
fn what_qemu_adds_by_itself_is_refused_too() {
    let refusal = |text: &str| derive(&line(text), &facts()).unwrap_err().detail;
    assert!(refusal("qemu-system-x86_64 -m 256").contains("default NIC"));
    let nographic = refusal("qemu-system-x86_64 -nic none -nographic");
    assert!(nographic.contains("-nographic"), "{nographic}");
    let fine = "qemu-system-x86_64 -nic none -nographic -serial file:/x -monitor none";
    assert!(shown(&derive(&line(fine), &facts()).unwrap().spec).contains("-display none"));
}

#[test]
fn devices_that_came_or_went_are_noticed() {
    let mut args = demo();
    args.extend(line("-device virtio-rng-pci,id=rng0"));
    let with = |devices: &[&str]| {
        let devices = devices.iter().map(|d| (*d).to_owned()).collect();
        derive(&args, &Facts { devices, ..facts() })
    };
    assert!(with(&["rng0"]).is_ok());
    assert!(with(&["rng0", "hot1"]).unwrap_err().detail.contains("hot1"));
    assert!(with(&[]).unwrap_err().detail.contains("rng0"));
}

#[test]
fn ram_in_all_its_forms() {
    let memdev = |id: &str, mib: u64| Memdev {
        id: id.into(),
        bytes: mib << 20,
        by_path: false,
    };
    // Two NUMA nodes: the machine has no backend of its own then.
    let mut args = demo();
    args.extend(line(
        "-object memory-backend-ram,id=ram0,size=128M,host-nodes=0,policy=bind -numa node,memdev=ram0 \
         -object memory-backend-ram,id=ram1,size=512M -numa node,memdev=ram1",
    ));
    let numa = Facts {
        memdevs: vec![memdev("ram0", 128), memdev("ram1", 512)],
        ..facts()
    };
    let spec = derive(&args, &numa).unwrap().spec;
    assert_eq!(
        spec.ram.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(),
        ["ram1", "ram0"]
    );
    assert!(!shown(&spec).contains("memory-backend"), "{}", shown(&spec));

    let hot = Facts {
        memdevs: vec![memdev("pc.ram", 256), memdev("hot", 128)],
        ..facts()
    };
    assert!(derive(&demo(), &hot).unwrap_err().detail.contains("hot"));
    let path = Memdev {
        by_path: true,
        ..memdev("pc.ram", 256)
    };
    assert!(
        derive(
            &demo(),
            &Facts {
                memdevs: vec![path],
                ..facts()
            }
        )
        .unwrap_err()
        .detail
        .contains("is a path")
    );
    assert!(
        derive(
            &demo(),
            &Facts {
                memdevs: vec![],
                ..facts()
            }
        )
        .unwrap()
        .spec
        .ram
        .is_empty()
    );

    let microvm = Facts {
        machine: "microvm".into(),
        default_ram_id: "microvm.ram".into(),
        memdevs: vec![memdev("microvm.ram", 64)],
        ..facts()
    };
    let spec = derive(&demo(), &microvm).unwrap().spec;
    assert!(
        shown(&spec).starts_with("-machine microvm,memory-backend=microvm.ram "),
        "{}",
        shown(&spec)
    );
}

#[test]
fn taps_are_found_without_a_name_and_by_the_bridge_helper() {
    let nics = |net: &str| {
        let spec = derive(&line(&format!("qemu-system-x86_64 -nodefaults {net}")), &facts())
            .unwrap()
            .spec;
        (shown(&spec), spec.nics)
    };
    let (text, found) = nics("-netdev tap,id=a -netdev tap,id=b");
    assert_eq!(
        found.iter().map(|n| n.tap.as_str()).collect::<Vec<_>>(),
        ["t0", "vnet3"]
    );
    assert!(text.contains("tap,ifname=[1],script=no,downscript=no,id=b"), "{text}");
    let (text, found) =
        nics("-nic bridge,br=lan,model=virtio-net-pci,mac=52:54:00:00:00:01 -netdev tap,id=x,ifname=other");
    assert_eq!(
        found[0].bridge.as_deref(),
        Some("br0"),
        "what the kernel says counts more than the option"
    );
    assert_eq!(
        found[1],
        Nic {
            bridge: None,
            tap: "other".into()
        }
    );
    assert!(
        text.contains("-nic tap,ifname=[0],script=no,downscript=no,model=virtio-net-pci"),
        "{text}"
    );
    let (text, _) = nics("-netdev tap,id=q,fds=25:26:27,vhost=on,vhostfds=28:29:30");
    assert!(text.contains("id=q,vhost=on,queues=3"), "{text}");
}

proptest! {
    #[test]
    fn no_command_line_panics(args in prop::collection::vec(
        prop_oneof![
            prop::sample::select(vec![
                "-M", "-machine", "-object", "-device", "-netdev", "-nic", "-chardev", "-serial", "-drive", "-blockdev", "-vnc",
                "-numa", "-mon", "-smbios", "-cpu", "-incoming", "-S", "--nodefaults",
            ]).prop_map(str::to_owned),
            "[a-z:=,.{}\"/-]{0,24}",
        ],
        0..12,
    )) {
        let _ = derive(&args, &facts());
    }
}
