//! `umbra status`

use comfy_table::{Cell, Color};
use umbra_api::view::{HostView, Mode, StatusView};

use super::words::{self, age, bytes, count, number, percent};
use super::{Look, cell};

/// A host that has told nothing for so long is worth a word: three slots, and never less than this.
const SILENT_MS: i64 = 10_000;

pub fn status(look: &Look, base: &str, s: &StatusView) -> String {
    let mode = match s.mode {
        Mode::Act => "acts on its decisions",
        Mode::Observe => "observes only",
    };
    let title = format!("umbra-rps {} at {base}", words::clean(&s.version));
    let head = format!(
        "{}\nup {}, {mode}, slots of {}\n{}, {}, {}",
        look.bold(&title),
        age(s.started, s.now),
        words::span(s.slot_ms as f64 / 1000.0),
        count(s.hosts.len(), "host"),
        count(s.vms, "VM"),
        count(s.shadows, "shadow"),
    );
    let mut parts = vec![head, hosts(look, s)];
    let worries = worries(s);
    if !worries.is_empty() {
        parts.push(worries.iter().map(|w| look.warn(w)).collect::<Vec<_>>().join("\n"));
    }
    parts.join("\n\n")
}

fn hosts(look: &Look, s: &StatusView) -> String {
    if s.hosts.is_empty() {
        return "No host has reported yet: agents send their samples here by 'rps.url' in\ntheir configuration."
            .to_owned();
    }
    let header = [
        "HOST", "CPUS", "WANTED", "MEDIAN", "P90", "RISK", "FREE MEM", "VMS", "SHADOWS", "HEARD",
    ];
    look.table(
        &header,
        &[1, 2, 3, 4, 5, 6, 7, 8, 9],
        s.hosts.iter().map(|h| row(s, h)).collect(),
    )
}

/// WANTED is the last slot's demand, MEDIAN and P90 the highest predicted ones, in cores; RISK is the probability of contention.
fn row(s: &StatusView, h: &HostView) -> Vec<Cell> {
    let Some(last) = h.last_sample else {
        // Nothing is known of it: zeros would look like an idle host.
        let dashes = std::iter::repeat_n(Cell::new("–"), 6);
        let known = [
            Cell::new(h.vms),
            Cell::new(h.shadows),
            Cell::new("never").fg(Color::Red),
        ];
        return std::iter::once(cell(h.host.as_str()))
            .chain(dashes)
            .chain(known)
            .collect();
    };
    let risk = Cell::new(percent(h.contention_probability));
    let heard = age(last, s.now);
    vec![
        cell(h.host.as_str()),
        Cell::new(number(h.cpus)),
        Cell::new(number(h.cpu_demand)),
        Cell::new(number(h.cpu_predicted_p50)),
        Cell::new(number(h.cpu_predicted_p90)),
        match h.contention_probability {
            p if p >= 0.5 => risk.fg(Color::Red),
            p if p >= 0.2 => risk.fg(Color::Yellow),
            _ => risk,
        },
        Cell::new(bytes(h.mem_available_bytes)),
        Cell::new(h.vms),
        Cell::new(h.shadows),
        if silent(s, h) {
            Cell::new(heard).fg(Color::Red)
        } else {
            Cell::new(heard)
        },
    ]
}

fn silent(s: &StatusView, h: &HostView) -> bool {
    let patience = i64::try_from(s.slot_ms.saturating_mul(3))
        .unwrap_or(i64::MAX)
        .max(SILENT_MS);
    h.last_sample.is_none_or(|t| s.now.since(t) > patience)
}

fn worries(s: &StatusView) -> Vec<String> {
    let mut out = Vec::new();
    for h in &s.hosts {
        match h.last_sample {
            None => out.push(format!("{}: its agent has never reported", h.host)),
            Some(t) if silent(s, h) => out.push(format!("{}: its agent is silent for {}", h.host, age(t, s.now))),
            Some(_) => {}
        }
        if !h.replicator_up {
            out.push(format!("{}: its replicator does not answer", h.host));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample;

    #[test]
    fn two_hosts_in_80_columns() {
        let text = status(&sample::look(), "http://127.0.0.1:7400", &sample::status());
        assert_eq!(
            text,
            "\
umbra-rps 0.1.0 at http://127.0.0.1:7400
up 2 h 05 min, acts on its decisions, slots of 2.0 s
2 hosts, 2 VMs, 1 shadow

HOST  CPUS  WANTED  MEDIAN   P90  RISK  FREE MEM  VMS  SHADOWS  HEARD
a     1.00    0.74    0.90  1.31  83 %   5.0 GiB    2        0  1.4 s
b     1.00    0.74    0.90  1.31   0 %   5.0 GiB    0        1  1.4 s"
        );
    }

    #[test]
    fn what_is_amiss_is_said_below() {
        let mut s = sample::status();
        s.hosts[0].last_sample = Some(s.now.plus_ms(-60_000));
        s.hosts[1].last_sample = None;
        s.hosts[1].replicator_up = false;
        let text = status(&sample::look(), "http://x", &s);
        let tail: Vec<&str> = text.lines().rev().take(3).collect();
        let wanted = [
            "b: its replicator does not answer",
            "b: its agent has never reported",
            "a: its agent is silent for 60 s",
        ];
        assert_eq!(tail, wanted);
    }

    #[test]
    fn a_host_that_never_spoke_is_not_shown_as_idle() {
        let mut s = sample::status();
        s.hosts.truncate(1);
        s.hosts[0].last_sample = None;
        let text = status(&sample::look(), "http://x", &s);
        assert!(
            text.contains("\na        –       –       –    –     –         –    2        0  never"),
            "{text}"
        );
    }

    #[test]
    fn an_empty_cluster_says_what_to_do() {
        let mut s = sample::status();
        s.hosts.clear();
        assert!(status(&sample::look(), "http://x", &s).contains("No host has reported yet"));
    }
}
