//! Where a protected VM stands, in the words that the store, the API and the CLI share. The machine that moves it is the
//! RPS's `lifecycle` module.

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Unprotected,
    Provisioning,
    Seeding,
    /// Warm shadow, tier 0.
    Standby,
    /// Warm shadow, tier 1: contention nears.
    Armed,
    Switching,
    /// The VM runs on the host it was moved to; there is no way back prepared yet.
    Active,
    /// The VM runs away from home and its old host holds a shadow (reverse standby being built or ready).
    Reverse,
    /// Going home.
    FailingBack,
    Failed,
}

impl Stage {
    pub const ALL: [Self; 10] = [
        Self::Unprotected,
        Self::Provisioning,
        Self::Seeding,
        Self::Standby,
        Self::Armed,
        Self::Switching,
        Self::Active,
        Self::Reverse,
        Self::FailingBack,
        Self::Failed,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Unprotected => "unprotected",
            Self::Provisioning => "provisioning",
            Self::Seeding => "seeding",
            Self::Standby => "standby",
            Self::Armed => "armed",
            Self::Switching => "switching",
            Self::Active => "active",
            Self::Reverse => "reverse",
            Self::FailingBack => "failing_back",
            Self::Failed => "failed",
        }
    }
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}
