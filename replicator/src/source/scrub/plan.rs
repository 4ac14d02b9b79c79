//! Which parts of the private disks are compared next, and which differences are real. Pure.
//!
//! ```text
//!  walked ─alike─> done
//!     └─differs─> suspected ─the mirror was seen with nothing left, a while later─> looked at again
//!          ─differs, and the primary's is what it was─> damaged: mended      ─anything else─> done
//! ```
//! A guest writes while disks are compared, and the mirror is always a little behind: a difference alone says nothing. A part that stayed
//! the same on the primary while the mirror caught up, and differs still, was not brought over as it should, or was changed since.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use umbra_api::wire::disk::{RANGE_BYTES, RANGES_MAX};

/// From one look to the next: 4 MiB/s of all disks together at most.
pub const EVERY: Duration = Duration::from_secs(1);
/// QEMU's mirror looks at its bitmap at least each 100 ms, and tells then what is left.
const SETTLE: Duration = Duration::from_secs(1);
/// A suspect whose mirror never catches up comes again with the next walk.
const FORGET: Duration = Duration::from_secs(30);
/// A target that lost a whole disk is noticed by as many.
const SUSPECTS_MAX: usize = 64;

/// Neighbouring ranges of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    pub disk: usize,
    pub from: u64,
    pub bytes: u64,
}

#[derive(Debug)]
struct Suspect {
    sum: u64,
    since: Instant,
    /// The mirror had nothing left then, or later.
    caught_up: bool,
}

#[derive(Debug)]
pub struct Plan {
    sizes: Vec<u64>,
    disk: usize,
    at: u64,
    suspects: BTreeMap<(usize, u64), Suspect>,
}

impl Plan {
    pub fn new(sizes: Vec<u64>) -> Self {
        Self {
            sizes,
            disk: 0,
            at: 0,
            suspects: BTreeMap::new(),
        }
    }

    /// What to look at now: a suspect that is ripe, else where the walk is. `None`: there is nothing.
    pub fn next(&mut self, now: Instant) -> Option<Part> {
        self.suspects.retain(|_, s| s.caught_up || now - s.since < FORGET);
        if let Some((&(disk, from), _)) = self.suspects.iter().find(|(_, s)| s.caught_up) {
            let bytes = self.sizes.get(disk)?.saturating_sub(from).min(RANGE_BYTES);
            return Some(Part { disk, from, bytes });
        }
        for _ in 0..=self.sizes.len() {
            let size = *self.sizes.get(self.disk)?;
            let (disk, from) = (self.disk, self.at);
            let bytes = size.saturating_sub(from).min(RANGES_MAX as u64 * RANGE_BYTES);
            self.at += bytes;
            if self.at >= size {
                (self.disk, self.at) = ((self.disk + 1) % self.sizes.len(), 0);
            }
            if bytes > 0 {
                return Some(Part { disk, from, bytes });
            }
        }
        None
    }

    /// Disks whose mirror is of interest now.
    pub fn waits_for(&self, now: Instant) -> Vec<usize> {
        let due = |(_, s): &(_, &Suspect)| !s.caught_up && now - s.since >= SETTLE;
        let mut disks: Vec<usize> = self.suspects.iter().filter(due).map(|((disk, _), _)| *disk).collect();
        disks.dedup();
        disks
    }

    /// The mirror of this disk has nothing left.
    pub fn caught_up(&mut self, disk: usize, now: Instant) {
        for (_, s) in self.suspects.iter_mut().filter(|((d, _), _)| *d == disk) {
            s.caught_up |= now - s.since >= SETTLE;
        }
    }

