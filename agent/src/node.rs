//! The host as a whole: its CPUs and memory. The parsers are pure; [`read`] is the door.

use std::io;

use umbra_api::sample::HostSample;

use crate::cpulist::CpuList;
use crate::meter::Meter;
use crate::procfs::Procfs;

/// /proc/stat counts in hundredths of a second on every architecture (USER_HZ).
const TICK_NS: u64 = 10_000_000;

/// Totals and states of one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NodeTotals {
    pub cpu_busy_ns: u64,
    pub memory: Memory,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Memory {
    pub total_bytes: u64,
    pub available_bytes: u64,
    pub swap_total_bytes: u64,
    pub swap_free_bytes: u64,
}

pub fn read(proc: &Procfs, cpus: &CpuList) -> io::Result<NodeTotals> {
    Ok(NodeTotals {
        cpu_busy_ns: busy_ns(&proc.read("stat")?, cpus),
        memory: parse_meminfo(&proc.read("meminfo")?),
    })
}

/// CPUs that are online now.
pub fn online_cpus() -> io::Result<CpuList> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/online")?;
    text.parse()
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("{e}")))
}

/// Time that the given CPUs were neither idle nor waiting for I/O, nor with niced work: that runs on what VMs leave over, and
/// takes nothing from them. Time stolen by a hypervisor below is busy: it is not to be had. Guests' time is part of user
/// time already.
fn busy_ns(stat: &str, cpus: &CpuList) -> u64 {
    let ticks = stat.lines().filter_map(|line| {
        let (cpu, fields) = line.strip_prefix("cpu")?.split_once(' ')?;
        // The first line, `cpu `, is the sum of all.
        if !cpus.contains(cpu.parse().ok()?) {
            return None;
        }
        let fields: Vec<u64> = fields
            .split_ascii_whitespace()
            .map(|f| f.parse().unwrap_or(0))
            .collect();
        // user nice system idle iowait irq softirq steal
        Some([0, 2, 5, 6, 7].into_iter().filter_map(|i| fields.get(i)).sum::<u64>())
    });
    ticks.sum::<u64>().saturating_mul(TICK_NS)
}

fn parse_meminfo(text: &str) -> Memory {
    let kib = |key: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|v| v.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    Memory {
        total_bytes: kib("MemTotal").saturating_mul(1024),
        available_bytes: kib("MemAvailable").saturating_mul(1024),
        swap_total_bytes: kib("SwapTotal").saturating_mul(1024),
        swap_free_bytes: kib("SwapFree").saturating_mul(1024),
    }
}

/// Totals become a sample.
#[derive(Clone, Copy, Debug)]
pub struct NodeMeter {
    cpus: usize,
    busy: Meter,
}

impl NodeMeter {
    pub fn starting_at(t: &NodeTotals, cpus: &CpuList) -> Self {
        Self {
            cpus: cpus.len(),
            busy: Meter::starting_at(t.cpu_busy_ns),
        }
    }

    pub fn advance(&mut self, t: &NodeTotals) -> HostSample {
        HostSample {
            cpus: self.cpus as f64,
            // The kernel's own counters fall back a little at times.
            cpu_busy_ns: self.busy.advance(t.cpu_busy_ns, 100 * TICK_NS),
            mem_total_bytes: t.memory.total_bytes,
            mem_available_bytes: t.memory.available_bytes,
            swap_total_bytes: t.memory.swap_total_bytes,
            swap_free_bytes: t.memory.swap_free_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "cpu  30 3 30 300 30 3 3 3 9 0\ncpu0 10 1 10 100 10 1 1 1 3 0\ncpu1 20 2 20 200 20 2 2 2 6 0\nintr 5 6\nctxt 1\n";

    #[test]
    fn only_the_given_cpus_count() {
        let of = |l: &str| busy_ns(STAT, &l.parse().unwrap()) / TICK_NS;
        assert_eq!((of("0"), of("1"), of("0-1"), of("7")), (23, 46, 69, 0));
        assert_eq!(
            busy_ns("cpu0\ncpux 1 2\ncpu0 -1 x 5", &"0".parse().unwrap()) / TICK_NS,
            5
        );
    }

    #[test]
    fn memory() {
        let m = parse_meminfo("MemTotal:       2048 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\nSwapTotal: 0 kB\n");
        assert_eq!(
            (m.total_bytes, m.available_bytes, m.swap_total_bytes),
            (2 << 20, 1 << 20, 0)
        );
        assert_eq!(
            parse_meminfo("MemTotal: 18446744073709551615 kB\n").total_bytes,
            u64::MAX
        );
        assert_eq!(parse_meminfo("rubbish"), Memory::default());
    }

    #[test]
    fn this_machine_can_be_read() {
        let cpus = online_cpus().unwrap();
        let t = read(&Procfs::default(), &cpus).unwrap();
        assert!(t.memory.total_bytes > 0 && t.cpu_busy_ns > 0);
        let s = NodeMeter::starting_at(&t, &cpus).advance(&t);
        assert_eq!((s.cpus, s.cpu_busy_ns), (cpus.len() as f64, 0));
    }
}
