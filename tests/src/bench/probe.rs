//! Who asks the guest: a process of its own, so that neither the benchmark's threads nor a host's processes stretch what it
//! sees. It probes by UDP each millisecond and by HTTP a hundred times a second until it is told to end.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::lab::client::{Answer, Client};
use crate::lab::host::Host;
use crate::lab::net::Netns;
use crate::lab::process::Process;
use crate::lab::sys;
use crate::lab::udp::UdpProber;

const EVERY: Duration = Duration::from_millis(1);
const REQUESTS_PER_S: u32 = 100;
const END: Duration = Duration::from_secs(10);

/// What the prober saw.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// Longest row of lost UDP probes.
    pub lost_ms: f64,
    /// Longest time between two UDP answers.
    pub udp_gap_ms: f64,
    /// Longest time between two HTTP answers.
    pub reply_gap_ms: f64,
    pub requests: usize,
    pub failed: u64,
}

/// The prober's own main: ends at SIGTERM, and writes what it saw.
pub fn run(ip: Ipv4Addr, out: &Path) -> Result<()> {
    let (told, end) = channel();
    sys::on_first_signal(move |_| {
        let _ = told.send(());
    })?;
    let ns = Netns::own()?;
    let client = Client::start(&ns, ip, REQUESTS_PER_S, true)?;
    let prober = UdpProber::start(&ns, ip, EVERY)?;
    end.recv().context("nobody says when to end")?;
    let silence = prober.finish();
    let answers = client.answers();
    let seen = Seen {
        lost_ms: silence.longest_lost_ms,
        udp_gap_ms: silence.longest_gap_ms,
        reply_gap_ms: longest_gap_ms(&answers),
        requests: answers.len(),
        failed: client.errors().0,
    };
    std::fs::write(out, serde_json::to_vec(&seen)?).with_context(|| format!("writing {}", out.display()))
}

fn longest_gap_ms(answers: &[Answer]) -> f64 {
    let mut at: Vec<Instant> = answers.iter().map(|a| a.at).collect();
    at.sort_unstable();
    let gap = at.windows(2).map(|w| w[1] - w[0]).max();
    gap.unwrap_or_default().as_secs_f64() * 1e3
}

/// A prober that runs.
pub struct Probe {
    process: Process,
    out: PathBuf,
}

impl Probe {
    /// Starts one in `from`. It is urgent, so that what it misses is the guest's doing.
    pub fn start(from: &Host, ip: Ipv4Addr) -> Result<Self> {
        let out = from.file("probe.json");
        let _ = std::fs::remove_file(&out);
        let mut cmd = Command::new("nice");
        cmd.args(["-n", "-10"])
            .arg(std::env::current_exe().context("finding this program")?)
            .args(["probe", "--ip", &ip.to_string(), "--out"])
            .arg(&out);
        let process = from.spawn("probe", cmd)?;
        Ok(Self { process, out })
    }

    pub fn finish(mut self) -> Result<Seen> {
        self.process.check()?;
        let status = self.process.stop(END)?;
        if !status.success() {
            bail!("the prober failed: {}", self.process.log_tail());
        }
        let text = std::fs::read(&self.out).with_context(|| format!("reading {}", self.out.display()))?;
        serde_json::from_slice(&text).context("what the prober saw")
    }
}
