//! How this process reaches the pages of a RAM file, and what it tells the kernel about them.
//!
//! A shadow's pages are made through its QEMU's mapping, by `/proc/PID/mem`: that file is of one address space, for
//! as long as it is open, whoever gets the pid later. A page that is made this way is charged to QEMU's cgroup, is mapped where the
//! guest will need it, and costs this process no page tables. A page that is there already has all of this, and is written and read
//! by the file itself, in half the time. A file without a QEMU (tests) is mapped here.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};
use nix::libc;

use super::own;
use super::plan::Run;
use crate::launch::process::pidfd;
use crate::proc::ProcessId;
use crate::stream::items::PAGE_SIZE;

/// Pages that are looked at in one call.
const LOOK_PAGES: usize = 16 << 10;
/// What is unmapped at once: a fraction of a millisecond's work, and whole huge pages of the usual size.
pub const UNMAP_BYTES: usize = 2 << 20;

pub struct Window {
    /// Of a shadow's file: for looking, its pages are never touched.
    map: MmapRaw,
    shadow: Option<Shadow>,
}

struct Shadow {
    pid: i32,
    file: File,
    mem: File,
    process: OwnedFd,
    /// Where the file's first byte is in QEMU's address space.
    base: u64,
}

impl Window {
    pub fn own(file: &File) -> io::Result<Self> {
        Ok(Self {
            map: MmapOptions::new().map_raw(file)?,
            shadow: None,
        })
    }

    /// Fails if this QEMU has not mapped the whole file, or may not be looked into.
    pub fn through(file: &File, qemu: ProcessId) -> io::Result<Self> {
        let meta = file.metadata()?;
        let path = format!("/proc/{}/maps", qemu.pid);
        let base = find(&fs::read_to_string(&path)?, meta.dev(), meta.ino(), meta.len())
            .ok_or_else(|| io::Error::other(format!("{path} has no mapping of the whole file")))?;
        let mem = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{}/mem", qemu.pid))?;
        let process = pidfd(qemu.pid)?;
        if !qemu.alive() {
            return Err(io::Error::other("QEMU has exited"));
        }
        Ok(Self {
            map: MmapOptions::new().map_raw_read_only(file)?,
            shadow: Some(Shadow {
                pid: qemu.pid,
                file: file.try_clone()?,
                mem,
                process,
                base,
            }),
        })
    }

    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    /// Writes whole pages, and makes those that are not there.
    pub fn write(&self, at: usize, data: &[u8]) -> io::Result<()> {
        self.inside(at, data.len())?;
        if let Some(s) = &self.shadow {
            return s.mem.write_all_at(data, s.base + at as u64);
        }
        // SAFETY: the pages lie inside of the mapping, which is writable and lives as long as `self`; `data` is private
        // memory, so the two do not overlap; no reference into the mapping is ever made.
        unsafe {
            self.map
                .as_mut_ptr()
                .add(at)
                .copy_from_nonoverlapping(data.as_ptr(), data.len())
        };
        Ok(())
    }

    /// Writes whole pages that are there, in RAM or in swap: one that is not would be charged to this process. Not in hugetlbfs.
    pub fn rewrite(&self, at: usize, data: &[u8]) -> io::Result<()> {
        let Some(s) = &self.shadow else {
            return self.write(at, data);
        };
        self.inside(at, data.len())?;
        s.file.write_all_at(data, at as u64)
    }

    /// Reads whole pages.
    pub fn read(&self, at: usize, into: &mut [u8]) -> io::Result<()> {
        let Some(s) = &self.shadow else {
            return self.fetch(at, into);
        };
        self.inside(at, into.len())?;
        s.file.read_exact_at(into, at as u64)
    }

    /// The same, and they are mapped where the guest will need them, back from swap. A hole is filled.
    pub fn fetch(&self, at: usize, into: &mut [u8]) -> io::Result<()> {
        self.inside(at, into.len())?;
        if let Some(s) = &self.shadow {
            return s.mem.read_exact_at(into, s.base + at as u64);
        }
        // SAFETY: as in `write`: inside of the mapping, copied into private memory without a reference.
        unsafe {
            self.map
                .as_ptr()
                .add(at)
                .copy_to_nonoverlapping(into.as_mut_ptr(), into.len())
        };
        Ok(())
    }

