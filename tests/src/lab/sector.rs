//! A guest of one boot sector: for accelerators on which no Linux boots.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::host::Host;
use super::process::output;

const SOURCE: &str = include_str!("../../guest/sector.s");
/// Where a BIOS loads it.
const ADDRESS: &str = "0x7c00";
/// SeaBIOS boots from no disk that is smaller.
const DISK: u64 = 1 << 20;

/// Pages that may differ between two copies, by number: the guest's pattern and what is below it (BIOS data, its stack), and
/// the BIOS's own area below 1 MiB, where SeaBIOS has the stack of its interrupts.
pub fn is_written(page: u64) -> bool {
    page < 0x50 || (0x9f..0x100).contains(&page)
}

/// Assembles the sector into a disk for all hosts of the lab.
pub fn disk(host: &Host) -> Result<PathBuf> {
    let file = |name: &str| host.common(name);
    let (source, object, image) = (file("sector.s"), file("sector.o"), file("sector.disk"));
    if image.exists() {
        return Ok(image);
    }
    std::fs::write(&source, SOURCE).with_context(|| format!("writing {}", source.display()))?;
    output(Command::new("as").args(["--32", "-o"]).arg(&object).arg(&source)).context("as (package binutils)")?;
    let mut link = Command::new("ld");
    link.args(["-m", "elf_i386", "-Ttext", ADDRESS, "--oformat", "binary", "-o"]);
    output(link.arg(&image).arg(&object)).context("ld (package binutils)")?;
    let disk = std::fs::File::options().write(true).open(&image)?;
    disk.set_len(DISK).with_context(|| format!("{}", image.display()))?;
    Ok(image)
}

/// Read-only: a disk that nobody writes is carried by its path and not copied.
pub fn arguments(host: &Host) -> Result<Vec<String>> {
    let drive = format!("if=none,id=boot,format=raw,readonly=on,file={}", disk(host)?.display());
    let args = [
        "-drive",
        &drive,
        "-device",
        "virtio-blk-pci,drive=boot,bootindex=0",
        "-cpu",
        "qemu64",
    ];
    Ok(args.map(str::to_owned).into())
}
