//! What measuring costs: the agent's kernel programs an event, a task switch with and without them, and the agent itself
//! beside process-exporter, both asked once a second about the same QEMUs.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::Options;
use super::rows::{Row, median};
use crate::lab::Lab;
use crate::lab::client::Client;
use crate::lab::daemons::{AGENT, Binaries};
use crate::lab::host::Host;
use crate::lab::process::{Process, wait_for};
use crate::lab::sched;
use crate::lab::vm::{self, GuestImage, Vm, VmSpec};

const NEEDED: [&str; 1] = ["umbra-agent"];
const EXPORTER: u16 = 9256;
const UP: Duration = Duration::from_secs(20);
/// SeaBIOS has given up looking for something to boot.
const BOOT: Duration = Duration::from_secs(15);

pub fn run(options: &Options) -> Result<Vec<Row>> {
    let binaries = Binaries::find(&NEEDED)?;
    let mut rows = programs(&binaries, options.quick)?;
    rows.push(switch(&binaries, options.quick)?);
    let crowds: &[usize] = if options.quick { &[10] } else { &[10, 50] };
    for n in crowds {
        rows.extend(crowd(&binaries, *n, options.quick)?);
    }
    Ok(rows)
}

fn start_agent(binaries: &Binaries, host: &Host, stats: bool) -> Result<Process> {
    let file = host.file("umbra-agent.toml");
    let config = format!(
        "host = \"{}\"\nlisten = \"{}:{AGENT}\"\nscope = \"netns\"\ninterval_ms = 1000\n",
        host.name, host.ip
    );
    std::fs::write(&file, config).with_context(|| format!("writing {}", file.display()))?;
    let mut cmd = Command::new(binaries.path("umbra-agent"));
    cmd.arg("--config").arg(&file);
    if stats {
        cmd.arg("--stats");
    }
    let mut agent = host.spawn("umbra-agent", cmd)?;
    wait_for("the agent's first round", UP, || {
        agent.check()?;
        Ok(host
            .get((host.ip, AGENT), "/readyz")
            .ok()
            .filter(|r| r.status == 200)
            .map(|_| ()))
    })?;
    Ok(agent)
}

/// Nanoseconds a run of each program, while a guest serves web requests and writes memory.
fn programs(binaries: &Binaries, quick: bool) -> Result<Vec<Row>> {
    let lab = Lab::new(&["a"])?;
    let host = lab.host("a")?;
    let spec = VmSpec {
        dirty: 2000,
        ..VmSpec::new("web", 10)
    };
    let mut vm = Vm::start(host, &GuestImage::find()?, &spec)?;
    vm.wait_up(&lab.client)?;
    let _client = Client::start(&lab.client.ns, spec.ip, 100, true)?;
    let _agent = start_agent(binaries, host, true)?;
    let runs = if quick { 3 } else { 10 };
    let mut each: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut before = costs(host)?;
    for _ in 0..runs {
        sleep(Duration::from_secs(2));
        let now = costs(host)?;
        for (program, (count, seconds)) in &now {
            let (c, s) = before.get(program).copied().unwrap_or_default();
            if *count > c {
                each.entry(program.clone())
                    .or_default()
                    .push((seconds - s) * 1e9 / (count - c));
            }
        }
        before = now;
    }
    if each.is_empty() {
        bail!("the agent's /metrics tells no costs of its programs");
    }
    let row = |(program, ns): (String, Vec<f64>)| {
        let value = median(&ns)?;
        Some(Row::new(&program, "ns_per_event", "ns", value, ns.len()))
    };
    Ok(each.into_iter().filter_map(row).collect())
}

/// Runs, and seconds in them, of each program so far.
fn costs(host: &Host) -> Result<BTreeMap<String, (f64, f64)>> {
    Ok(parse_costs(&host.get((host.ip, AGENT), "/metrics")?.ok()?.text()))
}

fn parse_costs(metrics: &str) -> BTreeMap<String, (f64, f64)> {
    let mut found: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for line in metrics.lines() {
        let Some((name, rest)) = line.split_once("{program=\"") else {
            continue;
        };
        let Some((program, value)) = rest.split_once("\"} ") else {
            continue;
        };
        let Ok(value) = value.trim().parse::<f64>() else {
            continue;
        };
        match name {
            "umbra_agent_program_runs_total" => found.entry(program.to_owned()).or_default().0 = value,
            "umbra_agent_program_run_seconds_total" => found.entry(program.to_owned()).or_default().1 = value,
            _ => {}
        }
    }
    found
}

/// Two threads on one core that wake each other by pipes, with the agent and without, in turns.
fn switch(binaries: &Binaries, quick: bool) -> Result<Row> {
    let lab = Lab::new(&["a"])?;
    let host = lab.host("a")?;
    let core = host.cpus.first().copied().context("the host has no core")?;
    let (runs, time) = if quick { (5, 1) } else { (15, 2) };
    let time = Duration::from_secs(time);
    let mut losses = Vec::new();
    for n in 0..runs {
        // The machine's mood changes slowly: neighbours in time are compared, in either order.
        let (with, without);
        if n % 2 == 0 {
            without = round_trips(core, time)?;
            let _agent = start_agent(binaries, host, false)?;
            with = round_trips(core, time)?;
        } else {
            let agent = start_agent(binaries, host, false)?;
            with = round_trips(core, time)?;
            drop(agent);
            without = round_trips(core, time)?;
        }
        losses.push(100.0 * (1.0 - with / without));
    }
    println!("switch: losses of all runs in percent: {losses:.1?}");
    let loss = median(&losses).context("no runs")?;
    Ok(Row::new("switch", "loss_pct", "%", loss, losses.len()))
}

