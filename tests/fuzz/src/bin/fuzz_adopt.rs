//! Command lines of QEMUs that others started, an argument a line: taken or refused, never a panic, and always the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use umbra_replicator::adopt::ability::{Ability, NEEDED};
use umbra_replicator::adopt::facts::{BlockNode, Memdev, Tap};
use umbra_replicator::adopt::options::Opts;
use umbra_replicator::adopt::{Facts, Storage, derive};
use umbra_replicator::qmp::Version;

/// What such a QEMU would answer. The first byte varies what it has.
fn facts(how: u8) -> Facts {
    let version = Version {
        major: 10,
        minor: 0,
        micro: 2,
    };
    let memdev = |id: &str| Memdev {
        id: id.into(),
        bytes: 256 << 20,
        by_path: how & 1 != 0,
    };
    let disk = |device: &str, file: &str| BlockNode {
        node: "#block1".into(),
        device: device.into(),
        driver: if how & 2 != 0 { "qcow2" } else { "raw" }.into(),
        file: file.into(),
        bytes: 64 << 20,
        read_only: how & 4 != 0,
    };
    let tap = |fd: u32| Tap {
        fd,
        name: "t0".into(),
        bridge: (how & 8 != 0).then(|| "br0".into()),
    };
    Facts {
        version,
        ability: Ability {
            capabilities: NEEDED.map(|name| (name.to_owned(), false)).into(),
            told_bandwidth: how & 32 != 0,
            ..Ability::default()
        },
        machine: "pc-q35-10.0".into(),
        default_ram_id: "pc.ram".into(),
        memdevs: vec![memdev("pc.ram")],
        devices: vec!["net0".into(), "d0".into()],
        taps: vec![tap(25)],
        disks: vec![
            disk("d0", "/srv/d0.img"),
            disk("/machine/peripheral/d0/virtio-backend", "/srv/d1.img"),
        ],
        cwd: "/".into(),
        storage: if how & 16 != 0 {
            Storage::Shared
        } else {
            Storage::Private
        },
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((how, text)) = bytes.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    let args: Vec<String> = text.lines().map(str::to_owned).collect();
    for arg in &args {
        if let Ok(opts) = Opts::parse(arg, Some("driver")) {
            let _ = opts.render();
        }
    }
    let facts = facts(*how);
    assert_eq!(derive(&args, &facts), derive(&args, &facts));
});
