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

/// Rounds that ended, and complaints, in so many seconds after the seed.
fn play(guest: Guest, link: f64, seconds: f64) -> (u64, u64) {
    let start = Instant::now();
    let at = |q: &Qemu| start + Duration::from_secs_f64(q.now);
    let mut q = Qemu::new(guest, link);
    let mut p = Pacer::new(Settings::default(), start);
    p.setup(&ram(RAM));
    let (mut rounds, mut complaints, mut offset, mut until) = (0, 0, 0, None);
    while until.is_none_or(|u| q.now < u) {
        let pages = q.section(|page| p.page(0, page));
        offset += pages * 4_100 + 20;
        if p.is_seeding() {
            p.synced(q.syncs, offset);
        } else {
            until = until.or(Some(q.now + seconds));
        }
        let section = Section {
            end: false,
            pages,
            zeros: 0,
            at: offset,
        };
        match p.section(section, at(&q)) {
            Action::RoundDone(_) => {
                rounds += 1;
                p.pause(REST);
                q.pass(REST.as_secs_f64());
                p.woke(offset, at(&q));
            }
            Action::NotConverging(_) => complaints += 1,
            _ => {}
        }
    }
    (rounds, complaints)
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
        let (rounds, complaints) = play(guest(hot, rate), link, 30.0);
        assert!(
            rounds > 15 && complaints == 0,
            "{hot} {rate} {link}: {rounds}, {complaints}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn a_guest_that_is_too_fast_never_ends_a_round(hot in 400u64..2_000, factor in 3.0..500.0f64, link in 30.0..3_000.0f64) {
        let (rounds, complaints) = play(guest(hot, link * factor), link, 30.0);
        prop_assert_eq!(rounds, 0);
        prop_assert!(complaints >= 5, "{} complaints", complaints);
    }
}
