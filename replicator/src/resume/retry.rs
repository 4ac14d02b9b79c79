//! When a copy that broke off is begun again: soon, then less and less often, and not for ever.

use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(15);
/// The target keeps the memory a little longer: see [`super::held::HELD_FOR`].
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(15 * 60);
/// A pass that went on for so long has recovered: the next break is a new one.
const CALM: Duration = Duration::from_secs(60);

/// The attempts since a copy was last well.
#[derive(Debug, Default)]
pub struct Retry {
    since: Option<Instant>,
    wait: Duration,
    /// Since when a pass goes on.
    well: Option<Instant>,
}

impl Retry {
    /// A pass has begun, or the shadow is warm.
    pub fn went_on(&mut self, now: Instant) {
        self.well.get_or_insert(now);
    }

    /// The copy broke off, or an attempt failed: how long to wait for the next one. `None`: it has been too long.
    pub fn broke(&mut self, now: Instant) -> Option<Duration> {
        if self
            .well
            .take()
            .is_some_and(|t| now.saturating_duration_since(t) >= CALM)
        {
            *self = Self::default();
        }
        let since = *self.since.get_or_insert(now);
        if now.saturating_duration_since(since) >= GIVE_UP_AFTER {
            return None;
        }
        self.wait = (self.wait * 2).clamp(FIRST, LONGEST);
        Some(self.wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_become_rare_and_end() {
        let (mut r, start) = (Retry::default(), Instant::now());
        let (mut now, mut n) = (start, 0);
        while let Some(wait) = r.broke(now) {
            assert!((FIRST..=LONGEST).contains(&wait));
            now += wait;
            n += 1;
        }
        assert!((40..100).contains(&n), "{n}");
        assert!(now - start >= GIVE_UP_AFTER && now - start < GIVE_UP_AFTER + LONGEST);
    }

    #[test]
    fn only_a_pass_that_went_on_has_recovered() {
        let (mut r, start) = (Retry::default(), Instant::now());
        let at = |s| start + Duration::from_secs(s);
        assert_eq!(r.broke(at(0)), Some(FIRST));
        r.went_on(at(1));
        assert_eq!(
            r.broke(at(2)),
            Some(FIRST * 2),
            "one that breaks again and again is not begun at once"
        );
        r.went_on(at(3));
        r.went_on(at(50));
        assert_eq!(r.broke(at(3) + CALM), Some(FIRST), "it went on since 3 s");
    }
}
