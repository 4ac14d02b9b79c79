//! Looks in standby whether the target's memory is what was sent: memory that is kept for days may be damaged, and nobody reads it
//! before the VM has to run on it.
//!
//! The source notes a sum of each page as it is sent, zeros too, 8 bytes a page (2 MiB a GiB): the encoder's table knows no zeros, and its
//! hash costs more. In a rest it sends the sums of pages, in the order of the stream: the target compares them with its files at just the
//! moment at which these must be equal. Of what waits in swap a few pages at a time are read back and pushed out again ([`super::swapped`]).
//! A page of a hole is zero without being read. Once a switchover begins, nothing is compared any more.
//!
//! The source does not hold the guest's memory and can't send a page again at will; what differs is told, and a new pass repairs it.

use std::time::{Duration, Instant};

use umbra_api::wire::hashes::{SUM_PAGES_MAX, Sums};
use umbra_api::wire::setup::StreamSetup;

use crate::memory::plan::Run;
use crate::ram::{RamError, ShadowRam, Where};
use crate::resume::sum;
use crate::resume::swapped::{LONGEST, Turn};
use crate::stream::Page;
use crate::stream::items::PAGE_SIZE;

/// Pages that the target may have to read at a time, and how often: 4 MiB/s at most, which is a thousandth of a core.
const PAGES_AT_ONCE: usize = 512;
const EVERY: Duration = Duration::from_millis(500);

/// A page's sum as it was sent before (0: it was not), and now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Noted {
    pub before: u64,
    pub now: u64,
}

/// The source's side.
#[derive(Default)]
pub struct Sent {
    /// By block and page; 0 where nothing was sent.
    sums: Vec<Vec<u64>>,
    zero: u64,
    /// The page that is next.
    block: usize,
    page: usize,
    due: Option<Instant>,
}

impl Sent {
    pub fn begin(&mut self, setup: &StreamSetup) {
        self.sums = setup.blocks.iter().map(|b| vec![0; b.pages() as usize]).collect();
        self.zero = sum(&[0; PAGE_SIZE]);
    }

    /// The target has this page, or is sent it. `None` is a page of zeros.
    pub fn note(&mut self, block: u16, page: u64, data: Option<&Page>) -> Noted {
        let now = data.map_or(self.zero, sum);
        let block = self.sums.get_mut(usize::from(block));
        let place = block.and_then(|b| b.get_mut(usize::try_from(page).ok()?));
        let before = place.map_or(0, |place| std::mem::replace(place, now));
        Noted { before, now }
    }

    /// What this page was sent with last, 0 if it was not.
    pub fn of(&self, block: u16, page: u64) -> u64 {
        let block = self.sums.get(usize::from(block));
        let sum = block.and_then(|b| b.get(usize::try_from(page).ok()?));
        sum.copied().unwrap_or(0)
    }

    /// What the target is to look at now; `None` if there is nothing, or too soon. Begins again when it is through.
    pub fn next(&mut self, now: Instant) -> Option<Sums> {
        if self.due.is_some_and(|due| now < due) {
            return None;
        }
        for _ in 0..=self.sums.len() {
            let pages = self.sums.get(self.block)?;
            let rest = pages.get(self.page..).unwrap_or_default();
            let (mut to_read, mut n) = (0, 0);
            for sum in rest.iter().take(SUM_PAGES_MAX) {
                to_read += usize::from(*sum != 0 && *sum != self.zero);
                n += 1;
                if to_read == PAGES_AT_ONCE {
                    break;
                }
            }
            let taken = rest.get(..n).unwrap_or_default();
            let found = Sums {
                block: self.block as u16,
                from: self.page as u64,
                sums: taken.to_vec(),
            };
            self.page += n;
            if n == rest.len() {
                self.page = 0;
                self.block = (self.block + 1) % self.sums.len();
            }
            if found.sums.iter().any(|s| *s != 0) {
                self.due = Some(now + EVERY);
                return Some(found);
            }
        }
        None
    }
}

/// What the target found.
#[derive(PartialEq, Eq, Debug, Default)]
pub struct Looked {
    /// Pages that were compared.
    pub compared: u64,
    /// Those of them that were read back from swap for it.
    pub from_swap: u64,
    /// Those that are not what was sent.
    pub differing: Vec<u64>,
}

