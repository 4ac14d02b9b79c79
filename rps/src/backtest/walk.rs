//! One series by the protocol: at each origin only what was before it is known, and the next [`HORIZON`] slots are forecast.

use std::fmt::Write;

use umbra_api::UnixMs;

use super::score::{AT, HALVES, Walked};
use super::traces::{SLOT_MS, Trace, TraceVm};
use crate::forecast::auto::{self, Auto, Speaker};
use crate::forecast::select::Selector;
use crate::forecast::{Forecaster, History, Quantiles};

pub const HORIZON: usize = 12;
/// Slots from one origin to the next.
const STEP: usize = 12;
/// Of the running RPS's default configuration.
const MAX_HISTORY: usize = 2_016;

pub const HEADER: &str = "trace,vm,metric,origin,h,q50,q90,q95\n";

/// Scored beside the model.
pub const BASELINES: [&str; 2] = ["last", "trailing-2h"];

/// What forecasts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Model {
    /// What an RPS forecasts with that is configured for the mix.
    Auto,
    /// What it does by default, and with a short past: the expert that did best lately speaks alone.
    Select,
    /// One expert alone.
    Expert(String),
}

impl Model {
    pub fn by_name(name: &str) -> anyhow::Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "select" => Ok(Self::Select),
            _ if auto::by_name(name).is_some() => Ok(Self::Expert(name.to_owned())),
            _ => anyhow::bail!("no model {name}; there are auto, select, {}", auto::names().join(", ")),
        }
    }

    fn start(&self) -> Running {
        match self {
            Self::Auto => Running::Auto(Box::default()),
            Self::Select => Running::Select(Box::default()),
            Self::Expert(name) => Running::Expert(auto::by_name(name)),
        }
    }
}

enum Running {
    Auto(Box<Auto>),
    Select(Box<Selector>),
    Expert(Option<Box<dyn Forecaster>>),
}

impl Running {
    fn forecast(&mut self, history: &History) -> Option<Quantiles> {
        match self {
            Self::Auto(auto) => Some(auto.forecast(Speaker::Mix, history, HORIZON, STEP)?.quantiles),
            Self::Select(selector) => Some(selector.forecast(history, HORIZON, STEP)?.quantiles),
            Self::Expert(expert) => expert.as_ref()?.forecast(history, HORIZON),
        }
    }
}

/// The export's lines of one VM, and how well it was forecast by the model and by each of [`BASELINES`].
pub fn walk(trace: &Trace, vm: &TraceVm, model: &Model) -> (Vec<u8>, Walked) {
    let mut csv = String::new();
    let mut running = model.start();
    let mut beside: Vec<Running> = BASELINES
        .iter()
        .map(|name| Model::Expert((*name).to_owned()).start())
        .collect();
    let mut walked = Walked::new(&vm.slots, trace.slots, 1 + BASELINES.len());
    let origins: Vec<usize> = (trace.first_origin..(trace.slots + 1).saturating_sub(HORIZON))
        .step_by(STEP)
        .collect();
    for (i, origin) in origins.iter().copied().enumerate() {
        let known = vm.slots.get(..origin).unwrap_or(&vm.slots);
        // A VM that ended is known to have been silent since.
        let silent = origin - known.len();
        let recent = &known[known.len().saturating_sub(MAX_HISTORY - silent.min(MAX_HISTORY))..];
        let padded: Vec<_> = recent
            .iter()
            .copied()
            .chain(std::iter::repeat_n(None, silent))
            .collect();
        let end = UnixMs(i64::try_from(origin as u64 * SLOT_MS).unwrap_or(i64::MAX));
        let history = History::new(&padded, end, SLOT_MS, f64::MAX);
        let half = HALVES * i / origins.len();
        for (who, running) in std::iter::once(&mut running).chain(&mut beside).enumerate() {
            let forecast = rounded(running.forecast(&history), &history);
            if who == 0 {
                export(&mut csv, trace, vm, origin, &forecast);
            }
            let truth = (origin..).map(|t| vm.slots.get(t).copied().flatten());
            for (q, truth) in forecast.iter().zip(truth) {
                if let (Some(truth), Some(tally)) = (truth, walked.tally(who, half)) {
                    tally.add(truth, q);
                }
            }
        }
    }
    (csv.into_bytes(), walked)
}

/// The exported levels to four digits after the point: the export and our own scoring then have the very same numbers. A model
/// that has nothing to say repeats the last value.
fn rounded(forecast: Option<Quantiles>, history: &History) -> [[f64; AT.len()]; HORIZON] {
    let last = history.values().last().copied().unwrap_or(0.0);
    let mut out = [[last; AT.len()]; HORIZON];
    if let Some(forecast) = forecast {
        for (out, band) in out.iter_mut().zip(forecast.slots()) {
            *out = AT.map(|level| (band[level] * 1e4).round() / 1e4);
        }
    }
    out
}

fn export(csv: &mut String, trace: &Trace, vm: &TraceVm, origin: usize, forecast: &[[f64; AT.len()]]) {
    for (i, [q50, q90, q95]) in forecast.iter().enumerate() {
        let (name, id, metric, h) = (&trace.name, &vm.id, trace.metric, i + 1);
        // Writing to a string can't fail.
        let _ = writeln!(csv, "{name},{id},{metric},{origin},{h},{q50},{q90},{q95}");
    }
}
