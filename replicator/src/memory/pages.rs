//! A RAM file as two threads share it: the feed writes its pages, the keeper moves them between RAM and swap.
//!
//! What the guest sees never depends on the bits here but on the file: they say which pages are worth a system call.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use nix::fcntl::{FallocateFlags, fallocate};

use super::heat::{Bits, Heat};
use super::plan::Run;
use super::window::Window;
use crate::stream::Page;
use crate::stream::items::PAGE_SIZE;

pub struct Pages {
    pub path: PathBuf,
    file: File,
    pub window: Window,
    /// Pages that are no holes, as far as this process wrote them.
    pub present: Bits,
    /// Pages that were sent to swap, unless they came back unseen.
    away: Bits,
    pub heat: Heat,
    /// Pages are as small as the link's: those of hugetlbfs are neither swapped nor written by a system call.
    pub small: bool,
    /// RAM is kept at what a tier leaves it: what is read back from swap must go again.
    pub lean: AtomicBool,
    /// Holes of one page can be punched: in small ones, where it was never refused.
    punch: AtomicBool,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pages({})", self.path.display())
    }
}

impl Pages {
    pub fn new(path: &Path, file: File, window: Window, small: bool) -> Self {
        let pages = window.bytes() / PAGE_SIZE;
        Self {
            path: path.to_owned(),
            file,
            window,
            present: Bits::new(pages),
            away: Bits::new(pages),
            heat: Heat::new(pages),
            small,
            lean: AtomicBool::new(false),
            punch: AtomicBool::new(small),
        }
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn count(&self) -> usize {
        self.window.bytes() / PAGE_SIZE
    }

    pub fn present_bytes(&self) -> u64 {
        self.present.ones() * PAGE_SIZE as u64
    }

    /// Neighbouring pages, in as few calls as it takes. Only the feed writes.
    pub fn write(&self, first: usize, data: &[Page]) -> io::Result<()> {
        // All or none: what is there already is written in a call of its own.
        self.window
            .inside(first.saturating_mul(PAGE_SIZE), data.as_flattened().len())?;
        let pages = || first..first.saturating_add(data.len());
        for page in pages().filter(|p| self.away.get(*p)) {
            // All of it is overwritten: a page in swap is dropped there instead of read back first.
            self.forget(page);
        }
        let there = |page: usize| self.small && self.present.get(page);
        let (mut page, mut rest) = (first, data);
        while !rest.is_empty() {
            let known = there(page);
            let alike = (page..).zip(rest).take_while(|(p, _)| there(*p) == known).count();
            let (now, later) = rest.split_at(alike);
            let (at, bytes) = (page * PAGE_SIZE, now.as_flattened());
            match known {
                true => self.window.rewrite(at, bytes)?,
                false => self.window.write(at, bytes)?,
            }
            (page, rest) = (page + alike, later);
        }
        for page in pages() {
            self.present.set(page, true);
            self.away.set(page, false);
            self.heat.touch(page);
        }
        Ok(())
    }

    /// Copies out a page that is there.
    pub fn read(&self, page: usize, into: &mut Page) -> io::Result<()> {
        self.window.read(page * PAGE_SIZE, into)
    }

    /// Makes a page that is there a hole; false if this file can have none.
    pub fn forget(&self, page: usize) -> bool {
        if !self.punch(page) {
            return false;
        }
        self.present.set(page, false);
        self.away.set(page, false);
        true
    }

    fn punch(&self, page: usize) -> bool {
        if !self.punch.load(Relaxed) {
            return false;
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let at = (page * PAGE_SIZE) as i64;
        let punched = fallocate(&self.file, flags, at, PAGE_SIZE as i64).is_ok();
        self.punch.store(punched, Relaxed);
        punched
    }

    pub fn page_out(&self, run: Run) -> io::Result<()> {
        self.window.page_out(run)?;
        for page in run.first..run.first.saturating_add(run.pages) {
            self.away.set(page, true);
        }
        Ok(())
    }

    /// Reads pages back that the guest has.
    pub fn fetch(&self, run: Run, scratch: &mut [u8]) -> io::Result<()> {
        let into = scratch
            .get_mut(..run.pages.saturating_mul(PAGE_SIZE))
            .unwrap_or_default();
        self.window.fetch(run.first.saturating_mul(PAGE_SIZE), into)?;
        for page in run.first..run.first.saturating_add(run.pages) {
            self.away.set(page, false);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;

    use memmap2::MmapOptions;

    use super::*;
    use crate::proc::ProcessId;

    /// Runs of pages that are there, are not, and were sent to swap.
    #[test]
    fn a_run_is_written_whole_whatever_its_pages_are() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("ram");
        let open = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = open.unwrap();
        file.set_len(16 << 12).unwrap();
        let _theirs = MmapOptions::new().map_raw(&file).unwrap();
        let me = ProcessId::of(std::process::id() as i32).unwrap();
        let through = Window::through(&file, me);
        for window in through.into_iter().chain([Window::own(&file).unwrap()]) {
            file.set_len(0).unwrap();
            file.set_len(16 << 12).unwrap();
            let pages = Pages::new(&path, file.try_clone().unwrap(), window, true);
            let all = |from: u8, n: u8| (from..from + n).map(|b| [b; PAGE_SIZE]).collect::<Vec<_>>();
            pages.write(2, &all(50, 3)).unwrap();
            pages.write(8, &all(60, 1)).unwrap();
            pages.page_out(Run { first: 3, pages: 2 }).unwrap();
            pages.write(1, &all(100, 9)).unwrap();
            assert_eq!(pages.present_bytes(), 9 << 12);
            pages.write(15, &all(9, 1)).unwrap();
            assert!(pages.write(15, &all(1, 2)).is_err(), "beyond the end");
            let mut page = [0; PAGE_SIZE];
            for n in 0..16u8 {
                let want = match n {
                    1..=9 => 99 + n,
                    15 => 9,
                    _ => 0,
                };
                file.read_exact_at(&mut page, u64::from(n) << 12).unwrap();
                assert_eq!(page, [want; PAGE_SIZE], "{n}");
                pages.read(n.into(), &mut page).unwrap();
                assert_eq!(page, [want; PAGE_SIZE], "{n}");
            }
        }
    }
}
