//! What the rounds tell: how fast the guest dirties, what the link carries, how long a switchover would stop the guest.
//!
//! A link's speed shows only while it is busy. A stretch of reading that ends with bytes still unsent was bound by the link; one that
//! ends without only says that the link carries at least so much. Single stretches may be short, and a peer may stall:
//! what is believed is the mean over some seconds of busy time. Pure.

use std::time::{Duration, Instant};

/// Unsent bytes that say that the link was what it waited for.
const BUSY_BYTES: u64 = 64 << 10;
/// Shorter stretches, or of fewer bytes, tell nothing.
const TELLING: Duration = Duration::from_millis(2);
/// So much busy time is needed before a slow link is believed …
const BELIEVED_S: f64 = 1.0;
/// … and so much of it counts.
const REMEMBERED_S: f64 = 4.0;

/// A stop that has nothing to copy: the device state's load and the rest of the way, measured.
const BARE_STOP_MS: f64 = 8.0;
/// Device state of a guest with a few devices.
const DEVICE_BYTES: f64 = 100e3;
/// QEMU stops the guest with about so many pages left, or what was dirtied at all.
const LAST_PASS_PAGES: u64 = 200;
/// Unsent bytes with which a guest may be stopped: what the link carries in this time …
const BACKLOG_TIME_S: f64 = 0.020;
/// … but at least as much as keeps it busy …
const BACKLOG_MIN: u64 = 32 << 10;
/// … and so many where its speed is not known.
const BACKLOG: u64 = 256 << 10;

/// Speed of the link, from stretches of reading.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meter {
    stretch: Option<(u64, u64, Instant)>,
    busy_bytes: f64,
    busy_s: f64,
    /// It was seen to carry at least so much.
    at_least: f64,
}

impl Meter {
    /// A stretch begins: bytes given to the link so far, and those of them that are not sent yet.
    pub fn start(&mut self, wire: u64, unsent: u64, now: Instant) {
        self.stretch = Some((wire, unsent, now));
    }

    /// It ends.
    pub fn stop(&mut self, wire: u64, unsent: u64, now: Instant) {
        let Some((wire_before, unsent_before, since)) = self.stretch.take() else {
            return;
        };
        let took = now.saturating_duration_since(since);
        let sent = (wire.saturating_sub(wire_before) + unsent_before).saturating_sub(unsent);
        if took < TELLING || sent < BUSY_BYTES {
            return;
        }
        let (sent, took) = (sent as f64, took.as_secs_f64());
        if unsent >= BUSY_BYTES {
            let keep = (-took / REMEMBERED_S).exp();
            self.busy_bytes = self.busy_bytes * keep + sent;
            self.busy_s = self.busy_s * keep + took;
            // A link that has become slower.
            self.at_least = self.at_least.min(self.busy().unwrap_or(f64::MAX));
        } else {
            self.at_least = self.at_least.max(sent / took);
            if self.busy().is_some_and(|b| b < self.at_least) {
                (self.busy_bytes, self.busy_s) = (0.0, 0.0);
            }
        }
    }

    fn busy(&self) -> Option<f64> {
        (self.busy_s >= BELIEVED_S).then(|| self.busy_bytes / self.busy_s)
    }

    /// Bytes a second.
    pub fn rate(&self) -> Option<f64> {
        self.busy().or((self.at_least > 0.0).then_some(self.at_least))
    }

    /// Unsent bytes above which more is not worth having while the guest still runs: it would only wait for them once stopped.
    pub fn backlog_max(&self) -> u64 {
        self.rate().map_or(BACKLOG, backlog_max)
    }
}

fn backlog_max(rate: f64) -> u64 {
    BACKLOG_MIN.max((rate * BACKLOG_TIME_S) as u64)
}

/// How long a switchover would stop the guest, in ms.
pub fn downtime_ms(lag_pages: u64, bytes_per_page: f64, rate: f64) -> f64 {
    let lag = lag_pages as f64 * bytes_per_page;
    let last = lag_pages.min(LAST_PASS_PAGES) as f64 * bytes_per_page;
    BARE_STOP_MS + 1e3 * (last + DEVICE_BYTES + lag.min(backlog_max(rate).min(BACKLOG) as f64)) / rate.max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn a_busy_link_shows_its_speed_after_a_while_and_an_idle_one_only_a_bound() {
        let t = Instant::now();
        let mut m = Meter::default();
        assert_eq!((m.rate(), m.backlog_max()), (None, BACKLOG));
        // 1 MB in 10 ms, and all of it sent.
        m.start(0, 0, t);
        m.stop(1_000_000, 0, at(t, 10));
        assert_eq!(m.rate(), Some(1e8));
        assert_eq!(m.backlog_max(), 2_000_000);
        // A stall of half a second is not a slow link.
        m.start(1_000_000, 0, at(t, 500));
        m.stop(1_400_000, 200_000, at(t, 1_000));
        assert_eq!(m.rate(), Some(1e8));
        // Some seconds of it are.
        let (mut wire, mut unsent) = (1_400_000, 200_000);
        for s in 1..12 {
            m.start(wire, unsent, at(t, s * 1000));
            (wire, unsent) = (wire + 2_500_000, 200_000);
            m.stop(wire, unsent, at(t, s * 1000 + 1000));
        }
        let rate = m.rate().unwrap();
        assert!((2.3e6..2.6e6).contains(&rate), "{rate}");
        // It is fast again: one stretch shows it.
        m.start(wire, 0, at(t, 20_000));
        m.stop(wire + 4_000_000, 0, at(t, 20_040));
        assert_eq!(m.rate(), Some(1e8));
    }

    #[test]
    fn short_stretches_and_few_bytes_tell_nothing() {
        let t = Instant::now();
        let mut m = Meter::default();
        m.start(0, 0, t);
        m.stop(1 << 20, 0, t);
        m.start(1 << 20, 0, t);
        m.stop((1 << 20) + 100, 0, at(t, 100));
        m.stop(9 << 20, 0, at(t, 200));
        assert_eq!(m.rate(), None);
    }

    #[test]
    fn a_slow_link_makes_a_long_stop_and_a_fast_one_hardly_any() {
        assert_eq!(downtime_ms(3_000, 2_000.0, 250e3).round(), 2139.0);
        assert!(downtime_ms(3_000, 2_000.0, 1e9) < 10.0);
    }
}