/// The target's side. `turn`: of what waits in swap, which is left there without one. `leave`: something more urgent has come up.
pub fn compare(
    ram: &ShadowRam,
    sums: &Sums,
    turn: Option<&mut Turn>,
    leave: impl Fn() -> bool,
) -> Result<Looked, RamError> {
    let zero = sum(&[0; PAGE_SIZE]);
    let mut page = [0; PAGE_SIZE];
    let mut looked = Looked::default();
    let places = ram.places(sums.block, sums.from, sums.sums.len())?;
    let turn = turn.filter(|_| ram.is_lean(sums.block));
    let mut swapped = Fetcher::new(ram, sums.block, turn);
    let pages = (sums.from..).zip(&sums.sums).zip(places);
    for ((n, want), place) in pages.filter(|((_, sum), _)| **sum != 0) {
        if leave() {
            return Ok(looked);
        }
        let have = match place {
            Where::Swap if !swapped.fetch(n, &mut page)? => continue,
            Where::Swap => {
                looked.from_swap += 1;
                sum(&page)
            }
            Where::Nowhere => zero,
            Where::Ram => {
                ram.read_page(sums.block, n, &mut page)?;
                sum(&page)
            }
        };
        looked.compared += 1;
        if have != *want {
            looked.differing.push(n);
        }
    }
    // What was left above is the keeper's: nothing is swapped while a guest may stand still.
    swapped.push_out();
    Ok(looked)
}

/// Reads some pages back from swap, and pushes them out again.
struct Fetcher<'a> {
    ram: &'a ShadowRam,
    block: u16,
    turn: Option<&'a mut Turn>,
    begun: Instant,
    left: usize,
    fetched: Vec<Run>,
}

impl<'a> Fetcher<'a> {
    fn new(ram: &'a ShadowRam, block: u16, mut turn: Option<&'a mut Turn>) -> Self {
        let begun = Instant::now();
        Self {
            left: turn.as_mut().map_or(0, |t| t.allows(begun)),
            ram,
            block,
            turn,
            begun,
            fetched: Vec::new(),
        }
    }

    /// False if it has to wait for another time.
    fn fetch(&mut self, n: u64, page: &mut Page) -> Result<bool, RamError> {
        let Some(turn) = &mut self.turn else { return Ok(false) };
        if self.left == 0 || self.begun.elapsed() > LONGEST || !turn.takes(self.block, n) {
            return Ok(false);
        }
        self.left -= 1;
        self.ram.fetch_page(self.block, n, page)?;
        let first = n as usize;
        match self.fetched.last_mut() {
            Some(run) if run.first + run.pages == first => run.pages += 1,
            _ => self.fetched.push(Run { first, pages: 1 }),
        }
        Ok(true)
    }

