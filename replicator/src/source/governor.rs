//! Gives the pump its pauses: reads what the copy costs this host, what the link takes, and keeps the figures that the status shows.

use std::time::{Duration, Instant};

use umbra_api::order::Pacing;
use umbra_api::replica::{Convergence, Pace};
use umbra_api::wire::setup::{Block, StreamSetup};

use crate::heat::{self, Waits};
use crate::pacing::Round;
use crate::pacing::control::{Bounds, Controller, Pause, Used};
use crate::pacing::estimate::{Meter, downtime_ms};
use crate::pacing::working::WorkingSet;
use crate::stream::items::PAGE_SIZE;

/// The kernel tells another process's CPU time in ticks of 10 ms: shares are told of so long.
const CPU_WINDOW: Duration = Duration::from_secs(5);
/// A round of fewer pages tells nothing of what a page costs on the link.
const TELLING_PAGES: u64 = 32;

/// What the pump knows of the copy, for the status.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    pub dirty_pages_per_s: u64,
    pub estimated_downtime_ms: Option<f64>,
    pub pace: Pace,
}

/// Whose CPU time it costs.
pub struct Costs {
    pub qemu: i32,
    /// QEMU's threads of the migration.
    pub threads: Vec<i32>,
}

/// Bytes given to the link, and those of them that are not on their way yet.
#[derive(Clone, Copy)]
pub struct Sent {
    pub wire: u64,
    pub unsent: u64,
}

pub struct Governor {
    controller: Controller,
    costs: Costs,
    waits: Waits,
    meter: Meter,
    working: WorkingSet,
    figures: Figures,
    /// CPU times at the last pause, QEMU's and this thread's …
    before: (Duration, Duration),
    /// … and at the begin of the window that is told of.
    window: (Duration, Duration, Instant),
    /// Bytes on the link and time at the last round's end.
    round: (u64, Option<Instant>),
    /// Of the present stretch of the first copy.
    since: Instant,
}

impl Governor {
    /// To be made on the thread that carries the pages: its CPU time counts.
    pub fn new(pacing: Pacing, bounds: Bounds, costs: Costs, now: Instant) -> Self {
        let rest = Duration::from_millis(pacing.round_ms);
        let cpu = (heat::cpu_time(costs.qemu, &costs.threads), heat::own_time());
        let mut meter = Meter::default();
        meter.start(0, 0, now);
        let mut waits = Waits::default();
        waits.look(now);
        Self {
            controller: Controller::new(rest, pacing.lag, bounds, now),
            costs,
            waits,
            meter,
            working: WorkingSet::new([]),
            figures: Figures::default(),
            before: cpu,
            window: (cpu.0, cpu.1, now),
            round: (0, None),
            since: now,
        }
    }

    pub fn figures(&self) -> Figures {
        self.figures
    }

    pub fn setup(&mut self, setup: &StreamSetup) {
        let pages = setup.blocks.iter().map(Block::pages);
        self.working = WorkingSet::new(pages);
    }

    /// A page of a round. The first copy is not asked for: all pages are in it.
    pub fn page(&mut self, block: u16, page: u64) {
        self.working.seen(block, page);
    }

    /// More unsent bytes than this are not worth having while the guest still runs.
    pub fn backlog_max(&self) -> u64 {
        self.meter.backlog_max()
    }

    /// Reading begins again.
    pub fn woke(&mut self, sent: Sent, now: Instant) {
        self.meter.start(sent.wire, sent.unsent, now);
        self.since = now;
    }

    /// Now and then in the first copy: how long to leave the host to others.
    pub fn seeding(&mut self, sent: Sent, now: Instant) -> Duration {
        self.meter.stop(sent.wire, sent.unsent, now);
        let used = self.used(now);
        let worked = now.saturating_duration_since(self.since);
        let pause = self.controller.seeding(worked, used, now);
        self.cost(pause);
        self.woke(sent, now);
        pause.time
    }

    /// How long the present stretch of the first copy has gone on.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// A round is complete, and all of it is given to the link.
    pub fn ended(&mut self, round: &Round, sent: Sent, now: Instant) -> Duration {
        self.meter.stop(sent.wire, sent.unsent, now);
        let used = self.used(now);
        let pause = self.controller.after(round, used, now);
        let (wire, last) = self.round;
        self.round = (sent.wire, Some(now));
        self.page_costs(round, sent.wire.saturating_sub(wire));
        if round.number > 0 {
            let since = last.map_or(round.took, |t| now.saturating_duration_since(t));
            self.figures.dirty_pages_per_s = per_s(round.pages, since);
        }
        let pace = &mut self.figures.pace;
        pace.convergence = Convergence::Converging;
        (pace.round_ms, pace.round_pages) = (0, 0);
        pace.lag_bytes = round.pages * PAGE_SIZE as u64;
        pace.working_set_pages = self.working.pages();
        self.working.end_round();
        self.told(round, pause);
        pause.time
    }

    /// The present round will not end, by its own numbers: the guest dirties at least so many pages a second.
    pub fn too_fast(&mut self, round: &Round, dirtied: u64) {
        self.figures.dirty_pages_per_s = dirtied;
        let pace = &mut self.figures.pace;
        pace.convergence = Convergence::NotConverging;
        (pace.round_ms, pace.round_pages) = (round.took.as_millis() as u64, round.pages);
        pace.working_set_pages = self.working.pages();
    }

