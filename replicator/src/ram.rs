//! The shadow's RAM on the target: guest memory in files that the shadow's QEMU maps too, small blocks in memory.
//!
//! A file is sparse where the guest's pages are zero, so that a shadow costs the target what the guest uses. Reading a hole
//! of a mapped tmpfs file would fill it, so which pages are there is known from a bitmap and not by looking.
//!
//! While the shadow waits with `-S` and `-incoming`, its QEMU does not touch these files; this process is their only writer:
//! new pages are made through QEMU's own mapping ([`crate::memory::window`]).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::unistd::{Whence, lseek};
use umbra_api::wire::setup::StreamSetup;

use crate::memory::pages::Pages;
use crate::memory::plan::Run;
use crate::memory::window::Window;
use crate::proc::ProcessId;
use crate::stream::Page;
use crate::stream::items::PAGE_SIZE;

/// Most bytes that all blocks have together that are kept in memory: firmware flash is the largest, with 4 MB.
pub const SMALL_BYTES_MAX: u64 = 64 << 20;

const ZERO_PAGE: Page = [0; PAGE_SIZE];

#[derive(Debug, thiserror::Error)]
pub enum RamError {
    #[error("RAM file {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("RAM file {path} has {have} bytes, {want} are needed")]
    FileSize { path: PathBuf, have: u64, want: u64 },
    #[error("RAM block {name:?} has {block} bytes, its file {file}")]
    BlockSize { name: String, block: u64, file: u64 },
    #[error("no RAM block of the stream is named {0:?}")]
    NoSuchBlock(String),
    #[error("blocks without a file have {bytes} bytes together, at most {max} are kept in memory")]
    TooMuchSmall { bytes: u64, max: u64 },
    #[error("page of RAM block number {block}, there are {blocks}")]
    UnknownBlock { block: u16, blocks: usize },
    #[error("page {page} of RAM block {block}, which has {pages}")]
    OutOfBlock { block: u16, page: u64, pages: u64 },
}

/// What it takes to read a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Where {
    /// A hole: it is zero.
    Nowhere,
    Ram,
    /// It would have to be read back first.
    Swap,
}

/// A block's pages in a file.
pub struct RamFile {
    pages: Arc<Pages>,
}

impl RamFile {
    /// Opens a file of exactly this size, or makes a new one, which is all zeros, and maps it here.
    pub fn open_or_create(path: &Path, bytes: u64) -> Result<Self, RamError> {
        Self::open(path, bytes, Window::own)
    }

    /// A file that is there, written through the mapping of the QEMU whose memory it is. Where that can't be, it is mapped here,
    /// and charged to this process.
    pub fn of_shadow(path: &Path, qemu: ProcessId) -> Result<Self, RamError> {
        Self::open(path, 0, |file| {
            Window::through(file, qemu).or_else(|e| {
                tracing::warn!(path = %path.display(), "the shadow's RAM is charged to the replicator: {e}");
                Window::own(file)
            })
        })
    }

    /// `bytes`: 0 if it is as long as it is.
    fn open(path: &Path, bytes: u64, window: impl FnOnce(&File) -> io::Result<Window>) -> Result<Self, RamError> {
        let io = |source| RamError::Io {
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        let size = |have, want| RamError::FileSize {
            path: path.to_owned(),
            have,
            want,
        };
        let bytes = match (meta.len(), bytes) {
            (have, 0) => have,
            (0, bytes) => file.set_len(bytes).map(|()| bytes).map_err(io)?,
            (have, bytes) if have != bytes => return Err(size(have, bytes)),
            (_, bytes) => bytes,
        };
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE as u64) {
            let page = PAGE_SIZE as u64;
            return Err(size(bytes, bytes.next_multiple_of(page).max(page)));
        }
        let window = window(&file).map_err(io)?;
        let pages = Pages::new(path, file, window, meta.blksize() == PAGE_SIZE as u64);
        if meta.len() != 0 {
            find_data(&pages);
        }
        Ok(Self { pages: Arc::new(pages) })
    }

