//! Disks of a guest, and the journal that the guest writes on them, read off their images.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::process::output;

/// The guest's own file: what it writes is what is looked for.
#[path = "../../guest/src/record.rs"]
mod record;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bus {
    VirtioBlk,
    VirtioScsi,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskSpec {
    pub bus: Bus,
    /// `raw` or `qcow2`.
    pub format: &'static str,
    pub mib: u64,
}

/// What the guest calls its disks, in order.
pub fn names(disks: &[DiskSpec]) -> Vec<String> {
    let (mut blk, mut scsi) = (b'a'..=b'z', b'a'..=b'z');
    let mut name = |d: &DiskSpec| {
        let (prefix, letters) = match d.bus {
            Bus::VirtioBlk => ("vd", &mut blk),
            Bus::VirtioScsi => ("sd", &mut scsi),
        };
        format!("{prefix}{}", char::from(letters.next().unwrap_or(b'z')))
    };
    disks.iter().map(&mut name).collect()
}

/// Makes the images and says how QEMU is to have them: `-drive` and `-blockdev`, as operators and libvirt write them.
pub fn arguments(disks: &[DiskSpec], file: impl Fn(usize) -> PathBuf) -> Result<Vec<String>> {
    let mut args: Vec<String> = Vec::new();
    if disks.iter().any(|d| d.bus == Bus::VirtioScsi) {
        args.extend(["-device", "virtio-scsi-pci,id=scsi0"].map(str::to_owned));
    }
    for (n, disk) in disks.iter().enumerate() {
        let path = file(n);
        // Shared ones are there already.
        if !path.exists() {
            create(&path, disk.format, disk.mib << 20)?;
        }
        let path = path.display();
        match disk.bus {
            Bus::VirtioBlk => {
                args.extend([
                    "-drive".into(),
                    format!("file={path},if=none,id=d{n},format={}", disk.format),
                ]);
                args.extend(["-device".into(), format!("virtio-blk-pci,drive=d{n}")]);
            }
            Bus::VirtioScsi => {
                let storage = format!(r#"{{"driver":"file","filename":"{path}","node-name":"s{n}"}}"#);
                let format = format!(r#"{{"driver":"{}","node-name":"f{n}","file":"s{n}"}}"#, disk.format);
                args.extend(["-blockdev".into(), storage, "-blockdev".into(), format]);
                args.extend(["-device".into(), format!("scsi-hd,bus=scsi0.0,drive=f{n}")]);
            }
        }
    }
    Ok(args)
}

pub fn create(path: &Path, format: &str, bytes: u64) -> Result<()> {
    let mut cmd = Command::new("qemu-img");
    cmd.args(["create", "-q", "-f", format])
        .arg(path)
        .arg(bytes.to_string());
    output(&mut cmd).map(|_| ())
}

/// The journal of an image that no QEMU writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Journal {
    /// The latest record. All that may be there up to it are there, whole.
    pub last: u64,
}

impl Journal {
    /// Reads it; an error is a record that is lost, torn or in another one's place.
    pub fn read(image: &Path, format: &str) -> Result<Self> {
        let raw = image.with_extension("journal");
        let mut cmd = Command::new("qemu-img");
        // -U: a stopped QEMU may hold the image still.
        cmd.args(["convert", "-U", "-f", format, "-O", "raw"])
            .arg(image)
            .arg(&raw);
        output(&mut cmd)?;
        let journal = Self::of(&raw).with_context(|| format!("the journal on {}", image.display()));
        let _ = std::fs::remove_file(&raw);
        journal
    }

    fn of(raw: &Path) -> Result<Self> {
        let file = File::open(raw)?;
        let bytes = file.metadata()?.len();
        let mut found = Vec::new();
        for slot in 0..record::SLOTS {
            let mut block = [0; record::BYTES as usize];
            file.read_exact_at(&mut block, record::place(slot, bytes).context("the disk is too small")?)?;
            let words: Vec<u64> = block
                .as_chunks::<8>()
                .0
                .iter()
                .map(|b| u64::from_le_bytes(*b))
                .collect();
            let n = record::read(&words)
                .map_err(anyhow::Error::msg)
                .with_context(|| format!("slot {slot}"))?;
            ensure!(n == 0 || n % record::SLOTS == slot, "record {n} is in slot {slot}");
            found.push(n);
        }
        let last = found.iter().copied().max().unwrap_or(0);
        for n in last.saturating_sub(record::SLOTS - 1).max(1)..=last {
            if found.get((n % record::SLOTS) as usize) != Some(&n) {
                bail!("record {n} is lost, the last one is {last}");
            }
        }
        Ok(Self { last })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_and_a_torn_record_are_told() {
        let path = std::env::temp_dir().join(format!("umbra-journal-{}", std::process::id()));
        let file = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let bytes = 8 << 20;
        file.set_len(bytes).unwrap();
        let write = |n: u64, at: u64| {
            let block: Vec<u8> = (0..record::WORDS)
                .flat_map(|i| record::word(n, i).to_le_bytes())
                .collect();
            file.write_all_at(&block, record::place(at, bytes).unwrap()).unwrap();
        };
        assert_eq!(Journal::of(&path).unwrap().last, 0);
        (1..=700).for_each(|n| write(n, n));
        assert_eq!(Journal::of(&path).unwrap().last, 700);
        let why = |file: &File| {
            let _ = file;
            format!("{:#}", Journal::of(&path).unwrap_err())
        };
        write(600 - record::SLOTS, 600);
        assert!(why(&file).contains("record 600 is lost"), "{}", why(&file));
        write(600, 601);
        assert!(why(&file).contains("is in slot"), "{}", why(&file));
        file.write_all_at(b"torn", record::place(601, bytes).unwrap() + 100)
            .unwrap();
        assert!(why(&file).contains("word 12"), "{}", why(&file));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn names_follow_the_bus() {
        let disk = |bus| DiskSpec {
            bus,
            format: "raw",
            mib: 1,
        };
        let disks = [disk(Bus::VirtioBlk), disk(Bus::VirtioScsi), disk(Bus::VirtioBlk)];
        assert_eq!(names(&disks), ["vda", "sda", "vdb"]);
    }
}
