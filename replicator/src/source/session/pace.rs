//! How a session keeps to its pacing: the bound on a stop, and what is done about a guest that is too fast.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::pace;
use umbra_api::replica::{Convergence, Pace};

use super::{Input, Migration, Rates, Session, State};
use crate::pacing::Round;
use crate::source::pressure::Reaction;

impl Session {
    /// It stands still for no longer than it may: until SHUT(0) it can still run on here.
    pub(super) fn bound_the_stop(&mut self) {
        self.pump.stopped.store(true, Ordering::Relaxed);
        if let State::Stopping { .. } = self.machine.state {
            let most = Instant::now() + Duration::from_millis(self.plan.pacing.max_downtime_ms);
            self.give_up_at = Some(self.give_up_at.map_or(most, |t| t.min(most)));
        }
    }

    /// Why a switchover whose time is up is given up, with what is known of the copy.
    pub(super) fn timed_out(&self) -> Input {
        let most = self.plan.pacing.max_downtime_ms;
        match (&self.machine.state, self.times.stopped) {
            (State::Stopping { .. } | State::Relinquishing { .. }, Some(t))
                if t.elapsed().as_millis() >= most.into() =>
            {
                let detail = format!(
                    "the guest had been stopped for {} ms, {most} ms are allowed: it runs on here",
                    t.elapsed().as_millis()
                );
                Input::Failed(Refusal::new(RefusalCode::DowntimeTooLong, detail))
            }
            (State::Stopping { .. }, None) => {
                let waited = self.times.ordered.map_or(Duration::ZERO, |t| t.elapsed());
                Input::Failed(pace::never_stopped(&self.progress, waited))
            }
            _ => Input::TimedOut,
        }
    }

    pub(super) fn round(&mut self, round: Round) {
        let now = Instant::now();
        if round.number == 0 {
            self.progress.seed_ms = Some(self.started.elapsed().as_millis() as u64);
            tracing::info!(vm = %self.plan.vm, took = ?self.started.elapsed(), pages = round.pages, "seeded");
        }
        let reaction = self.pressure.round_ended();
        self.react(reaction, None);
        self.last_round = Some(now);
        self.progress.rounds = round.number;
        self.progress.lag_pages = round.pages;
    }

    pub(super) fn not_converging(&mut self, round: Round) {
        self.ask_rates();
        self.note_figures();
        let refusal = pace::not_converging(&self.progress);
        tracing::warn!(vm = %self.plan.vm, pages = round.pages, took = ?round.took, "{}", refusal.detail);
        self.progress.lag_pages = round.pages;
        let reaction = self.pressure.complained();
        self.react(reaction, Some(refusal));
        self.publish();
    }

    pub(super) fn react(&mut self, reaction: Reaction, why: Option<Refusal>) {
        // In a switchover QEMU has its order, and its time.
        if !matches!(self.machine.state, State::Seeding | State::Standby) {
            return;
        }
        match reaction {
            Reaction::Nothing => {}
            Reaction::GiveUp => {
                if let Some(why) = why {
                    self.input(Input::Failed(why));
                }
            }
            Reaction::Throttle(percent) => {
                tracing::info!(vm = %self.plan.vm, percent, "the guest is slowed down");
                if let Some(Err(e)) = self.migration.as_ref().map(|m| m.throttle(percent)) {
                    tracing::warn!(vm = %self.plan.vm, percent, "the guest can't be slowed down: {e}");
                }
            }
        }
    }

    pub(super) fn ask_rates(&mut self) {
        match self.migration.as_ref().map(Migration::rates) {
            Some(Ok(rates)) => self.rates = rates,
            Some(Err(e)) => tracing::debug!(vm = %self.plan.vm, "query-migrate: {e}"),
            None => self.rates = Rates::default(),
        }
    }

    /// What the pump and QEMU know of the copy.
    pub(super) fn note_figures(&mut self) {
        let figures = self.pump.figures();
        self.progress.dirty_pages_per_s = figures.dirty_pages_per_s;
        self.progress.estimated_downtime_ms = figures.estimated_downtime_ms;
        let ordered = self.plan.pacing;
        self.progress.pace = Pace {
            throttle_pct: self.rates.throttle_pct,
            max_downtime_ms: ordered.max_downtime_ms,
            max_lag: ordered.lag,
            when_too_fast: ordered.not_converging,
            max_bandwidth_mbit: ordered.bandwidth_mbit,
            ..figures.pace
        };
        if figures.pace.convergence == Convergence::NotConverging {
            // QEMU counts at its dirty syncs, of which a long round has few.
            self.progress.dirty_pages_per_s = figures.dirty_pages_per_s.max(self.rates.dirty_pages_per_s);
        }
    }
}
