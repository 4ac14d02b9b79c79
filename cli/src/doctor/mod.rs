//! `umbra doctor`: whether this host has what Umbra needs, and what to do where it has not. Asks no RPS and changes nothing.
//!
//! [`facts`] reads the machine, [`checks`] judges what was read (pure; one function a check, and a list of them), and here it is drawn.

pub mod checks;
pub mod facts;

use serde::Serialize;

pub use checks::all;
pub use facts::Facts;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    /// It works without, and not as well.
    Warn,
    /// A part of Umbra can't work.
    Fail,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    pub remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Ok,
            found: found.into(),
            remedy: None,
        }
    }

    fn bad(name: &'static str, verdict: Verdict, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name,
            verdict,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }
}

/// Whether all of Umbra can work here.
pub fn fit(checks: &[Check]) -> bool {
    checks.iter().all(|c| c.verdict != Verdict::Fail)
}

/// As rows of name and text; what is wrong has its remedy behind it.
pub fn rows(checks: &[Check]) -> Vec<(&'static str, String)> {
    let text = |c: &Check| {
        let word = match c.verdict {
            Verdict::Ok => "ok: ",
            Verdict::Warn => "warning: ",
            Verdict::Fail => "FAILS: ",
        };
        let remedy = c.remedy.as_ref().map_or_else(String::new, |r| format!(". {r}"));
        format!("{word}{}{remedy}", c.found)
    };
    checks.iter().map(|c| (c.name, text(c))).collect()
}
