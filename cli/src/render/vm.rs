//! `umbra vm show`

use comfy_table::Cell;
use umbra_api::order::{Lag, NotConverging, Tier};
use umbra_api::replica::{
    Convergence, DiskProgress, HeldBack, Pace, Progress, Resumption, ShadowMemory, SwitchoverReport,
};
use umbra_api::view::{ForecastView, VmView};

use super::words::{bytes, count, number, span, sparkline, us, whole};
use super::{Look, cell, stage_cell, words_of};

/// As many slots of history and of forecast are drawn: both fit a line of 80 columns.
const SLOTS: usize = 48;
/// As many events are shown; `umbra events --vm` has them all.
const EVENTS: usize = 8;

pub fn show(look: &Look, v: &VmView) -> String {
    let s = &v.summary;
    let title = format!("{} ({})", super::words::clean(&s.name), s.vm);
    let mut parts = vec![format!("{}\n{}", look.bold(&title), look.pairs(standing(v)))];
    if let Some(e) = &v.last_error {
        parts.push(look.warn(&format!("Last error: {}", super::words::clean(e))));
    }
    parts.push(section(look, "Demand (cores)", look.pairs(demand(v))));
    if !v.scores.is_empty() {
        parts.push(section(look, "Models by last backtest", scores(look, v)));
    }
    if let Some(p) = &v.progress {
        parts.push(section(look, "Copy", look.pairs(copy(look, p))));
    }
    if !v.disks.is_empty() {
        let rows = v.disks.iter().map(|d| (d.path.as_str(), disk(d)));
        parts.push(section(look, "Disks", look.pairs(rows.collect())));
    }
    if let Some(r) = &v.last_switchover {
        parts.push(section(look, "Last switchover", look.pairs(switchover(look, r))));
    }
    if !v.events.is_empty() {
        parts.push(section(look, "Events", events(look, v)));
    }
    parts.join("\n\n")
}

fn section(look: &Look, title: &str, body: String) -> String {
    format!("{}\n{body}", look.bold(title))
}

fn standing(v: &VmView) -> Vec<(&'static str, String)> {
    let s = &v.summary;
    let shadow = match (&s.shadow, v.tier) {
        (Some(h), Some(t)) => format!("on {h}, {}", tier(t)),
        (Some(h), None) => format!("on {h}"),
        (None, _) if !s.protect => "none, this VM is opted out".to_owned(),
        (None, _) => "none".to_owned(),
    };
    let ram = v.shadow_memory.as_ref().map(|m| ("memory", shadow_ram(m)));
    let risk = if s.cps > s.threshold { "above" } else { "not above" };
    let mut rows = vec![
        ("host", super::vms::place(s)),
        ("stage", format!("{}, epoch {}", words_of(s.stage), v.epoch)),
        ("shadow", shadow),
    ];
    rows.extend(ram);
    rows.extend([
        (
            "risk",
            format!("CPS {}, {risk} the threshold of {}", number(s.cps), number(s.threshold)),
        ),
        (
            "size",
            format!(
                "{}, {} of RAM ({} resident)",
                count(v.vcpus as usize, "vCPU"),
                bytes(v.guest_bytes),
                bytes(v.rss_bytes)
            ),
        ),
    ]);
    rows
}

/// What it takes of its host's RAM, and what is to be known about it.
fn shadow_ram(m: &ShadowMemory) -> String {
    let mut text = format!("{} of its {} are in RAM", bytes(m.resident_bytes), bytes(m.used_bytes));
    if let Some(limit) = m.limit_bytes {
        text += &format!(", its tier leaves it {}", bytes(limit));
    }
    if let Some(p) = m.promotion {
        text += &format!("; the last promotion took {}", span(p.took_ms as f64 / 1e3));
    }
    if let Some(why) = &m.not_shrunk {
        text += &format!("; not shrunk: {}", super::words::clean(why));
    }
    text
}

fn tier(t: Tier) -> &'static str {
    match t {
        Tier::Standby => "tier 0 (standby)",
        Tier::Armed => "tier 1 (armed)",
        Tier::Active => "tier 2 (active)",
    }
}

