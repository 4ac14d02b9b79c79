//! Which pages leave RAM and which come back. Pure: heat and residency in, runs of pages out.

use umbra_api::order::{Peak, Tier};

use super::heat::HOT;

/// So many pages from here on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    pub first: usize,
    pub pages: usize,
}

/// What a tier leaves a shadow of its RAM, in bytes. The peak counts the guest's memory in use and can't be known before
/// an agent has told it; what the shadow holds is known always, and more than that it can't need.
pub fn limit_bytes(share: f64, tier: Tier, peak: Peak, present: u64) -> Option<u64> {
    if tier == Tier::Active {
        return None;
    }
    let base = match peak.mem_bytes {
        0 => present,
        most => most.min(present),
    };
    Some((base as f64 * share) as u64)
}

/// Slack above the limit before what the rounds brought back is written out again: each time costs a look at every page.
pub fn slack(limit: u64) -> u64 {
    (limit / 8).max(4 << 20)
}

/// At most `want` pages that are in RAM, the coldest; of equally cold ones those at the highest addresses, since a guest's kernel
/// lives at the lowest. Never a hot one: the next round would fetch it back.
pub fn coldest(heat: &[u8], resident: &[bool], want: usize) -> Vec<Run> {
    let mut counts = [0usize; 256];
    for (h, _) in heat.iter().zip(resident).filter(|(_, r)| **r) {
        if let Some(c) = counts.get_mut(usize::from(*h)) {
            *c += 1;
        }
    }
    let (mut left, mut whole) = (want, 0u8);
    // Classes below `whole` go as they are, of `whole` itself only `left`.
    while whole < HOT {
        let count = counts.get(usize::from(whole)).copied().unwrap_or(0);
        if count > left {
            break;
        }
        left -= count;
        whole += 1;
    }
    let mut partial = if whole < HOT { left } else { 0 };
    let mut runs: Vec<Run> = Vec::new();
    for (page, (h, _)) in heat.iter().zip(resident).enumerate().rev().filter(|(_, (_, r))| **r) {
        let goes = *h < whole || (*h == whole && partial > 0);
        if !goes {
            continue;
        }
        if *h == whole {
            partial -= 1;
        }
        match runs.last_mut() {
            Some(run) if run.first == page + 1 => {
                run.first = page;
                run.pages += 1;
            }
            _ => runs.push(Run { first: page, pages: 1 }),
        }
    }
    runs
}

/// At most `want` pages that the guest has and RAM has not, hottest first.
pub fn hottest(heat: &[u8], resident: &[bool], present: impl Fn(usize) -> bool, want: usize) -> Vec<Run> {
    let mut away: Vec<usize> = (0..heat.len().min(resident.len()))
        .filter(|p| resident.get(*p) == Some(&false) && present(*p))
        .collect();
    let hot = |page: &usize| std::cmp::Reverse(heat.get(*page).copied().unwrap_or(0));
    // Stable: pages of one class stay in the order of their addresses, and make long runs.
    away.sort_by_key(hot);
    away.truncate(want);
    let mut runs: Vec<Run> = Vec::new();
    for page in away {
        match runs.last_mut() {
            Some(run) if run.first + run.pages == page => run.pages += 1,
            _ => runs.push(Run { first: page, pages: 1 }),
        }
    }
    runs
}

/// Cuts runs into pieces of at most so many pages.
pub fn pieces(runs: &[Run], longest: usize) -> impl Iterator<Item = Run> {
    let longest = longest.max(1);
    runs.iter().flat_map(move |run| {
        (0..run.pages).step_by(longest).map(move |at| Run {
            first: run.first + at,
            pages: longest.min(run.pages - at),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: usize, pages: usize) -> Run {
        Run { first, pages }
    }

    #[test]
    fn the_limit_is_the_tiers_share_of_what_can_be_needed() {
        let peak = |mem_bytes| Peak {
            cpu_cores: 1.0,
            mem_bytes,
        };
        assert_eq!(limit_bytes(0.1, Tier::Standby, peak(500), 1000), Some(50));
        assert_eq!(limit_bytes(0.1, Tier::Standby, peak(5000), 1000), Some(100));
        assert_eq!(limit_bytes(0.5, Tier::Armed, peak(0), 1000), Some(500));
        assert_eq!(limit_bytes(1.0, Tier::Active, peak(500), 1000), None);
    }

    #[test]
    fn the_coldest_go_from_the_top_and_the_hot_ones_stay() {
        let heat = [0, 0, 3, 0, 0x80, 0, 1, HOT];
        let resident = [true, true, true, true, true, false, true, true];
        assert_eq!(coldest(&heat, &resident, 1), [run(3, 1)]);
        assert_eq!(coldest(&heat, &resident, 2), [run(3, 1), run(1, 1)]);
        assert_eq!(coldest(&heat, &resident, 4), [run(6, 1), run(3, 1), run(0, 2)]);
        // All there are, without the two hot ones.
        assert_eq!(coldest(&heat, &resident, 99), [run(6, 1), run(0, 4)]);
        assert_eq!(coldest(&heat, &resident, 0), []);
        assert_eq!(coldest(&[0; 5], &[true; 5], 3), [run(2, 3)]);
    }

    #[test]
    fn the_hottest_come_back_first() {
        let heat = [1, 1, 0x80, 0, 0, 7, 9];
        let resident = [false, false, false, true, false, false, false];
        let present = |p: usize| p != 5;
        assert_eq!(
            hottest(&heat, &resident, present, 99),
            [run(2, 1), run(6, 1), run(0, 2), run(4, 1)]
        );
        assert_eq!(hottest(&heat, &resident, present, 2), [run(2, 1), run(6, 1)]);
    }

    #[test]
    fn long_runs_are_taken_piece_by_piece() {
        let cut: Vec<Run> = pieces(&[run(10, 5), run(0, 1)], 2).collect();
        assert_eq!(cut, [run(10, 2), run(12, 2), run(14, 1), run(0, 1)]);
    }
}
