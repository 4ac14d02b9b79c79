//! Writes what the fuzzers begin with: `cargo run -p umbra-fuzz --example corpus -- DIR` makes a folder in DIR for each of them. Good inputs, which random
//! bytes would take long to find.

use std::error::Error;
use std::path::{Path, PathBuf};

use umbra_api::Epoch;
use umbra_api::wire::control::Message;
use umbra_api::wire::frame::RoundEnd;
use umbra_api::wire::setup::{Block, StreamSetup};
use umbra_api::wire::{Purpose, encode_preamble};
use umbra_replicator::encode::{Encoder, Settings};
use umbra_replicator::stream::compose::Composer;
use umbra_replicator::stream::items::command;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let dir: PathBuf = std::env::args_os().nth(1).ok_or("usage: corpus DIR")?.into();
    write(&dir.join("stream"), &streams())?;
    write(&dir.join("frames"), &frames()?)?;
    write(&dir.join("qmp"), &qmp())?;
    write(&dir.join("adopt"), &command_lines())
}

fn command_lines() -> Vec<(u8, Vec<u8>)> {
    let uuid = "-uuid 6e3a0b3e-6f3d-4a83-9a55-0f6a3d1f2c11";
    let plain = format!(
        "/usr/bin/qemu-system-x86_64 {uuid} -name web,debug-threads=on -nodefaults -display none -M q35 -m 256 -smp 1 \
         -netdev tap,id=n0,ifname=t0,script=no,downscript=no -device virtio-net-pci,netdev=n0,mac=52:54:00:00:99:02 \
         -drive file=/srv/d0.img,if=none,id=d0,format=raw -device virtio-blk-pci,drive=d0 \
         -serial file:/tmp/web.ser -qmp unix:/tmp/web.qmp,server=on,wait=off"
    );
    let json = format!(
        r#"qemu-system-x86_64 {uuid} -machine pc-q35-10.0,memory-backend=pc.ram -S
        -object {{"qom-type":"memory-backend-memfd","id":"pc.ram","size":268435456}}
        -blockdev {{"driver":"file","filename":"/srv/d1.img","node-name":"s0"}} -blockdev {{"driver":"qcow2","node-name":"f0","file":"s0"}}
        -device {{"driver":"scsi-hd","drive":"f0","id":"d0"}} -netdev {{"type":"tap","fd":"25","id":"n0"}}
        -chardev socket,id=m,fd=22,server=on,wait=off -mon chardev=m,mode=control -incoming defer"#
    );
    let lines = |text: &str| text.split_whitespace().collect::<Vec<_>>().join("\n").into_bytes();
    vec![(0, lines(&plain)), (10, lines(&json)), (31, lines(&plain))]
}

/// Each input's first byte says how it is cut or what kind it is.
fn write(dir: &Path, inputs: &[(u8, Vec<u8>)]) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    for (i, (first, rest)) in inputs.iter().enumerate() {
        std::fs::write(dir.join(format!("seed-{i}")), [&[*first][..], rest].concat())?;
    }
    Ok(())
}

fn setup() -> StreamSetup {
    let block = |name: &str, pages: u64| Block {
        name: name.into(),
        bytes: pages << 12,
    };
    let blocks = vec![block("pc.ram", 64), block("pc.bios", 4)];
    StreamSetup {
        version: 3,
        config: b"\x07\0\0\0\x03q35".to_vec(),
        ram_section: 2,
        ram_version: 4,
        blocks,
    }
}

fn streams() -> Vec<(u8, Vec<u8>)> {
    let setup = setup();
    let json = br#"{"page_size":4096,"devices":[{"name":"timer"}]}"#;
    let uuid = [&b"\x05\x12configuration/uuid\0\0\0\x01"[..], &[7; 16]].concat();
    let caps = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x06events";
    let bits = b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x0c";
    let rich = [&setup.config[..], bits, caps, &uuid].concat();
    let mut out = Vec::new();
    for config in [&setup.config, &rich] {
        let mut c = Composer::new(&setup);
        c.header(config);
        out.push((0, c.into_bytes()));
        let mut c = Composer::new(&setup);
        c.header(config)
            .command(command::OPEN_RETURN_PATH, &[])
            .command(command::PING, &[0, 0, 0, 1])
            .ram_start(false);
        c.part()
            .page(0, 1, None)
            .page(0, 2, Some(&[2; 4096]))
            .page(1, 3, None)
            .end_section();
        c.part().page(1, 0, None).page(0, 0, None).end_section();
        c.command(command::SWITCHOVER_START, &[])
            .end()
            .page(0, 5, None)
            .end_section();
        c.raw(b"\x04\0\0\0\x03\x05timer\0\0\0\0\0\0\0\x02state\x7e\0\0\0\x03")
            .description(json);
        let whole = c.into_bytes();
        out.push((0, whole.clone()));
        out.push((255, whole));
    }
    out
}

fn frames() -> Result<Vec<(u8, Vec<u8>)>> {
    let mut out = vec![
        (0, Message::Ping { n: 1 }.encode()),
        (0, Message::Commit { epoch: Epoch(3) }.encode()),
    ];
    for level in [0, 1] {
        let mut e = Encoder::new(Settings {
            level_min: level,
            level_rounds: level,
            level_max: level,
            delta_cache_bytes: 1 << 20,
        })?;
        e.setup(&setup());
        let mut keep = |p: &[u8]| {
            out.push((1, p.to_vec()));
            Ok(())
        };
        e.page(0, 3, Some(&[5; 4096]), &mut keep)?;
        e.page(0, 4, None, &mut keep)?;
        e.page(1, 1, Some(&[6; 4096]), &mut keep)?;
        // A known page, and from the third version on a delta.
        e.page(0, 5, Some(&[5; 4096]), &mut keep)?;
        let mut changing = [5; 4096];
        for n in 7..10 {
            changing[100] = n;
            e.page(0, 3, Some(&changing), &mut keep)?;
        }
        e.flush(&mut keep)?;
    }
    out.push((2, RoundEnd { round: 1, pages: 2 }.encode().to_vec()));
    out.push((5, setup().encode()?));
    out.push((255, encode_preamble(Purpose::Ram).to_vec()));
    Ok(out)
}

fn qmp() -> Vec<(u8, Vec<u8>)> {
    let greeting =
        r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}"#;
    let event =
        r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "MIGRATION", "data": {"status": "setup"}}"#;
    let answers =
        "{\"return\": {}, \"id\": 1}\n{\"id\": 2, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}";
    let all = format!("{greeting}\r\n{event}\n{answers}\n");
    vec![
        (0, all.clone().into_bytes()),
        (9, all.into_bytes()),
        (255, greeting.as_bytes().to_vec()),
    ]
}
