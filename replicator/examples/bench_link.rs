//! What TLS costs the link over loopback, beside the same link in clear: `cargo run --release --example bench_link -- [--quick]
//! [--json FILE]`.
//!
//! `gb_per_s` sends frames of 256 KiB one way, as a first copy does, with no packing before and no unpacking behind: a
//! seed is slower than that by far. `cpu_s_per_gb` is the CPU time of both sides together, the kernel's included.
//! `round_trip_us` is a control message and its echo, `handshake_us` all from connecting to the echo of the first message.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::Parser as _;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};
use umbra_api::wire::Purpose;
use umbra_api::wire::control::Message;
use umbra_api::wire::frame::Kind;
use umbra_replicator::link::tls::{Files, Tls};
use umbra_replicator::link::{Link, LinkError, Security, accept, connect};

const FRAME: usize = 256 << 10;
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(clap::Parser)]
#[command(about = "What TLS costs the link, beside the link in clear")]
struct Cli {
    /// Fewer runs
    #[arg(long)]
    quick: bool,
    /// Writes the rows to this file too
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let (runs, frames, echoes) = if cli.quick { (3, 1024, 2000) } else { (11, 4096, 10_000) };
    let dir = tempfile::tempdir()?;
    let tls = Security::Tls(Arc::new(certificates(dir.path())?));
    let mut figures = [Vec::new(), Vec::new()];
    // In turns, so that whatever else the machine does hits both. The first turn is for the caches.
    for run in 0..=runs {
        for (security, seen) in [&tls, &Security::Plaintext].into_iter().zip(&mut figures) {
            let figure = measure(security, frames, echoes)?;
            if run > 0 {
                seen.push(figure);
            }
        }
    }
    let [ours, peer] = figures;
    let mut rows = Vec::new();
    println!("{:<16} {:>10} {:>10}", "metric", "TLS", "in clear");
    let names = [
        ("gb_per_s", "GB/s"),
        ("cpu_s_per_gb", "s/GB"),
        ("round_trip_us", "us"),
        ("handshake_us", "us"),
    ];
    for (i, (metric, unit)) in names.into_iter().enumerate() {
        let (ours, peer) = (median(&ours, i), median(&peer, i));
        println!("{metric:<16} {ours:>10.2} {peer:>10.2}");
        rows.push(
            json!({"case": "loopback", "metric": metric, "unit": unit, "ours": ours, "peer": peer,
            "peer_name": "in clear", "runs": runs}),
        );
    }
    write(cli.json.as_deref(), &rows)
}

fn write(path: Option<&Path>, rows: &[Value]) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let all = json!({ "bench": "link", "rows": rows });
    std::fs::write(path, format!("{all:#}\n")).with_context(|| format!("cannot write {}", path.display()))
}

fn median(figures: &[[f64; 4]], i: usize) -> f64 {
    let mut all: Vec<f64> = figures.iter().map(|f| f[i]).collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}

fn cpu_s() -> Result<f64> {
    let u = getrusage(UsageWho::RUSAGE_SELF)?;
    Ok((u.user_time().num_microseconds() + u.system_time().num_microseconds()) as f64 / 1e6)
}

/// Gigabytes a second, CPU seconds a gigabyte, microseconds a round trip and a handshake.
fn measure(security: &Security, frames: u64, echoes: u64) -> Result<[f64; 4]> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?.to_string();
    let theirs = security.clone();
    let server = std::thread::spawn(move || -> Result<()> {
        let (_, link) = accept(listener.accept()?.0, &theirs, TIMEOUT)?;
        Ok(serve(link)?)
    });
    let begun = Instant::now();
    let mut link = connect(&addr, &"bench".parse()?, Purpose::Ram, security, TIMEOUT)?;
    echo(&mut link, 0)?;
    let handshake_us = begun.elapsed().as_secs_f64() * 1e6;

    let begun = Instant::now();
    for n in 1..=echoes {
        echo(&mut link, n)?;
    }
    let round_trip_us = begun.elapsed().as_secs_f64() * 1e6 / echoes as f64;

    let payload: Vec<u8> = (0..FRAME).map(|i| (i * 31 / 7) as u8).collect();
    let gb = (frames * FRAME as u64) as f64 / 1e9;
    let (begun, cpu) = (Instant::now(), cpu_s()?);
    for _ in 0..frames {
        link.writer.send(Kind::Pages, &payload)?;
    }
    echo(&mut link, 0)?;
    let (took, cpu) = (begun.elapsed().as_secs_f64(), cpu_s()? - cpu);
    drop(link);
    server.join().map_err(|_| anyhow!("the serving thread panicked"))??;
    Ok([gb / took, cpu / gb, round_trip_us, handshake_us])
}

fn echo(link: &mut Link, n: u64) -> Result<(), LinkError> {
    link.writer.send_message(&Message::Ping { n })?;
    link.reader.next_message().map(|_| ())
}

/// Echoes messages and takes pages, until the peer ends.
fn serve(mut link: Link) -> Result<(), LinkError> {
    loop {
        let message = match link.reader.next() {
            Ok((Kind::Control, payload)) => payload.to_vec(),
            Ok(_) => continue,
            Err(LinkError::Closed { .. }) => return Ok(()),
            Err(e) => return Err(e),
        };
        link.writer.send(Kind::Control, &message)?;
    }
}

fn certificates(dir: &Path) -> Result<Tls> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let cert = CertificateParams::new(vec!["bench".to_owned()])?.signed_by(&key, &ca)?;
    let files = Files {
        cert: dir.join("bench.crt"),
        key: dir.join("bench.key"),
        ca: dir.join("ca.crt"),
    };
    std::fs::write(&files.cert, cert.pem())?;
    std::fs::write(&files.key, key.serialize_pem())?;
    std::fs::write(&files.ca, ca.pem())?;
    Ok(Tls::load(&files, &"bench".parse()?)?)
}
