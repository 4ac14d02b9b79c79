//! Realistic command lines and what becomes of them.

use proptest::prelude::*;
use umbra_api::VmId;

use super::*;
use crate::adopt::ability::{Ability, NEEDED};
use crate::adopt::facts::{BlockNode, Memdev, Tap};
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
fn shown(spec: &ShadowSpec) -> String {
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
fn shared_and_read_only_disks_are_carried() {
    let mut args = demo();
    args.extend(line(
        "-drive file=a.qcow2,if=none,id=d -cdrom /srv/b.iso -drive if=pflash,readonly=on,file=/fw/CODE.fd",
    ));
    let shared = Facts {
        storage: Storage::Shared,
        ..facts()
    };
    let spec = derive(&args, &shared).unwrap().spec;
    assert!(
        shown(&spec).contains("-drive file=/home/op/a.qcow2,if=none,id=d"),
        "{}",
        shown(&spec)
    );
    for file in ["/home/op/a.qcow2", "/srv/b.iso", "/fw/CODE.fd"] {
        assert!(spec.files.contains(&file.to_owned()), "{file}: {:?}", spec.files);
    }
    let mut args = demo();
    args.extend(line(
        "-drive file=nbd://store/x,if=virtio -blockdev raw,node-name=r,file=f",
    ));
    let spec = derive(&args, &shared).unwrap().spec;
    assert_eq!(
        spec.files.len(),
        2,
        "neither a URL nor a node is a file: {:?}",
        spec.files
    );
}

fn block(node: &str, device: &str, driver: &str, file: &str) -> BlockNode {
    BlockNode {
        node: node.into(),
        device: device.into(),
        driver: driver.into(),
        file: file.into(),
        bytes: 64 << 20,
        read_only: false,
    }
}

/// Options of private disks, what QEMU says of them, and what the shadow gets.
#[test]
fn private_disks_become_gaps() {
    let table = [
        (
            "-drive file=/srv/a.qcow2,if=none,id=d0,format=qcow2 -device virtio-blk-pci,drive=d0",
            block("#block1", "d0", "qcow2", "/srv/a.qcow2"),
            "-drive file=[disk0],if=none,id=d0,format=qcow2",
            "/srv/a.qcow2",
        ),
        // Its id is QEMU's, and its format was guessed by it: the shadow's is told.
        (
            "-drive if=virtio,file=a.img,cache=none",
            block("#block2", "virtio0", "raw", "a.img"),
            "-drive if=virtio,file=[disk0],cache=none,format=raw",
            "/home/op/a.img",
        ),
        (
            "-blockdev driver=qcow2,node-name=f,file.driver=file,file.filename=/srv/b.qcow2,discard=unmap",
            block("f", "/machine/peripheral/disk0", "qcow2", "/srv/b.qcow2"),
            "-blockdev driver=qcow2,node-name=f,file.driver=file,file.filename=[disk0],discard=unmap",
            "/srv/b.qcow2",
        ),
        (
            r#"-blockdev {"driver":"qcow2","node-name":"f","file":{"driver":"file","filename":"/srv/b.qcow2"},"backing":null}"#,
            block("f", "x", "qcow2", "/srv/b.qcow2"),
            r#"-blockdev {"backing":null,"driver":"qcow2","file":{"driver":"file","filename":"[disk0]"},"node-name":"f"}"#,
            "/srv/b.qcow2",
        ),
        // libvirt's: the storage is a node of its own, and comes first.
        (
            r#"-blockdev {"driver":"file","filename":"/srv/c.img","node-name":"s","auto-read-only":true}
               -blockdev {"node-name":"f","read-only":false,"driver":"raw","file":"s"}"#,
            block("f", "x", "raw", "/srv/c.img"),
            r#"-blockdev {"auto-read-only":true,"driver":"file","filename":"[disk0]","node-name":"s"}"#,
            "/srv/c.img",
        ),
        // A device of the primary's is a file of the target's.
        (
            "-blockdev host_device,node-name=s,filename=/dev/vg/web",
            block("s", "x", "host_device", "/dev/vg/web"),
            "-blockdev file,node-name=s,filename=[disk0]",
            "/dev/vg/web",
        ),
    ];
    for (options, node, expected, path) in table {
        let mut args = demo();
        args.extend(line(options));
        let disks = vec![node.clone()];
        let spec = derive(&args, &Facts { disks, ..facts() }).expect(options).spec;
        assert!(shown(&spec).contains(expected), "{expected}\n{}", shown(&spec));
        let [disk] = spec.disks.as_slice() else {
            panic!("{options}: {:?}", spec.disks)
        };
        assert_eq!(
            (disk.path.as_str(), &disk.node, disk.bytes),
            (path, &node.node, 64 << 20)
        );
        assert!(!spec.files.iter().any(|f| f == path), "the target needs no such file");
        command::check(&spec).unwrap();
    }
}

/// A former shadow's disks are the same spec again, but for where their images are.
#[test]
fn disks_of_a_former_shadow_are_disks_again() {
    let mut args = demo();
    args.extend(line(
        r#"-drive if=virtio,file=a.img -blockdev {"driver":"qcow2","node-name":"f","file":{"driver":"file","filename":"/srv/b"}}"#,
    ));
    let disks = |a: &str, b: &str| vec![block("#block2", "virtio0", "raw", a), block("f", "x", "qcow2", b)];
    let with = |disks| Facts { disks, ..facts() };
    let first = derive(&args, &with(disks("a.img", "/srv/b"))).unwrap().spec;
    let place = |n: usize| ["/d/0.img", "/d/1.img"][n];
    let fill = |a: &Arg| match a {
        Arg::Plain(text) => text.clone(),
        Arg::Disk { disk, prefix, suffix } => format!("{prefix}{}{suffix}", place(*disk)),
        Arg::Netdev { prefix, suffix, .. } => format!("{prefix}t0{suffix}"),
        Arg::RunFile { prefix, file, suffix } => format!("{prefix}/r/{file}{suffix}"),
    };
    let args: Vec<_> = ["/usr/bin/qemu-system-x86_64".into()]
        .into_iter()
        .chain(first.args.iter().map(fill))
        .collect();
    let again = derive(&args, &with(disks(place(0), place(1)))).unwrap().spec;
    assert_eq!(again.args, first.args);
    assert_eq!(
        again.disks.iter().map(|d| d.path.as_str()).collect::<Vec<_>>(),
        ["/d/0.img", "/d/1.img"]
    );
}

#[test]
fn uefi_variables_are_a_disk_and_its_code_a_file() {
    let code = "-drive if=pflash,format=raw,readonly=on,file=/fw/CODE.fd";
    let nodes = r#"-blockdev {"driver":"file","filename":"/fw/VARS.fd","node-name":"p1s"}
        -blockdev {"driver":"raw","node-name":"p1","file":"p1s"} -machine pflash1=p1"#;
    for (options, node, device) in [
        ("-drive if=pflash,format=raw,file=/fw/VARS.fd", "#block7", "pflash1"),
        (nodes, "p1", "/machine/system.flash1"),
    ] {
        let mut args = demo();
        args.extend(line(&format!("{code} {options}")));
        let vars = BlockNode {
            bytes: 540_672,
            ..block(node, device, "raw", "/fw/VARS.fd")
        };
        let spec = derive(
            &args,
            &Facts {
                disks: vec![vars],
                ..facts()
            },
        )
        .unwrap()
        .spec;
        assert!(spec.files.contains(&"/fw/CODE.fd".to_owned()), "{:?}", spec.files);
        assert!(!spec.files.contains(&"/fw/VARS.fd".to_owned()), "{:?}", spec.files);
        let [disk] = spec.disks.as_slice() else {
            panic!("one disk: {:?}", spec.disks)
        };
        assert_eq!(
            (disk.node.as_str(), disk.path.as_str(), disk.bytes),
            (node, "/fw/VARS.fd", 540_672)
        );
        command::check(&spec).unwrap();
    }
}

#[test]
fn disks_that_cannot_be_copied_are_refused_with_their_reason() {
    let nodes = || {
        vec![
            block("#block1", "d0", "qcow2", "/srv/a"),
            block("f", "x", "qcow2", "/srv/b"),
            block("v", "y", "vmdk", "/srv/v"),
        ]
    };
    let table = [
        ("-drive file=/srv/a,id=d0,snapshot=on", "temporary file"),
        ("-drive file=/srv/a,id=d0,format=vdi", "vdi was not tried"),
        ("-drive file=nbd://h/x,id=d0", "only files"),
        ("-drive file=/srv/a,id=d0,backing.file.filename=/x", "backing chain"),
        ("-drive file=/srv/a,if=sd", "if=sd"),
        ("-drive file=/srv/other,id=d7", "does not list it"),
        ("-blockdev driver=throttle,node-name=t,file=f", "throttle"),
        (
            r#"-blockdev {"driver":"qcow2","node-name":"f","file":"nowhere"}"#,
            "nowhere is no -blockdev",
        ),
        (
            r#"-blockdev {"driver":"qcow2","node-name":"f","backing":"base","file":{"driver":"file","filename":"/srv/b"}}"#,
            "backing chain",
        ),
        (
            "-blockdev qcow2,node-name=g,file.driver=file,file.filename=/srv/g",
            "no device",
        ),
        (
            "-blockdev qcow2,node-name=f,file.driver=rbd,file.filename=x",
            "only files",
        ),
        ("-uuid x", "not on the command line"),
    ];
    for (options, reason) in table {
        let mut args = demo();
        args.extend(line(options));
        let disks = nodes();
        let refusal = derive(&args, &Facts { disks, ..facts() }).expect_err(options);
        assert_eq!(refusal.code, RefusalCode::Unsupported);
        assert!(refusal.detail.contains(reason), "{options}: {}", refusal.detail);
    }
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