    pub fn path(&self) -> &Path {
        &self.pages.path
    }

    pub fn bytes(&self) -> u64 {
        self.pages.window.bytes() as u64
    }

    /// What this file shares with who keeps it in RAM or in swap.
    pub fn shared(&self) -> Arc<Pages> {
        self.pages.clone()
    }

    /// Bytes that the file takes up, as far as this process wrote it.
    pub fn present_bytes(&self) -> u64 {
        self.pages.present_bytes()
    }

    /// Number of a page, if the file has it.
    fn number(&self, page: u64) -> Option<usize> {
        usize::try_from(page).ok().filter(|p| *p < self.pages.count())
    }

    fn failed(&self, source: io::Error) -> RamError {
        RamError::Io {
            path: self.pages.path.clone(),
            source,
        }
    }

    /// Neighbouring pages. False, and nothing written, if one of them is none of this file's.
    pub fn write(&mut self, first: u64, data: &[Page]) -> Result<bool, RamError> {
        let last = first.saturating_add(data.len() as u64).saturating_sub(1);
        let (Some(first), Some(_)) = (self.number(first), self.number(last)) else {
            return Ok(false);
        };
        self.pages.write(first, data).map(|()| true).map_err(|e| self.failed(e))
    }

    fn zero(&mut self, page: u64) -> Result<bool, RamError> {
        let Some(number) = self.number(page) else {
            return Ok(false);
        };
        if !self.pages.present.get(number) || self.pages.forget(number) {
            return Ok(true);
        }
        self.write(page, &[ZERO_PAGE])
    }

    /// Where some pages are; empty if one of them is none of this file's.
    fn places(&self, first: u64, pages: usize) -> Result<Vec<Where>, RamError> {
        let last = first.saturating_add(pages as u64).saturating_sub(1);
        let (Some(first), Some(_)) = (self.number(first), self.number(last)) else {
            return Ok(Vec::new());
        };
        let resident = self.pages.window.resident_of(Run { first, pages });
        let resident = resident.map_err(|e| self.failed(e))?;
        let place = |(page, resident)| match (self.pages.present.get(page), resident) {
            (false, _) => Where::Nowhere,
            (true, true) => Where::Ram,
            (true, false) => Where::Swap,
        };
        Ok((first..).zip(resident).map(place).collect())
    }

    /// Whether pages that are read back from swap are pushed out again: otherwise none must be read for its own sake.
    fn is_lean(&self) -> bool {
        self.pages.lean.load(Ordering::Relaxed)
    }

    /// Copies a page out that waits in swap, through the address space that it will be pushed out of; false if there is no such page.
    fn fetch(&self, page: u64, into: &mut Page) -> Result<bool, RamError> {
        let Some(first) = self.number(page) else {
            return Ok(false);
        };
        let fetched = self.pages.fetch(Run { first, pages: 1 }, into);
        fetched.map(|()| true).map_err(|e| self.failed(e))
    }

    fn push_out(&self, run: Run) -> Result<(), RamError> {
        self.pages.page_out(run).map_err(|e| self.failed(e))
    }

    /// Copies a page out; false if there is no such page.
    pub fn read(&self, page: u64, into: &mut Page) -> Result<bool, RamError> {
        let Some(page) = self.number(page) else {
            return Ok(false);
        };
        if !self.pages.present.get(page) {
            *into = ZERO_PAGE;
            return Ok(true);
        }
        let read = self.pages.read(page, into);
        read.map(|()| true).map_err(|e| self.failed(e))
    }
}

