//! How long to pause: a lag to keep to, and what keeping to it may cost.
//!
//! ```text
//!                    lag target ──> wanted ──x backing off──┐
//!  CPU of QEMU, own ──> budgets ──> so long must it be ─────┴─ max ──> pause, at most LONGEST
//!  waits on this host ──> hot: backing off x 2 … 8, calm again: / 2
//! ```
//! Bounds come before the lag: a copy that makes the contention which it flees from would be worse than none. Pure: `now` and
//! what was used come from outside.

use std::time::{Duration, Instant};

use umbra_api::order::Lag;
use umbra_api::replica::HeldBack;

use super::Round;
use crate::stream::items::PAGE_SIZE;

/// Not even a round without end may make a shadow as old as the epoch.
pub const LONGEST: Duration = Duration::from_secs(4);
/// A round costs its syncs, however little there is to copy.
const SHORTEST: Duration = Duration::from_millis(20);
/// CPU time that was not used may be saved up for so long, which also evens out the kernel's count in ticks …
const SAVED: Duration = Duration::from_secs(2);
/// … and a debt is forgiven beyond this.
const DEBT_MAX: Duration = Duration::from_secs(30);
const BACK_OFF_MAX: u32 = 8;
/// The first copy works for at least one part of so many of the time: bounds that ask for less do not make it take for ever.
pub const SEED_PARTS: u32 = 10;
/// A host is calm again below this share of what makes it hot.
const CALM: f64 = 0.75;

/// What the host allows a copy.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Bounds {
    /// Shares of one CPU.
    pub qemu_cpu: f64,
    pub own_cpu: f64,
    /// Share of time in which somebody waits for a CPU.
    pub hot: f64,
}

/// What was used and seen since the last time.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Used {
    pub qemu: Duration,
    pub own: Duration,
    /// `None`: nothing new is known.
    pub waits: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pause {
    pub time: Duration,
    pub held: Option<HeldBack>,
}

/// CPU time, as the point in time at which its use is level with the bound again.
#[derive(Clone, Copy, Debug)]
struct Budget {
    share: f64,
    due: Instant,
}

impl Budget {
    fn new(share: f64, now: Instant) -> Self {
        // A share of nothing would be a pause for ever.
        let share = share.max(1e-3);
        Self {
            share,
            due: now.checked_sub(SAVED).unwrap_or(now),
        }
    }

    /// What was overdrawn is forgotten.
    fn forgive(&mut self, now: Instant) {
        self.due = self.due.min(now);
    }

    fn spend(&mut self, used: Duration, now: Instant) {
        let saved = now.checked_sub(SAVED).unwrap_or(now);
        let due = self.due.max(saved) + used.div_f64(self.share);
        self.due = due.min(now + DEBT_MAX);
    }

    fn wait(&self, now: Instant) -> Duration {
        self.due.saturating_duration_since(now)
    }
}

#[derive(Debug)]
pub struct Controller {
    rest: Duration,
    lag: Option<Lag>,
    hot: f64,
    qemu: Budget,
    own: Budget,
    back_off: u32,
    /// Pages a second that the guest dirties, over some rounds.
    dirty: Option<f64>,
    last: Option<Instant>,
}

impl Controller {
    pub fn new(rest: Duration, lag: Option<Lag>, bounds: Bounds, now: Instant) -> Self {
        Self {
            rest,
            lag,
            hot: bounds.hot,
            qemu: Budget::new(bounds.qemu_cpu, now),
            own: Budget::new(bounds.own_cpu, now),
            back_off: 1,
            dirty: None,
            last: None,
        }
    }

    pub fn is_hot(&self) -> bool {
        self.back_off > 1
    }

    /// A round has ended.
    pub fn after(&mut self, round: &Round, used: Used, now: Instant) -> Pause {
        if let Some(last) = self.last.filter(|_| round.number > 0) {
            let since = now.saturating_duration_since(last).as_secs_f64().max(1e-3);
            let rate = round.pages as f64 / since;
            self.dirty = Some(self.dirty.map_or(rate, |d| d + (rate - d) * 0.3));
        }
        self.last = Some(now);
        let wanted = self.wanted(round);
        if round.number > 0 {
            return self.pause(wanted, used, now);
        }
        // What the first copy cost beyond its bounds is not held against the rounds.
        self.qemu.forgive(now);
        self.own.forgive(now);
        let waits = used.waits;
        self.pause(
            wanted,
            Used {
                waits,
                ..Used::default()
            },
            now,
        )
    }

