//! Figures side by side, as a table and as JSON.

use std::path::Path;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use serde_json::json;

/// One metric of one case.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Row {
    pub case: String,
    pub metric: String,
    pub unit: String,
    pub ours: f64,
    /// `None` where there is nobody to compare with.
    pub peer: Option<f64>,
    pub peer_name: Option<String>,
    pub runs: usize,
}

impl Row {
    pub fn new(case: &str, metric: &str, unit: &str, ours: f64, runs: usize) -> Self {
        Self {
            case: case.to_owned(),
            metric: metric.to_owned(),
            unit: unit.to_owned(),
            ours,
            peer: None,
            peer_name: None,
            runs,
        }
    }

    pub fn beside(mut self, name: &str, peer: Option<f64>) -> Self {
        self.peer = peer;
        self.peer_name = Some(name.to_owned());
        self
    }
}

/// The value below which a share `p` of all values lies: the nearest one that was measured. `None` of nothing.
pub fn percentile(values: &[f64], p: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (p * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

pub fn median(values: &[f64]) -> Option<f64> {
    percentile(values, 0.5)
}

pub fn table(rows: &[Row]) -> String {
    let mut t = Table::new();
    t.load_style(presets::UTF8_HORIZONTAL_ONLY);
    t.set_header(["case", "metric", "unit", "ours", "peer", "whose", "runs"]);
    for r in rows {
        let peer = r.peer.map_or_else(|| "–".to_owned(), short);
        let name = r.peer_name.clone().unwrap_or_default();
        t.add_row([
            r.case.clone(),
            r.metric.clone(),
            r.unit.clone(),
            short(r.ours),
            peer,
            name,
            r.runs.to_string(),
        ]);
    }
    for column in [3, 4, 6] {
        if let Some(c) = t.column_mut(column) {
            c.set_cell_alignment(CellAlignment::Right);
        }
    }
    t.to_string()
}

fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

pub fn write(file: &Path, bench: &str, rows: &[Row]) -> Result<()> {
    let all = json!({ "bench": bench, "rows": rows });
    Ok(std::fs::write(file, format!("{all:#}\n"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let v = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!(median(&v), Some(3.0));
        assert_eq!(median(&v[..4]), Some(2.0));
        assert_eq!(percentile(&v, 0.99), Some(5.0));
        assert_eq!(percentile(&v, 0.0), Some(1.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_row_without_a_peer_says_null() {
        let row = Row::new("idle", "qemu_cpu_pct", "%", 1.5, 3);
        assert_eq!(
            serde_json::to_value(&row).unwrap(),
            json!({"case": "idle", "metric": "qemu_cpu_pct", "unit": "%", "ours": 1.5, "peer": null, "peer_name": null, "runs": 3})
        );
        assert!(table(&[row.beside("stock", Some(250.0))]).contains("250"));
    }
}
