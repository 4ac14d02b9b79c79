//! What the kernel programs and the agent agree on: names, layouts and meaning of maps and globals. `repr(C)`, no padding
//! that is not named, so that both sides and the kernel's verifier see the same bytes.
//!
//! ```text
//!   FILTER, NIC_FILTER   one bit per tgid / ifindex (folded): the way out for everything that is no VM
//!   VMS                  tgid -> slot                           written by the agent
//!   THREADS              tid  -> Thread                         written by the programs, seeded and swept by the agent
//!   CPU, BLOCK           slot -> totals, per CPU                written by the programs, only ever grow
//!   REQUESTS             struct request * -> Request (LRU)      the programs' own
//!   NICS                 (netns, ifindex) -> NicTotals, per CPU keys by the agent, values by the programs
//!   LOST                 events that found a map full, per CPU
//! ```
#![no_std]

/// Names of the maps.
pub mod maps {
    pub const FILTER: &str = "FILTER";
    pub const NIC_FILTER: &str = "NIC_FILTER";
    pub const VMS: &str = "VMS";
    pub const THREADS: &str = "THREADS";
    pub const CPU: &str = "CPU";
    pub const BLOCK: &str = "BLOCK";
    pub const NICS: &str = "NICS";
    pub const LOST: &str = "LOST";
}

/// A filter has one bit for each id modulo its size. A set bit means 'look closer', a clear one 'surely no VM'.
pub const FILTER_WORDS: u32 = 1024;
pub const NIC_FILTER_WORDS: u32 = 64;

/// Word and bit of an id in a filter of `words` (a power of two).
#[inline(always)]
pub const fn filter_bit(id: u32, words: u32) -> (u32, u64) {
    ((id >> 6) & (words - 1), 1 << (id & 63))
}

/// Where a thread is between two events.
pub mod state {
    /// Asleep: its time is nobody's.
    pub const BLOCKED: u32 = 0;
    /// On a CPU.
    pub const RUNNING: u32 = 1;
    /// Runnable, without a CPU.
    pub const WAITING: u32 = 2;
    /// The agent found it runnable when the VM was registered, and can't know which of the two: the next switch tells.
    pub const SEEDED: u32 = 3;
}

/// A thread of a VM. Whatever time lies before `since_ns` is in its VM's totals already.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Thread {
    /// CLOCK_MONOTONIC at which `state` began.
    pub since_ns: u64,
    /// A tid may be used again by another process: the entry counts only with its tgid.
    pub tgid: u32,
    pub slot: u32,
    /// One of [`state`].
    pub state: u32,
    /// 1 for a vCPU's thread, else 0.
    pub vcpu: u32,
}

/// CPU time of one VM on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct CpuTotals {
    pub vcpu_run_ns: u64,
    pub vcpu_wait_ns: u64,
    pub emulator_run_ns: u64,
    pub emulator_wait_ns: u64,
}

pub const LATENCY_BUCKETS: usize = 24;

/// Disk requests of one VM, counted at their completion.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct BlockTotals {
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub read_ops: u64,
    pub write_ops: u64,
    /// Bucket `i` has the requests of `[2^i, 2^(i+1))` µs; the first also those below 1 µs, the last all above.
    pub latency_us_log2: [u64; LATENCY_BUCKETS],
}

/// Bucket of a latency. Always below [`LATENCY_BUCKETS`].
#[inline(always)]
pub const fn latency_bucket(ns: u64) -> usize {
    // Five comparisons instead of `leading_zeros`, for which eBPF has no instruction and LLVM many.
    let mut us = ns / 1000;
    let mut bucket = 0;
    let mut step = 16;
    while step > 0 {
        if us >> step != 0 {
            us >>= step;
            bucket += step;
        }
        step /= 2;
    }
    if bucket < LATENCY_BUCKETS { bucket } else { LATENCY_BUCKETS - 1 }
}

/// A disk request under way.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Request {
    /// CLOCK_MONOTONIC of the issue to the driver; 0 while it waits in the I/O scheduler.
    pub issued_ns: u64,
    pub bytes: u32,
    pub slot: u32,
}

/// An ifindex means something only within its network namespace.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub struct NicKey {
    /// Inode of the namespace, as in `/proc/PID/ns/net`.
    pub netns: u32,
    pub ifindex: u32,
}

