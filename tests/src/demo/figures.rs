//! Both runs in numbers, and the bars that they must clear.

use std::time::Duration;

use serde::Serialize;

use super::plan::Plan;
use super::scene::CONTENDED_MS;
use crate::lab::client::Quality;

pub const DOWNTIME_MS_MAX: f64 = 25.0;
/// With Umbra the contended seconds fall to this share or less.
pub const CONTENDED_SHARE_MAX: f64 = 0.25;

/// What one run cost the web VM and its client.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Bill {
    /// Over the plan's window.
    pub window: Quality,
    /// Longest silence of the whole run.
    pub gap_ms: f64,
    /// Of the running copy, second by second.
    pub waits_ms: Vec<f64>,
    pub failed: u64,
    pub last_error: Option<String>,
}

impl Bill {
    pub fn contended_s(&self) -> usize {
        self.waits_ms.iter().filter(|w| **w > CONTENDED_MS).count()
    }

    /// The second in which lasting contention begins: it and most of the four after it are contended.
    pub fn contended_from_s(&self) -> Option<usize> {
        let contended = |w: &f64| *w > CONTENDED_MS;
        self.waits_ms
            .windows(5)
            .position(|five| five.first().is_some_and(contended) && five.iter().filter(|w| contended(w)).count() >= 3)
    }
}

#[derive(Clone, PartialEq, Debug, Default)]
pub struct Plain {
    pub bill: Bill,
    pub errors: u64,
}

/// One switchover.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Move {
    /// STOP to RESUME, as the replicator reports it.
    pub reported_ms: f64,
    /// The same by the demo's own QMP connections, if they saw both events.
    pub watched_ms: Option<f64>,
    pub order_to_told_ms: f64,
    pub wire_bytes: u64,
}

impl Move {
    /// The longer one of the two measurements.
    pub fn stopped_ms(&self) -> f64 {
        self.reported_ms.max(self.watched_ms.unwrap_or(0.0))
    }
}

