//! When the steps of a switchover were, and the report that is made of them.

use std::time::Instant;

use umbra_api::replica::SwitchoverReport;
use umbra_api::{Epoch, UnixMs};

/// Points in time of a switchover, on this process's clock but for the guest's stop.
#[derive(Clone, Copy, Default)]
pub struct Times {
    pub ordered: Option<Instant>,
    pub stopped: Option<Instant>,
    pub stopped_unix_us: i64,
    pub ram_done: Option<Instant>,
    pub streamed: Option<Instant>,
    pub written: Option<Instant>,
    pub shut: Option<Instant>,
    pub committed: Option<Instant>,
}

/// What the target says of the resume.
#[derive(Clone, Copy, Debug)]
pub struct Resumed {
    pub epoch: Epoch,
    pub unix_us: i64,
    pub took_us: u64,
}

impl Times {
    /// Completes a report, now that the target says that the guest runs.
    pub fn conclude(
        &self,
        resumed: Resumed,
        report: SwitchoverReport,
        wire_bytes: u64,
        now: Instant,
        at: UnixMs,
    ) -> SwitchoverReport {
        let us = |from: Option<Instant>, to: Option<Instant>| {
            from.zip(to)
                .map_or(0, |(a, b)| b.saturating_duration_since(a).as_micros() as u64)
        };
        let stopped_us = match self.stopped_unix_us {
            0 => 0,
            stopped => u64::try_from(resumed.unix_us - stopped).unwrap_or(0),
        };
        SwitchoverReport {
            at,
            epoch: resumed.epoch,
            guest_stopped_us: stopped_us,
            stopped_to_told_us: us(self.stopped, Some(now)),
            order_to_told_us: us(self.ordered, Some(now)),
            last_pass_us: us(self.stopped, self.ram_done),
            device_state_us: us(self.ram_done, self.streamed),
            relinquish_us: us(self.streamed, self.written),
            shut_us: us(self.shut, self.committed),
            resume_us: resumed.took_us,
            wire_bytes,
            ..report
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_report_has_each_step_once_and_none_that_was_not() {
        let start = Instant::now();
        let at = |ms: u64| Some(start + Duration::from_millis(ms));
        let times = Times {
            ordered: at(0),
            stopped: at(10),
            stopped_unix_us: 1_000_000,
            ram_done: at(12),
            streamed: at(15),
            written: None,
            shut: at(16),
            committed: at(17),
        };
        let resumed = Resumed {
            epoch: Epoch(7),
            unix_us: 1_009_000,
            took_us: 300,
        };
        let before = SwitchoverReport {
            load_us: 2_500,
            ..SwitchoverReport::default()
        };
        let r = times.conclude(resumed, before, 99, start + Duration::from_millis(20), UnixMs(5));
        assert_eq!((r.epoch, r.at, r.guest_stopped_us), (Epoch(7), UnixMs(5), 9_000));
        assert_eq!((r.stopped_to_told_us, r.order_to_told_us), (10_000, 20_000));
        assert_eq!((r.last_pass_us, r.device_state_us, r.relinquish_us), (2_000, 3_000, 0));
        assert_eq!((r.shut_us, r.resume_us, r.wire_bytes), (1_000, 300, 99));
        assert_eq!(r.load_us, 2_500, "what was noted on the way stays");
        let earlier = Resumed {
            unix_us: 999_000,
            ..resumed
        };
        let r = times.conclude(earlier, before, 0, start, UnixMs(5));
        assert_eq!(r.guest_stopped_us, 0, "two hosts' clocks may differ");
    }
}
