//! When to read the held migration and when to let it rest: 'pace by reading'.
//!
//! ```text
//!          synced(count >= 3, mark)          a fresh, small section
//!  Seeding ───────────────────────> Reading ───── RoundDone ────────> Resting (once told how long, by pause)
//!                                     ^                                │   ^
//!                                     │            woke(mark), time is │   │ a section behind the mark
//!                                     └── woke(mark), no time is left ─┤   │
//!                                                             left     └─> Sipping
//!  any ── hurry ──> Hurrying: read on, there is no more rest
//! ```
//! A held migration iterates for ever. Read without a pause it spins at thousands of dirty syncs a second; left unread its
//! thread blocks in a write, and QEMU's main loop may wait for it: hence rests of at most half a second. A longer pause is
//! made of several, with a sip between them: one section is read, since at its end QEMU has let go of what others wait for.
//! How long to pause is said by [`control`], what the rounds tell of guest and link by [`estimate`] and [`working`].
//!
//! A round ends when all that was dirty at a sync after the wake-up has been read. QEMU does not say so, but:
//! at the wake-up, `mark` is what the stream already holds (read, or waiting in the socket). The first section that ends
//! strictly behind the mark was begun before it, so it is stale. From the second on, a small section means that
//! QEMU ran out of dirty pages after the mark. Small is not empty: a guest with a NIC always has some dozens of hot pages.
//! That holds as long as no section can have been cut: QEMU cuts one that has taken 50 ms, so on a slow link nearly all of them are
//! small, and the reader can't tell from outside which were, since it waits for the link where QEMU waits for the socket. A round
//! that has gone on for so long is ended by something that no cut touches, the order of the pages: QEMU has looked once through all of
//! RAM, and found few ([`turn`]). Neither silence nor the reader's patience ever ends a round.
//!
//! The end of the first pass cannot be told by a small section, which comes early by chance in a large guest; QEMU's
//! `dirty-sync-count` says it: 3 or more.

pub mod behind;
pub mod control;
pub mod estimate;
#[cfg(test)]
mod qemu_tests;
pub mod turn;
pub mod working;

use std::time::{Duration, Instant};

use umbra_api::order::ROUND_MS_MAX;
use umbra_api::wire::setup::{Block, StreamSetup};

use self::behind::Behind;
use self::turn::Turn;
use crate::stream::Section;

/// Dirty syncs of which the first pass is known to be over.
const SEEDED_SYNCS: u64 = 3;

/// QEMU cuts a section that has taken longer.
const SECTION_TIME: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Most pages of a section, or of a whole turn, that ends a round.
    pub small_pages: u64,
    /// A round that reads for longer than this does not converge: reported each time this has gone by again.
    pub patience: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            small_pages: 128,
            patience: Duration::from_secs(5),
        }
    }
}

/// What the reader does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    KeepReading,
    /// The round is complete: tell the target, and [`Pacer::pause`].
    RoundDone(Round),
    /// Do not read for so long (or until [`Pacer::hurry`]), then call [`Pacer::woke`].
    Rest(Duration),
    /// The round does not end: the guest dirties pages faster than they travel. Read on.
    NotConverging(Round),
    /// The last section: the guest is stopped and everything of its RAM was read.
    RamDone(Round),
}

/// Figures of a round, also of one that has not ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Round {
    /// 0 is the seed.
    pub number: u64,
    /// Pages read, zeros included.
    pub pages: u64,
    pub sections: u64,
    /// Bytes of the stream, from the last round's end on.
    pub bytes: u64,
    /// Time spent reading.
    pub took: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Seeding,
    /// `fresh` counts the sections that ended behind the mark.
    Reading {
        mark: u64,
        fresh: u32,
    },
    Resting {
        left: Duration,
    },
    /// In the middle of a long pause.
    Sipping {
        mark: u64,
        left: Duration,
    },
    Hurrying,
}

#[derive(Debug)]
pub struct Pacer {
    settings: Settings,
    phase: Phase,
    round: Round,
    /// Offset in the stream where the round began.
    from: u64,
    since: Instant,
    /// Time spent reading before `since`, in this round.
    before: Duration,
    turn: Turn,
    behind: Behind,
    /// Of the round's time, what the first pass took: as long as it takes.
    free: Duration,
    complaints: u32,
}

impl Pacer {
    pub fn new(settings: Settings, now: Instant) -> Self {
        Self {
            settings,
            phase: Phase::Seeding,
            round: Round {
                number: 0,
                pages: 0,
                sections: 0,
                bytes: 0,
                took: Duration::ZERO,
            },
            from: 0,
            since: now,
            before: Duration::ZERO,
            turn: Turn::default(),
            behind: Behind::new(settings.small_pages),
            free: Duration::ZERO,
            complaints: 0,
        }
    }

