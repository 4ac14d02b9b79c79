//! What is done about a guest that dirties its memory faster than the link carries it, by the policy of the protection.
//!
//! ```text
//!            complained                    complained               complained
//!  calm ─────────────────> throttled 30 % ───────────> 60 % … 99 % ───────────> (as far as QEMU goes)
//!    ^                        │    ^                    │
//!    └─── CALM_ROUNDS ended ──┘    └─ CALM_ROUNDS ended ┘
//! ```
//! A throttle that lets rounds end is eased by and by, and tightened again when they do not: a shadow is meant to spare its VM
//! contention, not to be one. QEMU ends it with the migration, however that ends. Pure.

use umbra_api::order::NotConverging;

/// Complaints until the protection ends, where it is to.
const GIVE_UP: u32 = 3;
const STEPS: [u8; 6] = [30, 60, 80, 90, 95, 99];
/// Rounds that have to end until the guest is given more.
const CALM_ROUNDS: u32 = 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reaction {
    Nothing,
    GiveUp,
    /// Slow the guest down by so many percent; 0 is not at all.
    Throttle(u8),
}

#[derive(Debug)]
pub struct Pressure {
    policy: NotConverging,
    complaints: u32,
    calm: u32,
    /// Steps of the throttle that are on.
    steps: usize,
}

impl Pressure {
    pub fn new(policy: NotConverging) -> Self {
        Self {
            policy,
            complaints: 0,
            calm: 0,
            steps: 0,
        }
    }

    /// QEMU has to know beforehand.
    pub fn may_throttle(&self) -> bool {
        self.policy == NotConverging::Throttle
    }

    /// A round has gone on for too long, or for as long again.
    pub fn complained(&mut self) -> Reaction {
        self.complaints = self.complaints.saturating_add(1);
        self.calm = 0;
        match self.policy {
            NotConverging::GiveUp if self.complaints >= GIVE_UP => Reaction::GiveUp,
            NotConverging::Throttle if self.steps < STEPS.len() => {
                self.steps += 1;
                Reaction::Throttle(self.percent())
            }
            _ => Reaction::Nothing,
        }
    }

    pub fn round_ended(&mut self) -> Reaction {
        self.complaints = 0;
        self.calm = self.calm.saturating_add(1);
        if self.steps == 0 || self.calm < CALM_ROUNDS {
            return Reaction::Nothing;
        }
        self.calm = 0;
        self.steps -= 1;
        Reaction::Throttle(self.percent())
    }

    fn percent(&self) -> u8 {
        self.steps
            .checked_sub(1)
            .and_then(|n| STEPS.get(n).copied())
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_policy_does_what_it_says() {
        let after = |policy, n: usize| {
            let mut p = Pressure::new(policy);
            (0..n).map(|_| p.complained()).collect::<Vec<_>>()
        };
        assert_eq!(after(NotConverging::AcceptLonger, 50), [Reaction::Nothing; 50]);
        let gives_up = [Reaction::Nothing, Reaction::Nothing, Reaction::GiveUp];
        assert_eq!(after(NotConverging::GiveUp, 3), gives_up);
        let throttle = after(NotConverging::Throttle, 8);
        let steps: Vec<_> = STEPS.into_iter().map(Reaction::Throttle).collect();
        assert_eq!(throttle[..6], steps);
        assert_eq!(throttle[6..], [Reaction::Nothing; 2]);
    }

    #[test]
    fn rounds_that_end_ease_the_throttle_and_take_complaints_back() {
        let mut p = Pressure::new(NotConverging::Throttle);
        p.complained();
        p.complained();
        let mut seen = Vec::new();
        for _ in 0..3 * CALM_ROUNDS {
            match p.round_ended() {
                Reaction::Nothing => {}
                other => seen.push(other),
            }
        }
        assert_eq!(seen, [Reaction::Throttle(30), Reaction::Throttle(0)]);
        let mut p = Pressure::new(NotConverging::GiveUp);
        for _ in 0..9 {
            assert_eq!(p.complained(), Reaction::Nothing);
            p.round_ended();
        }
    }
}