fn demand(v: &VmView) -> Vec<(&'static str, String)> {
    let s = &v.summary;
    let mut rows = vec![(
        "now",
        format!(
            "{}, waiting {} ms per s for a CPU",
            number(s.cpu_demand),
            whole(s.wait_ms_per_s)
        ),
    )];
    let past: Vec<f64> = v.history.iter().rev().take(SLOTS).rev().map(|p| p.cpu_cores).collect();
    let median = v.forecast.as_ref().and_then(|f| quantile(f, 0.5)).unwrap_or_default();
    let high = v.forecast.as_ref().and_then(|f| quantile(f, 0.9)).unwrap_or_default();
    // One scale for all three lines, so that they can be compared.
    let top = past
        .iter()
        .chain(median)
        .chain(high)
        .copied()
        .filter(|x| x.is_finite())
        .fold(0.0, f64::max);
    if !past.is_empty() {
        rows.push((
            "past",
            format!("{}  (highest {})", sparkline(&past, top), number(most(&past))),
        ));
    }
    for (name, row) in [("median", median), ("p90", high)] {
        if !row.is_empty() {
            let shown = row.get(..SLOTS).unwrap_or(row);
            rows.push((
                name,
                format!("{}  (highest {})", sparkline(shown, top), number(most(row))),
            ));
        }
    }
    rows.push(("model", v.model.clone()));
    rows
}

/// The forecast's row for this quantile, if it has one.
fn quantile(f: &ForecastView, q: f64) -> Option<&[f64]> {
    let i = f.quantiles.iter().position(|x| (x - q).abs() < 1e-6)?;
    f.cpu_cores.get(i).map(Vec::as_slice)
}

fn most(values: &[f64]) -> f64 {
    values.iter().copied().filter(|x| x.is_finite()).fold(0.0, f64::max)
}

fn scores(look: &Look, v: &VmView) -> String {
    let rows = v
        .scores
        .iter()
        .map(|s| {
            let chosen = if s.chosen { "chosen" } else { "" };
            vec![
                cell(&s.model),
                Cell::new(format!("{:.4}", s.pinball)),
                Cell::new(chosen),
            ]
        })
        .collect();
    super::indent(&look.table(&["MODEL", "PINBALL LOSS", ""], &[1], rows))
}

