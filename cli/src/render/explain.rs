//! `umbra explain`: one decision in plain words.

use comfy_table::{Cell, Color};
use umbra_api::view::{DecisionInputs, DecisionView, HostVerdict, Mode, VmSummary};

use super::words::{age, number, percent, span};
use super::{Look, cell, words_of};

pub fn explain(look: &Look, d: &DecisionView, vm: Option<&VmSummary>) -> String {
    let name = super::words::clean(&vm.map_or_else(|| d.vm.to_string(), |v| v.name.clone()));
    let mut parts = vec![
        format!(
            "{}\n{}",
            look.bold(&headline(d, &name)),
            look.sentences(vec![
                format!("Because {}.", reason(d).trim_end_matches('.')),
                when(look, d, vm)
            ]),
        ),
        format!(
            "{}\n{}",
            look.bold("The numbers"),
            look.sentences(numbers(&d.inputs, &name))
        ),
    ];
    if !d.hosts.is_empty() {
        parts.push(format!(
            "{}\n{}",
            look.bold("The hosts looked at"),
            hosts(look, &d.hosts)
        ));
    }
    parts.join("\n\n")
}

/// What was decided. In observe mode it is what would have been.
fn headline(d: &DecisionView, name: &str) -> String {
    let target = d.hosts.iter().find(|h| h.chosen).map(|h| h.host.to_string());
    let what = sentence(&d.action, name, target.as_deref());
    match (d.mode, d.action.as_str()) {
        (_, "nothing") => format!("{name}: nothing to do"),
        (Mode::Act, _) => format!("{name}: {what}"),
        (Mode::Observe, _) => format!("{name}: {what} – not done, since Umbra only observes"),
    }
}

/// A planner's word as an order in plain language; a word of a newer RPS is shown as it is.
fn sentence(action: &str, name: &str, host: Option<&str>) -> String {
    let on = host.map(|h| format!(" on {h}")).unwrap_or_default();
    match action {
        "provision" => format!("make a warm shadow{on}"),
        "arm" => format!("give its shadow{on} more of what it will need, since contention nears"),
        "switch" => format!("switch over to its shadow{on}"),
        "disarm" => format!("let its shadow{on} rest at tier 0 again, since contention is no longer near"),
        "fail_back" => format!("bring {name} back home"),
        "release" => "let its shadow go".to_owned(),
        other => other.replace('_', " "),
    }
}

/// The planner's sentence repeats its action ('switch, because …'), which stands elsewhere already.
pub fn reason(d: &DecisionView) -> &str {
    let because = d.because.as_str();
    because
        .strip_prefix(d.action.as_str())
        .and_then(|s| s.strip_prefix(", because "))
        .unwrap_or(because)
}

/// The same for a table's column.
pub fn short(action: &str) -> String {
    match action {
        "provision" => "make a shadow".to_owned(),
        "switch" => "switch over".to_owned(),
        other => other.replace('_', " "),
    }
}

fn when(look: &Look, d: &DecisionView, vm: Option<&VmSummary>) -> String {
    let stage = words_of(d.stage);
    let place = vm
        .map(|v| format!(" on host {}", super::vms::place(v)))
        .unwrap_or_default();
    let at = format!(
        "Decision {} of {}, {} ago, when the VM was {stage}.",
        d.id,
        look.clock(d.t),
        age(d.t, look.now)
    );
    match vm {
        Some(v) if v.stage != d.stage => format!("{at} Now it is {}{place}.", words_of(v.stage)),
        Some(_) => format!("{at} It still is{place}."),
        None => at,
    }
}

fn numbers(i: &DecisionInputs, name: &str) -> Vec<String> {
    vec![score(i, name), due(i), peak(i, name), host(i)]
}

fn score(i: &DecisionInputs, name: &str) -> String {
    let side = if i.cps > i.threshold { "above" } else { "not above" };
    match i.method.as_str() {
        "ratio" => format!(
            "{name}'s predicted use, weighed against what its host can give, scores {}: {side} the threshold of {}.",
            number(i.cps),
            number(i.threshold)
        ),
        _ => format!(
            "The probability that {name} meets contention on its host within the horizon is {}: {side} the threshold of {}.",
            percent(i.cps),
            percent(i.threshold)
        ),
    }
}