    pub fn inside(&self, at: usize, len: usize) -> io::Result<()> {
        match at.checked_add(len) {
            Some(end) if end <= self.map.len() => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{len} bytes at {at} of a mapping of {}", self.map.len()),
            )),
        }
    }

    fn span(&self, run: Run) -> io::Result<(usize, usize)> {
        let (at, len) = (run.first.saturating_mul(PAGE_SIZE), run.pages.saturating_mul(PAGE_SIZE));
        self.inside(at, len).map(|()| (at, len))
    }

    /// For each page whether it is in RAM, as swap cache too.
    pub fn resident(&self, out: &mut Vec<bool>) -> io::Result<()> {
        out.clear();
        self.look(0, self.map.len(), out)
    }

    /// The same for some of them.
    pub fn resident_of(&self, run: Run) -> io::Result<Vec<bool>> {
        let (at, len) = self.span(run)?;
        let mut out = Vec::with_capacity(run.pages);
        self.look(at, len, &mut out)?;
        Ok(out)
    }

    fn look(&self, from: usize, len: usize, out: &mut Vec<bool>) -> io::Result<()> {
        let end = from + len;
        let mut told = vec![0u8; len.div_ceil(PAGE_SIZE).min(LOOK_PAGES)];
        for at in (from..end).step_by(LOOK_PAGES * PAGE_SIZE) {
            let len = (end - at).min(LOOK_PAGES * PAGE_SIZE);
            // SAFETY: the range lies inside of the mapping, and `told` has a byte for each of its pages.
            let looked = unsafe { libc::mincore(self.map.as_mut_ptr().add(at).cast(), len, told.as_mut_ptr()) };
            if looked != 0 {
                return Err(io::Error::last_os_error());
            }
            out.extend(told.iter().take(len.div_ceil(PAGE_SIZE)).map(|b| b & 1 == 1));
        }
        Ok(())
    }

    /// Asks the kernel to write these pages to swap. Those that another process has mapped too stay.
    pub fn page_out(&self, run: Run) -> io::Result<()> {
        let (at, len) = self.span(run)?;
        let Some(s) = &self.shadow else {
            // SAFETY: the range lies inside of the mapping, and the advice changes no page's content.
            let advised = unsafe { libc::madvise(self.map.as_mut_ptr().add(at).cast(), len, libc::MADV_PAGEOUT) };
            return if advised == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            };
        };
        let there = libc::iovec {
            iov_base: std::ptr::without_provenance_mut((s.base as usize).saturating_add(at)),
            iov_len: len,
        };
        // SAFETY: takes a descriptor, one iovec that lives across the call, whose addresses are QEMU's and are not followed here,
        // and numbers; the advice changes no page's content.
        let advised = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                s.process.as_raw_fd(),
                &raw const there,
                1usize,
                libc::MADV_PAGEOUT,
                0u32,
            )
        };
        if advised < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Reads back what QEMU has in swap beside the guest's RAM, in pages.
    pub fn fetch_own(&self) -> io::Result<u64> {
        self.shadow.as_ref().map_or(Ok(0), |s| own::fetch(s.pid, &s.mem))
    }

    /// Begins to read pages back from swap. Holes stay holes.
    pub fn will_need(&self, run: Run) -> io::Result<()> {
        let (at, len) = self.span(run)?;
        self.map.advise_range(Advice::WillNeed, at, len)
    }

    /// Takes this process's map apart piece by piece, the file keeps its pages. `used` has a bit a page; `between` is told how
    /// long each piece took.
    pub fn unmap(&self, used: impl Iterator<Item = u64>, between: &mut impl FnMut(Duration)) {
        if self.shadow.is_some() {
            return;
        }
        let words: Vec<u64> = used.collect();
        for (piece, present) in words.chunks(UNMAP_BYTES / PAGE_SIZE / 64).enumerate() {
            let at = piece * UNMAP_BYTES;
            let len = UNMAP_BYTES.min(self.map.len().saturating_sub(at));
            if present.iter().all(|w| *w == 0) || len == 0 {
                continue;
            }
            let start = Instant::now();
            // SAFETY: the map is a shared one of a file, so nothing is lost that was written through it, and no reference
            // into it is ever made. Refused (gigantic pages), the rest goes in one piece.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, at, len) };
            between(start.elapsed());
        }
    }
}