    fn push_out(self) {
        if let Err(e) = self.ram.push_out(self.block, &self.fetched) {
            tracing::warn!("what was read back from swap stays in RAM for now: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::fcntl::{FallocateFlags, fallocate};
    use umbra_api::wire::setup::Block;

    use super::*;
    use crate::ram::RamFile;

    fn setup(pages: &[u64]) -> StreamSetup {
        let block = |(i, pages): (usize, &u64)| Block {
            name: format!("b{i}"),
            bytes: pages << 12,
        };
        StreamSetup {
            version: 3,
            config: vec![7],
            ram_section: 2,
            ram_version: 4,
            blocks: pages.iter().enumerate().map(block).collect(),
        }
    }

    fn page(n: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        page[..8].copy_from_slice(&(n + 1).to_le_bytes());
        page
    }

    #[test]
    fn every_page_has_its_turn_and_the_work_of_a_round_is_bounded() {
        let pages = [3, 0, 3000, 20_000];
        let (mut sent, mut now) = (Sent::default(), Instant::now());
        assert_eq!(sent.next(now), None, "before it began");
        sent.begin(&setup(&pages));
        assert_eq!(sent.next(now), None, "nothing was sent");
        for n in 0..3000 {
            sent.note(2, n, Some(&page(n)));
        }
        for n in 10_000..20_000 {
            sent.note(3, n, None);
        }
        let mut seen = std::collections::HashMap::<(u16, u64), u32>::new();
        for _ in 0..40 {
            let s = sent.next(now).unwrap();
            assert_eq!(sent.next(now + EVERY / 2), None, "too soon");
            now += EVERY;
            assert!(s.sums.len() <= SUM_PAGES_MAX);
            let read = s.sums.iter().filter(|s| **s != 0 && **s != sent.zero).count();
            assert!(read <= PAGES_AT_ONCE);
            for (n, _) in (s.from..).zip(&s.sums).filter(|(_, s)| **s != 0) {
                *seen.entry((s.block, n)).or_default() += 1;
            }
        }
        assert_eq!(seen.len(), 13_000);
        assert!(seen.values().all(|n| *n >= 2), "and again");
        sent.note(9, 0, None);
        sent.note(0, 3, None);
    }

    #[test]
    fn a_changed_byte_is_found_where_it_is() {
        let setup = setup(&[8]);
        let (mut sent, mut ram) = (Sent::default(), ShadowRam::new(&setup, vec![]).unwrap());
        sent.begin(&setup);
        for n in 0..5 {
            ram.write_page(0, n, &page(n)).unwrap();
            sent.note(0, n, Some(&page(n)));
        }
        sent.note(0, 5, None);
        let sums = sent.next(Instant::now()).unwrap();
        let look = |ram: &ShadowRam| compare(ram, &sums, None, || false).unwrap();
        let alike = Looked {
            compared: 6,
            ..Looked::default()
        };
        assert_eq!(look(&ram), alike);
        let mut damaged = page(3);
        damaged[4095] ^= 1;
        ram.write_page(0, 3, &damaged).unwrap();
        ram.write_page(0, 5, &page(5)).unwrap();
        ram.write_page(0, 7, &page(5)).unwrap();
        assert_eq!(look(&ram).differing, [3, 5], "and page 7 was never sent");
        let left = compare(&ram, &sums, None, || true).unwrap();
        assert_eq!(left, Looked::default(), "a guest stands still");
        let beyond = Sums {
            from: 7,
            ..sums.clone()
        };
        assert!(compare(&ram, &beyond, None, || false).is_err());
        assert!(compare(&ram, &Sums { block: 1, ..sums }, None, || false).is_err());
    }

    #[test]
    fn what_is_in_swap_or_nowhere_is_not_read() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let setup = setup(&[16]);
        let file = RamFile::open_or_create(&dir.path().join("ram"), 16 << 12).unwrap();
        let pages = file.shared();
        let mut ram = ShadowRam::new(&setup, vec![("b0".into(), file)]).unwrap();
        let mut sent = Sent::default();
        sent.begin(&setup);
        for n in 0..4 {
            ram.write_page(0, n, &page(n)).unwrap();
            sent.note(0, n, Some(&page(n)));
        }
        sent.note(0, 9, None);
        let sums = sent.next(Instant::now()).unwrap();
        assert_eq!(compare(&ram, &sums, None, || false).unwrap().compared, 5);
        assert_eq!(pages.present_bytes(), 4 << 12, "a hole that was looked at is one still");
        // Freed behind its back, as a page in swap is not in RAM.
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(pages.file(), flags, 2 << 12, 1 << 12).unwrap();
        assert_eq!(compare(&ram, &sums, None, || false).unwrap().compared, 4);

        // Its turn comes only where RAM is kept at a tier's. It is not what was sent: it is gone.
        let turn = || {
            let turn = Turn::new(Some(Duration::from_secs(1)), [16].into_iter(), Instant::now());
            std::thread::sleep(Duration::from_millis(200));
            turn
        };
        let mut first = turn();
        let left = compare(&ram, &sums, Some(&mut first), || false).unwrap();
        assert_eq!(left.from_swap, 0);
        pages.lean.store(true, std::sync::atomic::Ordering::Relaxed);
        let looked = compare(&ram, &sums, Some(&mut first), || false).unwrap();
        assert_eq!((looked.compared, looked.from_swap, looked.differing), (5, 1, vec![2]));
        let mut now = turn();
        let hurried = compare(&ram, &sums, Some(&mut now), || true).unwrap();
        assert_eq!(hurried, Looked::default(), "a guest stands still");
    }
}