fn due(i: &DecisionInputs) -> String {
    let copy = format!(
        "A shadow takes {} to make and {} to promote",
        span(i.copy_s),
        span(i.promotion_s)
    );
    match (i.contention_in_s, i.lead_s) {
        (None, _) => format!("No contention is expected within the horizon. {copy}."),
        (Some(s), None) => format!("Contention is expected in {}. {copy}.", span(s)),
        (Some(s), Some(lead)) if lead >= 0.0 => {
            format!(
                "Contention is expected in {}. {copy}, which leaves {} to spare.",
                span(s),
                span(lead)
            )
        }
        (Some(s), Some(lead)) => {
            format!(
                "Contention is expected in {}. {copy}: {} too late.",
                span(s),
                span(-lead)
            )
        }
    }
}

fn peak(i: &DecisionInputs, name: &str) -> String {
    format!(
        "{name} alone is expected to want {} cores at its peak, {} at the 90th and {} at the 99th percentile (model {}).",
        number(i.peak_cpu_p50),
        number(i.peak_cpu_p90),
        number(i.peak_cpu_p99),
        i.model
    )
}

fn host(i: &DecisionInputs) -> String {
    format!(
        "All VMs of its host together: {} cores at the peak, {} at the 90th percentile. The host has {} for them.",
        number(i.host_demand_p50),
        number(i.host_demand_p90),
        number(i.host_capacity)
    )
}

/// The chosen one first.
fn hosts(look: &Look, verdicts: &[HostVerdict]) -> String {
    let mut sorted: Vec<&HostVerdict> = verdicts.iter().collect();
    sorted.sort_by_key(|v| !v.chosen);
    let rows = sorted
        .into_iter()
        .map(|v| {
            let verdict = match v.chosen {
                true => Cell::new("chosen").fg(Color::Green),
                false => Cell::new("rejected"),
            };
            vec![cell(v.host.as_str()), verdict, cell(&v.reason)]
        })
        .collect();
    super::indent(&look.table(&["HOST", "VERDICT", "WHY"], &[], rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample;

    #[test]
    fn a_decision_in_plain_words() {
        let text = explain(&sample::look(), &sample::decision(), Some(&sample::summary(1, "web")));
        assert_eq!(
            text,
            "\
web: make a warm shadow on b
  Because contention is predicted: CPS 0.91 is above 0.60; the copy takes 4.2 s.
  Decision 42 of 09:13:08, 12 s ago, when the VM was unprotected. Now it is
  standby on host a.

The numbers
  The probability that web meets contention on its host within the horizon is
  91 %: above the threshold of 60 %.
  Contention is expected in 18 s. A shadow takes 4.2 s to make and 1.0 s to
  promote, which leaves 13 s to spare.
  web alone is expected to want 0.80 cores at its peak, 0.95 at the 90th and
  1.10 at the 99th percentile (model ets).
  All VMs of its host together: 1.20 cores at the peak, 1.40 at the 90th
  percentile. The host has 1.00 for them.

The hosts looked at
  HOST  VERDICT   WHY
  b     chosen    0.85 cores stay free
  c     rejected  no room: its own VMs are expected to want 0.97 of its 1.00
                  cores within the horizon"
        );
    }

    #[test]
    fn doing_nothing_is_explained_too() {
        let mut d = sample::decision();
        d.action = "nothing".into();
        d.because = "nothing, because CPS 0.10 is not above 0.60".into();
        d.inputs.cps = 0.1;
        d.inputs.contention_in_s = None;
        d.hosts.clear();
        let text = explain(&sample::look(), &d, None);
        assert!(
            text.contains(": nothing to do\n  Because CPS 0.10 is not above 0.60.\n"),
            "{text}"
        );
        assert!(text.contains("10 %: not above"), "{text}");
        assert!(text.contains("No contention is expected"), "{text}");
        assert!(!text.contains("hosts looked at"), "{text}");
    }

    #[test]
    fn observing_says_that_nothing_was_done() {
        let mut d = sample::decision();
        d.mode = Mode::Observe;
        assert!(explain(&sample::look(), &d, None).contains("not done, since Umbra only observes"));
    }

    #[test]
    fn too_late_is_called_so() {
        let mut d = sample::decision();
        d.inputs.lead_s = Some(-3.0);
        assert!(explain(&sample::look(), &d, None).contains("3.0 s too late"));
    }

    #[test]
    fn a_word_of_a_newer_planner_is_shown_as_it_is() {
        let mut d = sample::decision();
        d.action = "drain_host".into();
        d.inputs.lead_s = Some(f64::NAN);
        assert!(explain(&sample::look(), &d, None).contains(": drain host\n"));
    }
}