/// Marks what an existing file holds. A file system that does not tell holes has none.
fn find_data(pages: &Pages) {
    let len = pages.window.bytes() as i64;
    let mut at = 0;
    while at < len {
        let (from, to) = match lseek(pages.file(), at, Whence::SeekData) {
            Ok(from) => (from, lseek(pages.file(), from, Whence::SeekHole).unwrap_or(len)),
            // Nothing but a hole up to the end.
            Err(nix::errno::Errno::ENXIO) => return,
            Err(_) => (at, len),
        };
        for page in from as usize / PAGE_SIZE..(to as usize).div_ceil(PAGE_SIZE) {
            pages.present.set(page, true);
        }
        at = to.max(at + 1);
    }
}

/// A block that has no file, with the time of each page's last change.
pub struct SmallBlock {
    bytes: Vec<u8>,
    changed: Vec<u64>,
}

impl SmallBlock {
    /// The pages that changed after `mark`, with their numbers.
    pub fn changed_after(&self, mark: Mark) -> impl Iterator<Item = (u64, &Page)> {
        let pages = (0u64..).zip(self.bytes.as_chunks::<PAGE_SIZE>().0);
        pages
            .zip(&self.changed)
            .filter(move |(_, c)| mark.0.is_none_or(|m| **c > m))
            .map(|(p, _)| p)
    }

    fn write(&mut self, page: u64, data: &Page, now: u64) -> bool {
        let Ok(page) = usize::try_from(page) else { return false };
        let pages = self.bytes.as_chunks_mut::<PAGE_SIZE>().0;
        let (Some(old), Some(changed)) = (pages.get_mut(page), self.changed.get_mut(page)) else {
            return false;
        };
        if old != data {
            *old = *data;
            *changed = now;
        }
        true
    }
}

/// A moment in the life of the small blocks. The default lies before all of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mark(Option<u64>);

enum Place {
    File(RamFile),
    Small(SmallBlock),
}

/// All blocks of a shadow, in the order of the stream's list.
pub struct ShadowRam {
    blocks: Vec<Place>,
    /// Counts changes of small pages.
    clock: u64,
}

impl ShadowRam {
    /// Blocks that `files` name are there; all others are small ones.
    pub fn new(setup: &StreamSetup, files: Vec<(String, RamFile)>) -> Result<Self, RamError> {
        let mut files = files;
        let mut blocks = Vec::with_capacity(setup.blocks.len());
        let mut small_bytes = 0u64;
        for b in &setup.blocks {
            if let Some(i) = files.iter().position(|(name, _)| *name == b.name) {
                let (name, file) = files.swap_remove(i);
                if file.bytes() != b.bytes {
                    return Err(RamError::BlockSize {
                        name,
                        block: b.bytes,
                        file: file.bytes(),
                    });
                }
                blocks.push(Place::File(file));
                continue;
            }
            small_bytes = small_bytes.saturating_add(b.bytes);
            if small_bytes > SMALL_BYTES_MAX {
                return Err(RamError::TooMuchSmall {
                    bytes: small_bytes,
                    max: SMALL_BYTES_MAX,
                });
            }
            blocks.push(Place::Small(SmallBlock {
                bytes: vec![0; b.bytes as usize],
                changed: vec![0; b.pages() as usize],
            }));
        }
        match files.pop() {
            Some((name, _)) => Err(RamError::NoSuchBlock(name)),
            None => Ok(Self { blocks, clock: 0 }),
        }
    }

    pub fn write_page(&mut self, block: u16, page: u64, data: &Page) -> Result<(), RamError> {
        self.write_pages(block, page, std::slice::from_ref(data))
    }

    /// Neighbouring pages: one system call for all of them.
    pub fn write_pages(&mut self, block: u16, first: u64, data: &[Page]) -> Result<(), RamError> {
        self.clock += 1;
        let wrote = match self.blocks.get_mut(usize::from(block)) {
            Some(Place::File(f)) => f.write(first, data)?,
            Some(Place::Small(s)) => (first..).zip(data).all(|(page, data)| s.write(page, data, self.clock)),
            None => false,
        };
        let last = first.saturating_add(data.len() as u64).saturating_sub(1);
        self.checked(wrote, block, last)
    }

