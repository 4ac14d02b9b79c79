//! `umbra-rps backtest demand` on a small made-up folder of traces: its scores against a computation of their definitions
//! from the export, and against the protocol's own `score.py`, where that lies beside the checkout.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A small deterministic source of noise, 0 to 1.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

const METRICS: [&str; 4] = ["cpu", "mem", "disk", "net"];

/// Four VMs of 330 slots, with gaps: one wanders, one swings, one stands still and one begins late and ends early; and eight VMs
/// of a short day.
fn write_traces(folder: &Path) {
    let mut noise = Noise(7);
    let mut long = String::from("vm,t,cpu,mem,disk,net\n");
    for vm in 0..4 {
        let mut level: f64 = 20.0;
        let life = if vm == 3 { 20..316 } else { 0..330 };
        for t in life {
            level = (level + noise.next() - 0.5).max(0.0);
            let swing = 10.0 + 8.0 * (f64::from(t) / 9.0).sin() + noise.next();
            let cpu = [level, swing, 3.0, swing * 2.0][vm];
            let cell = |value: f64, gap: bool| if gap { String::new() } else { format!("{value:.1}") };
            let gap = noise.next() < 0.03;
            let (mem, net) = (cell(100.0 * level, gap), cell(swing * level, noise.next() < 0.02));
            let _ = writeln!(long, "v{vm},{t},{},{mem},0,{net}", cell(cpu, gap));
        }
    }
    let mut wide = String::from("vm");
    (0..110).for_each(|t| write!(wide, ",t{t}").unwrap());
    wide.push('\n');
    for vm in 0..8 {
        let _ = write!(wide, "p{vm}");
        (0..110).for_each(|_| write!(wide, ",{}", (noise.next() * noise.next() * 60.0) as u32).unwrap());
        wide.push('\n');
    }
    for (name, text) in [("bitbrains_rnd_x", long), ("planetlab_20110399", wide)] {
        let packed = zstd::encode_all(text.as_bytes(), 1).unwrap();
        std::fs::write(folder.join(format!("{name}.csv.zst")), packed).unwrap();
    }
}

fn backtest(folder: &Path, out: &Path, threads: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_umbra-rps"))
        .args(["backtest", "demand", "--threads", threads, "--traces"])
        .arg(folder)
        .arg("--out")
        .arg(out)
        .output()
        .unwrap()
}

/// MAE, MASE, pinball .9 and .95, coverage .5, .9 and .95, as printed, by trace and metric.
fn printed(output: &Output) -> BTreeMap<String, Vec<f64>> {
    let text = String::from_utf8_lossy(&output.stdout);
    let rows = text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
    rows.filter(|r| r.get(1) == Some(&"auto"))
        .map(|r| (r[0].to_owned(), r[4..].iter().map(|n| n.parse().unwrap()).collect()))
        .collect()
}

/// By VM, what was measured in each slot.
type Truth = BTreeMap<String, Vec<Option<f64>>>;

fn truths(folder: &Path) -> BTreeMap<String, Truth> {
    let read = |name: &str| {
        let packed = std::fs::read(folder.join(name)).unwrap();
        String::from_utf8(zstd::decode_all(&packed[..]).unwrap()).unwrap()
    };
    let mut all: BTreeMap<String, Truth> = BTreeMap::new();
    for line in read("bitbrains_rnd_x.csv.zst").lines().skip(1) {
        let cells: Vec<_> = line.split(',').collect();
        for (metric, cell) in METRICS.iter().zip(&cells[2..]) {
            let trace = all.entry(format!("bitbrains.{metric}")).or_default();
            let slots = trace.entry(cells[0].to_owned()).or_insert_with(|| vec![None; 330]);
            slots[cells[1].parse::<usize>().unwrap()] = cell.parse().ok();
        }
    }
    for line in read("planetlab_20110399.csv.zst").lines().skip(1) {
        let (vm, values) = line.split_once(',').unwrap();
        let trace = all.entry("planetlab_20110399.cpu".into()).or_default();
        trace.insert(vm.to_owned(), values.split(',').map(|v| v.parse().ok()).collect());
    }
    all
}

