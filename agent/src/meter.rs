//! Totals that only grow become deltas that are never negative. Pure.

use umbra_agent_ebpf::{BlockTotals, LATENCY_BUCKETS, NicTotals, Thread};
use umbra_api::sample::{BlockSample, CpuSample, NetSample};

/// One total.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Meter {
    /// The highest total seen since the last reset.
    last: u64,
}

impl Meter {
    pub fn starting_at(total: u64) -> Self {
        Self { last: total }
    }

    /// How much came since the last call. A total that fell by up to `jitter` gives 0, and what was told already is not
    /// told again; one that fell by more began anew, and all of it is new.
    pub fn advance(&mut self, total: u64, jitter: u64) -> u64 {
        if total >= self.last {
            let delta = total - self.last;
            self.last = total;
            delta
        } else if self.last - total <= jitter {
            0
        } else {
            self.last = total;
            total
        }
    }
}

/// The time of one thread. Its totals include the stretch it is in. The kernel's copy of an entry can, very seldom, catch it half
/// written, with a stretch counted twice or not yet: any fall is such jitter, which the next reading makes good. A thread that
/// began anew is known by its birth.
#[derive(Clone, Copy, Debug)]
pub struct ThreadMeter {
    born_ns: u64,
    run: Meter,
    wait: Meter,
}

impl ThreadMeter {
    /// From zero: all that the entry holds is new.
    pub fn born(t: &Thread) -> Self {
        Self {
            born_ns: t.born_ns,
            run: Meter::default(),
            wait: Meter::default(),
        }
    }

