//! QEMU's own memory, of which a group's reclaim takes what lay idle: its load of device state would wait for each page of it.
//!
//! Nothing can be exempted from a reclaim, so it is read back right after: a few thousand pages, through the address space that has
//! them, which also makes them the youngest.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use crate::stream::items::PAGE_SIZE;

/// Entries of pagemap that are read in one call.
const ENTRIES: usize = 8 << 10;
/// Bit of a page that is in swap.
const SWAPPED: u64 = 1 << 62;

/// Reads back all private memory of a process that is in swap. Returns how many pages that were.
pub fn fetch(pid: i32, mem: &File) -> io::Result<u64> {
    if own_swap_kib(&fs::read_to_string(format!("/proc/{pid}/status"))?) == 0 {
        return Ok(0);
    }
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let (mut entries, mut fetched) = (vec![0u8; ENTRIES * 8], 0);
    for (from, to) in private(&maps) {
        let mut page = from / PAGE_SIZE as u64;
        let end = to / PAGE_SIZE as u64;
        while page < end {
            let want = usize::try_from(end - page).map_or(ENTRIES, |n| n.min(ENTRIES));
            let buffer = entries.get_mut(..want * 8).unwrap_or_default();
            // A range that went meanwhile.
            if pagemap.read_exact_at(buffer, page * 8).is_err() {
                break;
            }
            for (at, entry) in (page..).zip(buffer.as_chunks::<8>().0) {
                if u64::from_ne_bytes(*entry) & SWAPPED != 0 && mem.read_at(&mut [0], at * PAGE_SIZE as u64).is_ok() {
                    fetched += 1;
                }
            }
            page += want as u64;
        }
    }
    Ok(fetched)
}

fn own_swap_kib(status: &str) -> u64 {
    let line = status.lines().find_map(|l| l.strip_prefix("VmSwap:"));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse().ok())
        .unwrap_or(0)
}

/// Address ranges that can be read and are the process's alone.
fn private(maps: &str) -> impl Iterator<Item = (u64, u64)> {
    maps.lines().filter_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        let hex = |s: &str| u64::from_str_radix(s, 16).ok();
        let ours = rest.starts_with('r') && rest.as_bytes().get(3) == Some(&b'p') && !rest.ends_with("[vsyscall]");
        ours.then_some((hex(from)?, hex(to)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_its_own_and_readable_is_looked_at() {
        let maps = "55d0c0000000-55d0c0001000 r--p 00000000 fe:00 12 /usr/bin/qemu\n\
                    7f0000000000-7f0000100000 rw-s 00000000 00:15 77 /dev/shm/a.ram\n\
                    7f1000000000-7f1000002000 rw-p 00000000 00:00 0 \n\
                    7f2000000000-7f2000001000 ---p 00000000 00:00 0 \n\
                    ffffffffff600000-ffffffffff601000 r-xp 00000000 00:00 0 [vsyscall]\nodd\n";
        let found: Vec<_> = private(maps).collect();
        assert_eq!(
            found,
            [
                (0x55d0_c000_0000, 0x55d0_c000_1000),
                (0x7f10_0000_0000, 0x7f10_0000_2000)
            ]
        );
    }

    #[test]
    fn a_process_that_has_nothing_in_swap_is_left_alone() {
        assert_eq!(own_swap_kib("VmRSS:\t  5 kB\nVmSwap:\t   84 kB\n"), 84);
        assert_eq!(own_swap_kib("Name: x\n"), 0);
        let me = std::process::id() as i32;
        let mem = File::open("/proc/self/mem").unwrap();
        // Whatever this machine swapped, it is read without an error.
        fetch(me, &mem).unwrap();
    }
}
