//! Assembles the agent: configuration, kernel programs, the round, `/metrics`, the sender.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, bail};
use clap::Parser;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::time::MissedTickBehavior;
use tracing::{error, info, warn};
use umbra_agent::collect::Collector;
use umbra_agent::config::{Config, Scope};
use umbra_agent::cpulist::CpuList;
use umbra_agent::kernel::{Messages, Probe};
use umbra_agent::metrics::{self, Board, Shown};
use umbra_agent::node;
use umbra_agent::procfs::Procfs;
use umbra_agent::push::{self, Outbox};
use umbra_agent::track::Tracker;
use umbra_api::UnixMs;
use umbra_api::problem::Problem;
use umbra_daemon::client::Client;
use umbra_daemon::http::{self, Limits, Method, Reply, Request, status};
use umbra_daemon::stop::{self, Stop};

/// Counts what each VM of this host uses and waits for, with eBPF, and tells the RPS
#[derive(Parser)]
#[command(name = "umbra-agent", version, max_term_width = 100)]
struct Cli {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Check the configuration and end
    #[arg(long)]
    check: bool,
    /// Measure one interval, print it and end; nothing is sent
    #[arg(long)]
    once: bool,
    /// With --once: print the batch as JSON
    #[arg(long, requires = "once")]
    json: bool,
    /// Let the kernel count what each program costs; shown in /metrics, and by --once on stderr
    #[arg(long)]
    stats: bool,
}

