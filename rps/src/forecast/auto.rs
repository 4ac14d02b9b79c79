//! What the running RPS forecasts with as configured, and `umbra-rps backtest demand --model auto` measures as a mix.
//!
//! A series with hours of a past is forecast by the [`Mix`]; before, the [`Selector`]'s choice speaks alone. A past that is short against
//! the horizon holds almost no origin that a whole horizon has followed, so nothing that records or analogs could be made of. And a
//! past of minutes was tried: on made-up loads in slots of a second the mix was as good as the choice on noise, steps, ramps and
//! walks (0.96 to 1.10 of its pinball loss), and far worse where a short season rules (2.1 on a wave, 5.0 on a job every 25
//! slots), since it has no expert that looks for a period.

use std::sync::OnceLock;

use serde::Deserialize;

use super::mix::{self, Member, Mix};
use super::select::{self, Selection, Selector};
use super::{Forecaster, History};

/// From so many horizons, and so much time, of history on the mix speaks.
const MIX_HORIZONS: usize = 4;
const MIX_MS: u64 = 4 * 3_600_000;

/// Whose forecast it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Speaker {
    /// The expert that did best lately. The default, since no test shows yet that the mix is never far worse: see above.
    #[default]
    Chosen,
    /// All of them, once there is a past of hours.
    Mix,
}

/// One series' forecaster, kept between slots; everything in it can be made anew from the series.
#[derive(Clone, Debug, Default)]
pub struct Auto {
    selector: Selector,
    mix: Mix,
}

impl Auto {
    /// `every`: slots between two looks at how good the experts are.
    pub fn forecast(&mut self, by: Speaker, history: &History, horizon: usize, every: usize) -> Option<Selection> {
        let past_ms = history.slot_ms.saturating_mul(history.len() as u64);
        if by == Speaker::Chosen || history.len() < MIX_HORIZONS * horizon || past_ms < MIX_MS {
            return self.selector.forecast(history, horizon, every);
        }
        // Its backtests' errors are as large as all that the mix keeps.
        self.selector = Selector::default();
        self.mix.forecast(mixed(), history, horizon, every)
    }
}

fn mixed() -> &'static [Member] {
    static MEMBERS: OnceLock<Vec<Member>> = OnceLock::new();
    MEMBERS.get_or_init(mix::members)
}

/// Any expert by its name, for a backtest of it alone.
pub fn by_name(name: &str) -> Option<Box<dyn Forecaster>> {
    all().find(|e| e.name() == name)
}

/// Of all experts, those of the mix first.
pub fn names() -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for expert in all() {
        if !names.iter().any(|n| n == expert.name()) {
            names.push(expert.name().to_owned());
        }
    }
    names
}

fn all() -> impl Iterator<Item = Box<dyn Forecaster>> {
    mix::members().into_iter().map(|m| m.expert).chain(select::experts())
}
