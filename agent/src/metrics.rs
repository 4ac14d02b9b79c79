//! `/metrics`: the last round's snapshot, written when it is asked for. VMs come and go, so there are no registered families that would
//! have to forget them: [`Exposition`] is a collector.
//!
//! Counters of a VM begin at 0 when the agent finds its process.

use std::fmt::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, LabelSetEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use umbra_api::sample::LATENCY_BUCKETS;

use crate::collect::{Snapshot, VmView};
use crate::kernel::{ProgramCost, ProgramState};
use crate::push::Outbox;

/// What is shown beside the collector's snapshot.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    pub snapshot: Snapshot,
    pub programs: Vec<ProgramState>,
    /// Empty unless the kernel counts the cost of programs.
    pub costs: Vec<ProgramCost>,
    pub round_seconds: f64,
    pub failed_rounds: u64,
}

/// The place where the collector puts its last snapshot.
#[derive(Default)]
pub struct Board(Mutex<Arc<Shown>>);

impl Board {
    pub fn show(&self, shown: Shown) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(shown);
    }

    pub fn last(&self) -> Arc<Shown> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

pub fn registry(board: Arc<Board>, outbox: Arc<Outbox>) -> Registry {
    let mut registry = Registry::with_prefix("umbra");
    registry.register_collector(Box::new(Exposition { board, outbox }));
    registry
}

struct Exposition {
    board: Arc<Board>,
    outbox: Arc<Outbox>,
}

impl std::fmt::Debug for Exposition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Exposition")
    }
}

impl Collector for Exposition {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), Error> {
        let shown = self.board.last();
        let mut out = Out(encoder);
        vm_cpu(&mut out, &shown.snapshot.vms)?;
        vm_io(&mut out, &shown.snapshot.vms)?;
        vm_state(&mut out, &shown.snapshot.vms)?;
        host(&mut out, &shown.snapshot)?;
        self.agent(&mut out, &shown)
    }
}

/// Labels of one line. Values are escaped by the encoder: a VM's name may hold anything.
struct Labels<'a>(Vec<(&'static str, &'a str)>);

impl EncodeLabelSet for Labels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder) -> Result<(), Error> {
        for pair in &self.0 {
            prometheus_client::encoding::EncodeLabel::encode(pair, encoder.encode_label())?;
        }
        Ok(())
    }
}

struct Out<'a>(DescriptorEncoder<'a>);

type Line<'a, V> = (Labels<'a>, V);