fn main() -> ExitCode {
    umbra_daemon::logs::init();
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let config: Config = umbra_daemon::config::load(&cli.config)?;
    if cli.check {
        println!("{}: ok", cli.config.display());
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(serve(cli, config))
}

async fn serve(cli: &Cli, config: Config) -> Result<()> {
    let stop = stop::on_signals()?;
    let proc = Procfs::default();
    if !proc.in_first_pid_ns() {
        bail!(
            "the agent runs in a PID namespace of its own, where /proc has other PIDs than the kernel programs see: run it in the host's"
        );
    }
    let cpus = usable_cpus(&config)?;
    // Statistics last as long as this descriptor.
    let stats = match cli.stats {
        true => Some(aya::sys::enable_stats(aya::sys::Stats::RunTime).context("statistics of kernel programs")?),
        false => None,
    };
    let (probe, messages) = Probe::load(config.max_vms, proc.clone())?;
    let netns = match config.scope {
        Scope::All => None,
        Scope::Netns => Some(
            proc.own_netns()
                .context("this process's network namespace can't be read")?,
        ),
    };
    let tracker = Tracker::new(netns, config.max_vms as usize);
    let collector = Collector::new(config.host.clone(), cpus, now(), probe, tracker, config.max_vms);
    let mut rounds = Rounds {
        collector,
        proc,
        messages,
        stats: stats.is_some(),
        last: Instant::now(),
        failed: 0,
    };
    match cli.once {
        true => once(cli, &config, &mut rounds).await,
        false => daemon(config, rounds, stop).await,
    }
}

/// The CPUs that count as this host's: those of the configuration that are online, or all that are.
fn usable_cpus(config: &Config) -> Result<CpuList> {
    let online = node::online_cpus().context("/sys/devices/system/cpu/online")?;
    let Some(cpus) = &config.cpus else { return Ok(online) };
    let missing = cpus.missing_in(&online);
    if missing.len() == cpus.len() {
        bail!("cpus = \"{cpus}\": none of them is online here ({online} are)");
    }
    if !missing.is_empty() {
        warn!("cpus = \"{cpus}\": {missing:?} are not online here and count as capacity all the same");
    }
    Ok(cpus.clone())
}

fn now() -> UnixMs {
    UnixMs::from_system(SystemTime::now())
}

struct Rounds {
    collector: Collector<Probe>,
    proc: Procfs,
    messages: Option<Messages>,
    stats: bool,
    last: Instant,
    failed: u64,
}

impl Rounds {
    fn next(&mut self) -> Result<Option<umbra_api::sample::SampleBatch>> {
        // The interval is measured by the steady clock: a step of the wall clock moves `t`, not the rates.
        let start = Instant::now();
        let elapsed = start - self.last;
        self.last = start;
        let result = self.collector.round(&self.proc, now(), elapsed);
        self.failed += u64::from(result.is_err());
        // They wait in a ring buffer that holds far more than a round's: a wake-up for each would cost more than it tells.
        if let Some(messages) = &mut self.messages {
            messages.flush();
        }
        Ok(result?)
    }

    fn shown(&self) -> Shown {
        let probe = self.collector.kernel();
        Shown {
            snapshot: self.collector.snapshot(),
            programs: probe.programs().to_vec(),
            costs: if self.stats { probe.costs() } else { Vec::new() },
            round_seconds: self.last.elapsed().as_secs_f64(),
            failed_rounds: self.failed,
        }
    }
}

async fn once(cli: &Cli, config: &Config, rounds: &mut Rounds) -> Result<()> {
    rounds.next()?;
    tokio::time::sleep(config.interval()).await;
    let batch = rounds.next()?.context("the interval was too short to measure")?;
    match cli.json {
        true => println!("{}", serde_json::to_string_pretty(&batch)?),
        false => print!("{}", table(&batch)),
    }
    for c in rounds.shown().costs.iter().filter(|c| c.runs > 0) {
        eprintln!(
            "{:20} {:>9} runs {:>6.0} ns a run",
            c.name,
            c.runs,
            c.run_ns as f64 / c.runs as f64
        );
    }
    Ok(())
}

fn table(batch: &umbra_api::sample::SampleBatch) -> String {
    let cores = |ns: u64| ns as f64 / (batch.interval_ms as f64 * 1e6);
    let mut text = format!(
        "{}: {} CPUs, {:.2} busy, {} MB of {} available\n{:36} {:16} {:>8} {:>6} {:>6} {:>8} {:>10} {:>10}\n",
        batch.host,
        batch.node.cpus,
        cores(batch.node.cpu_busy_ns),
        batch.node.mem_available_bytes >> 20,
        batch.node.mem_total_bytes >> 20,
        "VM",
        "NAME",
        "PID",
        "RUN",
        "WAIT",
        "RSS MB",
        "DISK B",
        "NET B"
    );
    for v in &batch.vms {
        text += &format!(
            "{:36} {:16} {:>8} {:>6.2} {:>6.2} {:>8} {:>10} {:>10}\n",
            v.vm.to_string(),
            v.name,
            v.pid,
            cores(v.cpu.run_ns()),
            cores(v.cpu.wait_ns()),
            v.mem.rss_bytes >> 20,
            v.block.read_bytes + v.block.write_bytes,
            v.net.rx_bytes + v.net.tx_bytes
        );
    }
    text
}

async fn daemon(config: Config, mut rounds: Rounds, mut stop: Stop) -> Result<()> {
    let board = Arc::new(Board::default());
    let outbox = Arc::new(Outbox::new(config.rps.as_ref().map_or(1, |r| r.buffer_batches)));
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listen = \"{}\"", config.listen))?;
    let registry = Arc::new(metrics::registry(board.clone(), outbox.clone()));
    let answers = (board.clone(), registry);
    let server = tokio::spawn(http::serve(
        listener,
        Limits::default(),
        stop.clone(),
        move |r: Request| {
            let (board, registry) = answers.clone();
            async move { answer(&r, &board, &registry) }
        },
    ));
    let sender = match &config.rps {
        Some(rps) => {
            let client = Client::new(&rps.url, rps.timeout())?;
            Some(tokio::spawn(push::run(outbox.clone(), client, stop.clone())))
        }
        None => None,
    };
    info!(host = %config.host, listen = %config.listen, "agent runs");
    stop::notify_ready();
    let mut ticks = tokio::time::interval(config.interval());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! { _ = ticks.tick() => {}, () = stop.asked() => break }
        let result = tokio::task::block_in_place(|| rounds.next());
        board.show(rounds.shown());
        match result {
            Ok(Some(batch)) if sender.is_some() => outbox.add(batch),
            Ok(_) => {}
            Err(e) => warn!("this round failed: {e:#}"),
        }
    }
    if let Some(sender) = sender {
        sender.await.context("sender")?;
    }
    server.await.context("HTTP server")
}

fn answer(r: &Request, board: &Board, registry: &Registry) -> Reply {
    if r.method != Method::GET {
        return http::problem(&Problem::new(
            405,
            "method",
            "Only GET is answered here",
            r.method.to_string(),
        ));
    }
    match r.path.as_str() {
        "/metrics" => umbra_daemon::metrics::reply(registry),
        "/healthz" => http::reply(status::OK, "text/plain", "ok\n"),
        "/readyz" => match board.last().snapshot.rounds > 0 {
            true => http::reply(status::OK, "text/plain", "ready\n"),
            false => http::problem(&Problem::new(503, "not_ready", "Not ready", "no round has ended yet")),
        },
        path => http::problem(&Problem::not_found(path)),
    }
}
