//! Writes a journal on a disk at a steady rate. A record counts as acknowledged when fdatasync has said so: none of those may
//! be lost, wherever the VM goes. Old records are read back, past the page cache.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crate::record;
use crate::state::{Disk, State};
use crate::sys;

/// The driver may still be probing when its module is loaded.
const APPEARS: Duration = Duration::from_secs(20);

pub fn run(disk: &Disk, state: &State) {
    if let Err(error) = write(disk, state) {
        state.errors.fetch_add(1, Relaxed);
        // The console may be gone, the counter is not.
        let _ = writeln!(io::stdout().lock(), "E disk {}: {error}", disk.name);
    }
}

fn write(disk: &Disk, state: &State) -> io::Result<()> {
    let path = Path::new("/dev").join(&disk.name);
    let give_up = Instant::now() + APPEARS;
    while !path.exists() && Instant::now() < give_up {
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut file = open(&path)?;
    let bytes = file.seek(SeekFrom::End(0))?;
    // Page-aligned, as O_DIRECT wants it.
    let block = sys::anonymous_words(record::WORDS)?;
    let small = || io::Error::other(format!("{bytes} bytes are too few for the journal"));
    let mut next = Instant::now();
    for n in 1.. {
        let at = record::place(n, bytes).ok_or_else(small)?;
        block.iter_mut().enumerate().for_each(|(i, w)| *w = record::word(n, i));
        file.write_all_at(sys::bytes_of(block), at)?;
        file.sync_data()?;
        disk.acknowledged.store(n, Relaxed);
        // An old one: the one whose slot comes about half a ring later.
        if let Some(old) = n.checked_sub(record::SLOTS / 2).filter(|old| *old > 0) {
            file.read_exact_at(sys::bytes_of_mut(block), record::place(old, bytes).ok_or_else(small)?)?;
            match record::read(block) {
                Ok(found) if found == old => {}
                other => return Err(io::Error::other(format!("record {old} reads as {other:?}"))),
            }
        }
        let rate = state.disk_records_per_s.load(Relaxed).clamp(1, 10_000);
        // What a stopped guest missed is not made up for.
        next = (next + Duration::from_secs(1) / u32::try_from(rate).unwrap_or(1)).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
}
