//! Whether a copy is fit for a switchover, in words with all the numbers that there are.

use std::time::Duration;

use crate::order::{Refusal, RefusalCode};
use crate::replica::{Convergence, Progress};
use crate::wire::pages::PAGE_SIZE;

/// Whether a switchover may be begun.
pub fn gate(p: &Progress) -> Result<(), Refusal> {
    if p.pace.convergence == Convergence::NotConverging {
        return Err(not_converging(p));
    }
    match p.estimated_downtime_ms {
        Some(ms) if p.pace.max_downtime_ms > 0 && ms > p.pace.max_downtime_ms as f64 => {
            let detail = format!(
                "a switchover would stop the guest for about {ms:.0} ms, {} ms are allowed: {}",
                p.pace.max_downtime_ms,
                speeds(p)
            );
            Err(Refusal::new(RefusalCode::DowntimeTooLong, detail))
        }
        _ => Ok(()),
    }
}

/// With all the numbers that there are.
pub fn not_converging(p: &Progress) -> Refusal {
    let detail = format!(
        "no round ends, {} pages in {:.1} s by now: {}",
        p.pace.round_pages,
        p.pace.round_ms as f64 / 1e3,
        speeds(p)
    );
    Refusal::new(RefusalCode::NotConverging, detail)
}

/// A switchover that was ordered, and in which QEMU never came to stop the guest.
pub fn never_stopped(p: &Progress, waited: Duration) -> Refusal {
    let detail = format!(
        "the guest was not stopped within {} ms of the order, and runs on here: {}",
        waited.as_millis(),
        speeds(p)
    );
    Refusal::new(RefusalCode::NotConverging, detail)
}

fn speeds(p: &Progress) -> String {
    let dirty = p.dirty_pages_per_s;
    let mut text = format!(
        "the guest dirties {} {dirty} pages/s ({:.1} MB/s)",
        // Of a round that does not end QEMU knows which pages, not how often.
        if p.pace.convergence == Convergence::NotConverging {
            "at least"
        } else {
            "about"
        },
        (dirty * PAGE_SIZE as u64) as f64 / 1e6
    );
    match p.pace.link_bytes_per_s {
        Some(rate) => text += &format!(", the link carries {:.1} MB/s", rate as f64 / 1e6),
        None => text += ", the link's speed is not known",
    }
    if let Some((rate, page)) = p.pace.link_bytes_per_s.zip(p.pace.wire_bytes_per_page) {
        text += &format!(" ({:.0} pages/s)", rate as f64 / page.max(1.0));
    }
    if let Some(pct) = p.pace.throttle_pct {
        text += &format!(", and it is slowed down by {pct} % already");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::Pace;

    #[test]
    fn a_switchover_that_would_stop_the_guest_for_long_is_refused_with_the_numbers() {
        let pace = Pace {
            link_bytes_per_s: Some(250_000),
            wire_bytes_per_page: Some(2_000.0),
            max_downtime_ms: 1_000,
            ..Pace::default()
        };
        let ms = 3_057.0;
        let slow = Progress {
            dirty_pages_per_s: 80,
            estimated_downtime_ms: Some(ms),
            pace,
            ..Progress::default()
        };
        let refusal = gate(&slow).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::DowntimeTooLong);
        for number in ["about 3057 ms", "1000 ms", "80 pages/s", "0.2 MB/s", "(125 pages/s)"] {
            assert!(refusal.detail.contains(number), "{number} in {refusal}");
        }
        let mut fast = slow;
        fast.estimated_downtime_ms = Some(9.0);
        assert_eq!(gate(&fast), Ok(()));
        fast.estimated_downtime_ms = None;
        assert_eq!(gate(&fast), Ok(()));
        fast.pace.convergence = Convergence::NotConverging;
        fast.pace.round_pages = 4711;
        fast.pace.throttle_pct = Some(40);
        let refusal = gate(&fast).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::NotConverging);
        assert!(refusal.detail.contains("4711 pages") && refusal.detail.contains("40 %"));
    }
}
