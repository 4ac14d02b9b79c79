//! Disks on command lines: those that are copied, those that are carried, and those that are refused.

use super::tests::{demo, facts, line, shown};
use super::*;
use crate::adopt::facts::BlockNode;
use crate::launch::command;

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
