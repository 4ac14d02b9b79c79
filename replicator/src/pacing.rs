//! When to read the held migration and when to let it rest: 'pace by reading'.
//!
//! ```text
//!          synced(count >= 3, mark)          a fresh, small section
//!  Seeding ───────────────────────> Reading ────────────────────────> Resting
//!                                     ^    (RoundDone, with its rest)    │
//!                                     └──────────── woke(mark) ──────────┘
//!  any ── hurry ──> Hurrying: read on, there is no more rest
//! ```
//! A held migration iterates for ever. Read without a pause it spins at thousands of dirty syncs a second; left unread its
//! thread blocks in a write, and QEMU's main loop may wait for it: hence rests of at most half a second.
//!
//! A round ends when all that was dirty at a sync after the wake-up has been read. QEMU does not say so, but:
//! at the wake-up, `mark` is what the stream already holds (read, or waiting in the socket). The first section that ends
//! strictly behind the mark was begun before it, so it is stale. From the second on, a small section means that
//! QEMU ran out of dirty pages after the mark. Small is not empty: a guest with a NIC always has some dozens of hot pages.
//!
//! The end of the first pass cannot be told by a small section, which comes early by chance in a large guest; QEMU's
//! `dirty-sync-count` says it: 3 or more.

use std::time::{Duration, Instant};

use umbra_api::order::ROUND_MS_MAX;

use crate::stream::Section;

/// Dirty syncs of which the first pass is known to be over.
const SEEDED_SYNCS: u64 = 3;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Pause between two rounds; longer than [`ROUND_MS_MAX`] is cut to it.
    pub rest: Duration,
    /// Most pages of a section that ends a round.
    pub small_pages: u64,
    /// A round that reads for longer than this does not converge: reported each time this has gone by again.
    pub patience: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rest: Duration::from_millis(ROUND_MS_MAX),
            small_pages: 128,
            patience: Duration::from_secs(5),
        }
    }
}

/// What the reader does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    KeepReading,
    /// The round is complete: tell the target, do not read for `rest` (or until [`Pacer::hurry`]), then call [`Pacer::woke`].
    RoundDone {
        round: Round,
        rest: Duration,
    },
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
    Resting,
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
    complaints: u32,
}

impl Pacer {
    pub fn new(settings: Settings, now: Instant) -> Self {
        let rest = settings.rest.min(Duration::from_millis(ROUND_MS_MAX));
        Self {
            settings: Settings { rest, ..settings },
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
            complaints: 0,
        }
    }

    /// The first pass still goes on: ask QEMU for its `dirty-sync-count` now and then, and tell [`Pacer::synced`].
    pub fn is_seeding(&self) -> bool {
        self.phase == Phase::Seeding
    }

    /// The round that is being read, or was last.
    pub fn round(&self) -> Round {
        self.round
    }

    /// QEMU's `dirty-sync-count`, and the bytes received plus those that wait in the socket, asked *after* the count.
    pub fn synced(&mut self, count: u64, mark: u64) {
        if self.phase == Phase::Seeding && count >= SEEDED_SYNCS {
            self.phase = Phase::Reading { mark, fresh: 0 };
        }
    }

    /// The rest is over. `mark` as for [`Pacer::synced`].
    pub fn woke(&mut self, mark: u64, now: Instant) {
        if self.phase == Phase::Resting {
            self.phase = Phase::Reading { mark, fresh: 0 };
            self.since = now;
        }
    }

    /// A switchover was ordered and its ack is sent: from now on everything is read at once.
    pub fn hurry(&mut self, now: Instant) {
        if self.phase == Phase::Resting {
            self.since = now;
        }
        self.phase = Phase::Hurrying;
    }

    /// A section was read.
    pub fn section(&mut self, s: Section, now: Instant) -> Action {
        self.round.pages += s.pages + s.zeros;
        self.round.sections += 1;
        self.round.bytes = s.at.saturating_sub(self.from);
        self.round.took = now.saturating_duration_since(self.since);
        if s.end {
            self.phase = Phase::Hurrying;
            return Action::RamDone(self.round);
        }
        if let Phase::Reading { mark, fresh } = &mut self.phase
            && s.at > *mark
        {
            *fresh = fresh.saturating_add(1);
            if *fresh >= 2 && s.pages + s.zeros <= self.settings.small_pages {
                return self.end_round(s.at);
            }
        }
        self.complain()
    }

    fn end_round(&mut self, at: u64) -> Action {
        let round = self.round;
        self.phase = Phase::Resting;
        self.round = Round {
            number: round.number + 1,
            pages: 0,
            sections: 0,
            bytes: 0,
            took: Duration::ZERO,
        };
        self.from = at;
        self.complaints = 0;
        Action::RoundDone {
            round,
            rest: self.settings.rest,
        }
    }

    /// A seed takes as long as it takes; every other round has its time.
    fn complain(&mut self) -> Action {
        let due = self.settings.patience * (self.complaints + 1);
        if matches!(self.phase, Phase::Seeding) || self.round.took < due {
            return Action::KeepReading;
        }
        let patience = self.settings.patience.as_nanos().max(1);
        self.complaints = u32::try_from(self.round.took.as_nanos() / patience).unwrap_or(u32::MAX - 1);
        Action::NotConverging(self.round)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(matches!(
            a,
            Action::RoundDone {
                round: Round {
                    number: 0,
                    pages: 0,
                    ..
                },
                ..
            }
        ));
        (p, c)
    }

    #[test]
    fn a_small_section_does_not_end_the_seed() {
        let (mut p, c) = pacer();
        for at in 1..50 {
            assert_eq!(p.section(section(at * 100, 0), c.after(at)), Action::KeepReading);
        }
        p.synced(2, 5000);
        assert!(p.is_seeding());
        p.synced(3, 5000);
        assert!(!p.is_seeding());
        assert_eq!(p.section(section(5000, 0), c.after(60)), Action::KeepReading);
        assert_eq!(p.section(section(5001, 0), c.after(61)), Action::KeepReading);
        let done = p.section(section(5010, 7), c.after(62));
        let want = Round {
            number: 0,
            pages: 7,
            sections: 52,
            bytes: 5010,
            took: Duration::from_millis(62),
        };
        assert_eq!(
            done,
            Action::RoundDone {
                round: want,
                rest: Duration::from_millis(500)
            }
        );
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
        assert_eq!(
            done,
            Action::RoundDone {
                round: want,
                rest: Duration::from_millis(500)
            }
        );
        assert_eq!(p.round().number, 2);
    }

    #[test]
    fn a_rest_is_never_longer_than_qemu_bears() {
        let c = Clock(Instant::now());
        let mut p = Pacer::new(
            Settings {
                rest: Duration::from_secs(9),
                ..Settings::default()
            },
            c.0,
        );
        p.synced(4, 0);
        p.section(section(1, 0), c.after(1));
        let a = p.section(section(2, 0), c.after(1));
        assert!(matches!(a, Action::RoundDone { rest, .. } if rest == Duration::from_millis(500)));
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
        assert!(matches!(
            p.section(section(1 << 20, 1), c.after(20_600)),
            Action::RoundDone { .. }
        ));
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
