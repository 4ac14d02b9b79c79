//! Recorded demand, read from zstd-compressed CSV: one series a VM and metric, one value a 5-minute slot.
//!
//! | file | columns |
//! |---|---|
//! | `bitbrains_rnd*.csv.zst` | `vm,t,cpu,mem,disk,net`; an empty cell is a missing sample |
//! | `azure*.csv.zst` | `vm,t,avg_cpu,…` |
//! | `planetlab_*.csv.zst` | `vm,t0,t1,…`: a VM a line |

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// Of all traces.
pub const SLOT_MS: u64 = 300_000;
/// Nobody has a trace of more than twenty years; bounds what a wrong `t` can allocate.
const SLOTS_MAX: usize = 1 << 21;
/// Slots known before the first origin: a day, or six hours of a trace that is only a day long.
const FIRST_ORIGIN: usize = 288;
const FIRST_ORIGIN_SHORT: usize = 72;

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}, line {line}: {what}", path.display())]
    Line { path: PathBuf, line: usize, what: String },
    #[error("{}: no trace file (bitbrains_rnd*, azure* or planetlab_*, each .csv.zst)", .0.display())]
    None(PathBuf),
}

/// One metric of one trace.
#[derive(Clone, PartialEq, Debug)]
pub struct Trace {
    pub name: String,
    pub metric: &'static str,
    pub first_origin: usize,
    /// Slots of the whole trace; a VM may have fewer.
    pub slots: usize,
    /// In the file's order.
    pub vms: Vec<TraceVm>,
}

impl Trace {
    pub fn title(&self) -> String {
        format!("{}.{}", self.name, self.metric)
    }
}

#[derive(Clone, PartialEq, Debug, Default)]
pub struct TraceVm {
    pub id: String,
    pub slots: Vec<Option<f64>>,
}

/// All traces of a folder, by file name.
pub fn load(folder: &Path) -> Result<Vec<Trace>, TraceError> {
    let io = |source| TraceError::Io {
        path: folder.to_owned(),
        source,
    };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        paths.push(entry.map_err(io)?.path());
    }
    paths.sort();
    let mut traces = Vec::new();
    for path in &paths {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let Some(stem) = name.strip_suffix(".csv.zst") else {
            continue;
        };
        if stem.starts_with("bitbrains_rnd") {
            traces.extend(long(path, "bitbrains", &["cpu", "mem", "disk", "net"])?);
        } else if stem.starts_with("azure") {
            traces.extend(long(path, "azure", &["cpu"])?);
        } else if stem.starts_with("planetlab_") {
            traces.push(wide(path, stem)?);
        }
    }
    if traces.is_empty() {
        return Err(TraceError::None(folder.to_owned()));
    }
    Ok(traces)
}

/// The file's lines without its first, numbered as editors do.
fn lines(path: &Path) -> Result<impl Iterator<Item = Result<(usize, String), TraceError>>, TraceError> {
    let io = {
        let path = path.to_owned();
        move |source| TraceError::Io {
            path: path.clone(),
            source,
        }
    };
    let file = std::fs::File::open(path).map_err(&io)?;
    let text = BufReader::new(zstd::Decoder::new(file).map_err(&io)?);
    let numbered = text.lines().enumerate().skip(1);
    Ok(numbered.map(move |(i, line)| line.map(|l| (i + 1, l)).map_err(&io)))
}

/// `None` for an empty cell.
fn number(cell: &str) -> Result<Option<f64>, String> {
    if cell.is_empty() {
        return Ok(None);
    }
    match cell.parse::<f64>() {
        Ok(v) if v.is_finite() => Ok(Some(v)),
        _ => Err(format!("`{cell}` is not a number")),
    }
}

/// A line a VM and slot: `vm,t,` and a column for each of `metrics`; what follows is not read.
fn long(path: &Path, name: &str, metrics: &[&'static str]) -> Result<Vec<Trace>, TraceError> {
    let mut traces: Vec<Trace> = metrics
        .iter()
        .map(|metric| Trace {
            name: name.to_owned(),
            metric,
            first_origin: FIRST_ORIGIN,
            slots: 0,
            vms: Vec::new(),
        })
        .collect();
    let mut rows: HashMap<String, usize> = HashMap::new();
    for line in lines(path)? {
        let (line, text) = line?;
        take_long(&text, &mut rows, &mut traces).map_err(|what| TraceError::Line {
            path: path.to_owned(),
            line,
            what,
        })?;
    }
    Ok(traces)
}

fn take_long(text: &str, rows: &mut HashMap<String, usize>, traces: &mut [Trace]) -> Result<(), String> {
    let mut cells = text.split(',');
    let vm = cells.next().filter(|vm| !vm.is_empty()).ok_or("no VM")?;
    let t = cells.next().unwrap_or_default();
    let slot: usize = t.parse().map_err(|_| format!("`{t}` is not a slot"))?;
    if slot >= SLOTS_MAX {
        return Err(format!("slot {slot} is beyond {SLOTS_MAX}"));
    }
    let row = match rows.get(vm) {
        Some(row) => *row,
        None => {
            rows.insert(vm.to_owned(), rows.len());
            rows.len() - 1
        }
    };
    for trace in traces {
        let cell = cells.next().ok_or_else(|| format!("no column for {}", trace.metric))?;
        let value = number(cell)?;
        trace.slots = trace.slots.max(slot + 1);
        if trace.vms.len() <= row {
            trace.vms.push(TraceVm {
                id: vm.to_owned(),
                slots: Vec::new(),
            });
        }
        if let Some(vm) = trace.vms.get_mut(row) {
            if vm.slots.len() <= slot {
                vm.slots.resize(slot + 1, None);
            }
            vm.slots[slot] = value;
        }
    }
    Ok(())
}

/// A line a VM, a column a slot.
fn wide(path: &Path, name: &str) -> Result<Trace, TraceError> {
    let mut trace = Trace {
        name: name.to_owned(),
        metric: "cpu",
        first_origin: FIRST_ORIGIN_SHORT,
        slots: 0,
        vms: Vec::new(),
    };
    for line in lines(path)? {
        let (line, text) = line?;
        let wrong = |what| TraceError::Line {
            path: path.to_owned(),
            line,
            what,
        };
        let (vm, values) = text.split_once(',').ok_or_else(|| wrong("no values".into()))?;
        let slots: Result<Vec<_>, _> = values.split(',').map(number).collect();
        let slots = slots.map_err(wrong)?;
        if trace.vms.is_empty() {
            trace.slots = slots.len();
        }
        if slots.len() != trace.slots || slots.contains(&None) {
            let what = format!(
                "{} values, expected {} without a gap",
                slots.iter().flatten().count(),
                trace.slots
            );
            return Err(wrong(what));
        }
        trace.vms.push(TraceVm {
            id: vm.to_owned(),
            slots,
        });
    }
    Ok(trace)
}