    pub fn zero_page(&mut self, block: u16, page: u64) -> Result<(), RamError> {
        self.clock += 1;
        let wrote = match self.blocks.get_mut(usize::from(block)) {
            Some(Place::File(f)) => f.zero(page)?,
            Some(Place::Small(s)) => s.write(page, &ZERO_PAGE, self.clock),
            None => false,
        };
        self.checked(wrote, block, page)
    }

    /// Where some neighbouring pages are. Nothing is read.
    pub fn places(&self, block: u16, first: u64, pages: usize) -> Result<Vec<Where>, RamError> {
        let found = match self.blocks.get(usize::from(block)) {
            Some(Place::File(f)) => f.places(first, pages)?,
            Some(place @ Place::Small(_)) if first.saturating_add(pages as u64) <= place.pages() => {
                vec![Where::Ram; pages]
            }
            _ => Vec::new(),
        };
        let last = first.saturating_add(pages as u64).saturating_sub(1);
        self.checked(found.len() == pages, block, last).map(|()| found)
    }

    pub fn read_page(&self, block: u16, page: u64, into: &mut Page) -> Result<(), RamError> {
        let read = match self.blocks.get(usize::from(block)) {
            Some(Place::File(f)) => f.read(page, into)?,
            Some(Place::Small(s)) => match usize::try_from(page).ok().and_then(|p| s.page(p)) {
                Some(data) => {
                    *into = *data;
                    true
                }
                None => false,
            },
            None => false,
        };
        self.checked(read, block, page)
    }

    /// Whether a block's pages wait in swap for good, and may be looked at by way of RAM.
    pub fn is_lean(&self, block: u16) -> bool {
        matches!(self.blocks.get(usize::from(block)), Some(Place::File(f)) if f.is_lean())
    }

    /// Reads a page that waits in swap. It is in RAM then, until it is pushed out.
    pub fn fetch_page(&self, block: u16, page: u64, into: &mut Page) -> Result<(), RamError> {
        let fetched = match self.blocks.get(usize::from(block)) {
            Some(Place::File(f)) => f.fetch(page, into)?,
            _ => false,
        };
        self.checked(fetched, block, page)
    }

    /// Has such pages go again. The kernel writes them when it can; the tier's keeper sees to the rest.
    pub fn push_out(&self, block: u16, runs: &[Run]) -> Result<(), RamError> {
        match self.blocks.get(usize::from(block)) {
            Some(Place::File(f)) => runs.iter().try_for_each(|run| f.push_out(*run)),
            _ => Ok(()),
        }
    }

    fn checked(&self, done: bool, block: u16, page: u64) -> Result<(), RamError> {
        if done {
            return Ok(());
        }
        Err(match self.blocks.get(usize::from(block)) {
            Some(place) => RamError::OutOfBlock {
                block,
                page,
                pages: place.pages(),
            },
            None => RamError::UnknownBlock {
                block,
                blocks: self.blocks.len(),
            },
        })
    }

    /// The blocks that are no files, with their numbers.
    pub fn small(&self) -> impl Iterator<Item = (u16, &SmallBlock)> {
        (0u16..).zip(&self.blocks).filter_map(|(i, p)| match p {
            Place::Small(s) => Some((i, s)),
            Place::File(_) => None,
        })
    }

    /// Now, for [`SmallBlock::changed_after`].
    pub fn mark(&self) -> Mark {
        Mark(Some(self.clock))
    }

    /// Unmaps all files, in small pieces with a call of `between` after each, which may wait: a map of gigabytes takes a tenth
    /// of a second of CPU time to remove, and holds up every other thread that needs memory meanwhile.
    pub fn unmap(self, mut between: impl FnMut(Duration)) {
        for place in self.blocks {
            if let Place::File(file) = place {
                file.pages.window.unmap(file.pages.present.words(), &mut between);
            }
        }
    }