impl Out<'_> {
    fn counters<'l>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        lines: impl Iterator<Item = Line<'l, f64>>,
    ) -> Result<(), Error> {
        let mut family = self
            .0
            .encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        for (labels, value) in lines {
            family
                .encode_family(&labels)?
                .encode_counter::<NoLabelSet, _, f64>(&value, None)?;
        }
        Ok(())
    }

    fn gauges<'l>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        lines: impl Iterator<Item = Line<'l, f64>>,
    ) -> Result<(), Error> {
        let mut family = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        for (labels, value) in lines {
            family.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn gauge(&mut self, name: &str, help: &str, unit: Option<Unit>, value: f64) -> Result<(), Error> {
        self.0
            .encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?
            .encode_gauge(&value)
    }

    fn counter(&mut self, name: &str, help: &str, unit: Option<Unit>, value: f64) -> Result<(), Error> {
        let mut family = self
            .0
            .encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        family.encode_counter::<NoLabelSet, _, f64>(&value, None)
    }
}

/// A VM by three labels: a primary and its shadow may be on one host under one uuid.
struct Ids(Vec<(String, &'static str)>);

impl Ids {
    fn of(vms: &[VmView]) -> Self {
        let role = |incoming| if incoming { "true" } else { "false" };
        Self(
            vms.iter()
                .map(|v| (v.last.vm.to_string(), role(v.last.incoming)))
                .collect(),
        )
    }

    /// One line a VM and kind.
    fn lines<'a, const N: usize>(
        &'a self,
        vms: &'a [VmView],
        key: &'static str,
        kinds: [&'static str; N],
        values: impl Fn(&VmView) -> [f64; N] + 'a,
    ) -> impl Iterator<Item = Line<'a, f64>> {
        self.0.iter().zip(vms).flat_map(move |((id, incoming), v)| {
            let line = move |(kind, value)| {
                let mut labels = vec![
                    ("vm", id.as_str()),
                    ("name", v.last.name.as_str()),
                    ("incoming", *incoming),
                ];
                if !key.is_empty() {
                    labels.push((key, kind));
                }
                (Labels(labels), value)
            };
            kinds.into_iter().zip(values(v)).map(line).collect::<Vec<_>>()
        })
    }
}

fn seconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64()
}

fn vm_cpu(out: &mut Out, vms: &[VmView]) -> Result<(), Error> {
    let ids = Ids::of(vms);
    let kinds = ["vcpu", "emulator"];
    let run = |v: &VmView| [v.used.cpu.vcpu_run_ns, v.used.cpu.emulator_run_ns].map(seconds);
    let wait = |v: &VmView| [v.used.cpu.vcpu_wait_ns, v.used.cpu.emulator_wait_ns].map(seconds);
    let help = "CPU time of the VM's threads";
    out.counters(
        "vm_cpu_run",
        help,
        Some(Unit::Seconds),
        ids.lines(vms, "threads", kinds, run),
    )?;
    let help = "Time that the VM's threads were runnable and waited for a CPU";
    out.counters(
        "vm_cpu_wait",
        help,
        Some(Unit::Seconds),
        ids.lines(vms, "threads", kinds, wait),
    )
}

fn vm_io(out: &mut Out, vms: &[VmView]) -> Result<(), Error> {
    let ids = Ids::of(vms);
    let kinds = ["read", "write"];
    let bytes = |v: &VmView| [v.used.block.sample.read_bytes, v.used.block.sample.write_bytes].map(|b| b as f64);
    out.counters(
        "vm_block",
        "Bytes of the VM's disk requests",
        Some(Unit::Bytes),
        ids.lines(vms, "operation", kinds, bytes),
    )?;
    let ops = |v: &VmView| [v.used.block.sample.read_ops, v.used.block.sample.write_ops].map(|b| b as f64);
    out.counters(
        "vm_block_operations",
        "The VM's disk requests",
        None,
        ids.lines(vms, "operation", kinds, ops),
    )?;
    let kinds = ["received", "sent"];
    let bytes = |v: &VmView| [v.used.net.rx_bytes, v.used.net.tx_bytes].map(|b| b as f64);
    out.counters(
        "vm_network",
        "Bytes through the VM's taps, as the guest sees it",
        Some(Unit::Bytes),
        ids.lines(vms, "direction", kinds, bytes),
    )?;
    let packets = |v: &VmView| [v.used.net.rx_packets, v.used.net.tx_packets].map(|b| b as f64);
    out.counters(
        "vm_network_packets",
        "Packets through the VM's taps",
        None,
        ids.lines(vms, "direction", kinds, packets),
    )?;
    vm_latency(out, vms, &ids)
}

fn vm_latency(out: &mut Out, vms: &[VmView], ids: &Ids) -> Result<(), Error> {
    let help = "Time of the VM's disk requests from issue to completion";
    let mut family = out
        .0
        .encode_descriptor("vm_block_latency", help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for (labels, i) in ids.lines(vms, "", [""], |_| [0.0]).map(|(l, _)| l).zip(0usize..) {
        let Some(block) = vms.get(i).map(|v| &v.used.block) else {
            continue;
        };
        let counts = (0..LATENCY_BUCKETS).map(|b| block.sample.latency_us_log2.get(b).copied().unwrap_or(0));
        // Bucket b ends at 2^(b+1) µs; the last one has no end.
        let bound = |b: usize| {
            if b + 1 == LATENCY_BUCKETS {
                f64::INFINITY
            } else {
                (1u64 << (b + 1)) as f64 / 1e6
            }
        };
        let buckets: Vec<(f64, u64)> = counts.enumerate().map(|(b, n)| (bound(b), n)).collect();
        let count = buckets.iter().map(|(_, n)| n).sum();
        let sum = seconds(block.latency_ns_sum);
        family
            .encode_family(&labels)?
            .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
    }
    Ok(())
}

fn vm_state(out: &mut Out, vms: &[VmView]) -> Result<(), Error> {
    let ids = Ids::of(vms);
    let kinds = ["resident", "guest"];
    let memory = |v: &VmView| [v.last.mem.rss_bytes, v.last.mem.guest_bytes].map(|b| b as f64);
    let help = "Memory of the QEMU process, and what the guest was given";
    out.gauges(
        "vm_memory",
        help,
        Some(Unit::Bytes),
        ids.lines(vms, "kind", kinds, memory),
    )?;
    let vcpus = |v: &VmView| [f64::from(v.last.vcpus)];
    out.gauges(
        "vm_vcpus",
        "vCPUs at the start of the VM",
        None,
        ids.lines(vms, "", [""], vcpus),
    )?;
    let mut family = out
        .0
        .encode_descriptor("vm", "The VM's process", None, MetricType::Info)?;
    for v in vms {
        let (id, pid) = (v.last.vm.to_string(), v.last.pid.to_string());
        let qmp = v.qmp.first().map_or("", String::as_str);
        let incoming = if v.last.incoming { "true" } else { "false" };
        let labels = [
            ("vm", id.as_str()),
            ("name", &v.last.name),
            ("incoming", incoming),
            ("pid", &pid),
            ("qmp", qmp),
        ];
        family.encode_info(&Labels(labels.to_vec()))?;
    }
    Ok(())
}

fn host(out: &mut Out, s: &Snapshot) -> Result<(), Error> {
    out.gauge("host_cpus", "CPUs that VMs may use", None, s.node.cpus)?;
    let help = "Time that these CPUs were busy since the agent started";
    out.counter("host_cpu_busy", help, Some(Unit::Seconds), seconds(s.node_busy_ns))?;
    let memory = [
        ("total", s.node.mem_total_bytes),
        ("available", s.node.mem_available_bytes),
        ("swap_total", s.node.swap_total_bytes),
        ("swap_free", s.node.swap_free_bytes),
    ];
    let lines = memory
        .into_iter()
        .map(|(kind, bytes)| (Labels(vec![("kind", kind)]), bytes as f64));
    out.gauges("host_memory", "Memory of the host", Some(Unit::Bytes), lines)
}

impl Exposition {
    fn agent(&self, out: &mut Out, shown: &Shown) -> Result<(), Error> {
        let s = &shown.snapshot;
        let attached = shown.programs.iter().map(|p| {
            (
                Labels(vec![("program", p.name)]),
                f64::from(u8::from(p.missing.is_none())),
            )
        });
        out.gauges(
            "agent_program",
            "1 if the kernel program is attached, 0 if it was left out",
            None,
            attached,
        )?;
        let lost = [("threads", s.lost.threads), ("requests", s.lost.requests)];
        let lines = lost.into_iter().map(|(map, n)| (Labels(vec![("map", map)]), n as f64));
        out.counters("agent_lost_events", "Events that found a map full", None, lines)?;
        out.gauge("agent_vms", "VMs that are followed", None, s.vms.len() as f64)?;
        out.gauge(
            "agent_left_out_vms",
            "QEMUs that can't be followed",
            None,
            s.left_out as f64,
        )?;
        out.counter("agent_rounds", "Rounds of collecting", None, s.rounds as f64)?;
        out.counter(
            "agent_failed_rounds",
            "Rounds that ended with an error",
            None,
            shown.failed_rounds as f64,
        )?;
        out.gauge(
            "agent_round",
            "Time that the last round took",
            Some(Unit::Seconds),
            shown.round_seconds,
        )?;
        let c = self.outbox.counts();
        let batches = [("sent", c.sent), ("refused", c.refused), ("dropped", c.dropped)];
        let lines = batches
            .into_iter()
            .map(|(result, n)| (Labels(vec![("result", result)]), n as f64));
        out.counters("agent_batches", "Batches for the RPS", None, lines)?;
        out.gauge(
            "agent_batches_waiting",
            "Batches that wait for the RPS",
            None,
            c.waiting as f64,
        )?;
        if shown.costs.is_empty() {
            return Ok(());
        }
        let runs = shown
            .costs
            .iter()
            .map(|c| (Labels(vec![("program", c.name)]), c.runs as f64));
        out.counters(
            "agent_program_runs",
            "Runs of the kernel program while the kernel counts them",
            None,
            runs,
        )?;
        let time = shown
            .costs
            .iter()
            .map(|c| (Labels(vec![("program", c.name)]), seconds(c.run_ns)));
        out.counters(
            "agent_program_run",
            "Time of the kernel program's runs",
            Some(Unit::Seconds),
            time,
        )
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use umbra_api::VmId;
    use umbra_api::sample::{CpuSample, VmSample};
    use uuid::Uuid;

    use super::*;
    use crate::meter::Used;

    #[test]
    fn the_text_has_every_vm_and_survives_hostile_names() {
        let mut used = Used {
            cpu: CpuSample {
                vcpu_run_ns: 1_500_000_000,
                ..CpuSample::default()
            },
            ..Used::default()
        };
        used.block.sample.latency_us_log2 = vec![0, 3];
        let last = VmSample {
            vm: VmId(Uuid::from_u128(1)),
            name: "we\"b\n".into(),
            pid: 9,
            incoming: true,
            vcpus: 2,
            cpu: CpuSample::default(),
            mem: Default::default(),
            block: Default::default(),
            net: Default::default(),
        };
        let board = Arc::new(Board::default());
        board.show(Shown {
            snapshot: Snapshot {
                vms: vec![VmView {
                    last,
                    used,
                    qmp: vec!["/q".into()],
                }],
                ..Snapshot::default()
            },
            programs: vec![ProgramState {
                name: "sched_switch",
                missing: Some("no".into()),
            }],
            ..Shown::default()
        });
        let mut text = String::new();
        encode(&mut text, &registry(board, Arc::new(Outbox::new(1)))).unwrap();
        let labels = format!("vm=\"{}\",name=\"we\\\"b\\n\",incoming=\"true\"", Uuid::from_u128(1));
        for line in [
            format!("umbra_vm_cpu_run_seconds_total{{{labels},threads=\"vcpu\"}} 1.5"),
            format!("umbra_vm_block_latency_seconds_count{{{labels}}} 3"),
            format!("umbra_vm_info{{{labels},pid=\"9\",qmp=\"/q\"}} 1"),
            "umbra_agent_program{program=\"sched_switch\"} 0".to_owned(),
            format!("umbra_vm_block_latency_seconds_bucket{{le=\"+Inf\",{labels}}} 3"),
            "# UNIT umbra_vm_network_bytes bytes".to_owned(),
        ] {
            assert!(text.contains(&line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
