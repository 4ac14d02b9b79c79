//! How fast the stream parser is, beside `memcpy` of the same bytes: `cargo run --release --example bench_parse -- [--quick]
//! [--json FILE]`.
//!
//! A stream in memory is pushed in reads of 1 MiB, as from a socket. `gb_per_s` parses it and copies each page to its place
//! in RAM, zero pages are only counted; memcpy copies the stream's bytes once, in the same pieces. `in_place_gb_per_s` leaves
//! the pages where they lie, as the encoder has them: no peer does as little. `ram_gb_per_s` counts guest RAM and not bytes of
//! the stream: a zero page has nine. All memory is mapped beforehand.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser as _;
use serde_json::{Value, json};
use umbra_api::wire::setup::{Block, StreamSetup};
use umbra_replicator::stream::compose::Composer;
use umbra_replicator::stream::items::PAGE_SIZE;
use umbra_replicator::stream::{Event, Limits, Page, Parser, StreamError};

const READ: usize = 1 << 20;
const RAM_PAGES: u64 = 64 << 10;
/// Pages of a section: QEMU ends one every 50 ms, which at full speed are some ten thousand.
const SECTION_PAGES: u64 = 8192;

#[derive(clap::Parser)]
#[command(about = "GB/s of the migration stream's parser, beside memcpy of the same bytes")]
struct Cli {
    /// Fewer runs
    #[arg(long)]
    quick: bool,
    /// Writes the rows to this file too
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What the pages are.
#[derive(Clone, Copy)]
enum Case {
    Raw,
    Zero,
    /// Every other run of 16 pages is zero.
    Mixed,
}

impl Case {
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Zero => "zero",
            Self::Mixed => "mixed",
        }
    }

    fn is_zero(self, page: u64) -> bool {
        match self {
            Self::Raw => false,
            Self::Zero => true,
            Self::Mixed => (page / 16).is_multiple_of(2),
        }
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let runs = if cli.quick { 3 } else { 11 };
    let mut rows = Vec::new();
    println!("{:<8} {:<18} {:>10} {:>10}", "case", "metric", "ours", "memcpy");
    for case in [Case::Raw, Case::Zero, Case::Mixed] {
        rows.extend(measure(case, runs)?);
    }
    if let Some(path) = cli.json {
        let all = json!({ "bench": "parse", "rows": rows });
        std::fs::write(&path, format!("{all:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn measure(case: Case, runs: usize) -> Result<Vec<Value>> {
    let stream = stream(case);
    let mut ram = vec![1; RAM_PAGES as usize * PAGE_SIZE];
    let mut copy = vec![1; stream.len()];
    let (mut parses, mut stores, mut copies) = (Vec::new(), Vec::new(), Vec::new());
    // In turns, so that whatever else the machine does hits all of them. The first turn is for the caches.
    for run in 0..=runs {
        let t = [parse(&stream)?, store(&stream, &mut ram)?, memcpy(&stream, &mut copy)];
        if run > 0 {
            parses.push(t[0]);
            stores.push(t[1]);
            copies.push(t[2]);
        }
    }
    let (parse_s, store_s, copy_s) = (median(parses), median(stores), median(copies));
    let gb = |bytes: usize, s: f64| bytes as f64 / 1e9 / s;
    let peer = gb(stream.len(), copy_s);
    let figures = [
        ("gb_per_s", gb(stream.len(), store_s), Some(peer)),
        ("in_place_gb_per_s", gb(stream.len(), parse_s), None),
        ("ram_gb_per_s", gb(ram.len(), store_s), None),
    ];
    let row = |(metric, ours, peer): (&str, f64, Option<f64>)| {
        println!(
            "{:<8} {metric:<18} {ours:>10.2} {:>10}",
            case.name(),
            peer.map_or("-".into(), |p| format!("{p:.2}"))
        );
        let name = peer.map(|_| "memcpy");
        json!({"case": case.name(), "metric": metric, "unit": "GB/s", "ours": ours, "peer": peer, "peer_name": name, "runs": runs})
    };
    Ok(figures.into_iter().map(row).collect())
}

fn stream(case: Case) -> Vec<u8> {
    let blocks = vec![Block {
        name: "pc.ram".into(),
        bytes: RAM_PAGES * PAGE_SIZE as u64,
    }];
    let config = b"\x07\0\0\0\x03q35".to_vec();
    let setup = StreamSetup {
        version: 3,
        config,
        ram_section: 2,
        ram_version: 4,
        blocks,
    };
    let mut c = Composer::new(&setup);
    c.header(&setup.config).ram_start(false);
    for page in 0..RAM_PAGES {
        if page.is_multiple_of(SECTION_PAGES) {
            c.part();
        }
        let fill = [page as u8 | 1; PAGE_SIZE];
        c.page(0, page, Some(&fill).filter(|_| !case.is_zero(page)));
        if page % SECTION_PAGES == SECTION_PAGES - 1 {
            c.end_section();
        }
    }
    c.into_bytes()
}

fn parse(stream: &[u8]) -> Result<f64> {
    let mut sum = 0u64;
    let s = run(stream, |e| match e {
        Event::Page { page, data, .. } => sum += page ^ u64::from(data[0]),
        Event::Zero { page, .. } => sum += page,
        _ => {}
    })?;
    black_box(sum);
    Ok(s)
}

/// Zero pages are only counted: RAM that is zero already is not touched.
fn store(stream: &[u8], ram: &mut [u8]) -> Result<f64> {
    let mut zeros = 0u64;
    let places = ram.as_chunks_mut::<PAGE_SIZE>().0;
    let s = run(stream, |e| match e {
        Event::Page { page, data, .. } => {
            let data: &Page = data;
            if let Some(place) = places.get_mut(page as usize) {
                *place = *data;
            }
        }
        Event::Zero { .. } => zeros += 1,
        _ => {}
    })?;
    black_box((zeros, places));
    Ok(s)
}

fn run(stream: &[u8], mut take: impl FnMut(Event<'_>)) -> Result<f64> {
    let mut p = Parser::new(Limits::default());
    let start = Instant::now();
    for piece in black_box(stream).chunks(READ) {
        p.push(piece, &mut |e: Event<'_>| {
            take(e);
            Ok::<_, StreamError>(())
        })?;
    }
    let s = start.elapsed().as_secs_f64();
    anyhow::ensure!(
        p.position() == stream.len() as u64,
        "the stream was not read to its end"
    );
    Ok(s)
}

fn memcpy(stream: &[u8], to: &mut [u8]) -> f64 {
    let start = Instant::now();
    for (to, from) in to.chunks_mut(READ).zip(black_box(stream).chunks(READ)) {
        to.copy_from_slice(from);
    }
    black_box(to);
    start.elapsed().as_secs_f64()
}

fn median(mut s: Vec<f64>) -> f64 {
    s.sort_unstable_by(f64::total_cmp);
    s.get(s.len() / 2).copied().unwrap_or(f64::NAN)
}