    /// In the middle of a round that does not end: nothing is wanted, but the bounds hold.
    pub fn within(&mut self, used: Used, now: Instant) -> Pause {
        self.pause(Duration::ZERO, used, now)
    }

    /// During the first copy, which keeps to the bounds as far as that does not make it take for ever, and leaves a hot host every
    /// other moment at least: `worked` is how long it has gone on since the last time.
    pub fn seeding(&mut self, worked: Duration, used: Used, now: Instant) -> Pause {
        self.spend(used, now);
        let most = worked.saturating_mul(SEED_PARTS - 1);
        let hot = match self.is_hot() {
            true => worked,
            false => Duration::ZERO,
        };
        longest([
            (hot, Some(HeldBack::HotHost)),
            (self.qemu.wait(now).min(most), Some(HeldBack::QemuCpu)),
            (self.own.wait(now).min(most), Some(HeldBack::OwnCpu)),
        ])
    }

    fn wanted(&self, round: &Round) -> Duration {
        let pages = match self.lag {
            None => return self.rest,
            Some(Lag::Ms(ms)) => {
                let most = Duration::from_millis(ms).saturating_sub(round.took);
                return most.clamp(SHORTEST.min(self.rest), self.rest);
            }
            Some(Lag::Pages(n)) => n,
            Some(Lag::Bytes(n)) => n / PAGE_SIZE as u64,
        };
        let Some(dirty) = self.dirty.filter(|d| *d > 0.0) else {
            return self.rest;
        };
        let time = (pages as f64 / dirty).min(self.rest.as_secs_f64());
        Duration::from_secs_f64(time)
            .saturating_sub(round.took)
            .clamp(SHORTEST.min(self.rest), self.rest)
    }

    fn feel(&mut self, waits: Option<f64>) {
        match waits {
            Some(w) if w >= self.hot => self.back_off = (self.back_off * 2).min(BACK_OFF_MAX),
            Some(w) if w < self.hot * CALM => self.back_off = (self.back_off / 2).max(1),
            _ => {}
        }
    }

    fn pause(&mut self, wanted: Duration, used: Used, now: Instant) -> Pause {
        self.spend(used, now);
        let cool = match self.is_hot() {
            // Also of nothing there is more when the host is hot.
            true => wanted.max(self.rest) * self.back_off,
            false => wanted,
        };
        longest([
            (wanted, None),
            (cool, Some(HeldBack::HotHost)),
            (self.qemu.wait(now), Some(HeldBack::QemuCpu)),
            (self.own.wait(now), Some(HeldBack::OwnCpu)),
        ])
    }

    fn spend(&mut self, used: Used, now: Instant) {
        self.qemu.spend(used.qemu, now);
        self.own.spend(used.own, now);
        self.feel(used.waits);
    }
}

