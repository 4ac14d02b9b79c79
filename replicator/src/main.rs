//! umbra-replicator: keeps warm shadows of VMs, as their source or as their target.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::signal::unix::{Signal, SignalKind, signal};
use umbra_daemon::{config, http, logs, stop};
use umbra_replicator::config::Config;
use umbra_replicator::engine::Engine;
use umbra_replicator::link::Security;
use umbra_replicator::{http as routes, target};

/// Keeps warm shadows of KVM/QEMU virtual machines on other hosts, and switches over to them.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[arg(long, value_name = "FILE", default_value = "/etc/umbra/umbra-replicator.toml")]
    config: PathBuf,
    /// Only check the configuration.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("umbra-replicator: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let config: Config = config::load(&args.config)?;
    if args.check {
        println!("{}: ok", args.config.display());
        return Ok(());
    }
    logs::init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(serve(config, args.config.clone()))
}

async fn serve(config: Config, file: PathBuf) -> Result<()> {
    let stop = stop::on_signals()?;
    let hangup = signal(SignalKind::hangup())?;
    let (listen, link_listen) = (config.listen, config.link_listen);
    // Bound before anything is taken up: a second daemon on the same host must not touch the first one's replicas.
    let listener = tokio::net::TcpListener::bind(listen)
        .await
        .with_context(|| format!("listen = {listen}"))?;
    let link = link_listen
        .map(|a| TcpListener::bind(a).with_context(|| format!("link_listen = {a}")))
        .transpose()?;
    let security = config
        .security()
        .map_err(|e| anyhow::anyhow!("{}: {}", e.key, e.reason))?;
    if matches!(security, Security::Plaintext) {
        tracing::warn!("the link is in clear and believes every peer: link.plaintext = true");
    }
    if let Some(file) = &config.test_faults {
        tracing::warn!(
            "this daemon dies when {} says so: test_faults is for tests alone",
            file.display()
        );
    }
    let engine = tokio::task::spawn_blocking(|| Engine::start(config, security)).await??;
    if let Some(link) = link {
        target::listener::listen(engine.clone(), link)?;
    }
    tokio::spawn(reload_on_hangup(engine.clone(), file, hangup));
    tracing::info!(%listen, ?link_listen, "ready");
    stop::notify_ready();
    let routes = engine.clone();
    http::serve(listener, http::Limits::default(), stop, move |r| {
        routes::answer(routes.clone(), r)
    })
    .await;
    tokio::task::spawn_blocking(move || engine.stop()).await?;
    Ok(())
}

/// SIGHUP: certificates and limits are read anew. A configuration with an error changes nothing.
async fn reload_on_hangup(engine: Arc<Engine>, file: PathBuf, mut hangup: Signal) {
    while hangup.recv().await.is_some() {
        let (engine, file) = (engine.clone(), file.clone());
        let read = tokio::task::spawn_blocking(move || -> Result<()> {
            let config: Config = config::load(&file)?;
            let taken = engine.reload(&config);
            taken.map_err(|e| anyhow::anyhow!("{}: {}: {}", file.display(), e.key, e.reason))
        });
        match read.await.map_err(anyhow::Error::from).and_then(|r| r) {
            Ok(()) => tracing::info!("certificates and limits were read anew"),
            Err(e) => tracing::error!("nothing is changed: {e:#}"),
        }
    }
}