/// Where a file's first byte is, in the text of a `/proc/PID/maps`, if all of it is mapped there in one go.
fn find(maps: &str, dev: u64, inode: u64, bytes: u64) -> Option<u64> {
    let device = format!("{:02x}:{:02x}", libc::major(dev), libc::minor(dev));
    let mut found: Option<(u64, u64)> = None;
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (range, access) = (fields.next()?, fields.next()?);
        let (offset, its_device, its_inode) = (fields.next()?, fields.next()?, fields.next()?);
        if its_device != device || its_inode.parse() != Ok(inode) || !access.starts_with("rw") {
            continue;
        }
        let hex = |s: &str| u64::from_str_radix(s, 16).ok();
        let (from, to) = range.split_once('-')?;
        let (from, to, offset) = (hex(from)?, hex(to)?, hex(offset)?);
        found = match found {
            // A mapping that was split by some advice goes on where the last piece ended.
            Some((base, end)) if end == from && from.checked_sub(base) == Some(offset) => Some((base, to)),
            None if offset == 0 => Some((from, to)),
            other => other,
        };
    }
    found.filter(|(base, end)| end - base >= bytes).map(|(base, _)| base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_found_whole_or_not_at_all() {
        let maps = "55d0c0000000-55d0c0001000 r--p 00000000 fe:00 12 /usr/bin/qemu\n\
                    7f0000000000-7f0000100000 rw-s 00000000 00:15 77 /dev/shm/a b.ram\n\
                    7f0000100000-7f0000200000 rw-s 00100000 00:15 77 /dev/shm/a b.ram\n\
                    7f0000200000-7f0000300000 rw-s 00000000 00:15 78 /dev/shm/other\n\
                    7fff00000000-7fff00001000 rw-p 00000000 00:00 0 [stack]\n";
        let dev = libc::makedev(0, 0x15);
        assert_eq!(find(maps, dev, 77, 2 << 20), Some(0x7f00_0000_0000));
        assert_eq!(find(maps, dev, 77, 3 << 20), None, "not all of it");
        assert_eq!(find(maps, dev, 78, 1 << 20), Some(0x7f00_0020_0000));
        assert_eq!(find(maps, libc::makedev(0, 0x16), 78, 1 << 20), None);
        assert_eq!(find("nonsense", dev, 77, 1), None);
    }

    #[test]
    fn a_childs_mapping_is_written_and_read_from_here() {
        // A shell that has the file mapped: none does. So this process, seen through /proc.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join("ram"))
            .unwrap();
        file.set_len(8 << 12).unwrap();
        let me = ProcessId::of(std::process::id() as i32).unwrap();
        assert!(Window::through(&file, me).is_err(), "not mapped");
        let theirs = MmapOptions::new().map_raw(&file).unwrap();
        let window = match Window::through(&file, me) {
            Ok(window) => window,
            Err(e) => return println!("SKIPPED: /proc/PID/mem is closed here: {e}"),
        };
        window.write(3 << 12, &[7; PAGE_SIZE]).unwrap();
        let mut page = [0; PAGE_SIZE];
        file.read_exact_at(&mut page, 3 << 12).unwrap();
        assert_eq!(page, [7; PAGE_SIZE]);
        window.rewrite(3 << 12, &[8; PAGE_SIZE]).unwrap();
        for read in [Window::read, Window::fetch] {
            page.fill(0);
            read(&window, 3 << 12, &mut page).unwrap();
            assert_eq!(page, [8; PAGE_SIZE]);
        }
        window.read(5 << 12, &mut page).unwrap();
        assert_eq!(page, [0; PAGE_SIZE], "a hole, and stays one");
        let mut resident = Vec::new();
        window.resident(&mut resident).unwrap();
        assert_eq!(resident, [false, false, false, true, false, false, false, false]);
        window.will_need(Run { first: 0, pages: 8 }).unwrap();
        window.resident(&mut resident).unwrap();
        assert_eq!(resident.iter().filter(|r| **r).count(), 1, "holes stay holes");
        for write in [Window::write, Window::rewrite] {
            assert!(write(&window, 8 << 12, &page).is_err());
        }
        for read in [Window::read, Window::fetch] {
            assert!(read(&window, usize::MAX, &mut page).is_err());
        }
        assert!(window.page_out(Run { first: 7, pages: 2 }).is_err());
        drop(theirs);
        assert!(
            window.write(3 << 12, &page).is_err(),
            "unmapped there, and no fault here"
        );
    }
}
