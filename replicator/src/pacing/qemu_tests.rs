//! The pacer before a model of QEMU's migration thread: a bitmap that is read round and round, a dirty sync when little is left,
//! a section that is cut after 50 ms, and a guest that writes while its pages travel.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::tests::ram;
use super::*;

const RAM: u64 = 2_048;
/// 4 MiB a second for 100 ms, in pages: below it QEMU asks what else is dirty.
const THRESHOLD: usize = 102;
const REST: Duration = Duration::from_millis(500);
/// Pages that the socket and the link hold, and for which QEMU does not wait.
const BUFFER: f64 = 50.0;

/// A guest that writes `rate` pages a second, round and round in its hot ones.
#[derive(Clone, Copy, Debug)]
struct Guest {
    hot: u64,
    rate: f64,
    written: f64,
}

struct Qemu {
    guest: Guest,
    /// Pages a second.
    link: f64,
    /// Seconds.
    now: f64,
    /// The kernel's log, and QEMU's own bitmap.
    log: BTreeSet<u64>,
    dirty: BTreeSet<u64>,
    /// Where it looks next.
    place: u64,
    syncs: u64,
    sent: u64,
    /// What waits in the socket.
    queued: f64,
}

impl Qemu {
    fn new(guest: Guest, link: f64) -> Self {
        Self {
            guest,
            link,
            now: 0.0,
            log: BTreeSet::new(),
            dirty: (0..RAM).collect(),
            place: 0,
            syncs: 1,
            sent: 0,
            queued: 0.0,
        }
    }

    fn pass(&mut self, seconds: f64) {
        self.now += seconds;
        self.queued = (self.queued - seconds * self.link).max(0.0);
        let from = self.guest.written;
        self.guest.written += seconds * self.guest.rate;
        let new = (self.guest.written as u64 - from as u64).min(self.guest.hot);
        for n in 0..new {
            // Far apart, so that they lie all over RAM.
            let page = (from as u64 + n) % self.guest.hot * 683 % RAM;
            self.log.insert(page);
        }
    }

    fn send(&mut self, page: u64) {
        self.dirty.remove(&page);
        self.place = page + 1;
        self.sent += 1;
        self.queued += 1.0;
        let wait = (self.queued - BUFFER).max(0.0) / self.link;
        self.pass(wait + 3e-6);
    }

    /// Its pages, as the reader gets them.
    fn section(&mut self, mut page: impl FnMut(u64)) -> u64 {
        if self.dirty.len() < THRESHOLD {
            self.dirty.append(&mut self.log);
            self.syncs += 1;
            self.pass(100e-6);
        }
        let begin = self.now;
        let mut n = 0;
        loop {
            let next = self.dirty.range(self.place..).next().copied();
            let next = next.or_else(|| self.dirty.iter().next().copied());
            let Some(next) = next else { break };
            self.send(next);
            page(next);
            n += 1;
            if (n - 1) & 63 == 0 && self.now - begin > 0.050 {
                break;
            }
        }
        n
    }
}

/// What was told in so many seconds after the seed.
#[derive(Default, Debug)]
struct Told {
    rounds: u64,
    complaints: u64,
    /// After so many seconds of a guest that writes faster.
    too_fast: Vec<f64>,
}

/// `faster`: from then on it writes so many pages a second.
fn play(guest: Guest, link: f64, seconds: f64, faster: Option<(f64, f64)>) -> Told {
    let start = Instant::now();
    let at = |q: &Qemu| start + Duration::from_secs_f64(q.now);
    let mut q = Qemu::new(guest, link);
    let mut p = Pacer::new(Settings::default(), start);
    p.setup(&ram(RAM));
    let (mut told, mut offset, mut until) = (Told::default(), 0, None);
    while until.is_none_or(|u| q.now < u) {
        let pages = q.section(|page| p.page(0, page));
        offset += pages * 4_100 + 20;
        if p.is_seeding() {
            p.synced(q.syncs, offset);
        } else {
            until = until.or(Some(q.now + seconds));
        }
        let changed = until.zip(faster).map(|(u, (after, rate))| (u - seconds + after, rate));
        if let Some((_, rate)) = changed.filter(|(t, _)| q.now >= *t) {
            q.guest.rate = rate;
        }
        let section = Section {
            end: false,
            pages,
            zeros: 0,
            at: offset,
        };
        match p.section(section, at(&q)) {
            Action::RoundDone(_) => {
                told.rounds += 1;
                p.pause(REST);
                q.pass(REST.as_secs_f64());
                p.woke(offset, at(&q));
            }
            Action::NotConverging(_) => told.complaints += 1,
            _ => {
                let since = changed.map_or(0.0, |(t, _)| q.now - t);
                told.too_fast.extend(p.too_fast(at(&q)).map(|_| since));
            }
        }
    }
    told
}

fn guest(hot: u64, rate: f64) -> Guest {
    Guest {
        hot,
        rate,
        written: 0.0,
    }
}

#[test]
fn a_guest_that_the_link_carries_has_rounds_and_no_complaints() {
    for (hot, rate, link) in [
        (1_500, 200.0, 1_000.0),
        (50, 1e5, 300.0),
        (1_500, 2_000.0, 100e3),
        (1, 1.0, 20.0),
    ] {
        let told = play(guest(hot, rate), link, 30.0, None);
        assert!(
            told.rounds > 15 && told.complaints == 0 && told.too_fast.is_empty(),
            "{hot} {rate} {link}: {told:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn a_guest_that_is_too_fast_never_ends_a_round(hot in 400u64..2_000, factor in 3.0..500.0f64, link in 30.0..3_000.0f64) {
        let told = play(guest(hot, link * factor), link, 30.0, None);
        prop_assert_eq!(told.rounds, 0);
        prop_assert!(told.complaints >= 5, "{told:?}");
    }

    #[test]
    fn a_guest_that_becomes_too_fast_is_told_of_in_its_first_long_round(
        hot in 600u64..2_000, factor in 3.0..50.0f64, link in 500.0..3_000.0f64,
    ) {
        let told = play(guest(hot, 20.0), link, 30.0, Some((10.0, link * factor)));
        prop_assert!(told.rounds > 10, "{told:?}");
        // The rest that it began in, one turn or two, and what it takes to be certain; a complaint takes 5 s more than the rest.
        prop_assert!(told.too_fast.len() == 1 && told.too_fast.iter().all(|s| *s < 4.0), "{told:?}");
    }
}
