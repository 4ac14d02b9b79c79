//! A load over time: `0:0.10,20:0.10,80:0.95` are seconds and the share of each vCPU, linear in between; the last value holds.

use std::str::FromStr;

/// More points than any test wants, few enough that a request cannot fill the memory.
const MAX_POINTS: usize = 1024;

#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// Seconds and share, times strictly rising, never empty.
    points: Vec<(f64, f64)>,
}

impl Schedule {
    pub fn idle() -> Self {
        Schedule {
            points: vec![(0.0, 0.0)],
        }
    }

    /// The share of each vCPU wanted `seconds` after the schedule's start.
    pub fn share_at(&self, seconds: f64) -> f64 {
        let mut before: Option<(f64, f64)> = None;
        for &(time, share) in &self.points {
            if seconds < time {
                return match before {
                    None => share,
                    Some((t0, s0)) => s0 + (share - s0) * (seconds - t0) / (time - t0),
                };
            }
            before = Some((time, share));
        }
        before.map_or(0.0, |(_, share)| share)
    }

    /// No CPU is wanted from here on.
    pub fn is_over_at(&self, seconds: f64) -> bool {
        self.share_at(seconds) == 0.0 && self.points.iter().all(|&(time, share)| time <= seconds || share == 0.0)
    }
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut points: Vec<(f64, f64)> = Vec::new();
        for part in text.trim().split(',') {
            let (time, share) = part
                .split_once(':')
                .ok_or_else(|| format!("'{part}' is not SECONDS:SHARE"))?;
            let time: f64 = time
                .trim()
                .parse()
                .map_err(|_| format!("'{time}' is not a number of seconds"))?;
            let share: f64 = share.trim().parse().map_err(|_| format!("'{share}' is not a share"))?;
            if !time.is_finite() || time < 0.0 || points.last().is_some_and(|last| last.0 >= time) {
                return Err(format!("times must rise from 0: {time}"));
            }
            if !(0.0..=1.0).contains(&share) {
                return Err(format!("a share is 0 to 1: {share}"));
            }
            if points.len() == MAX_POINTS {
                return Err(format!("more than {MAX_POINTS} points"));
            }
            points.push((time, share));
        }
        Ok(Schedule { points })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_linear_between_points_and_holds_the_last() {
        let schedule: Schedule = "10:0.1,20:0.1,80:0.9,90:0".parse().unwrap();
        assert_eq!(schedule.share_at(0.0), 0.1);
        assert_eq!(schedule.share_at(20.0), 0.1);
        assert!((schedule.share_at(50.0) - 0.5).abs() < 1e-9);
        assert_eq!(schedule.share_at(1000.0), 0.0);
        assert!(!schedule.is_over_at(85.0));
        assert!(schedule.is_over_at(90.0));
    }

    #[test]
    fn refuses_what_is_no_schedule() {
        for bad in [
            "", "0", "0:2", "0:-1", "x:1", "0:x", "5:0,5:1", "5:0,1:1", "nan:0", "inf:0", "0:nan", "0:0,",
        ] {
            assert!(bad.parse::<Schedule>().is_err(), "{bad}");
        }
        let long = (0..2000).map(|i| format!("{i}:0")).collect::<Vec<_>>().join(",");
        assert!(long.parse::<Schedule>().is_err());
    }
}
