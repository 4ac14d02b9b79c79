//! Whether the present round will end, told from its own turns through RAM and long before it has gone on for too long.
//!
//! ```text
//!  round ended       sync                     sync                   sync
//!  ────┴──────────────┴────────────────────────┴──────────────────────┴──>
//!      <─── window ──><─── turn 1 carries it ──><─ turn 2 carries that ─>
//! ```
//! A turn carries what was dirtied since the sync before it. One that takes longer than what it carries took to be dirtied is followed by one
//! that carries at least as much: a longer window holds more pages, and of a guest that writes the same ones again and again as
//! many. So rounds do not end for as long as the guest goes on like this. A link that stalls looks the same for a moment, and then the rest
//! of the round is there at once: what is suspected has to last. Pure.

use std::time::{Duration, Instant};

/// A suspicion that is still there after this, in the same round, is believed.
const LASTS: Duration = Duration::from_millis(250);
/// A turn that takes at most this part of the time in which its pages were dirtied leaves less for the next one.
const SHRINKS: f64 = 0.9;

#[derive(Clone, Copy, Debug)]
struct Carried {
    /// The turn that is under way began then …
    begun: Instant,
    /// … with what was dirtied in this time.
    window: Duration,
    pages: u64,
}

#[derive(Debug, Default)]
pub struct Behind {
    /// Turns of so few pages end a round, however long they take.
    small_pages: u64,
    /// End of the last round.
    ended: Option<Instant>,
    turn: Option<Carried>,
    /// Whole turns of this round.
    turns: u64,
    suspected: Option<Instant>,
    told: bool,
    /// Pages of the last whole turn, and what that is a second.
    pages: u64,
    dirtied: u64,
}

impl Behind {
    pub fn new(small_pages: u64) -> Self {
        Self {
            small_pages,
            ..Self::default()
        }
    }

    pub fn round_ended(&mut self, now: Instant) {
        *self = Self {
            ended: Some(now),
            ..Self::new(self.small_pages)
        };
    }

    /// The first section of the round that knows what is dirty. Of the first pass nobody knows when its pages were dirtied.
    pub fn begin(&mut self, now: Instant) {
        self.turn = self.ended.map(|t| Carried {
            begun: now,
            window: now.saturating_duration_since(t),
            pages: 0,
        });
    }

    pub fn page(&mut self) {
        if let Some(turn) = &mut self.turn {
            turn.pages = turn.pages.saturating_add(1);
        }
    }

    /// Now and then, on a slow link not only where a section ends, which may take seconds there; `turns` are the round's whole ones. Once
    /// a round, when it is certain: how fast the guest dirties at least, pages a second.
    pub fn look(&mut self, turns: u64, now: Instant) -> Option<u64> {
        let turn = self.turn.as_mut()?;
        let took = now.saturating_duration_since(turn.begun);
        let dirtied = (turn.pages as f64 / turn.window.as_secs_f64().max(1e-3)) as u64;
        if turns > self.turns {
            if took < turn.window.mul_f64(SHRINKS) {
                self.suspected = None;
            } else {
                self.suspected.get_or_insert(now);
            }
            (self.turns, self.pages, self.dirtied) = (turns, turn.pages, dirtied);
            *turn = Carried {
                begun: now,
                window: took,
                pages: 0,
            };
            return None;
        }
        if took > turn.window {
            self.suspected.get_or_insert(now);
        }
        let lasts = now.saturating_duration_since(self.suspected?) >= LASTS;
        let small = self.pages.max(turn.pages) <= self.small_pages;
        if !lasts || small || std::mem::replace(&mut self.told, true) {
            return None;
        }
        Some(self.dirtied.max(dirtied))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REST: f64 = 0.5;

    fn read(b: &mut Behind, pages: u64, now: Instant) -> Option<u64> {
        (0..pages).for_each(|_| b.page());
        b.look(0, now)
    }

    /// A guest that writes `dirty` pages a second of a working set, on a link that carries `carried` a second, in sections of 10 ms at most. When
    /// the round ends, and when it is told that it will not, in seconds.
    fn play(dirty: f64, carried: f64, working_set: f64) -> (Option<f64>, Option<f64>) {
        let start = Instant::now();
        let at = |s: f64| start + Duration::from_secs_f64(s);
        let mut b = Behind::new(128);
        b.round_ended(start);
        let (mut t, mut turns, mut told) = (REST, 0, None);
        b.begin(at(t));
        let mut left = (dirty * REST).min(working_set);
        let mut begun = t;
        while t < REST + 5.0 {
            let sent = (carried * 0.010).min(left);
            t += sent / carried;
            left -= sent;
            if left <= 0.0 {
                (turns, left) = (turns + 1, (dirty * (t - begun)).min(working_set));
                begun = t;
                if left <= 128.0 {
                    return (Some(t - REST), told);
                }
            }
            (0..sent as u64).for_each(|_| b.page());
            if b.look(turns, at(t)).is_some() {
                assert_eq!(told, None, "told twice");
                told = Some(t - REST);
            }
        }
        (None, told)
    }

    proptest! {
        #[test]
        fn a_guest_that_is_too_fast_is_told_of_soon(carried in 1_000.0..50_000.0f64, times in 1.05..20.0f64, set in 0.5..20.0f64) {
            // Of which a turn takes up to a second, and the first one longer than the rest before it.
            let dirty = carried * times;
            let working_set = (carried * set).min(carried);
            let (ended, told) = play(dirty, carried, working_set.max(carried * 0.6));
            prop_assert_eq!(ended, None);
            prop_assert!(told.is_some_and(|t| t < 2.5), "{told:?}");
        }

        #[test]
        fn a_guest_that_can_be_followed_is_not(carried in 1_000.0..50_000.0f64, share in 0.0..0.8f64, set in 0.01..20.0f64) {
            let (ended, told) = play(carried * share, carried, carried * set);
            prop_assert!(ended.is_some() && told.is_none(), "{ended:?} {told:?}");
        }
    }

    #[test]
    fn pages_that_are_written_again_and_again_are_told_of_though_each_turn_is_short() {
        let (ended, told) = play(50_000.0, 10_000.0, 1_000.0);
        assert_eq!(ended, None);
        assert!(told.is_some_and(|t| t < 1.0), "{told:?}");
    }

    #[test]
    fn a_link_that_stalls_for_a_moment_is_not_the_guests_doing() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut b = Behind::new(128);
        b.round_ended(start);
        b.begin(at(500));
        assert_eq!(read(&mut b, 100, at(505)), None);
        for ms in 3_000..3_100 {
            assert_eq!(read(&mut b, 50, at(ms)), None);
        }
        b.round_ended(at(3_100));
        b.begin(at(3_600));
        assert_eq!(read(&mut b, 50, at(3_700)), None);
    }

    #[test]
    fn of_the_first_pass_nothing_is_known_and_a_rate_is_what_a_turn_carried() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut b = Behind::new(128);
        b.begin(at(0));
        assert_eq!(read(&mut b, 1_000, at(60_000)), None);
        b.round_ended(at(60_000));
        b.begin(at(60_500));
        assert_eq!(read(&mut b, 1_000, at(61_001)), None);
        assert_eq!(read(&mut b, 1_000, at(61_300)), Some(4_000));
        assert_eq!(read(&mut b, 1_000, at(62_300)), None);
    }
}