/// Round trips a second between two threads on a core.
fn round_trips(core: usize, time: Duration) -> Result<f64> {
    let (there, here) = (nix::unistd::pipe()?, nix::unistd::pipe()?);
    let echo = spawn(move || -> Result<()> {
        pin(core)?;
        let (mut from, mut to) = (std::fs::File::from(there.0), std::fs::File::from(here.1));
        let mut byte = [0];
        while from.read(&mut byte)? == 1 {
            to.write_all(&byte)?;
        }
        Ok(())
    });
    let ask = spawn(move || -> Result<f64> {
        pin(core)?;
        let (to, from): (OwnedFd, OwnedFd) = (there.1, here.0);
        let (mut to, mut from) = (std::fs::File::from(to), std::fs::File::from(from));
        let (start, mut n) = (Instant::now(), 0u64);
        while start.elapsed() < time {
            for _ in 0..100 {
                to.write_all(&[1])?;
                from.read_exact(&mut [0])?;
            }
            n += 100;
        }
        Ok(n as f64 / start.elapsed().as_secs_f64())
    });
    let rate = ask.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
    echo.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    rate
}

fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// CPU time and memory of the agent, and of process-exporter, about `n` QEMUs that do nothing.
fn crowd(binaries: &Binaries, n: usize, quick: bool) -> Result<Vec<Row>> {
    let lab = Lab::new(&["a"])?;
    let host = lab.host("a")?;
    let qemus = (0..n).map(|i| idle_qemu(host, i)).collect::<Result<Vec<_>>>()?;
    sleep(BOOT);
    let agent = start_agent(binaries, host, false)?;
    let exporter = start_exporter(host)?;
    if exporter.is_none() {
        println!("{n} VMs: process-exporter is not installed here (Debian's prometheus-process-exporter): no peer");
    }
    let (runs, window) = if quick { (3, 3) } else { (7, 5) };
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        ours.push(watched(host, &agent, AGENT, window)?);
        if let Some(exporter) = &exporter {
            peers.push(watched(host, exporter, EXPORTER, window)?);
        }
    }
    drop(qemus);
    let case = format!("{n}vms");
    let of = |all: &[(f64, f64)], f: fn(&(f64, f64)) -> f64| median(&all.iter().map(f).collect::<Vec<_>>());
    let row = |metric, unit, f: fn(&(f64, f64)) -> f64| {
        let row = Row::new(&case, metric, unit, of(&ours, f).unwrap_or_default(), runs);
        match exporter {
            Some(_) => row.beside("process-exporter", of(&peers, f)),
            None => row,
        }
    };
    Ok(vec![row("cpu_pct", "%", |v| v.0), row("rss_mb", "MB", |v| v.1)])
}

/// CPU percent and resident MB of a process that is asked for its metrics each second.
fn watched(host: &Host, process: &Process, port: u16, seconds: u32) -> Result<(f64, f64)> {
    let mut reader = sched::Reader::default();
    let (before, start) = (reader.read(process.pid())?, Instant::now());
    for _ in 0..seconds {
        host.get((host.ip, port), "/metrics")?.ok()?;
        sleep(Duration::from_secs(1));
    }
    let after = reader.read(process.pid())?;
    let cpu = 100.0 * (after.run_ns - before.run_ns) as f64 / start.elapsed().as_nanos() as f64;
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid()))?;
    let kb = status.lines().find_map(|l| {
        l.strip_prefix("VmRSS:")?
            .split_ascii_whitespace()
            .next()?
            .parse::<f64>()
            .ok()
    });
    Ok((cpu, kb.context("no VmRSS")? * 1024.0 / 1e6))
}

/// SeaBIOS, with nothing to boot.
fn idle_qemu(host: &Host, n: usize) -> Result<Process> {
    let uuid = uuid::Uuid::from_u128(0x756d_6272_6162_4000_8000_0000_0000_0000 | n as u128);
    let mut cmd = Command::new(vm::qemu()?);
    cmd.args(["-uuid", &uuid.to_string(), "-name", &format!("idle-{n}")])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-M", "q35", "-accel", "tcg", "-m", "16"]);
    host.spawn(&format!("idle-{n}"), cmd)
}

fn start_exporter(host: &Host) -> Result<Option<Process>> {
    let program = std::path::Path::new("/usr/bin/prometheus-process-exporter");
    if !program.exists() {
        return Ok(None);
    }
    // A group a QEMU, as the agent tells them apart.
    let file = host.file("exporter.yml");
    std::fs::write(
        &file,
        "process_names:\n  - name: \"{{.Comm}}-{{.PID}}\"\n    cmdline:\n    - 'qemu-system'\n",
    )?;
    let mut cmd = Command::new(program);
    cmd.arg(format!("-config.path={}", file.display()))
        .arg(format!("-web.listen-address={}:{EXPORTER}", host.ip));
    let mut process = host.spawn("exporter", cmd)?;
    wait_for("process-exporter", UP, || {
        process.check()?;
        Ok(host
            .get((host.ip, EXPORTER), "/metrics")
            .ok()
            .filter(|r| r.status == 200)
            .map(|_| ()))
    })?;
    Ok(Some(process))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_found_among_the_metrics() {
        let text = "# HELP umbra_agent_program_runs x\numbra_agent_program_runs_total{program=\"sched_switch\"} 200\n\
                    umbra_agent_program_run_seconds_total{program=\"sched_switch\"} 0.00005\n\
                    umbra_agent_program{program=\"sched_switch\"} 1\n";
        assert_eq!(
            parse_costs(text),
            BTreeMap::from([("sched_switch".to_owned(), (200.0, 0.00005))])
        );
        assert!(parse_costs("x{program=\"\nnonsense").is_empty());
    }
}
