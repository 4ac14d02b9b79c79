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