    /// What the target says of a part, of which the primary had these sums. Ranges that are damaged, with the primary's sum.
    pub fn looked(&mut self, part: Part, sums: &[u64], differing: &[u64], now: Instant) -> Vec<(u64, u64)> {
        let mut damaged = Vec::new();
        for (from, sum) in (part.from..).step_by(RANGE_BYTES as usize).zip(sums) {
            let differs = differing.contains(&from);
            let key = (part.disk, from);
            match self.suspects.remove(&key) {
                Some(s) if differs && s.caught_up && s.sum == *sum => damaged.push((from, *sum)),
                // Its time goes on: a walk may come by while it is not ripe.
                Some(s) if differs && !s.caught_up && s.sum == *sum => {
                    self.suspects.insert(key, s);
                }
                _ if differs && self.suspects.len() < SUSPECTS_MAX => {
                    let s = Suspect {
                        sum: *sum,
                        since: now,
                        caught_up: false,
                    };
                    self.suspects.insert(key, s);
                }
                _ => {}
            }
        }
        damaged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn every_byte_of_every_disk_has_its_turn() {
        let now = Instant::now();
        let sizes = vec![9 * MIB + 512, 0, 512];
        let mut plan = Plan::new(sizes.clone());
        for _ in 0..2 {
            let mut seen = vec![0; 3];
            for _ in 0..4 {
                let part = plan.next(now).unwrap();
                assert_eq!(part.from, seen[part.disk], "in order");
                assert!(part.bytes <= 4 * MIB);
                seen[part.disk] += part.bytes;
            }
            assert_eq!(seen, sizes);
        }
        assert_eq!(Plan::new(vec![]).next(now), None);
        assert_eq!(Plan::new(vec![0]).next(now), None);
    }

    #[test]
    fn only_a_difference_that_outlives_the_mirrors_work_is_damage() {
        let began = Instant::now();
        let later = |ms| began + Duration::from_millis(ms);
        let first = |plan: &mut Plan| {
            let part = plan.next(began).unwrap();
            assert_eq!(plan.looked(part, &[1, 2, 3, 4], &[2 * RANGE_BYTES], began), []);
        };
        let suspect = Part {
            disk: 0,
            from: 2 * RANGE_BYTES,
            bytes: RANGE_BYTES,
        };
        let ripe = |plan: &mut Plan| {
            assert_eq!(
                plan.waits_for(later(900)),
                [] as [usize; 0],
                "the mirror may not have looked since"
            );
            plan.caught_up(0, later(900));
            assert_ne!(plan.next(later(1000)), Some(suspect));
            assert_eq!(plan.waits_for(later(1000)), [0]);
            plan.caught_up(1, later(1000));
            assert_ne!(plan.next(later(1000)), Some(suspect), "another disk's");
            plan.caught_up(0, later(1000));
            assert_eq!(plan.next(later(1000)), Some(suspect));
        };
        let new = || Plan::new(vec![4 * RANGE_BYTES, MIB]);

        let mut damaged = new();
        first(&mut damaged);
        ripe(&mut damaged);
        assert_eq!(
            damaged.looked(suspect, &[3], &[suspect.from], later(1000)),
            [(suspect.from, 3)]
        );
        assert_ne!(damaged.next(later(1001)), Some(suspect), "told once");

        let mut written = new();
        first(&mut written);
        ripe(&mut written);
        assert_eq!(
            written.looked(suspect, &[9], &[suspect.from], later(1000)),
            [],
            "the guest wrote"
        );
        let mut behind = new();
        first(&mut behind);
        ripe(&mut behind);
        assert_eq!(
            behind.looked(suspect, &[3], &[], later(1000)),
            [],
            "the mirror was behind"
        );
        assert_eq!(behind.waits_for(later(9000)), [] as [usize; 0]);

        let mut never = new();
        first(&mut never);
        assert!(never.next(later(40_000)).is_some());
        assert_eq!(
            never.waits_for(later(40_000)),
            [] as [usize; 0],
            "the mirror never caught up"
        );
    }

    #[test]
    fn a_disk_that_is_gone_is_noticed_by_a_few() {
        let now = Instant::now();
        let mut plan = Plan::new(vec![64 * MIB]);
        for _ in 0..10 {
            let part = plan.next(now).unwrap();
            let all: Vec<u64> = (0..64).map(|n| part.from + n * RANGE_BYTES).collect();
            plan.looked(part, &[7; 64], &all, now);
        }
        assert_eq!(plan.suspects.len(), SUSPECTS_MAX);
    }
}
