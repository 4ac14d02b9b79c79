//! On the target: a new shadow gets what is held of an earlier one, and its source is told which pages these are.
//!
//! Each page is copied through the QEMU that it is for, so that it is charged and mapped as if it had come by the link, and its hash is
//! taken of the very bytes that were copied: what a source does not send is what is there. What was copied is freed at once,
//! so that no VM's memory is held twice.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use umbra_api::VmId;
use umbra_api::wire::frame::Kind;
use umbra_api::wire::hashes::{HELD_PAGES_MAX, Hash, Held};

use super::held;
use crate::encode::held::PageHash;
use crate::link::{FrameWriter, LinkError, WriteHalf};
use crate::ram::{RamError, RamFile};
use crate::stream::Page;
use crate::stream::items::PAGE_SIZE;

/// Bytes that are there twice for a moment. Whole huge pages of the usual size.
const PIECE_BYTES: usize = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum FillError {
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// Fills the new shadow's files, which nobody else writes; how many pages the source was told. A source that is lost meanwhile does
/// not end it: the next one is told of all.
pub fn fill(vm: VmId, files: &mut [(String, RamFile)], to: &mut FrameWriter<WriteHalf>) -> Result<u64, FillError> {
    let mut teller = Teller {
        to,
        told: 0,
        lost: None,
    };
    for (block, ram) in files {
        let Some(path) = held::of(vm, block, ram.bytes(), ram.path()) else {
            continue;
        };
        copy(&path, ram, |from, pages| teller.tell(block, from, pages))?;
        if let Err(e) = std::fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), "held memory is not removed: {e}");
        }
    }
    teller.end().map_err(FillError::from)
}

struct Teller<'a> {
    to: &'a mut FrameWriter<WriteHalf>,
    told: u64,
    lost: Option<LinkError>,
}

impl Teller<'_> {
    fn tell(&mut self, name: &str, from: u64, pages: &[Page]) {
        let hashes: Vec<Hash> = match self.lost {
            None => pages.iter().map(|p| PageHash::of(p).to_bytes()).collect(),
            Some(_) => return,
        };
        for (from, hashes) in (from..).step_by(HELD_PAGES_MAX).zip(hashes.chunks(HELD_PAGES_MAX)) {
            let held = Held { name, from, hashes };
            match self.to.send(Kind::Held, &held.encode()) {
                Ok(()) => self.told += hashes.len() as u64,
                Err(e) => return self.lost = Some(e),
            }
        }
    }

    fn end(self) -> Result<u64, LinkError> {
        match self.lost {
            Some(e) => Err(e),
            None => self.to.send(Kind::Held, &[]).map(|()| self.told),
        }
    }
}

/// Moves all pages of a held file that are not zero; `each` is given neighbouring ones with the first one's number.
fn copy(path: &Path, ram: &mut RamFile, mut each: impl FnMut(u64, &[Page])) -> Result<(), RamError> {
    let failed = |source| RamError::Io {
        path: PathBuf::from(path),
        source,
    };
    let file = File::options().read(true).write(true).open(path).map_err(failed)?;
    let len = ram.bytes();
    let mut buffer = vec![0; PIECE_BYTES];
    let mut at = 0;
    while let Some((from, to)) = data(&file, at, len).map_err(failed)? {
        let to = to.min(from + PIECE_BYTES as u64 - from % PIECE_BYTES as u64);
        let piece = buffer.get_mut(..(to - from) as usize).unwrap_or_default();
        file.read_exact_at(piece, from).map_err(failed)?;
        let mut page = from / PAGE_SIZE as u64;
        let pages = piece.as_chunks::<PAGE_SIZE>().0;
        for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            if !run.first().is_none_or(is_zero) {
                ram.write(page, run)?;
                each(page, run);
            }
            page += run.len() as u64;
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // A file that can't have holes is freed as a whole, at the end.
        let _ = fallocate(&file, flags, from as i64, (to - from) as i64);
        at = to;
    }
    Ok(())
}

fn is_zero(page: &Page) -> bool {
    *page == [0; PAGE_SIZE]
}

/// The next bytes of a file that are no hole, in whole pages. A file system that does not tell holes has none.
fn data(file: &File, at: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= len {
        return Ok(None);
    }
    let page = PAGE_SIZE as u64;
    let (from, to) = match lseek(file, at as i64, Whence::SeekData) {
        Ok(from) => (
            from as u64,
            lseek(file, from, Whence::SeekHole).map_or(len, |to| to as u64),
        ),
        Err(Errno::ENXIO) => return Ok(None),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => (at, len),
        Err(e) => return Err(e.into()),
    };
    let (from, to) = (from - from % page, to.next_multiple_of(page).min(len));
    Ok((from < to).then_some((from, to)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_held_is_moved_and_told_once() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let pages = 4096u64;
        let path = dir.path().join("held");
        let held = File::create_new(&path).unwrap();
        held.set_len(pages << 12).unwrap();
        // Beside a hole, across a piece's end, and a zero in between.
        let there = [0, 1, 1022, 1023, 1024, 1025, 3000, 3002, 4095];
        for n in there {
            held.write_all_at(&[n as u8 | 1; PAGE_SIZE], n << 12).unwrap();
        }
        held.write_all_at(&[0; PAGE_SIZE], 3001 << 12).unwrap();
        let mut ram = RamFile::open_or_create(&dir.path().join("ram"), pages << 12).unwrap();
        let mut told = Vec::new();
        copy(&path, &mut ram, |from, run| {
            let all = (from..).zip(run).map(|(n, page)| (n, PageHash::of(page)));
            told.extend(all);
        })
        .unwrap();
        let numbers: Vec<u64> = told.iter().map(|t| t.0).collect();
        assert_eq!(numbers, there);
        let mut page = [0; PAGE_SIZE];
        for (n, hash) in told {
            assert!(ram.read(n, &mut page).unwrap());
            assert_eq!(PageHash::of(&page), hash, "{n}");
            assert_eq!(page[0], n as u8 | 1);
        }
        assert_eq!(
            ram.present_bytes(),
            there.len() as u64 * PAGE_SIZE as u64,
            "zeros are not"
        );
        assert_eq!(
            std::os::unix::fs::MetadataExt::blocks(&held.metadata().unwrap()),
            0,
            "freed"
        );
    }
}