/// The longest of these, of equally long ones the first.
fn longest<const N: usize>(candidates: [(Duration, Option<HeldBack>); N]) -> Pause {
    let mut longest = Pause {
        time: Duration::ZERO,
        held: None,
    };
    for (time, held) in candidates {
        if time > longest.time {
            longest = Pause { time, held };
        }
    }
    Pause {
        time: longest.time.min(LONGEST),
        ..longest
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REST: Duration = Duration::from_millis(500);

    fn bounds(cpu: f64) -> Bounds {
        Bounds {
            qemu_cpu: cpu,
            own_cpu: cpu,
            hot: 0.8,
        }
    }

    fn round(number: u64, pages: u64, took: Duration) -> Round {
        Round {
            number,
            pages,
            sections: 2,
            bytes: pages * 4100,
            took,
        }
    }

    /// A guest that dirties steadily, and a copy whose cost is in its pages.
    #[derive(Clone, Copy)]
    struct Load {
        dirty: f64,
        working_set: u64,
        us_per_page: f64,
    }

    fn busy(dirty: f64) -> Load {
        Load {
            dirty,
            working_set: u64::MAX,
            us_per_page: 5.0,
        }
    }

    /// Plays `rounds`; the pauses, and the CPU share used.
    fn play(c: &mut Controller, start: Instant, load: Load, rounds: u64) -> (Vec<Pause>, f64) {
        let (mut now, mut since, mut cpu, mut pauses) = (start, start, Duration::ZERO, Vec::new());
        for n in 0..=rounds {
            let pages = ((load.dirty * (now - since).as_secs_f64()) as u64).min(load.working_set);
            let took = Duration::from_secs_f64(pages as f64 * load.us_per_page / 1e6);
            since = now;
            now += took;
            let used = Used {
                qemu: took,
                own: took,
                waits: None,
            };
            let p = c.after(&round(n, pages, took), used, now);
            if n > 0 {
                cpu += took;
            }
            now += p.time;
            pauses.push(p);
        }
        (pauses, cpu.as_secs_f64() / (now - start).as_secs_f64())
    }

    proptest! {
        #[test]
        fn a_steady_load_never_costs_more_than_the_bound(
            dirty in 0.0..200_000.0f64, working_set in 1u64..200_000, us_per_page in 0.5..20.0f64, bound in 0.02..0.9f64,
        ) {
            let now = Instant::now();
            let mut c = Controller::new(REST, None, bounds(bound), now);
            let load = Load { dirty, working_set, us_per_page };
            let (pauses, share) = play(&mut c, now, load, 400);
            prop_assert!(pauses.iter().all(|p| p.time <= LONGEST));
            // A guest that writes other pages all the time can't be followed in bounds, however rarely.
            let whole = working_set as f64 * us_per_page / 1e6;
            let possible = (dirty * us_per_page / 1e6).min(whole / (LONGEST.as_secs_f64() + whole)) <= bound;
            // More only by what was saved up at the begin.
            prop_assert!(share <= bound + 0.02 || !possible, "{share} of {bound}");
        }

        #[test]
        fn a_steady_load_has_a_steady_lag(dirty in 100.0..20_000.0f64, pages in 50u64..2_000) {
            let now = Instant::now();
            let mut c = Controller::new(REST, Some(Lag::Pages(pages)), bounds(0.9), now);
            let load = Load { dirty, working_set: u64::MAX, us_per_page: 2.0 };
            let (pauses, _) = play(&mut c, now, load, 200);
            let tail: Vec<f64> = pauses[150..].iter().map(|p| p.time.as_secs_f64() * dirty).collect();
            // The target, but for rounds that can't be shorter or longer.
            let want = (pages as f64).clamp(SHORTEST.as_secs_f64() * dirty, REST.as_secs_f64() * dirty);
            prop_assert!(tail.iter().all(|t| (t - want).abs() <= want * 0.15 + 2.0), "{tail:?}, wanted {want}");
        }

        #[test]
        fn a_hot_host_is_left_alone_and_a_calm_one_is_not(readings in prop::collection::vec(0.0..1.0f64, 1..60)) {
            let now = Instant::now();
            let mut c = Controller::new(REST, None, bounds(0.9), now);
            let mut before = REST;
            for (n, w) in (1..).zip(readings) {
                let at = now + Duration::from_secs(n);
                let used = Used { waits: Some(w), ..Used::default() };
                let p = c.after(&round(n, 10, Duration::ZERO), used, at);
                match w {
                    w if w >= 0.8 => prop_assert!(p.time >= (before * 2).min(LONGEST) && p.held == Some(HeldBack::HotHost)),
                    w if w < 0.6 => prop_assert!(p.time <= before.max(REST) && p.time <= (before / 2).max(REST)),
                    _ => prop_assert_eq!(p.time, before),
                }
                before = p.time;
            }
        }
    }

    #[test]
    fn without_a_target_or_a_burden_the_pause_is_the_one_that_was_ordered() {
        let now = Instant::now();
        let mut c = Controller::new(REST, None, bounds(0.25), now);
        let (pauses, _) = play(&mut c, now, busy(2_000.0), 50);
        let ordered = Pause { time: REST, held: None };
        assert!(pauses.iter().all(|p| *p == ordered), "{pauses:?}");
    }

    #[test]
    fn a_lag_in_time_or_bytes_shortens_the_pause() {
        let now = Instant::now();
        let mut c = Controller::new(REST, Some(Lag::Ms(120)), bounds(0.9), now);
        let p = c.after(&round(1, 5, Duration::from_millis(20)), Used::default(), now);
        assert_eq!(p.time, Duration::from_millis(100));
        let p = c.after(&round(2, 5, Duration::from_secs(3)), Used::default(), now);
        assert_eq!(p.time, SHORTEST);
        let lag = |lag| {
            play(
                &mut Controller::new(REST, Some(lag), bounds(0.9), now),
                now,
                busy(5_000.0),
                40,
            )
            .0
        };
        assert_eq!(lag(Lag::Bytes(4096 * 500)), lag(Lag::Pages(500)));
    }

    #[test]
    fn the_seed_shares_a_hot_host_and_costs_the_rounds_nothing() {
        let now = Instant::now();
        let mut c = Controller::new(REST, None, bounds(0.1), now);
        let worked = Duration::from_millis(250);
        let mut feels = |waits| {
            let used = Used {
                waits,
                ..Used::default()
            };
            c.seeding(worked, used, now).time
        };
        assert_eq!(feels(Some(0.3)), Duration::ZERO);
        assert_eq!(feels(Some(0.95)), worked);
        assert_eq!(feels(None), worked);
        assert_eq!(feels(Some(0.1)), Duration::ZERO);
        let used = Used {
            qemu: Duration::from_secs(60),
            own: Duration::from_secs(60),
            waits: None,
        };
        assert_eq!(
            c.after(&round(0, 1 << 20, Duration::from_secs(60)), used, now).time,
            REST
        );
    }

    /// A first copy of a minute's work for one thread or both; how long it takes, and what share of it the dearer one works.
    fn copy(bound: f64, qemu: f64, own: f64) -> (f64, f64) {
        let start = Instant::now();
        let look = Duration::from_millis(250);
        let mut c = Controller::new(REST, None, bounds(bound), start);
        let mut now = start;
        for _ in 0..240 {
            now += look;
            let used = Used {
                qemu: look.mul_f64(qemu),
                own: look.mul_f64(own),
                waits: None,
            };
            let pause = c.seeding(look, used, now);
            assert_eq!(pause.time.is_zero(), pause.held.is_none());
            now += pause.time;
        }
        let took = (now - start).as_secs_f64();
        (took, 60.0 * qemu.max(own) / took)
    }

    proptest! {
        #[test]
        fn the_first_copy_keeps_to_the_bounds_and_does_not_take_for_ever(
            bound in 0.001..1.0f64, qemu in 0.0..1.0f64, own in 0.0..1.0f64,
        ) {
            let (took, share) = copy(bound, qemu, own);
            prop_assert!(took <= 60.0 * f64::from(SEED_PARTS) + 0.1, "{took} s");
            let slowest = qemu.max(own) / f64::from(SEED_PARTS);
            // More only by what was saved up at the begin.
            let saved = SAVED.as_secs_f64() * bound / took;
            prop_assert!(share <= bound.max(slowest) + saved + 0.01, "{share} of {bound}");
            // And never longer than they ask for.
            prop_assert!(took <= 60.1 || share + 0.01 >= bound.min(qemu.max(own)), "{took} s, {share} of {bound}");
        }
    }

    #[test]
    fn a_round_without_end_is_bounded_too() {
        let now = Instant::now();
        let mut c = Controller::new(REST, None, bounds(0.25), now);
        let used = Used {
            own: Duration::from_secs(5),
            ..Used::default()
        };
        let p = c.within(used, now + Duration::from_secs(5));
        assert_eq!((p.time, p.held), (LONGEST, Some(HeldBack::OwnCpu)));
        assert_eq!(
            c.within(Used::default(), now + Duration::from_secs(90)).time,
            Duration::ZERO
        );
    }
}