    /// The files, as they are shared with who keeps them in RAM or in swap.
    pub fn shared(&self) -> Vec<Arc<Pages>> {
        let file = |p: &Place| match p {
            Place::File(f) => Some(f.shared()),
            Place::Small(_) => None,
        };
        self.blocks.iter().filter_map(file).collect()
    }

    /// Bytes of guest memory that are not holes.
    pub fn present_bytes(&self) -> u64 {
        let of = |p: &Place| match p {
            Place::File(f) => f.present_bytes(),
            Place::Small(s) => s.bytes.len() as u64,
        };
        self.blocks.iter().map(of).sum()
    }
}

impl Place {
    fn pages(&self) -> u64 {
        match self {
            Self::File(f) => f.pages.count() as u64,
            Self::Small(s) => s.changed.len() as u64,
        }
    }
}

impl SmallBlock {
    fn page(&self, page: usize) -> Option<&Page> {
        self.bytes.as_chunks().0.get(page)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use umbra_api::wire::setup::Block;

    use super::*;
    use crate::memory::window::UNMAP_BYTES;

    pub(crate) fn setup(blocks: &[(&str, u64)]) -> StreamSetup {
        let block = |(name, pages): &(&str, u64)| Block {
            name: (*name).into(),
            bytes: pages << 12,
        };
        let blocks = blocks.iter().map(block).collect();
        StreamSetup {
            version: 3,
            config: b"\x07\0\0\0\x01q".to_vec(),
            ram_section: 2,
            ram_version: 4,
            blocks,
        }
    }

    fn file(dir: &tempfile::TempDir, name: &str, pages: u64) -> RamFile {
        RamFile::open_or_create(&dir.path().join(name), pages << 12).unwrap()
    }

    fn on_disk(path: &Path) -> u64 {
        std::fs::metadata(path).unwrap().blocks() * 512
    }

    #[test]
    fn zeros_leave_holes() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut f = file(&dir, "ram", 16);
        let path = f.path().to_owned();
        assert!(f.zero(3).unwrap() && f.zero(15).unwrap());
        assert_eq!((on_disk(&path), f.present_bytes()), (0, 0));
        assert!(f.write(3, &[[7; PAGE_SIZE], [8; PAGE_SIZE]]).unwrap());
        assert_eq!((on_disk(&path), f.present_bytes()), (8192, 8192));
        let mut page = [0; PAGE_SIZE];
        f.pages.file().read_exact_at(&mut page, 4 << 12).unwrap();
        assert_eq!(page, [8; PAGE_SIZE]);
        assert!(f.zero(3).unwrap());
        assert_eq!((on_disk(&path), f.present_bytes()), (4096, 4096));
        for (n, want) in [(2, 0), (3, 0), (4, 8)] {
            assert!(f.read(n, &mut page).unwrap());
            assert_eq!(page, [want; PAGE_SIZE]);
        }
        assert_eq!(on_disk(&path), 4096);
        for n in [16, u64::MAX, u64::MAX >> 12] {
            assert!(!f.write(n, &[page]).unwrap() && !f.zero(n).unwrap() && !f.read(n, &mut page).unwrap());
        }
    }

