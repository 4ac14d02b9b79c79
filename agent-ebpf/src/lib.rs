//! What the kernel programs and the agent agree on: names, layouts and meaning of maps and globals. `repr(C)`, no padding
//! that is not named, so that both sides and the kernel's verifier see the same bytes.
//!
//! ```text
//!   FILTER, NIC_FILTER   one bit per tgid / ifindex (folded): the way out for everything that is no VM
//!   VMS                  tgid -> slot                           written by the agent
//!   THREADS              tid  -> Thread, its totals             written by the programs; seeded, and swept when dead, by the agent
//!   BLOCK                slot -> BlockTotals, per CPU           written by the programs, only ever grow
//!   REQUESTS             struct request * -> Request (LRU)      the programs' own
//!   NICS                 (netns, ifindex) -> NicTotals, per CPU keys by the agent, values by the programs
//!   LOST                 events that found a map full, per CPU
//! ```
//!
//! CPU time is summed per thread of a VM, not per VM, because a thread's totals and the stretch that it is in now are then read as one value. A
//! vCPU that owns a CPU may run for seconds between two switches; totals apart from the open stretches could only be read at
//! two moments, and what ended in between would be counted twice or never.
#![no_std]

/// Names of the maps.
pub mod maps {
    pub const FILTER: &str = "FILTER";
    pub const NIC_FILTER: &str = "NIC_FILTER";
    pub const VMS: &str = "VMS";
    pub const THREADS: &str = "THREADS";
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
    /// It ended. The agent takes its last totals and removes the entry.
    pub const DEAD: u32 = 4;
}

/// A thread of a VM.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Thread {
    /// CLOCK_MONOTONIC at which this entry was made: a tid that is used again has another one.
    pub born_ns: u64,
    /// CLOCK_MONOTONIC at which `state` began. What lies before it is in the totals.
    pub since_ns: u64,
    pub run_ns: u64,
    /// Runnable without a CPU.
    pub wait_ns: u64,
    /// A tid may be used again by another process: the entry counts only with its tgid.
    pub tgid: u32,
    /// One of [`state`].
    pub state: u32,
    /// 1 for a vCPU's thread, else 0.
    pub vcpu: u32,
    pub reserved: u32,
}

impl Thread {
    /// Totals as of `now`, with the stretch that the thread is in: (run, wait).
    pub const fn at(&self, now_ns: u64) -> (u64, u64) {
        let open = now_ns.saturating_sub(self.since_ns);
        match self.state {
            state::RUNNING | state::SEEDED => (self.run_ns + open, self.wait_ns),
            state::WAITING => (self.run_ns, self.wait_ns + open),
            _ => (self.run_ns, self.wait_ns),
        }
    }
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
    pub latency_ns_sum: u64,
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
    if bucket < LATENCY_BUCKETS {
        bucket
    } else {
        LATENCY_BUCKETS - 1
    }
}

/// A disk request under way.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Request {
    /// CLOCK_MONOTONIC of the issue to the driver; 0 while it waits in the I/O scheduler.
    pub issued_ns: u64,
    pub bytes: u32,
    /// Of its VM, or [`NOBODY`].
    pub slot: u32,
}

/// A request of no VM. It is noted nevertheless while it waits in the I/O scheduler, as a VM's thread may be the one that issues it.
pub const NOBODY: u32 = u32::MAX;

/// An ifindex means something only within its network namespace.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
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
    use crate::Group;

    /// (who needs it, global, struct, member)
    pub const ALL: &[(Group, &str, &str, &str)] = &[
        (Group::Sched, "TASK_TGID", "task_struct", "tgid"),
        (Group::Sched, "TASK_PID", "task_struct", "pid"),
        (Group::Sched, "TASK_STATE", "task_struct", "__state"),
        (Group::Sched, "TASK_COMM", "task_struct", "comm"),
        (Group::Block, "REQUEST_LEN", "request", "__data_len"),
        (Group::Block, "REQUEST_FLAGS", "request", "cmd_flags"),
        (Group::Net, "SKB_LEN", "sk_buff", "len"),
        (Group::Net, "SKB_DEV", "sk_buff", "dev"),
        (Group::Net, "DEV_IFINDEX", "net_device", "ifindex"),
        (Group::Net, "DEV_NET", "net_device", "nd_net.net"),
        (Group::Net, "NET_INUM", "net", "ns.inum"),
    ];
    /// Offset of `task_struct.preempt_notifiers.first`, or [`ABSENT`] in a kernel without KVM.
    pub const TASK_NOTIFIERS: &str = "TASK_NOTIFIERS";
    pub const ABSENT: u64 = u64::MAX;
    /// 1 if sched_switch tells prev_state as its fourth argument (since Linux 5.18), else 0.
    pub const SWITCH_HAS_STATE: &str = "SWITCH_HAS_STATE";
}

/// What a program counts. A kernel that lacks a member or a tracepoint of one group still serves the others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Group {
    Sched,
    Block,
    Net,
}

/// The programs. Each has the name of the BTF tracepoint that it attaches to.
pub const PROGRAMS: &[(Group, &str)] = &[
    (Group::Sched, "sched_switch"),
    (Group::Sched, "sched_wakeup"),
    (Group::Sched, "sched_wakeup_new"),
    (Group::Block, "block_rq_insert"),
    (Group::Block, "block_rq_merge"),
    (Group::Block, "block_rq_issue"),
    (Group::Block, "block_rq_complete"),
    (Group::Net, "net_dev_queue"),
    (Group::Net, "netif_receive_skb"),
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
    pod!(Thread, BlockTotals, Request, NicKey, NicTotals);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_have_no_padding() {
        assert_eq!(size_of::<Thread>(), 4 * 8 + 4 * 4);
        assert_eq!(size_of::<BlockTotals>(), (5 + LATENCY_BUCKETS) * 8);
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
    fn an_open_stretch_belongs_to_its_state() {
        let mut t = Thread {
            since_ns: 100,
            run_ns: 10,
            wait_ns: 20,
            ..Thread::default()
        };
        for (state, expected) in [
            (state::BLOCKED, (10, 20)),
            (state::RUNNING, (15, 20)),
            (state::WAITING, (10, 25)),
            (state::SEEDED, (15, 20)),
            (state::DEAD, (10, 20)),
        ] {
            t.state = state;
            assert_eq!(t.at(105), expected);
            // Another CPU's clock may be a little ahead.
            assert_eq!(t.at(99), (10, 20));
        }
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
