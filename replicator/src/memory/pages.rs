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
    /// Holes of one page can be punched: not in hugetlbfs.
    punch: AtomicBool,
    /// Pages of this size are swapped.
    pub swappable: bool,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pages({})", self.path.display())
    }
}

impl Pages {
    pub fn new(path: &Path, file: File, window: Window, small_pages: bool) -> Self {
        let pages = window.bytes() / PAGE_SIZE;
        Self {
            path: path.to_owned(),
            file,
            window,
            present: Bits::new(pages),
            away: Bits::new(pages),
            heat: Heat::new(pages),
            punch: AtomicBool::new(small_pages),
            swappable: small_pages,
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

    /// Only the feed writes.
    pub fn write(&self, page: usize, data: &Page) -> io::Result<()> {
        // All of it is overwritten: a page in swap is dropped there instead of read back first.
        if self.away.get(page) {
            self.punch(page);
            self.away.set(page, false);
        }
        self.window.write(page * PAGE_SIZE, data)?;
        self.present.set(page, true);
        self.heat.touch(page);
        Ok(())
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
        self.window.read(run.first.saturating_mul(PAGE_SIZE), into)?;
        for page in run.first..run.first.saturating_add(run.pages) {
            self.away.set(page, false);
        }
        Ok(())
    }
}
