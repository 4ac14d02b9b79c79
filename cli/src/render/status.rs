//! `umbra status`

use comfy_table::{Cell, Color};
use umbra_api::view::{HostView, Mode, StatusView};

use super::words::{age, bytes, count, number, percent};
use super::{Look, cell};

/// A host that has told nothing for so long is worth a word: three slots, and never less than this.
const SILENT_MS: i64 = 10_000;

pub fn status(look: &Look, base: &str, s: &StatusView) -> String {
    let mode = match s.mode {
        Mode::Act => "acts on its decisions",
        Mode::Observe => "only observes: it decides and records, and does nothing",
    };
    let head = format!(
        "{}\n{}, {}, {}; slots of {}",
        look.bold(&format!(
            "umbra-rps {} at {base}, up {}, {mode}",
            s.version,
            age(s.started, s.now)
        )),
        count(s.hosts.len(), "host"),
        count(s.vms, "VM"),
        count(s.shadows, "shadow"),
        super::words::span(s.slot_ms as f64 / 1000.0),
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
        return "No host has reported yet: agents send their samples to this RPS by 'rps' in their configuration."
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
    let risk = Cell::new(percent(h.contention_probability));
    let heard = match h.last_sample {
        Some(t) => age(t, s.now),
        None => "never".to_owned(),
    };
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
umbra-rps 0.1.0 at http://127.0.0.1:7400, up 2 h 05 min, acts on its decisions
2 hosts, 2 VMs, 1 shadow; slots of 2.0 s

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
    fn an_empty_cluster_says_what_to_do() {
        let mut s = sample::status();
        s.hosts.clear();
        assert!(status(&sample::look(), "http://x", &s).contains("No host has reported yet"));
    }
}