    /// The blocks of RAM are known.
    pub fn setup(&mut self, setup: &StreamSetup) {
        self.turn = Turn::new(setup.blocks.iter().map(Block::pages), self.settings.small_pages);
    }

    /// A page was read, of zeros or not. Each, and in order.
    pub fn page(&mut self, block: u16, page: u64) {
        self.turn.page(block, page);
        self.behind.page();
    }

    /// The first pass still goes on: ask QEMU for its `dirty-sync-count` now and then, and tell [`Pacer::synced`].
    pub fn is_seeding(&self) -> bool {
        self.phase == Phase::Seeding
    }

    /// The round that is being read, or was last.
    pub fn round(&self) -> Round {
        self.round
    }

    /// The present round will not end for as long as the guest goes on like this: told once, with the pages a second that it
    /// dirties at least. Long before [`Action::NotConverging`], which is for what is done about it.
    pub fn too_fast(&mut self, now: Instant) -> Option<u64> {
        match self.phase {
            Phase::Reading { .. } => self.behind.look(self.turn.turns(), now),
            _ => None,
        }
    }

    /// QEMU's `dirty-sync-count`, and the bytes received plus those that wait in the socket, asked *after* the count.
    pub fn synced(&mut self, count: u64, mark: u64) {
        if self.phase == Phase::Seeding && count >= SEEDED_SYNCS {
            self.free = self.round.took;
            self.phase = Phase::Reading { mark, fresh: 0 };
        }
    }

    /// Pauses for so long, after a round or in the middle of one; the first part of it is to be rested now.
    pub fn pause(&mut self, time: Duration) -> Option<Duration> {
        match self.phase {
            Phase::Reading { .. } => {
                self.before = self.round.took;
                Some(self.part(time))
            }
            Phase::Resting { .. } => Some(self.part(time)),
            Phase::Seeding | Phase::Sipping { .. } | Phase::Hurrying => None,
        }
    }

    fn part(&mut self, time: Duration) -> Duration {
        let part = time.min(Duration::from_millis(ROUND_MS_MAX));
        self.phase = Phase::Resting { left: time - part };
        part
    }

    /// The rest is over. `mark` as for [`Pacer::synced`].
    pub fn woke(&mut self, mark: u64, now: Instant) {
        match self.phase {
            Phase::Resting { left } if left.is_zero() => {
                self.phase = Phase::Reading { mark, fresh: 0 };
                self.since = now;
            }
            Phase::Resting { left } => self.phase = Phase::Sipping { mark, left },
            _ => {}
        }
    }

    /// A switchover was ordered and its ack is sent: from now on everything is read at once.
    pub fn hurry(&mut self, now: Instant) {
        if let Phase::Resting { .. } | Phase::Sipping { .. } = self.phase {
            self.since = now;
        }
        self.phase = Phase::Hurrying;
    }

    /// A section was read.
    pub fn section(&mut self, s: Section, now: Instant) -> Action {
        let pages = s.pages + s.zeros;
        self.round.pages += pages;
        self.round.sections += 1;
        self.round.bytes = s.at.saturating_sub(self.from);
        if let Phase::Sipping { mark, left } = self.phase {
            // `since` is of the reading before.
            return match s.at > mark && !s.end {
                true => Action::Rest(self.part(left)),
                false if s.end => self.ram_done(),
                false => Action::KeepReading,
            };
        }
        self.round.took = self.before + now.saturating_duration_since(self.since);
        if s.end {
            return self.ram_done();
        }
        if let Phase::Resting { .. } = self.phase {
            // What was read together with the round's end.
            return Action::KeepReading;
        }
        if let Phase::Reading { mark, fresh } = &mut self.phase
            && s.at > *mark
        {
            *fresh = fresh.saturating_add(1);
            if *fresh == 1 {
                self.turn.begin();
                self.behind.begin(now);
                return self.complain();
            }
            if pages == 0 {
                self.turn.nothing();
            }
            let ended = match self.round.took < SECTION_TIME {
                true => pages <= self.settings.small_pages,
                false => self.turn.is_small(),
            };
            if ended {
                self.behind.round_ended(now);
                return self.end_round(s.at);
            }
        }
        self.complain()
    }

    fn ram_done(&mut self) -> Action {
        self.phase = Phase::Hurrying;
        Action::RamDone(self.round)
    }

    fn end_round(&mut self, at: u64) -> Action {
        let round = self.round;
        self.phase = Phase::Resting { left: Duration::ZERO };
        self.round = Round {
            number: round.number + 1,
            pages: 0,
            sections: 0,
            bytes: 0,
            took: Duration::ZERO,
        };
        self.from = at;
        self.before = Duration::ZERO;
        self.free = Duration::ZERO;
        self.complaints = 0;
        Action::RoundDone(round)
    }