/// Carried forward, and the first value carried back to the start.
fn filled(slots: &[Option<f64>]) -> Vec<f64> {
    let mut last = slots.iter().flatten().next().copied().unwrap();
    let carry = |s: &Option<f64>| {
        last = s.unwrap_or(last);
        last
    };
    slots.iter().map(carry).collect()
}

/// What [`printed`] should be, from the export's lines and the definitions.
fn computed(truths: &BTreeMap<String, Truth>, export: &str) -> BTreeMap<String, Vec<f64>> {
    let mut points: BTreeMap<String, BTreeMap<String, Vec<[f64; 4]>>> = BTreeMap::new();
    for line in export.lines().skip(1) {
        let c: Vec<_> = line.split(',').collect();
        let title = format!("{}.{}", c[0], c[2]);
        let slot = c[3].parse::<usize>().unwrap() + c[4].parse::<usize>().unwrap() - 1;
        let Some(actual) = truths[&title][c[1]][slot] else {
            continue;
        };
        let [q50, q90, q95] = [c[5], c[6], c[7]].map(|q| q.parse::<f64>().unwrap());
        let vms = points.entry(title).or_default();
        vms.entry(c[1].to_owned()).or_default().push([actual, q50, q90, q95]);
    }
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
    let mut scores = BTreeMap::new();
    for (title, vms) in &points {
        let step = |vm: &str| {
            mean(
                filled(&truths[title][vm])
                    .windows(2)
                    .map(|w| (w[1] - w[0]).abs())
                    .collect(),
            )
        };
        let counted: Vec<_> = vms.iter().filter(|(vm, _)| step(vm) > 0.02).collect();
        if counted.is_empty() {
            continue;
        }
        let all: Vec<_> = counted.iter().flat_map(|(_, p)| p.iter()).copied().collect();
        let error = |p: &[[f64; 4]]| mean(p.iter().map(|p| (p[0] - p[1]).abs()).collect());
        let pinball = |i: usize, a: f64| {
            let one = |p: &[f64; 4]| {
                if p[0] > p[i] {
                    a * (p[0] - p[i])
                } else {
                    (1.0 - a) * (p[i] - p[0])
                }
            };
            mean(all.iter().map(one).collect())
        };
        let covered = |i: usize| mean(all.iter().map(|p| f64::from(u8::from(p[0] <= p[i]))).collect());
        let mase = mean(counted.iter().map(|(vm, p)| error(p) / step(vm)).collect());
        let score = vec![
            error(&all),
            mase,
            pinball(2, 0.9),
            pinball(3, 0.95),
            covered(1),
            covered(2),
            covered(3),
        ];
        scores.insert(title.clone(), score);
    }
    scores
}

#[test]
fn its_scores_are_the_definitions_and_threads_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    write_traces(folder.path());
    let (one, two) = (folder.path().join("one.csv"), folder.path().join("two.csv"));
    let output = backtest(folder.path(), &one, "1");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(backtest(folder.path(), &two, "2").stdout, output.stdout);
    let export = std::fs::read_to_string(&one).unwrap();
    assert_eq!(export, std::fs::read_to_string(&two).unwrap());

    // Origins 288, 300 and 312 of 330 slots, and 72, 84 and 96 of 110, 12 slots each.
    assert_eq!(export.lines().count(), 1 + 4 * 4 * 3 * 12 + 8 * 3 * 12);
    assert_eq!(export.lines().next(), Some("trace,vm,metric,origin,h,q50,q90,q95"));
    assert!(export.contains("\nbitbrains,v3,net,312,12,"), "{export:.300}");

    let expected = computed(&truths(folder.path()), &export);
    let printed = printed(&output);
    assert_eq!(expected.len(), 4, "a constant metric has no scores");
    for (title, expected) in &expected {
        for (e, p) in expected.iter().zip(&printed[title]) {
            assert!(
                (e - p).abs() <= 0.000_051,
                "{title}: {expected:?}, printed {:?}",
                printed[title]
            );
        }
    }
}