/// What became of a copy that broke off, and what a scrub of its memory found.
fn resumed(look: &Look, r: &Resumption, ram_bytes: u64) -> Option<String> {
    const PAGE: u64 = 4096;
    let mut parts = Vec::new();
    match r.broken_since {
        Some(since) => parts.push(format!(
            "it broke off at {}, and goes on by itself ({} so far)",
            look.clock(since),
            count(r.passes as usize, "attempt")
        )),
        None if r.passes > 0 => parts.push(format!(
            "begun anew {}, at last {} of {} travelled again",
            count(r.passes as usize, "time"),
            bytes(r.sent_pages.saturating_mul(PAGE)),
            bytes(ram_bytes)
        )),
        None => {}
    }
    if r.differing_pages > 0 {
        let pages = count(r.differing_pages as usize, "damaged page");
        parts.push(format!("{pages} found in the shadow"));
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

fn disk(d: &DiskProgress) -> String {
    let state = match d.ready {
        true => "complete, what is written follows".to_owned(),
        false => format!("{} of {} copied", bytes(d.copied_bytes), bytes(d.total_bytes)),
    };
    let mut text = format!("{state}; {} on the link", bytes(d.link_bytes));
    if d.scrubbed_bytes > 0 {
        text += &format!(", {} compared", bytes(d.scrubbed_bytes));
    }
    if d.differing_ranges > 0 {
        let ranges = count(d.differing_ranges as usize, "damaged range");
        text += &format!("; {ranges} found in the image, {} mended", d.mended_ranges);
    }
    text
}

fn copy(look: &Look, p: &Progress) -> Vec<(&'static str, String)> {
    let seed = match p.seed_ms {
        Some(ms) => format!("{} in {}", bytes(p.ram_bytes), span(ms as f64 / 1000.0)),
        None if p.ram_bytes > 0 => format!(
            "{} of {} ({:.0} %)",
            bytes(p.seeded_bytes),
            bytes(p.ram_bytes),
            100.0 * p.seeded_bytes as f64 / p.ram_bytes as f64
        ),
        None => "not begun".to_owned(),
    };
    let mut rows = vec![
        ("seed", seed),
        (
            "sent",
            format!(
                "{} on the link, {}",
                bytes(p.wire_bytes),
                count(p.rounds as usize, "round")
            ),
        ),
        (
            "lag",
            format!(
                "{} old, {} in the last round, {} dirtied per s",
                span(p.lag_ms as f64 / 1000.0),
                count(p.lag_pages as usize, "page"),
                p.dirty_pages_per_s
            ),
        ),
    ];
    if let Some(text) = resumed(look, &p.resume, p.ram_bytes) {
        rows.push(("after breaks", text));
    }
    if p.pace.convergence == Convergence::NotConverging {
        rows.push(("too fast", too_fast(p)));
    } else if let Some(ms) = p.estimated_downtime_ms {
        rows.push(("a switchover", format!("would stop the guest for about {ms:.1} ms")));
    }
    rows.extend(pace(&p.pace).map(|words| ("pace", words)));
    rows.push(("policy", policy(&p.pace)));
    rows
}

/// How the copy was ordered to keep up.
fn policy(p: &Pace) -> String {
    let mut words = format!("no stop of more than {}", span(p.max_downtime_ms as f64 / 1000.0));
    match p.max_lag {
        None => {}
        Some(Lag::Pages(n)) => words += &format!(", a lag of at most {n} pages"),
        Some(Lag::Bytes(n)) => words += &format!(", a lag of at most {}", bytes(n)),
        Some(Lag::Ms(n)) => words += &format!(", a lag of at most {}", span(n as f64 / 1000.0)),
    }
    if let Some(mbit) = p.max_bandwidth_mbit {
        words += &format!(", at most {mbit} Mbit/s");
    }
    words
        + match p.when_too_fast {
            NotConverging::AcceptLonger => ", copied on where no round ends",
            NotConverging::GiveUp => ", given up where no round ends",
            NotConverging::Throttle => ", the guest slowed down where no round ends",
        }
}

/// No round ends, and so there is no switchover.
fn too_fast(p: &Progress) -> String {
    let link = match p.pace.link_bytes_per_s {
        Some(rate) => format!("the link carries {}/s", bytes(rate)),
        None => "the link's speed is not known".to_owned(),
    };
    format!(
        "no round ends, {} in {} by now; {link}. A switchover is refused meanwhile",
        count(p.pace.round_pages as usize, "page"),
        span(p.pace.round_ms as f64 / 1000.0)
    )
}

/// What the copy costs. Nothing, before the first round.
fn pace(p: &Pace) -> Option<String> {
    if p.convergence == Convergence::Unknown {
        return None;
    }
    let mut words = format!(
        "{} written lately, {} ms between rounds, QEMU {:.1} % and copying {:.1} % of a CPU",
        count(p.working_set_pages as usize, "page"),
        p.pause_ms,
        p.qemu_cpu_pct,
        p.own_cpu_pct
    );
    words += match p.held_back_by {
        None => "",
        Some(HeldBack::QemuCpu | HeldBack::OwnCpu) => ", held back to keep to that",
        Some(HeldBack::HotHost) => ", held back because the host is busy",
    };
    if let Some(pct) = p.throttle_pct {
        words += &format!(", the guest slowed down by {pct} %");
    }
    Some(words)
}

fn switchover(look: &Look, r: &SwitchoverReport) -> Vec<(&'static str, String)> {
    vec![
        ("at", format!("{}, epoch {}", look.clock(r.at), r.epoch)),
        ("guest stopped", us(r.guest_stopped_us)),
        ("order to running", us(r.order_to_told_us)),
        (
            "steps",
            format!(
                "last pass {}, device state {}, load {}, relinquish {}, shut {}, resume {}",
                us(r.last_pass_us),
                us(r.device_state_us),
                us(r.load_us),
                us(r.relinquish_us),
                us(r.shut_us),
                us(r.resume_us)
            ),
        ),
        (
            "sent",
            format!(
                "{} at the end and {} of device state; {} in all",
                count(r.last_pass_pages as usize, "page"),
                bytes(r.device_state_bytes),
                bytes(r.wire_bytes)
            ),
        ),
    ]
}

fn events(look: &Look, v: &VmView) -> String {
    let mut sorted: Vec<_> = v.events.iter().collect();
    sorted.sort_by_key(|e| e.t);
    let skipped = sorted.len().saturating_sub(EVENTS);
    let rows = sorted
        .into_iter()
        .skip(skipped)
        .map(|e| vec![Cell::new(look.clock(e.t)), stage_cell(e.to), cell(&e.reason)])
        .collect();
    super::indent(&look.table(&["TIME", "STAGE", "WHY"], &[], rows))
}

#[cfg(test)]
mod tests {
    use umbra_api::replica::Promotion;

    use super::*;
    use crate::render::sample;

    #[test]
    fn everything_about_one_vm() {
        assert_eq!(
            show(&sample::look(), &sample::vm()),
            "\
web (00000001-0000-0000-0000-000000000001)
  host    a
  stage   standby, epoch 2
  shadow  on b, tier 0 (standby)
  memory  22 MiB of its 201 MiB are in RAM, its tier leaves it 20 MiB
  risk    CPS 0.91, above the threshold of 0.60
  size    1 vCPU, 256 MiB of RAM (210 MiB resident)

Demand (cores)
  now     0.42, waiting 4 ms per s for a CPU
  past    ▅▅▅▆▆▆▇▇▁▁▂▂▂▃▃▃▄▄▄▅▅▅▅▆▆▆▇▇▁▁▂▂▂▃▃▃▄▄▄▅▅▅▅▆▆▆▇▇  (highest 0.95)
  median  ▂▄▆  (highest 0.80)
  p90     ▃▅█  (highest 1.10)
  model   ets

Models by last backtest
  MODEL  PINBALL LOSS
  ets          0.0310  chosen
  last         0.0520

Copy
  seed          256 MiB in 1.8 s
  sent          41 MiB on the link, 17 rounds
  lag           340 ms old, 212 pages in the last round, 424 dirtied per s
  a switchover  would stop the guest for about 9.4 ms
  pace          1900 pages written lately, 500 ms between rounds, QEMU 1.2 % and
                copying 0.9 % of a CPU
  policy        no stop of more than 1.0 s, a lag of at most 500 pages, the
                guest slowed down where no round ends

Disks
  /srv/web.qcow2  complete, what is written follows; 3.1 GiB on the link, 5.0
                  GiB compared

Last switchover
  at                09:12:20, epoch 2
  guest stopped     9.31 ms
  order to running  21.40 ms
  steps             last pass 0.00 ms, device state 0.00 ms, load 0.00 ms,
                    relinquish 0.00 ms, shut 0.00 ms, resume 0.00 ms
  sent              180 pages at the end and 60 KiB of device state; 44 MiB in
                    all

Events
  TIME      STAGE    WHY
  09:12:50  standby  the first copy is complete"
        );
    }

    #[test]
    fn what_became_of_a_copy_that_broke_off() {
        let tell = |r: Resumption| resumed(&sample::look(), &r, 256 << 20);
        let mut r = Resumption::default();
        assert_eq!(tell(r), None);
        (r.passes, r.sent_pages, r.differing_pages) = (2, 512, 1);
        let text = tell(r).unwrap();
        assert_eq!(
            text,
            "begun anew 2 times, at last 2.0 MiB of 256 MiB travelled again; 1 damaged page found in the shadow"
        );
        r.broken_since = Some(sample::NOW);
        assert!(tell(r).unwrap().contains("goes on by itself (2 attempts so far)"));
    }

    #[test]
    fn a_damaged_disk_is_told() {
        let damaged = DiskProgress {
            scrubbed_bytes: 1 << 30,
            differing_ranges: 2,
            mended_ranges: 1,
            ready: true,
            ..DiskProgress::default()
        };
        let text = disk(&damaged);
        assert!(
            text.ends_with("1.0 GiB compared; 2 damaged ranges found in the image, 1 mended"),
            "{text}"
        );
    }

    #[test]
    fn what_a_shadow_takes_and_why_not_less() {
        let m = ShadowMemory {
            used_bytes: 8 << 20,
            resident_bytes: 8 << 20,
            not_shrunk: Some("this host has no swap".into()),
            promotion: Some(Promotion {
                at: sample::NOW,
                tier: Tier::Active,
                read_bytes: 5 << 20,
                took_ms: 1500,
            }),
            ..ShadowMemory::default()
        };
        assert_eq!(
            shadow_ram(&m),
            "8.0 MiB of its 8.0 MiB are in RAM; the last promotion took 1.5 s; not shrunk: this host has no swap"
        );
    }

    #[test]
    fn a_vm_of_which_little_is_known() {
        let mut v = sample::vm();
        (v.progress, v.last_switchover, v.forecast, v.tier) = (None, None, None, None);
        v.scores.clear();
        v.history.clear();
        v.events.clear();
        v.summary.shadow = None;
        v.last_error = Some("the target is down".into());
        let text = show(&sample::look(), &v);
        assert!(text.contains("shadow  none\n"), "{text}");
        assert!(text.contains("Last error: the target is down"), "{text}");
        assert!(!text.contains("Copy") && !text.contains("Events"), "{text}");
    }

    #[test]
    fn a_forecast_whose_rows_are_missing_is_no_panic() {
        let mut v = sample::vm();
        v.forecast = Some(ForecastView {
            from: sample::NOW,
            slot_ms: 0,
            quantiles: vec![0.5, 0.9],
            cpu_cores: vec![],
        });
        assert!(!show(&sample::look(), &v).contains("median"));
    }
}