/// Seconds count from the schedule's start.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Protected {
    pub bill: Bill,
    pub errors: u64,
    pub predicted_s: Option<f64>,
    /// When, at the prediction, contention was expected.
    pub expected_s: Option<f64>,
    pub ready_s: Option<f64>,
    pub moved_s: Option<f64>,
    pub home_s: Option<f64>,
    pub seed_s: Option<f64>,
    pub away: Option<Move>,
    pub back: Option<Move>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Figures {
    pub plain: Plain,
    pub protected: Protected,
    pub window_s: f64,
    /// As measured without Umbra.
    pub due_s: Option<f64>,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Json {
    pub downtime_ms: Option<f64>,
    pub failback_downtime_ms: Option<f64>,
    pub client_gap_ms: f64,
    pub lead_time_s: Option<f64>,
    pub seed_s: Option<f64>,
    pub client_p99_ms: Both<f64>,
    pub contended_s: Both<usize>,
    pub guest_errors: u64,
    pub wire_bytes: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Both<T> {
    pub with: T,
    pub without: T,
}

impl Figures {
    pub fn of(plan: &Plan, plain: &Plain, protected: &Protected) -> Self {
        let due_s = plain.bill.contended_from_s().map(|s| s as f64);
        Self {
            plain: plain.clone(),
            protected: protected.clone(),
            window_s: plan.window_s,
            due_s,
        }
    }

    /// From the warm shadow to the moment at which the plain machine was contended.
    pub fn lead_time_s(&self) -> Option<f64> {
        Some(self.due_s? - self.protected.ready_s?)
    }

    pub fn guest_errors(&self) -> u64 {
        self.plain.errors + self.protected.errors
    }

    pub fn json(&self) -> Json {
        Json {
            downtime_ms: self.protected.away.as_ref().map(|m| round(m.stopped_ms())),
            failback_downtime_ms: self.protected.back.as_ref().map(|m| round(m.stopped_ms())),
            client_gap_ms: round(self.protected.bill.gap_ms),
            lead_time_s: self.lead_time_s().map(round),
            seed_s: self.protected.seed_s.map(round),
            client_p99_ms: Both {
                with: round(self.protected.bill.window.p99_ms),
                without: round(self.plain.bill.window.p99_ms),
            },
            contended_s: Both {
                with: self.protected.bill.contended_s(),
                without: self.plain.bill.contended_s(),
            },
            guest_errors: self.guest_errors(),
            wire_bytes: self.protected.away.as_ref().map(|m| m.wire_bytes),
        }
    }

    /// The bars that were not cleared, in words.
    pub fn missed(&self) -> Vec<String> {
        let mut missed = Vec::new();
        if self.guest_errors() > 0 {
            missed.push(format!(
                "{} pattern errors in the guests, expected 0",
                self.guest_errors()
            ));
        }
        match self.protected.away.as_ref().map(Move::stopped_ms) {
            None => missed.push("the VM was not switched over".into()),
            Some(ms) if ms > DOWNTIME_MS_MAX => {
                missed.push(format!(
                    "the guest was stopped for {ms:.1} ms, at most {DOWNTIME_MS_MAX} ms are allowed"
                ));
            }
            Some(_) => {}
        }
        if self.protected.back.is_none() {
            missed.push("the VM was not failed back".into());
        }
        match self.lead_time_s() {
            None => missed.push("no lead time: there was no contention without Umbra, or no warm shadow".into()),
            Some(s) if s <= 0.0 => missed.push(format!("the shadow was warm {:.1} s after contention was due", -s)),
            Some(_) => {}
        }
        let (with, without) = (self.protected.bill.contended_s(), self.plain.bill.contended_s());
        if with as f64 > without as f64 * CONTENDED_SHARE_MAX {
            missed.push(format!(
                "{with} contended seconds with Umbra, {without} without: more than a quarter"
            ));
        }
        missed
    }
}

fn round(x: f64) -> f64 {
    (x * 1000.0).round() / 1000.0
}

/// Seconds of a duration since the start.
pub fn seconds(d: Duration) -> f64 {
    d.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Contended in these of a hundred seconds.
    fn bill(contended: std::ops::Range<usize>) -> Bill {
        let waits_ms = (0..100)
            .map(|s| {
                if contended.contains(&s) {
                    CONTENDED_MS + 100.0
                } else {
                    10.0
                }
            })
            .collect();
        Bill {
            waits_ms,
            ..Bill::default()
        }
    }

    fn good() -> Figures {
        let away = Move {
            reported_ms: 9.0,
            watched_ms: Some(9.5),
            order_to_told_ms: 20.0,
            wire_bytes: 1,
        };
        let protected = Protected {
            bill: bill(40..45),
            ready_s: Some(35.5),
            away: Some(away.clone()),
            back: Some(away),
            ..Protected::default()
        };
        Figures::of(
            &Plan::default(),
            &Plain {
                bill: bill(40..80),
                errors: 0,
            },
            &protected,
        )
    }

    #[test]
    fn a_good_run_clears_all_bars() {
        assert_eq!(good().missed(), Vec::<String>::new());
        assert_eq!(good().lead_time_s(), Some(4.5));
        assert_eq!(good().json().downtime_ms, Some(9.5), "the longer one counts");
    }

    #[test]
    fn each_bar_is_told_by_itself() {
        let mut f = good();
        f.protected.errors = 1;
        assert!(f.missed()[0].contains("pattern"));
        let mut f = good();
        f.protected.away.as_mut().unwrap().watched_ms = Some(25.1);
        assert!(f.missed()[0].contains("25.1 ms"));
        let mut f = good();
        f.protected.ready_s = Some(50.0);
        assert!(f.missed()[0].contains("10.0 s after"));
        let mut f = good();
        f.protected.bill = bill(40..51);
        assert!(f.missed()[0].contains("11 contended"));
        assert_eq!(
            Figures::of(&Plan::default(), &Plain::default(), &Protected::default())
                .missed()
                .len(),
            3
        );
    }

    #[test]
    fn a_single_bad_second_is_no_contention_yet() {
        let mut b = bill(50..60);
        b.waits_ms[10] = CONTENDED_MS + 100.0;
        assert_eq!(b.contended_from_s(), Some(50));
        assert_eq!(b.contended_s(), 11);
    }

    #[test]
    fn the_json_has_exactly_the_agreed_keys() {
        let json = serde_json::to_value(good().json()).unwrap();
        let keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        let mut agreed = vec![
            "downtime_ms",
            "failback_downtime_ms",
            "client_gap_ms",
            "lead_time_s",
            "seed_s",
            "client_p99_ms",
            "contended_s",
            "guest_errors",
            "wire_bytes",
        ];
        agreed.sort_unstable();
        let mut keys = keys;
        keys.sort_unstable();
        assert_eq!(keys, agreed);
        assert_eq!(json["contended_s"]["without"], 40);
    }
}