    /// A seed takes as long as it takes; every other round has its time.
    fn complain(&mut self) -> Action {
        let took = self.round.took.saturating_sub(self.free);
        let due = self.settings.patience * (self.complaints + 1);
        if matches!(self.phase, Phase::Seeding) || took < due {
            return Action::KeepReading;
        }
        let patience = self.settings.patience.as_nanos().max(1);
        self.complaints = u32::try_from(took.as_nanos() / patience).unwrap_or(u32::MAX - 1);
        Action::NotConverging(self.round)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REST: Duration = Duration::from_millis(500);

    struct Clock(Instant);

    impl Clock {
        fn after(&self, ms: u64) -> Instant {
            self.0 + Duration::from_millis(ms)
        }
    }

    fn section(at: u64, pages: u64) -> Section {
        Section {
            end: false,
            pages,
            zeros: 0,
            at,
        }
    }

    pub fn ram(pages: u64) -> StreamSetup {
        StreamSetup {
            version: 3,
            config: Vec::new(),
            ram_section: 2,
            ram_version: 4,
            blocks: vec![Block {
                name: "pc.ram".into(),
                bytes: pages * 4096,
            }],
        }
    }

    fn pacer() -> (Pacer, Clock) {
        let c = Clock(Instant::now());
        (Pacer::new(Settings::default(), c.0), c)
    }

    /// A pacer whose seed is over, at offset 1000.
    fn seeded() -> (Pacer, Clock) {
        let (mut p, c) = pacer();
        p.synced(3, 900);
        p.section(section(950, 0), c.after(10));
        let a = p.section(section(1000, 0), c.after(10));
        let Action::RoundDone(round) = a else { panic!("{a:?}") };
        assert_eq!((round.number, round.pages), (0, 0));
        assert_eq!(p.pause(REST), Some(REST));
        (p, c)
    }

    #[test]
    fn a_small_section_does_not_end_the_seed() {
        let (mut p, c) = pacer();
        for at in 1..50 {
            assert_eq!(p.section(section(at * 100, 0), c.after(at / 2)), Action::KeepReading);
        }
        p.synced(2, 5000);
        assert!(p.is_seeding());
        p.synced(3, 5000);
        assert!(!p.is_seeding());
        assert_eq!(p.section(section(5000, 0), c.after(40)), Action::KeepReading);
        assert_eq!(p.section(section(5001, 0), c.after(41)), Action::KeepReading);
        let done = p.section(section(5010, 7), c.after(42));
        let want = Round {
            number: 0,
            pages: 7,
            sections: 52,
            bytes: 5010,
            took: Duration::from_millis(42),
        };
        assert_eq!(done, Action::RoundDone(want));
    }

    #[test]
    fn the_first_section_behind_the_mark_is_stale_and_a_large_one_ends_nothing() {
        let (mut p, c) = seeded();
        p.woke(2000, c.after(500));
        for (at, pages) in [(1500, 0), (2000, 0), (2001, 0), (3000, 129)] {
            assert_eq!(p.section(section(at, pages), c.after(501)), Action::KeepReading, "{at}");
        }
        let done = p.section(
            Section {
                zeros: 8,
                ..section(3500, 120)
            },
            c.after(503),
        );
        let want = Round {
            number: 1,
            pages: 257,
            sections: 5,
            bytes: 2500,
            took: Duration::from_millis(3),
        };
        assert_eq!(done, Action::RoundDone(want));
        assert_eq!(p.round().number, 2);
    }

    #[test]
    fn a_rest_is_never_longer_than_qemu_bears_and_a_long_pause_sips() {
        let (mut p, c) = seeded();
        assert_eq!(p.pause(Duration::from_millis(1_200)), Some(REST));
        // Of what waits in the socket nothing ends the pause; the first section behind it does.
        for at in [2_000, 3_000] {
            p.woke(at, c.after(at));
            assert_eq!(p.section(section(at - 500, 0), c.after(at)), Action::KeepReading);
            let rest = if at == 2_000 { REST } else { Duration::from_millis(200) };
            assert_eq!(p.section(section(at + 1, 100), c.after(at)), Action::Rest(rest));
        }
        p.woke(4_000, c.after(4_000));
        assert_eq!(p.section(section(4_001, 5), c.after(4_001)), Action::KeepReading);
        let done = p.section(section(4_010, 6), c.after(4_003));
        let Action::RoundDone(round) = done else {
            panic!("{done:?}")
        };
        // The sips' pages are the round's, their time is not.
        assert_eq!((round.pages, round.took), (211, Duration::from_millis(3)));
    }

    #[test]
    fn a_sip_ends_in_a_hurry_or_with_the_stream() {
        let (mut p, c) = seeded();
        p.pause(REST * 3);
        p.woke(2_000, c.after(500));
        p.hurry(c.after(501));
        assert_eq!(p.section(section(2_001, 0), c.after(502)), Action::KeepReading);
        assert_eq!(p.pause(REST), None);
        let (mut p, c) = seeded();
        p.pause(REST * 3);
        p.woke(2_000, c.after(500));
        let last = Section {
            end: true,
            ..section(1_500, 1)
        };
        assert!(matches!(p.section(last, c.after(501)), Action::RamDone(_)));
    }

    #[test]
    fn in_a_hurry_nothing_rests() {
        let (mut p, c) = seeded();
        p.hurry(c.after(100));
        p.woke(1000, c.after(100));
        for at in 1..20 {
            assert_eq!(p.section(section(1000 + at, 0), c.after(100 + at)), Action::KeepReading);
        }
        let last = Section {
            end: true,
            ..section(2000, 30)
        };
        let Action::RamDone(round) = p.section(last, c.after(120)) else {
            panic!("no end")
        };
        assert_eq!(
            (round.pages, round.bytes, round.took),
            (30, 1000, Duration::from_millis(20))
        );
    }

    #[test]
    fn a_round_that_does_not_end_is_told_with_its_figures() {
        let (mut p, c) = seeded();
        p.woke(1000, c.after(500));
        let mut told = 0;
        for i in 1..=200 {
            match p.section(section(1000 + i * 100, 1000), c.after(500 + i * 100)) {
                Action::KeepReading => {}
                Action::NotConverging(r) => {
                    told += 1;
                    assert_eq!((r.pages, r.sections), (i * 1000, i));
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(told, 4);
    }

    #[test]
    fn a_slow_round_ends_with_a_turn_of_few_pages_and_not_with_a_section_of_few() {
        let (mut p, c) = pacer();
        p.setup(&ram(10_000));
        let mut seen = (0, 0);
        let mut read = |p: &mut Pacer, pages: &[u64], ms: u64| {
            pages.iter().for_each(|n| p.page(0, *n));
            seen = (seen.0 + 1_000, seen.1 + ms);
            p.section(section(seen.0, pages.len() as u64), c.after(seen.1))
        };
        p.synced(3, 0);
        // As slow as can be: one page a section, and 500 that are dirty again each time.
        for i in 0..2_000 {
            let a = read(&mut p, &[i % 500], 51);
            assert!(
                matches!(a, Action::KeepReading | Action::NotConverging(_)),
                "{i}: {a:?}"
            );
        }
        // The guest has calmed down to three, but of the turn that ends with 300 there are 200 more.
        for page in [100, 200, 300] {
            assert!(!matches!(read(&mut p, &[page], 51), Action::RoundDone(_)));
        }
        assert!(matches!(read(&mut p, &[100], 51), Action::RoundDone(_)));
    }

    #[test]
    fn a_slow_round_ends_with_a_section_of_nothing() {
        let (mut p, c) = seeded();
        p.setup(&ram(10_000));
        p.woke(2_000, c.after(500));
        (0..64).for_each(|n| p.page(0, n));
        assert_eq!(p.section(section(2_100, 64), c.after(600)), Action::KeepReading);
        assert_eq!(p.section(section(2_200, 1), c.after(700)), Action::KeepReading);
        assert!(matches!(
            p.section(section(2_300, 0), c.after(701)),
            Action::RoundDone(_)
        ));
    }

    #[test]
    fn a_pause_in_the_middle_of_a_round_is_no_time_of_the_round() {
        let (mut p, c) = seeded();
        p.woke(1000, c.after(500));
        let a = p.section(section(2000, 1000), c.after(5_600));
        assert!(matches!(a, Action::NotConverging(_)));
        assert_eq!(p.pause(Duration::from_millis(300)), Some(Duration::from_millis(300)));
        p.woke(2100, c.after(60_000));
        assert_eq!(p.section(section(3000, 1000), c.after(61_000)), Action::KeepReading);
        let a = p.section(section(4000, 1000), c.after(65_000));
        let Action::NotConverging(round) = a else {
            panic!("{a:?}")
        };
        assert_eq!((round.pages, round.took), (3000, Duration::from_millis(10_100)));
    }

    #[test]
    fn a_seed_is_never_too_long() {
        let (mut p, c) = pacer();
        for i in 1..100 {
            assert_eq!(p.section(section(i, 100_000), c.after(i * 10_000)), Action::KeepReading);
        }
    }

    #[test]
    fn the_end_ends_in_any_phase() {
        let (mut p, c) = pacer();
        assert!(matches!(
            p.section(
                Section {
                    end: true,
                    ..section(9, 1)
                },
                c.0
            ),
            Action::RamDone(_)
        ));
    }
}