#[test]
fn the_protocols_own_scores_agree() {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/score.py");
    if !script.exists() {
        eprintln!("SKIPPED: no {}", script.display());
        return;
    }
    let works = |program: &str, args: &[&str]| {
        Command::new(program)
            .args(args)
            .output()
            .is_ok_and(|o| o.status.success())
    };
    // Debian's has numpy by `cargo xtask setup`, even where another one comes first.
    let python = ["python3", "/usr/bin/python3"]
        .into_iter()
        .find(|p| works(p, &["-c", "import numpy"]));
    let (Some(python), true) = (python, works("zstd", &["--version"])) else {
        eprintln!("SKIPPED: {} needs python3 with numpy, and zstd", script.display());
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    write_traces(folder.path());
    let out = folder.path().join("out.csv");
    let ours = printed(&backtest(folder.path(), &out, "2"));
    let run = Command::new(python)
        .arg(&script)
        .arg("demand")
        .arg(folder.path())
        .arg(&out)
        .output();
    // Of a constant metric it scores nothing, and prints what is no JSON.
    let theirs = String::from_utf8(run.unwrap().stdout).unwrap().replace("NaN", "null");
    let theirs: serde_json::Value = serde_json::from_str(&theirs).unwrap();
    const KEYS: [&str; 7] = [
        "MAE",
        "MASE",
        "pinball0.9",
        "pinball0.95",
        "coverage0.5",
        "coverage0.9",
        "coverage0.95",
    ];
    for title in [
        "bitbrains.cpu",
        "bitbrains.mem",
        "bitbrains.net",
        "planetlab_20110399.cpu",
    ] {
        for (key, ours) in KEYS.iter().zip(&ours[title]) {
            let theirs = theirs[title][key].as_f64().unwrap();
            assert!(
                (ours - theirs).abs() <= 0.000_101,
                "{title}, {key}: {ours}, score.py {theirs}"
            );
        }
    }
}

#[test]
fn a_bad_trace_is_named_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.csv");
    let told = || {
        let output = backtest(folder.path(), &out, "1");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(told().contains("no trace file"), "{}", told());
    for (name, text, expected) in [
        (
            "azure_x",
            "vm,t,avg_cpu\na,0,1.5\na,1,often\n",
            "azure_x.csv.zst, line 3: `often` is not a number",
        ),
        (
            "azure_x",
            "vm,t,avg_cpu\na,0,1.5\na,-1,2\n",
            "azure_x.csv.zst, line 3: `-1` is not a slot",
        ),
        (
            "azure_x",
            "vm,t,avg_cpu\na,0\n",
            "azure_x.csv.zst, line 2: no column for cpu",
        ),
        (
            "planetlab_x",
            "vm,t0,t1\na,1,2\nb,1\n",
            "planetlab_x.csv.zst, line 3: 1 values, expected 2",
        ),
    ] {
        let path = folder.path().join(format!("{name}.csv.zst"));
        std::fs::write(&path, zstd::encode_all(text.as_bytes(), 1).unwrap()).unwrap();
        assert!(told().contains(expected), "{}", told());
        std::fs::remove_file(&path).unwrap();
    }
    // A file that is cut off.
    let packed = zstd::encode_all(&b"vm,t,avg_cpu\na,0,1.5\n"[..], 1).unwrap();
    std::fs::write(folder.path().join("azure_x.csv.zst"), &packed[..packed.len() - 5]).unwrap();
    assert!(told().contains("azure_x.csv.zst"), "{}", told());
}
