//! What a copy costs this host, and how much its others wait: read from /proc at the end of a round.

use std::fs;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// The kernel sums its pressure each two seconds.
const WINDOW: Duration = Duration::from_millis(2_500);
/// The unit in which /proc tells CPU time, the same on all that Umbra runs on.
const TICK: Duration = Duration::from_millis(10);
const PRESSURE: &str = "/proc/pressure/cpu";
const SCHEDSTAT: &str = "/proc/schedstat";

/// CPU time of a process's threads so far; threads that have ended count nothing any more.
pub fn cpu_time(pid: i32, threads: &[i32]) -> Duration {
    let ticks: u64 = threads
        .iter()
        .filter_map(|t| fs::read_to_string(format!("/proc/{pid}/task/{t}/stat")).ok())
        .filter_map(|text| ticks(&text))
        .sum();
    TICK.saturating_mul(u32::try_from(ticks).unwrap_or(u32::MAX))
}

/// utime and stime, fields 14 and 15. The name stands in parentheses and may hold some itself.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// CPU time of the calling thread so far.
pub fn own_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Share of time in which somebody on this host waits for a CPU.
#[derive(Debug, Default)]
pub struct Waits {
    last: Option<(Duration, Instant)>,
    share: Option<f64>,
}

impl Waits {
    /// A new reading, or `None` while there is none: it takes a while, or this kernel tells nothing.
    pub fn look(&mut self, now: Instant) -> Option<f64> {
        if self
            .last
            .is_some_and(|(_, at)| now.saturating_duration_since(at) < WINDOW)
        {
            return None;
        }
        let total = waited()?;
        let (before, at) = self.last.replace((total, now))?;
        let since = now.saturating_duration_since(at).as_secs_f64();
        let share = total.saturating_sub(before).as_secs_f64() / since;
        self.share = Some(share.min(1.0));
        self.share
    }

    /// The last reading.
    pub fn share(&self) -> Option<f64> {
        self.share
    }
}

/// Time so far in which somebody waited: by pressure stall information, or by the mean of the CPUs' run-queue waits.
fn waited() -> Option<Duration> {
    let read = |path: &str| fs::read_to_string(path).ok();
    read(PRESSURE)
        .and_then(|t| pressure(&t))
        .or_else(|| read(SCHEDSTAT).and_then(|t| run_queues(&t)))
}

/// `some avg10=… avg60=… avg300=… total=MICROSECONDS`
fn pressure(text: &str) -> Option<Duration> {
    let line = text.lines().find(|l| l.starts_with("some "))?;
    let total = line.split_ascii_whitespace().find_map(|w| w.strip_prefix("total="))?;
    total.parse().ok().map(Duration::from_micros)
}

/// `cpuN` lines: the eighth number is the nanoseconds that tasks waited on that CPU.
fn run_queues(text: &str) -> Option<Duration> {
    let cpus = text.lines().filter(|l| l.starts_with("cpu"));
    let waits: Vec<u64> = cpus
        .filter_map(|l| l.split_ascii_whitespace().nth(8)?.parse().ok())
        .collect();
    let sum: u64 = waits.iter().fold(0, |a, b| a.saturating_add(*b));
    (!waits.is_empty()).then(|| Duration::from_nanos(sum / waits.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_understood() {
        let psi = "some avg10=18.25 avg60=14.08 avg300=13.38 total=4484981634\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(pressure(psi), Some(Duration::from_micros(4_484_981_634)));
        let sched =
            "version 15\ntimestamp 4294\ncpu0 0 0 0 0 0 0 900 100 7\ndomain0 3 1 2 3\ncpu1 0 0 0 0 0 0 900 300 7\n";
        assert_eq!(run_queues(sched), Some(Duration::from_nanos(200)));
        let stat = "77 (live) x (y) S 1 77 77 0 -1 64 0 0 0 0 250 50 0 0 20 0 4 0 100";
        assert_eq!(ticks(stat), Some(300));
        for text in ["", "some", "cpu0 1", "7 (a) S 1", "some total=x\n"] {
            assert_eq!(
                (pressure(text), run_queues(text), ticks(text)),
                (None, None, None),
                "{text:?}"
            );
        }
    }

    #[test]
    fn this_threads_own_time_grows_and_a_dead_threads_is_nothing() {
        let before = own_time();
        let mut n = 0u64;
        while own_time() == before {
            n = std::hint::black_box(n + 1);
        }
        assert_eq!(cpu_time(-1, &[1, 2]), Duration::ZERO);
    }

    #[test]
    fn waits_are_looked_at_now_and_then() {
        let now = Instant::now();
        let mut w = Waits::default();
        assert_eq!(w.look(now), None);
        assert_eq!(w.look(now + Duration::from_secs(1)), None);
        let later = w.look(now + Duration::from_secs(3));
        assert_eq!(later, w.share());
        assert_eq!(later.is_some(), waited().is_some());
    }
}
