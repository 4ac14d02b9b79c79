//! The table at the end.

use comfy_table::{CellAlignment, Table, presets};

use super::figures::{Bill, Figures, Move, Plain};

/// The plain run alone.
pub fn plain(plain: &Plain) -> String {
    let mut t = table(&["", "without Umbra"]);
    for (name, value) in rows(&plain.bill) {
        t.add_row([name, value]);
    }
    t.add_row([
        "lasting contention from".to_owned(),
        seconds(plain.bill.contended_from_s().map(|s| s as f64)),
    ]);
    t.to_string()
}

pub fn both(f: &Figures) -> String {
    let mut t = table(&["", "without Umbra", "with Umbra"]);
    for ((name, without), (_, with)) in rows(&f.plain.bill).into_iter().zip(rows(&f.protected.bill)) {
        t.add_row([name, without, with]);
    }
    let p = &f.protected;
    let none = String::new;
    let bytes = |m: &Option<Move>| m.as_ref().map_or_else(|| "–".into(), |m| mebibytes(m.wire_bytes));
    let stopped = |m: &Option<Move>| {
        m.as_ref()
            .map_or_else(|| "–".into(), |m| format!("{:.1} ms", m.stopped_ms()))
    };
    let command = |m: &Option<Move>| {
        m.as_ref()
            .map_or_else(|| "–".into(), |m| format!("{:.1} ms", m.order_to_told_ms))
    };
    for (name, with) in [
        ("predicted at", seconds(p.predicted_s)),
        ("contention then expected at", seconds(p.expected_s)),
        ("shadow warm at", seconds(p.ready_s)),
        ("seed time", seconds(p.seed_s)),
        ("lead time (warm to due)", seconds(f.lead_time_s())),
        ("switched over at", seconds(p.moved_s)),
        ("guest stopped (STOP to RESUME)", stopped(&p.away)),
        ("order to running", command(&p.away)),
        ("bytes sent", bytes(&p.away)),
        ("back home at", seconds(p.home_s)),
        ("failback: guest stopped", stopped(&p.back)),
        ("failback: order to running", command(&p.back)),
        ("failback: bytes sent", bytes(&p.back)),
    ] {
        t.add_row([name.to_owned(), none(), with]);
    }
    t.add_row(["contention due at".to_owned(), seconds(f.due_s), none()]);
    t.add_row([
        "pattern errors in the guests".to_owned(),
        f.plain.errors.to_string(),
        p.errors.to_string(),
    ]);
    t.to_string()
}

fn table(head: &[&str]) -> Table {
    let mut t = Table::new();
    t.load_style(presets::UTF8_FULL_CONDENSED).set_header(head);
    for column in t.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    t
}

fn rows(b: &Bill) -> [(String, String); 6] {
    [
        ("contended seconds".to_owned(), b.contended_s().to_string()),
        ("client p50".to_owned(), format!("{:.1} ms", b.window.p50_ms)),
        ("client p99".to_owned(), format!("{:.1} ms", b.window.p99_ms)),
        ("longest gap between answers".to_owned(), format!("{:.0} ms", b.gap_ms)),
        ("answers".to_owned(), b.window.answers.to_string()),
        ("requests without answer".to_owned(), b.failed.to_string()),
    ]
}

fn seconds(s: Option<f64>) -> String {
    s.map_or_else(|| "–".into(), |s| format!("{s:.1} s"))
}

fn mebibytes(n: u64) -> String {
    format!("{:.1} MiB", n as f64 / f64::from(1 << 20))
}
