//! What packing and unpacking a page costs, by kind: `cargo run --release --example bench_pages -- [--quick] [--json FILE]`.
//!
//! Rounds of 256 pages, scattered as in a last pass or neighbours, each changed in its own way since it was sent; `peer` is the same
//! round through zstd's level 1 alone, with no table of hashes and no cache, as it was before there were any. `encode_ns` is the
//! source's time a page up to the finished batch, `decode_ns` the target's until it is in the shadow's RAM, `bytes` what it takes.
//! The shadow's RAM is a file on tmpfs, reached as a QEMU's is, but that the process that has it mapped is this one.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser as _;
use memmap2::{MmapOptions, MmapRaw};
use serde_json::{Value, json};
use umbra_api::wire::setup::{Block, StreamSetup};
use umbra_replicator::encode::{Decoder, Encoder, Settings};
use umbra_replicator::proc::ProcessId;
use umbra_replicator::ram::{RamFile, ShadowRam};

const PAGES: u64 = 4096;
const ROUND: u64 = 256;

type Page = [u8; 4096];

#[derive(clap::Parser)]
#[command(about = "What packing and unpacking a page costs, by kind")]
struct Cli {
    /// Fewer runs
    #[arg(long)]
    quick: bool,
    /// Writes the rows to this file too
    #[arg(long)]
    json: Option<PathBuf>,
}

/// How a page is changed in round `n`.
type Change = fn(&mut Page, u64);

const SCATTERED: u64 = 13;

/// Name, distance from one page to the next, and change.
const CASES: [(&str, u64, Change); 6] = [
    ("zero", SCATTERED, |p, _| *p = [0; 4096]),
    ("same", SCATTERED, |_, _| {}),
    ("counter", SCATTERED, |p, n| put(p, 1000, n)),
    ("every 256th byte", SCATTERED, |p, n| {
        (0..16).for_each(|i| p[i * 256] = (n / ROUND + i as u64) as u8)
    }),
    ("text, rewritten", SCATTERED, |p, n| text(p, n * 977)),
    ("text, neighbours", 1, |p, n| text(p, n * 977)),
];

fn put(page: &mut Page, at: usize, n: u64) {
    page[at..at + 8].copy_from_slice(&n.to_le_bytes());
}

/// Lines of a log: zstd makes a fifth of them.
fn text(page: &mut Page, seed: u64) {
    let mut at = 0;
    let mut n = seed;
    while at < page.len() {
        n = n
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let line = format!(
            "{:>10} GET /items/{} HTTP/1.1 200 {}\n",
            n >> 40,
            n >> 48,
            (n >> 52) * 3
        );
        let len = line.len().min(page.len() - at);
        page[at..at + len].copy_from_slice(&line.as_bytes()[..len]);
        at += len;
    }
}

struct Ends {
    encoder: Encoder,
    decoder: Decoder,
    ram: ShadowRam,
    _theirs: MmapRaw,
    _dir: tempfile::TempDir,
}

impl Ends {
    fn new(known: bool) -> Result<Self> {
        let setup = StreamSetup {
            version: 3,
            config: vec![7],
            ram_section: 2,
            ram_version: 4,
            blocks: vec![Block {
                name: "pc.ram".into(),
                bytes: PAGES << 12,
            }],
        };
        let dir = tempfile::tempdir_in("/dev/shm")?;
        let path = dir.path().join("ram");
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        file.set_len(PAGES << 12)?;
        let theirs = MmapOptions::new().map_raw(&file)?;
        let ram = RamFile::of_shadow(&path, ProcessId::of(std::process::id() as i32)?)?;
        let mut encoder = Encoder::new(Settings {
            level_min: 1,
            level_rounds: 1,
            level_max: 1,
            delta_cache_bytes: if known { 64 << 20 } else { 0 },
        })?;
        if known {
            encoder.setup(&setup);
        }
        Ok(Self {
            encoder,
            decoder: Decoder::new()?,
            ram: ShadowRam::new(&setup, vec![("pc.ram".into(), ram)])?,
            _theirs: theirs,
            _dir: dir,
        })
    }

    /// Sends a round; nanoseconds a page of both ends, and bytes a page.
    fn round(&mut self, pages: &[(u64, Page)]) -> Result<[f64; 3]> {
        let mut batches = Vec::new();
        let mut sink = |b: &[u8]| {
            batches.push(b.to_vec());
            Ok(())
        };
        let begun = Instant::now();
        for (page, data) in pages {
            self.encoder.page(0, *page, Some(data), &mut sink)?;
        }
        self.encoder.flush(&mut sink)?;
        let encode = begun.elapsed();
        self.encoder.tick();
        let begun = Instant::now();
        for b in &batches {
            self.decoder.apply(b, &mut self.ram)?;
        }
        let each = |n: f64| n / pages.len() as f64;
        let bytes: usize = batches.iter().map(Vec::len).sum();
        Ok([
            each(encode.as_nanos() as f64),
            each(begun.elapsed().as_nanos() as f64),
            each(bytes as f64),
        ])
    }
}

fn measure(step: u64, change: Change, known: bool, rounds: u64) -> Result<[f64; 3]> {
    let mut ends = Ends::new(known)?;
    let mut pages: Vec<(u64, Page)> = (0..ROUND)
        .map(|i| {
            let mut page = [0; 4096];
            text(&mut page, i);
            (i * step % PAGES, page)
        })
        .collect();
    let mut seen = Vec::new();
    // The first rounds fill the table and the cache.
    for n in 0..rounds + 3 {
        for (i, (_, page)) in pages.iter_mut().enumerate() {
            change(page, n * ROUND + i as u64);
        }
        let figures = ends.round(&pages)?;
        if n >= 3 {
            seen.push(figures);
        }
    }
    Ok(std::array::from_fn(|i| {
        let mut all: Vec<f64> = seen.iter().map(|f| f[i]).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
    }))
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let rounds = if cli.quick { 50 } else { 400 };
    let mut rows: Vec<Value> = Vec::new();
    println!("{:<18} {:<10} {:>10} {:>12}", "case", "metric", "ours", "zstd alone");
    for (case, step, change) in CASES {
        let (ours, peer) = (
            measure(step, change, true, rounds)?,
            measure(step, change, false, rounds)?,
        );
        let names = [("encode_ns", "ns/page"), ("decode_ns", "ns/page"), ("bytes", "B/page")];
        for ((metric, unit), (ours, peer)) in names.into_iter().zip(ours.into_iter().zip(peer)) {
            println!("{case:<18} {metric:<10} {ours:>10.1} {peer:>12.1}");
            rows.push(
                json!({"case": case, "metric": metric, "unit": unit, "ours": ours, "peer": peer,
                "peer_name": "zstd alone", "runs": rounds}),
            );
        }
    }
    write(cli.json.as_deref(), &rows)
}

fn write(path: Option<&Path>, rows: &[Value]) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let all = json!({ "bench": "pages", "rows": rows });
    std::fs::write(path, format!("{all:#}\n")).with_context(|| format!("cannot write {}", path.display()))
}
