//! The thread that dirties and verifies the pattern, within a bounded share of the CPU.

use std::fs;
use std::io::{self, Write};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crate::options::PatternSize;
use crate::pattern::{Fault, PAGE_WORDS, Pattern};
use crate::state::State;
use crate::sys;

const PERIOD: Duration = Duration::from_millis(20);
/// The scrubber takes no more than this of a period (7 % of a core), and then needs longer than it was asked to.
const SCRUB_BUDGET: Duration = Duration::from_micros(1400);
/// Faults told one by one on the console; all are counted.
const TOLD: u64 = 20;

/// Memory for the pattern, with 4 bytes a page left for the generations.
pub fn memory(size: PatternSize) -> io::Result<&'static mut [u64]> {
    let kib = match size {
        PatternSize::Mib(mib) => mib.saturating_mul(1024),
        PatternSize::Auto => available_kib() * 6 / 10,
    };
    let pages = usize::try_from(kib / 4).unwrap_or(0);
    if pages == 0 {
        return Ok(&mut []);
    }
    sys::anonymous_words(pages.saturating_mul(PAGE_WORDS))
}

fn available_kib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok())
        .unwrap_or(0)
}

/// `scrub_s`: in how many seconds each page is to be verified once.
pub fn run(mut pattern: Pattern, state: &State, scrub_s: u64) -> ! {
    let scrub_per_period = (pattern.pages() as f64 * PERIOD.as_secs_f64() / scrub_s as f64).ceil() as u64;
    let mut last = Instant::now();
    let mut owed = 0.0;
    loop {
        std::thread::sleep(PERIOD);
        let now = Instant::now();
        // After a stop of the guest the rate is not made up for: at most 100 ms of writes at once.
        let elapsed = (now - last).min(Duration::from_millis(100));
        last = now;
        owed += state.dirty_pages_per_s.load(Relaxed) as f64 * elapsed.as_secs_f64();
        dirty(&mut pattern, state, &mut owed);
        scrub(&mut pattern, state, scrub_per_period);
    }
}

fn dirty(pattern: &mut Pattern, state: &State, owed: &mut f64) {
    let end = Instant::now() + PERIOD;
    while *owed >= 1.0 {
        *owed -= 1.0;
        tell(pattern.dirty_next(), state);
        // A rate that this CPU cannot do must not shut out the scrubber for ever.
        if pattern.writes().is_multiple_of(64) && Instant::now() > end {
            *owed = 0.0;
        }
    }
    state.dirty_pages.store(pattern.writes(), Relaxed);
}

fn scrub(pattern: &mut Pattern, state: &State, pages: u64) {
    let end = sys::thread_cpu() + SCRUB_BUDGET;
    for n in 1..=pages {
        tell(pattern.scrub_next(), state);
        state.scrubbed_pages.fetch_add(1, Relaxed);
        if n.is_multiple_of(16) && sys::thread_cpu() >= end {
            return;
        }
    }
}

fn tell(fault: Option<Fault>, state: &State) {
    let Some(fault) = fault else { return };
    if state.errors.fetch_add(1, Relaxed) < TOLD {
        // The console may be gone, the counter is not.
        let _ = writeln!(io::stdout().lock(), "E {fault:x?}");
    }
}