    /// A round does not end.
    pub fn complained(&mut self, round: &Round, sent: Sent, now: Instant) -> Duration {
        self.meter.stop(sent.wire, sent.unsent, now);
        let used = self.used(now);
        let pause = self.controller.within(used, now);
        self.page_costs(round, sent.wire.saturating_sub(self.round.0));
        // It dirties more than this, or the round would end.
        let carried = per_s(round.pages, round.took);
        self.figures.dirty_pages_per_s = self.figures.dirty_pages_per_s.max(carried);
        let pace = &mut self.figures.pace;
        pace.convergence = Convergence::NotConverging;
        (pace.round_ms, pace.round_pages) = (round.took.as_millis() as u64, round.pages);
        pace.working_set_pages = self.working.pages();
        self.told(round, pause);
        self.woke(sent, now);
        pause.time
    }

    fn page_costs(&mut self, round: &Round, wire: u64) {
        if round.pages >= TELLING_PAGES {
            let one = wire as f64 / round.pages as f64;
            let mean = self.figures.pace.wire_bytes_per_page;
            self.figures.pace.wire_bytes_per_page = Some(mean.map_or(one, |m| m + (one - m) * 0.3));
        }
    }

    fn told(&mut self, round: &Round, pause: Pause) {
        let (rate, page) = (self.meter.rate(), self.figures.pace.wire_bytes_per_page);
        self.figures.estimated_downtime_ms =
            rate.map(|r| downtime_ms(round.pages, page.unwrap_or(PAGE_SIZE as f64), r));
        self.cost(pause);
    }

    fn cost(&mut self, pause: Pause) {
        let pace = &mut self.figures.pace;
        pace.link_bytes_per_s = self.meter.rate().map(|r| r as u64);
        pace.pause_ms = pause.time.as_millis() as u64;
        pace.held_back_by = pause.held;
        pace.host_wait_pct = self.waits.share().map(|s| s * 100.0);
    }

    fn used(&mut self, now: Instant) -> Used {
        let cpu = self.costs_told(now);
        let (qemu, own) = std::mem::replace(&mut self.before, cpu);
        Used {
            qemu: cpu.0.saturating_sub(qemu),
            own: cpu.1.saturating_sub(own),
            waits: self.waits.look(now),
        }
    }

    fn costs_told(&mut self, now: Instant) -> (Duration, Duration) {
        let cpu = (heat::cpu_time(self.costs.qemu, &self.costs.threads), heat::own_time());
        let (qemu, own, since) = self.window;
        let time = now.saturating_duration_since(since);
        if time >= CPU_WINDOW {
            let pct =
                |now: Duration, then: Duration| 100.0 * now.saturating_sub(then).as_secs_f64() / time.as_secs_f64();
            self.figures.pace.qemu_cpu_pct = pct(cpu.0, qemu);
            self.figures.pace.own_cpu_pct = pct(cpu.1, own);
            self.window = (cpu.0, cpu.1, now);
        }
        cpu
    }
}

fn per_s(pages: u64, time: Duration) -> u64 {
    (pages as f64 / time.as_secs_f64().max(1e-3)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    fn round(number: u64, pages: u64, ms: u64) -> Round {
        Round {
            number,
            pages,
            sections: 2,
            bytes: pages * 4100,
            took: Duration::from_millis(ms),
        }
    }

    fn sent(wire: u64, unsent: u64) -> Sent {
        Sent { wire, unsent }
    }

    /// Bounds that nothing on the machine of the test can reach.
    fn governor(now: Instant) -> Governor {
        let bounds = Bounds {
            qemu_cpu: 1e3,
            own_cpu: 1e3,
            hot: 2.0,
        };
        let costs = Costs {
            qemu: -1,
            threads: Vec::new(),
        };
        Governor::new(Pacing::default(), bounds, costs, now)
    }

    #[test]
    fn rounds_that_end_show_rates_and_one_that_does_not_shows_that() {
        let t = Instant::now();
        let mut g = governor(t);
        g.seeding(sent(60 << 20, 0), at(t, 900));
        let pause = g.ended(&round(0, 60_000, 1_000), sent(64 << 20, 0), at(t, 1_000));
        assert_eq!(pause, Duration::from_millis(500));
        let mut wire = 64 << 20;
        for n in 1..4 {
            g.woke(sent(wire, 0), at(t, 500 + n * 500));
            wire += 1_000 * 2_000;
            g.ended(&round(n, 1_000, 4), sent(wire, 0), at(t, 1_000 + n * 500));
        }
        let f = g.figures();
        assert_eq!(f.dirty_pages_per_s, 2_000);
        assert_eq!(f.pace.convergence, Convergence::Converging);
        assert_eq!(f.pace.lag_bytes, 4_096_000);
        assert!(f.estimated_downtime_ms.is_some_and(|ms| ms < 50.0), "{f:?}");
        // 10 s on a link that takes 1 MB a second, with a round that goes on.
        g.woke(sent(wire, 0), at(t, 3_000));
        for s in 1..=2 {
            wire += 5_000_000 + if s == 1 { 100_000 } else { 0 };
            g.complained(
                &round(4, s * 2_500, s * 5_000),
                sent(wire, 100_000),
                at(t, 3_000 + s * 5_000),
            );
        }
        let f = g.figures();
        assert_eq!(f.pace.convergence, Convergence::NotConverging);
        assert_eq!((f.pace.round_ms, f.pace.round_pages), (10_000, 5_000));
        assert!(
            f.pace
                .link_bytes_per_s
                .is_some_and(|r| (900_000..1_100_000).contains(&r)),
            "{f:?}"
        );
        assert!(f.estimated_downtime_ms.is_some_and(|ms| ms > 500.0), "{f:?}");
    }
}