    #[test]
    fn an_unmapped_file_keeps_its_pages() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let pages = 2 * (UNMAP_BYTES / PAGE_SIZE) as u64 + 3;
        let mut ram = ShadowRam::new(
            &setup(&[("a", pages), ("b", 2)]),
            vec![("a".into(), file(&dir, "a", pages))],
        )
        .unwrap();
        ram.write_page(0, 1, &[7; PAGE_SIZE]).unwrap();
        ram.write_page(0, pages - 1, &[8; PAGE_SIZE]).unwrap();
        let mut pieces = 0;
        ram.unmap(|_| pieces += 1);
        assert_eq!(pieces, 2, "the hole between them is passed over");
        let again = file(&dir, "a", pages);
        let mut page = [0; PAGE_SIZE];
        assert!(again.read(1, &mut page).unwrap() && page == [7; PAGE_SIZE]);
        assert!(again.read(pages - 1, &mut page).unwrap() && page == [8; PAGE_SIZE]);
    }

    #[test]
    fn an_existing_file_is_known_again() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        assert!(file(&dir, "ram", 200).write(130, &[[9; PAGE_SIZE]]).unwrap());
        let mut f = file(&dir, "ram", 200);
        assert_eq!(f.present_bytes(), 4096);
        let mut page = [0; PAGE_SIZE];
        assert!(f.zero(130).unwrap() && f.read(130, &mut page).unwrap());
        assert_eq!((page, on_disk(f.path())), ([0; PAGE_SIZE], 0));
        let other = RamFile::open_or_create(f.path(), 201 << 12);
        assert!(matches!(
            other,
            Err(RamError::FileSize {
                have: 0xc8000,
                want: 0xc9000,
                ..
            })
        ));
        assert!(matches!(
            RamFile::open_or_create(&dir.path().join("odd"), 4097),
            Err(RamError::FileSize { .. })
        ));
        assert!(matches!(
            RamFile::open_or_create(&dir.path().join("no/where"), 4096),
            Err(RamError::Io { .. })
        ));
    }

    #[test]
    fn blocks_go_where_they_belong() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let s = setup(&[("pc.bios", 4), ("pc.ram", 16), ("empty", 0)]);
        let mut ram = ShadowRam::new(&s, vec![("pc.ram".into(), file(&dir, "ram", 16))]).unwrap();
        let before = ram.mark();
        ram.write_page(0, 1, &[1; PAGE_SIZE]).unwrap();
        ram.write_page(1, 9, &[2; PAGE_SIZE]).unwrap();
        let changed = |ram: &ShadowRam, mark| -> Vec<(u16, u64)> {
            ram.small()
                .flat_map(|(n, b)| b.changed_after(mark).map(move |(p, _)| (n, p)))
                .collect()
        };
        assert_eq!(changed(&ram, Mark::default()).len(), 4);
        assert_eq!(changed(&ram, before), [(0, 1)]);
        let mark = ram.mark();
        ram.write_page(0, 1, &[1; PAGE_SIZE]).unwrap();
        ram.zero_page(0, 2).unwrap();
        assert_eq!(changed(&ram, mark), []);
        ram.zero_page(0, 1).unwrap();
        assert_eq!(changed(&ram, mark), [(0, 1)]);
        let mut page = [0; PAGE_SIZE];
        ram.read_page(1, 9, &mut page).unwrap();
        assert_eq!(page, [2; PAGE_SIZE]);
        let e = ram.write_page(3, 0, &page).unwrap_err();
        assert!(matches!(e, RamError::UnknownBlock { block: 3, blocks: 3 }));
        for (block, past) in [(0, 4), (1, 16), (2, 0), (0, u64::MAX)] {
            assert!(matches!(ram.zero_page(block, past), Err(RamError::OutOfBlock { .. })));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let s = setup(&[("pc.ram", 16)]);
        let files = |name: &str, pages| vec![(name.to_owned(), file(&dir, &format!("{name}{pages}"), pages))];
        assert!(matches!(
            ShadowRam::new(&s, files("pc.ram", 15)),
            Err(RamError::BlockSize { .. })
        ));
        let two = [files("pc.ram", 16), files("other", 16)]
            .into_iter()
            .flatten()
            .collect();
        assert!(matches!(ShadowRam::new(&s, two), Err(RamError::NoSuchBlock(_))));
        let large = setup(&[("a", 1 << 40), ("b", 1 << 40)]);
        assert!(matches!(
            ShadowRam::new(&large, vec![]),
            Err(RamError::TooMuchSmall { .. })
        ));
    }
}
