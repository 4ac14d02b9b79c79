//! What travels: bytes on the link for a first copy and for the rounds of a standby, beside QEMU's own migration of the same guest, plain
//! and with multifd and zstd (level 1, its default).
//!
//! Three loads, each in a Linux of its own with real programs: a file server and its client, a compiler, a database ([`guest`]).
//! For the first copy the guest is stopped (its migration is then not held, but ends), so that all three send the very same memory; the peers' bytes are counted at a socket. For
//! the rounds it runs, and all three are counted on the very same pages: stock is QEMU's stream itself, held as ours is;
//! multifd is computed, which the first copy shows to be right within a percent or so ([`peers`]).
//! TLS's own bytes are in nobody's figures.

mod guest;
mod hold;
mod peers;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Options;
use super::cpu;
use super::rows::Row;
use crate::lab::Lab;
use crate::lab::host::Host;
use guest::{Guest, MEM_MIB};
use hold::{Costs, Hold};
use peers::Cost;

const LOADS: [&str; 3] = ["files", "compile", "database"];
/// Between two rounds: the longest that there is, and the default.
const REST: Duration = Duration::from_millis(500);

/// Of one load, or of all together.
#[derive(Clone, Copy, Default)]
struct Figures {
    seed: Copies,
    rounds: Copies,
}

#[derive(Clone, Copy, Default)]
struct Copies {
    ours: Cost,
    stock: Cost,
    multifd: Cost,
    /// What was copied: RAM for the seed, QEMU's stream for rounds.
    gb: f64,
}

pub fn run(options: &Options) -> Result<Vec<Row>> {
    let enough = Duration::from_secs(if options.quick { 20 } else { 120 });
    let window = options.window.unwrap_or(enough);
    let lab = Lab::new(&["a"])?;
    let host = lab.host("a")?;
    let image = guest::image(&host.folder("mix")?).context("making the guest's image")?;
    let (mut rows, mut all, mut loads) = (Vec::new(), Figures::default(), 0);
    for load in LOADS.iter().filter(|l| options.wants(l)) {
        let guest = Guest::start(host, &image, load)?;
        let figures = measure(host, &guest, load, window).with_context(|| format!("load '{load}'"))?;
        rows.extend(tell(load, &figures));
        add(&mut all.seed, &figures.seed);
        add(&mut all.rounds, &figures.rounds);
        loads += 1;
    }
    if loads > 1 {
        rows.extend(tell("all", &all));
    }
    println!(
        "real programs in guests of {MEM_MIB} MiB under TCG: httpd and wget over a tree of files, gcc's cc1 and as on zstd's sources, \
         sqlite3; rounds of {window:?} a load, 0.5 s apart"
    );
    Ok(rows)
}

fn measure(host: &Host, guest: &Guest, load: &str, window: Duration) -> Result<Figures> {
    peers::run(guest, false)?;
    let stock = peers::migrate(guest, &host.file("stock.sock"), false).context("stock")?;
    // QEMU wants to have run between two migrations: a blink, in which some pages change.
    peers::run(guest, true)?;
    peers::run(guest, false)?;
    let multifd = peers::migrate(guest, &host.file("multifd.sock"), true).context("multifd")?;
    peers::run(guest, true)?;
    peers::run(guest, false)?;
    let before = cpu::of_process(guest.process.pid())?;
    let mut whole = Hold::start(guest, &host.file(&format!("{load}-seed.sock")), false)?;
    whole.round().context("our first copy")?;
    let qemu_s = cpu::of_process(guest.process.pid())? - before;
    let seed = whole.take();
    println!(
        "{load}: first copy {}; computed multifd {:.1} MB beside {:.1} real",
        kinds(&seed),
        mb(seed.multifd.bytes),
        mb(multifd.bytes)
    );
    peers::run(guest, true)?;
    let mut hold = Hold::start(guest, &host.file(&format!("{load}.sock")), true)?;
    hold.round()?;
    // Of a running guest: not what is compared.
    hold.take();
    let end = Instant::now() + window;
    while Instant::now() < end {
        // This is the pause that pacing is about.
        std::thread::sleep(REST);
        hold.woke()?;
        hold.round()?;
    }
    let rounds = hold.take();
    println!("{load}: {} rounds {}", rounds.rounds, kinds(&rounds));
    let ours = Cost {
        cpu_s: seed.ours.cpu_s + qemu_s,
        ..seed.ours
    };
    Ok(Figures {
        seed: Copies {
            ours,
            stock,
            multifd,
            gb: f64::from(MEM_MIB) * 1.048_576e-3,
        },
        rounds: Copies {
            ours: rounds.ours,
            stock: rounds.stock,
            multifd: rounds.multifd,
            gb: rounds.stock.bytes as f64 / 1e9,
        },
    })
}

fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// How the pages travelled so far.
fn kinds(costs: &Costs) -> String {
    let of = |(name, count): (&str, umbra_api::replica::PageCount)| {
        format!("{name} {} ({:.1} MB)", count.pages, mb(count.bytes))
    };
    costs.pages.all().map(of).join(", ")
}

fn add(to: &mut Copies, more: &Copies) {
    let pairs = [
        (&mut to.ours, &more.ours),
        (&mut to.stock, &more.stock),
        (&mut to.multifd, &more.multifd),
    ];
    for (to, more) in pairs {
        to.bytes += more.bytes;
        to.cpu_s += more.cpu_s;
    }
    to.gb += more.gb;
}

fn tell(load: &str, figures: &Figures) -> Vec<Row> {
    let mut rows = Vec::new();
    for (what, copies) in [("seed", &figures.seed), ("rounds", &figures.rounds)] {
        let ours = mb(copies.ours.bytes);
        let bytes = format!("{what}_mb");
        rows.push(Row::new(load, &bytes, "MB", ours, 1).beside("stock migrate", Some(mb(copies.stock.bytes))));
        rows.push(Row::new(load, &bytes, "MB", ours, 1).beside("migrate-multifd zstd", Some(mb(copies.multifd.bytes))));
        let each = |c: &Cost| c.cpu_s / copies.gb.max(f64::MIN_POSITIVE);
        let row = Row::new(load, &format!("{what}_cpu_s_per_gb"), "s/GB", each(&copies.ours), 1);
        if what == "seed" {
            rows.push(row.clone().beside("stock migrate", Some(each(&copies.stock))));
        }
        rows.push(row.beside("migrate-multifd zstd", Some(each(&copies.multifd))));
    }
    rows
}