    pub fn advance(&mut self, t: &Thread, now_ns: u64) -> CpuSample {
        if t.born_ns != self.born_ns {
            *self = Self::born(t);
        }
        let (run, wait) = t.at(now_ns);
        let (run, wait) = (self.run.advance(run, u64::MAX), self.wait.advance(wait, u64::MAX));
        match t.vcpu {
            0 => CpuSample {
                emulator_run_ns: run,
                emulator_wait_ns: wait,
                ..CpuSample::default()
            },
            _ => CpuSample {
                vcpu_run_ns: run,
                vcpu_wait_ns: wait,
                ..CpuSample::default()
            },
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct BlockMeter {
    sums: [Meter; 5],
    latency: [Meter; LATENCY_BUCKETS],
}

/// A delta of [`BlockTotals`]: the sample has no sum of latencies, `/metrics` does.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BlockDelta {
    pub sample: BlockSample,
    pub latency_ns_sum: u64,
}

impl BlockMeter {
    pub fn starting_at(t: &BlockTotals) -> Self {
        Self {
            sums: block_fields(t).map(Meter::starting_at),
            latency: t.latency_us_log2.map(Meter::starting_at),
        }
    }

    pub fn advance(&mut self, t: &BlockTotals) -> BlockDelta {
        let [read_bytes, write_bytes, read_ops, write_ops, latency_ns_sum] =
            advance(&mut self.sums, block_fields(t), 0);
        BlockDelta {
            sample: BlockSample {
                read_bytes,
                write_bytes,
                read_ops,
                write_ops,
                latency_us_log2: trimmed(&advance(&mut self.latency, t.latency_us_log2, 0)),
            },
            latency_ns_sum,
        }
    }
}

fn block_fields(t: &BlockTotals) -> [u64; 5] {
    [t.read_bytes, t.write_bytes, t.read_ops, t.write_ops, t.latency_ns_sum]
}

/// Without the empty buckets at the end: most intervals of most VMs have none at all.
fn trimmed(buckets: &[u64]) -> Vec<u64> {
    let used = buckets.iter().rposition(|c| *c != 0).map_or(0, |last| last + 1);
    buckets.iter().take(used).copied().collect()
}

#[derive(Clone, Copy, Debug)]
pub struct NicMeter([Meter; 4]);

impl NicMeter {
    pub fn starting_at(t: &NicTotals) -> Self {
        Self(nic_fields(t).map(Meter::starting_at))
    }

    pub fn advance(&mut self, t: &NicTotals) -> NetSample {
        let [rx_bytes, tx_bytes, rx_packets, tx_packets] = advance(&mut self.0, nic_fields(t), 0);
        NetSample {
            rx_bytes,
            tx_bytes,
            rx_packets,
            tx_packets,
        }
    }
}

fn nic_fields(t: &NicTotals) -> [u64; 4] {
    [t.rx_bytes, t.tx_bytes, t.rx_packets, t.tx_packets]
}

fn advance<const N: usize>(meters: &mut [Meter; N], totals: [u64; N], jitter: u64) -> [u64; N] {
    let mut totals = totals.into_iter();
    meters
        .each_mut()
        .map(|m| m.advance(totals.next().unwrap_or_default(), jitter))
}

/// What a VM has used since it was found: the counters of `/metrics`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Used {
    pub cpu: CpuSample,
    pub block: BlockDelta,
    pub net: NetSample,
}

impl Used {
    pub fn add(&mut self, cpu: &CpuSample, block: &BlockDelta, net: &NetSample) {
        add_cpu(&mut self.cpu, cpu);
        let (to, from) = (&mut self.block.sample, &block.sample);
        to.read_bytes += from.read_bytes;
        to.write_bytes += from.write_bytes;
        to.read_ops += from.read_ops;
        to.write_ops += from.write_ops;
        to.latency_us_log2.resize(LATENCY_BUCKETS, 0);
        to.latency_us_log2
            .iter_mut()
            .zip(&from.latency_us_log2)
            .for_each(|(t, f)| *t += f);
        self.block.latency_ns_sum += block.latency_ns_sum;
        add_net(&mut self.net, net);
    }
}

pub fn add_cpu(to: &mut CpuSample, from: &CpuSample) {
    to.vcpu_run_ns += from.vcpu_run_ns;
    to.vcpu_wait_ns += from.vcpu_wait_ns;
    to.emulator_run_ns += from.emulator_run_ns;
    to.emulator_wait_ns += from.emulator_wait_ns;
}

pub fn add_net(to: &mut NetSample, from: &NetSample) {
    to.rx_bytes += from.rx_bytes;
    to.tx_bytes += from.tx_bytes;
    to.rx_packets += from.rx_packets;
    to.tx_packets += from.tx_packets;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn deltas_are_what_came_since() {
        let mut m = Meter::starting_at(100);
        assert_eq!(m.advance(130, 0), 30);
        assert_eq!(m.advance(130, 0), 0);
        assert_eq!(m.advance(131, 0), 1);
    }

    #[test]
    fn a_small_fall_is_jitter_and_is_not_told_twice() {
        let mut m = Meter::starting_at(1000);
        assert_eq!(m.advance(990, 50), 0);
        assert_eq!(m.advance(1005, 50), 5);
    }

    #[test]
    fn a_great_fall_is_a_reset() {
        let mut m = Meter::starting_at(1000);
        assert_eq!(m.advance(7, 50), 7);
        assert_eq!(m.advance(9, 50), 2);
    }

    #[test]
    fn a_thread_is_followed_through_its_stretches() {
        use umbra_agent_ebpf::state;
        let mut t = Thread {
            born_ns: 5,
            since_ns: 100,
            state: state::RUNNING,
            ..Thread::default()
        };
        let mut m = ThreadMeter::born(&t);
        assert_eq!(m.advance(&t, 130).emulator_run_ns, 30);
        // It turns out to be a vCPU's, ran until 140 and waits.
        (t.vcpu, t.state, t.since_ns, t.run_ns) = (1, state::WAITING, 140, 40);
        let s = m.advance(&t, 150);
        assert_eq!((s.vcpu_run_ns, s.vcpu_wait_ns, s.emulator_run_ns), (10, 10, 0));
        // The same number, another thread.
        let t = Thread {
            born_ns: 160,
            run_ns: 3,
            ..Thread::default()
        };
        assert_eq!(m.advance(&t, 170).run_ns(), 3);
    }

    #[test]
    fn latencies_end_with_their_last_count() {
        let mut b = BlockMeter::starting_at(&BlockTotals::default());
        let mut t = BlockTotals::default();
        assert!(b.advance(&t).sample.latency_us_log2.is_empty());
        t.latency_us_log2[3] = 2;
        t.latency_ns_sum = 20_000;
        let d = b.advance(&t);
        assert_eq!(
            (d.sample.latency_us_log2.as_slice(), d.latency_ns_sum),
            (&[0, 0, 0, 2][..], 20_000)
        );
        let mut used = Used::default();
        used.add(&CpuSample::default(), &d, &NetSample::default());
        used.add(&CpuSample::default(), &d, &NetSample::default());
        assert_eq!(used.block.sample.latency_us_log2[3], 4);
    }

    proptest! {
        /// However totals are read, the sum of the deltas is the highest of them.
        #[test]
        fn jitter_neither_loses_nor_invents(steps in proptest::collection::vec((0u64..1000, 0u64..100), 1..50)) {
            let (mut meter, mut total, mut sum, mut highest) = (Meter::default(), 0, 0, 0);
            for (grow, lag) in steps {
                total += grow;
                let read = total - lag.min(total);
                highest = highest.max(read);
                sum += meter.advance(read, 1000);
            }
            prop_assert_eq!(sum, highest);
        }
    }
}