/// Traffic of one tap on one CPU, named as the *guest* sees it: received is what the host sent into the tap.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct NicTotals {
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
}

/// Entries of LOST.
pub mod lost {
    /// A thread found THREADS full: its time goes uncounted.
    pub const THREADS: u32 = 0;
    /// A request found REQUESTS full.
    pub const REQUESTS: u32 = 1;
    pub const ENTRIES: u32 = 2;
}

/// Globals that the agent fills from the kernel's BTF before the load, because Rust has no CO-RE: byte offsets of members.
/// Each is a `u64` of its own, as the verifier must know a constant to allow a direct load.
pub mod offsets {
    /// (global, struct, member)
    pub const ALL: &[(&str, &str, &str)] = &[
        ("TASK_TGID", "task_struct", "tgid"),
        ("TASK_PID", "task_struct", "pid"),
        ("TASK_STATE", "task_struct", "__state"),
        ("TASK_COMM", "task_struct", "comm"),
        ("REQUEST_LEN", "request", "__data_len"),
        ("REQUEST_FLAGS", "request", "cmd_flags"),
        ("SKB_LEN", "sk_buff", "len"),
        ("SKB_DEV", "sk_buff", "dev"),
        ("DEV_IFINDEX", "net_device", "ifindex"),
        ("DEV_NET", "net_device", "nd_net.net"),
        ("NET_INUM", "net", "ns.inum"),
    ];
    /// Offset of `task_struct.preempt_notifiers.first`, or [`ABSENT`] in a kernel without KVM.
    pub const TASK_NOTIFIERS: &str = "TASK_NOTIFIERS";
    pub const ABSENT: u64 = u64::MAX;
    /// 1 if sched_switch tells prev_state as its fourth argument (since Linux 5.18), else 0.
    pub const SWITCH_HAS_STATE: &str = "SWITCH_HAS_STATE";
}

/// (program, tracepoint): the same name by design, listed so that the agent can attach one by one and go on without one.
pub const PROGRAMS: &[&str] = &[
    "sched_switch",
    "sched_wakeup",
    "sched_wakeup_new",
    "block_rq_insert",
    "block_rq_merge",
    "block_rq_issue",
    "block_rq_complete",
    "net_dev_queue",
    "netif_receive_skb",
];

#[cfg(feature = "user")]
mod pod {
    use super::*;

    macro_rules! pod {
        ($($t:ty),*) => {$(
            // SAFETY: repr(C), integers only, without padding (the tests compare the sizes), so any bytes are a value.
            unsafe impl aya::Pod for $t {}
        )*};
    }
    pod!(Thread, CpuTotals, BlockTotals, Request, NicKey, NicTotals);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_have_no_padding() {
        assert_eq!(size_of::<Thread>(), 8 + 4 * 4);
        assert_eq!(size_of::<CpuTotals>(), 4 * 8);
        assert_eq!(size_of::<BlockTotals>(), (4 + LATENCY_BUCKETS) * 8);
        assert_eq!(size_of::<Request>(), 8 + 2 * 4);
        assert_eq!(size_of::<NicKey>(), 2 * 4);
        assert_eq!(size_of::<NicTotals>(), 4 * 8);
    }

    #[test]
    fn latency_buckets_are_powers_of_two() {
        assert_eq!(latency_bucket(0), 0);
        assert_eq!(latency_bucket(999), 0);
        assert_eq!(latency_bucket(1_999), 0);
        for i in 1..LATENCY_BUCKETS {
            assert_eq!(latency_bucket((1_000 << i) - 1), i - 1);
            assert_eq!(latency_bucket(1_000 << i), i);
        }
        assert_eq!(latency_bucket(u64::MAX), LATENCY_BUCKETS - 1);
    }

    #[test]
    fn a_filter_bit_lies_within_the_filter() {
        for id in [0, 1, 63, 64, 65_535, 65_536, u32::MAX] {
            let (word, bit) = filter_bit(id, FILTER_WORDS);
            assert!(word < FILTER_WORDS && bit.count_ones() == 1);
        }
        assert_eq!(filter_bit(65_536 + 130, FILTER_WORDS), (2, 4));
    }
}
