//! The kernel programs. They sum, per VM, in maps; no event travels to user space.
//!
//! `sched_switch` runs hundreds of thousands of times a second on a busy host, nearly always for threads that are no VM's.
//! So each program first reads an id by a direct load (no helper call) and looks at one bit of a filter of 8 KB; only a VM's own
//! threads reach a hash map, one lookup a side.
//!
//! ```text
//!              sched_wakeup                    switch in (+wait)
//!   BLOCKED ───────────────> WAITING ────────────────────────────────> RUNNING
//!      ^                        ^          switch out, runnable (+run)   │  │
//!      │                        └────────────────────────────────────────┘  │
//!      └──────────────────────────── switch out, not runnable (+run) ───────┘   (for the last time: DEAD)
//! ```
//!
//! No lock is needed: a thread is on one CPU at a time, a wakeup of a thread that still leaves its CPU is held back by the
//! scheduler until it has left, and the other totals are per CPU.
#![no_std]
#![no_main]

use aya_ebpf::Global;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap};
use aya_ebpf::programs::BtfTracePointContext;
use aya_ebpf::{EbpfContext, bindings::BPF_ANY};
use aya_log_ebpf::{debug, warn};
use umbra_agent_ebpf::{
    BlockTotals, FILTER_WORDS, NIC_FILTER_WORDS, NOBODY, NicKey, NicTotals, Request, Thread, filter_bit,
    latency_bucket, lost, offsets, state,
};

/// The agent sets the sizes of VMS, THREADS, BLOCK and NICS before the load; these are the defaults.
const VMS_DEFAULT: u32 = 1024;

#[map]
static FILTER: Array<u64> = Array::with_max_entries(FILTER_WORDS, 0);
#[map]
static NIC_FILTER: Array<u64> = Array::with_max_entries(NIC_FILTER_WORDS, 0);
#[map]
static VMS: HashMap<u32, u32> = HashMap::with_max_entries(VMS_DEFAULT, 0);
#[map]
static THREADS: HashMap<u32, Thread> = HashMap::with_max_entries(32 * VMS_DEFAULT, 0);
#[map]
static BLOCK: PerCpuArray<BlockTotals> = PerCpuArray::with_max_entries(VMS_DEFAULT, 0);
#[map]
static REQUESTS: LruHashMap<u64, Request> = LruHashMap::with_max_entries(16384, 0);
#[map]
static NICS: PerCpuHashMap<NicKey, NicTotals> = PerCpuHashMap::with_max_entries(4 * VMS_DEFAULT, 0);
#[map]
static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(lost::ENTRIES, 0);

macro_rules! globals {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        static $name: Global<u64> = Global::new(0);
    )*};
}
globals!(TASK_TGID TASK_PID TASK_STATE TASK_COMM TASK_NOTIFIERS SWITCH_HAS_STATE);
globals!(REQUEST_LEN REQUEST_FLAGS SKB_LEN SKB_DEV DEV_IFINDEX DEV_NET NET_INUM);

/// `task->__state` of a thread that schedules for the last time.
const TASK_DEAD: u32 = 0x80;
/// The low byte of `request->cmd_flags` is the operation; flushes and discards move no data and are not counted.
const REQ_OP_MASK: u32 = 0xff;
const REQ_OP_READ: u32 = 0;
const REQ_OP_WRITE: u32 = 1;
const REQ_OP_ZONE_APPEND: u32 = 7;
/// `netif_receive_skb` sees a frame whose Ethernet header was pulled already.
const ETH_HLEN: u64 = 14;

/// Reads a member by a direct load.
///
/// # Safety
/// `base` must be a pointer that the verifier knows by its BTF type, and `offset` that of a member of type `T`. The verifier checks both
/// at the load of the program; a bad pointer then reads as zero.
#[inline(always)]
unsafe fn member<T: Copy>(base: *const u8, offset: &Global<u64>) -> T {
    // SAFETY: the caller's promise, which the verifier enforces.
    unsafe { *base.add(offset.load() as usize).cast::<T>() }
}

#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
fn watched(tgid: u32) -> bool {
    let (word, bit) = filter_bit(tgid, FILTER_WORDS);
    FILTER.get(word).is_some_and(|w| w & bit != 0)
}

#[inline(always)]
fn slot_of(tgid: u32) -> Option<u32> {
    VMS.get_ptr(tgid).map(|slot| {
        // SAFETY: a map's value, which the verifier bounds; only the agent writes it, whole.
        unsafe { *slot }
    })
}

/// Counts a loss, and says whether it should be told: the first on this CPU, then each time that the count has doubled.
#[inline(always)]
fn lose(what: u32) -> bool {
    match LOST.get_ptr_mut(what) {
        // SAFETY: this CPU's own entry.
        Some(n) => unsafe {
            *n += 1;
            *n & (*n - 1) == 0
        },
        None => false,
    }
}

/// Adds a stretch to a total. The clocks of two CPUs may differ by some nanoseconds: never below zero.
#[inline(always)]
fn since(start: u64, now: u64) -> u64 {
    now.saturating_sub(start)
}

/// Whether the thread that leaves the CPU is a vCPU's. KVM registers a preempt notifier for a thread as long as it is in
/// `KVM_RUN`, and nothing else does; so a vCPU is known at its first switch from within the guest, whatever it is called. A TCG vCPU
/// is known by the name that QEMU gives it with `debug-threads=on`: `CPU 0/TCG`.
///
/// # Safety
/// `task` must be the verifier's `task_struct`.
#[inline(always)]
unsafe fn is_vcpu(task: *const u8) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        if TASK_NOTIFIERS.load() != offsets::ABSENT && member::<u64>(task, &TASK_NOTIFIERS) != 0 {
            return true;
        }
        let comm = TASK_COMM.load() as usize;
        // Byte by byte: the verifier takes a load of an array's elements, not one across them.
        *task.add(comm) == b'C'
            && *task.add(comm + 1) == b'P'
            && *task.add(comm + 2) == b'U'
            && *task.add(comm + 3) == b' '
    }
}

/// Takes up a thread that is seen for the first time. Nothing is credited: when its state began is not known.
#[inline(always)]
fn adopt(ctx: &BtfTracePointContext, tid: u32, tgid: u32, state: u32, now: u64) {
    // The filter lets some through that are no VM's.
    if VMS.get_ptr(tgid).is_none() {
        return;
    }
    let thread = Thread {
        born_ns: now,
        since_ns: now,
        run_ns: 0,
        wait_ns: 0,
        tgid,
        state,
        vcpu: 0,
        reserved: 0,
    };
    if THREADS.insert(tid, thread, u64::from(BPF_ANY)).is_err() && lose(lost::THREADS) {
        warn!(
            ctx,
            "the map of threads is full: thread {} of process {} goes uncounted", tid, tgid
        );
    }
}

/// The entry of a thread, unless it is a leftover of an earlier one with the same number.
#[inline(always)]
fn thread_of(tid: u32, tgid: u32) -> Option<*mut Thread> {
    let t = THREADS.get_ptr_mut(tid)?;
    // SAFETY: a map's value, which the verifier bounds.
    unsafe { ((*t).tgid == tgid && (*t).state != state::DEAD).then_some(t) }
}

#[btf_tracepoint(function = "sched_switch")]
fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    let prev: *const u8 = ctx.arg(1);
    let next: *const u8 = ctx.arg(2);
    // SAFETY: both are the tracepoint's `struct task_struct *`.
    let (prev_tgid, next_tgid) = unsafe { (member::<u32>(prev, &TASK_TGID), member::<u32>(next, &TASK_TGID)) };
    let (out, into) = (watched(prev_tgid), watched(next_tgid));
    if !out && !into {
        return 0;
    }
    let now = now_ns();
    if out {
        // SAFETY: as above.
        unsafe { leave(&ctx, prev, prev_tgid, now) };
    }
    if into {
        // SAFETY: as above.
        unsafe { enter(&ctx, next, next_tgid, now) };
    }
    0
}

/// # Safety
/// `task` must be the verifier's `task_struct`, and `ctx` that of sched_switch.
#[inline(always)]
unsafe fn leave(ctx: &BtfTracePointContext, task: *const u8, tgid: u32, now: u64) {
    // SAFETY: the caller's promise; map values are bounded by the verifier.
    unsafe {
        let task_state: u32 = match SWITCH_HAS_STATE.load() {
            0 => member(task, &TASK_STATE),
            _ => ctx.arg(3),
        };
        // The first argument is a bool: the thread was pushed off the CPU, and is runnable whatever its state says.
        let preempted = ctx.arg::<u64>(0) & 0xff != 0;
        let next_state = if preempted || task_state == 0 {
            state::WAITING
        } else {
            state::BLOCKED
        };
        let tid: u32 = member(task, &TASK_PID);
        let dead = task_state & TASK_DEAD != 0;
        let Some(t) = thread_of(tid, tgid) else {
            if !dead {
                adopt(ctx, tid, tgid, next_state, now);
            }
            return;
        };
        if (*t).state == state::RUNNING || (*t).state == state::SEEDED {
            (*t).run_ns += since((*t).since_ns, now);
        }
        (*t).since_ns = now;
        (*t).state = if dead { state::DEAD } else { next_state };
        if (*t).vcpu == 0 && is_vcpu(task) {
            (*t).vcpu = 1;
            debug!(ctx, "thread {} of process {} is a vCPU", tid, tgid);
        }
    }
}

/// # Safety
/// `task` must be the verifier's `task_struct`.
#[inline(always)]
unsafe fn enter(ctx: &BtfTracePointContext, task: *const u8, tgid: u32, now: u64) {
    // SAFETY: the caller's promise; map values are bounded by the verifier.
    unsafe {
        let tid: u32 = member(task, &TASK_PID);
        let Some(t) = thread_of(tid, tgid) else {
            adopt(ctx, tid, tgid, state::RUNNING, now);
            return;
        };
        if (*t).state == state::WAITING || (*t).state == state::SEEDED {
            (*t).wait_ns += since((*t).since_ns, now);
        }
        (*t).since_ns = now;
        (*t).state = state::RUNNING;
    }
}

#[btf_tracepoint(function = "sched_wakeup")]
fn sched_wakeup(ctx: BtfTracePointContext) -> i32 {
    woken(&ctx)
}

#[btf_tracepoint(function = "sched_wakeup_new")]
fn sched_wakeup_new(ctx: BtfTracePointContext) -> i32 {
    woken(&ctx)
}

#[inline(always)]
fn woken(ctx: &BtfTracePointContext) -> i32 {
    let task: *const u8 = ctx.arg(0);
    // SAFETY: the tracepoint's `struct task_struct *`; map values are bounded by the verifier.
    unsafe {
        let tgid: u32 = member(task, &TASK_TGID);
        if !watched(tgid) {
            return 0;
        }
        let now = now_ns();
        let tid: u32 = member(task, &TASK_PID);
        let Some(t) = thread_of(tid, tgid) else {
            adopt(ctx, tid, tgid, state::WAITING, now);
            return 0;
        };
        // A thread may be woken while it still runs, or waits: then nothing changes. One that was seeded had in truth gone to sleep
        // before the seed.
        if (*t).state == state::BLOCKED || (*t).state == state::SEEDED {
            (*t).since_ns = now;
            (*t).state = state::WAITING;
        }
    }
    0
}

/// A request enters the I/O scheduler. It is issued later, perhaps by a kernel thread: whose it is must be noted here.
#[btf_tracepoint(function = "block_rq_insert")]
fn block_rq_insert(ctx: BtfTracePointContext) -> i32 {
    let rq: *const u8 = ctx.arg(0);
    let request = Request {
        issued_ns: 0,
        bytes: 0,
        slot: slot_of_current(&ctx).unwrap_or(NOBODY),
    };
    note(&ctx, rq as u64, request);
    0
}

/// A request is merged into another and ends without completing: whoever gets its memory next must not inherit the VM.
#[btf_tracepoint(function = "block_rq_merge")]
fn block_rq_merge(ctx: BtfTracePointContext) -> i32 {
    let rq: *const u8 = ctx.arg(0);
    let _ = REQUESTS.remove(rq as u64);
    0
}

#[btf_tracepoint(function = "block_rq_issue")]
fn block_rq_issue(ctx: BtfTracePointContext) -> i32 {
    let rq: *const u8 = ctx.arg(0);
    let key = rq as u64;
    // SAFETY: the tracepoint's `struct request *`; map values are bounded by the verifier.
    unsafe {
        match REQUESTS.get_ptr_mut(key) {
            // Issued before and put back by a busy driver: its time runs on.
            Some(r) if (*r).issued_ns != 0 => {}
            Some(r) => {
                (*r).bytes = member(rq, &REQUEST_LEN);
                (*r).issued_ns = now_ns();
            }
            None => {
                if let Some(slot) = slot_of_current(&ctx) {
                    let request = Request {
                        issued_ns: now_ns(),
                        bytes: member(rq, &REQUEST_LEN),
                        slot,
                    };
                    note(&ctx, key, request);
                }
            }
        }
    }
    0
}

#[btf_tracepoint(function = "block_rq_complete")]
fn block_rq_complete(ctx: BtfTracePointContext) -> i32 {
    let rq: *const u8 = ctx.arg(0);
    let key = rq as u64;
    // SAFETY: the tracepoint's `struct request *`; map values are bounded by the verifier.
    unsafe {
        let Some(r) = REQUESTS.get_ptr(key) else {
            return 0;
        };
        let request = *r;
        // Completed in parts: the first part counts for the whole.
        let _ = REQUESTS.remove(key);
        // NOBODY lies beyond the array.
        let Some(b) = BLOCK.get_ptr_mut(request.slot) else {
            return 0;
        };
        let flags: u32 = member(rq, &REQUEST_FLAGS);
        match flags & REQ_OP_MASK {
            REQ_OP_READ => {
                (*b).read_ops += 1;
                (*b).read_bytes += u64::from(request.bytes);
            }
            REQ_OP_WRITE | REQ_OP_ZONE_APPEND => {
                (*b).write_ops += 1;
                (*b).write_bytes += u64::from(request.bytes);
            }
            _ => return 0,
        }
        let ns = now_ns().saturating_sub(request.issued_ns);
        (*b).latency_ns_sum += ns;
        let bucket = latency_bucket(ns);
        if let Some(count) = (*b).latency_us_log2.get_mut(bucket) {
            *count += 1;
        }
    }
    0
}

#[inline(always)]
fn slot_of_current(ctx: &BtfTracePointContext) -> Option<u32> {
    let tgid = ctx.tgid();
    match watched(tgid) {
        true => slot_of(tgid),
        false => None,
    }
}

#[inline(always)]
fn note(ctx: &BtfTracePointContext, key: u64, request: Request) {
    if REQUESTS.insert(key, request, u64::from(BPF_ANY)).is_err() && lose(lost::REQUESTS) {
        warn!(
            ctx,
            "the map of disk requests is full: a request of {} bytes goes uncounted", request.bytes
        );
    }
}

/// The host sends a frame into a device: for a tap, the guest receives.
#[btf_tracepoint(function = "net_dev_queue")]
fn net_dev_queue(ctx: BtfTracePointContext) -> i32 {
    let skb: *const u8 = ctx.arg(0);
    // SAFETY: the tracepoint's `struct sk_buff *`; the totals are this CPU's own.
    unsafe {
        if let Some(nic) = nic_of(skb) {
            (*nic).rx_packets += 1;
            (*nic).rx_bytes += u64::from(member::<u32>(skb, &SKB_LEN));
        }
    }
    0
}

/// A device hands a frame to the host: for a tap, the guest sent it.
#[btf_tracepoint(function = "netif_receive_skb")]
fn netif_receive_skb(ctx: BtfTracePointContext) -> i32 {
    let skb: *const u8 = ctx.arg(0);
    // SAFETY: as above.
    unsafe {
        if let Some(nic) = nic_of(skb) {
            (*nic).tx_packets += 1;
            (*nic).tx_bytes += u64::from(member::<u32>(skb, &SKB_LEN)) + ETH_HLEN;
        }
    }
    0
}

/// # Safety
/// `skb` must be the verifier's `sk_buff`.
#[inline(always)]
unsafe fn nic_of(skb: *const u8) -> Option<*mut NicTotals> {
    // SAFETY: the caller's promise; pointers read from it keep their BTF type.
    unsafe {
        let dev: *const u8 = member(skb, &SKB_DEV);
        let ifindex: u32 = member(dev, &DEV_IFINDEX);
        let (word, bit) = filter_bit(ifindex, NIC_FILTER_WORDS);
        if NIC_FILTER.get(word).is_none_or(|w| w & bit == 0) {
            return None;
        }
        let net: *const u8 = member(dev, &DEV_NET);
        let netns: u32 = member(net, &NET_INUM);
        NICS.get_ptr_mut(NicKey { netns, ifindex })
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
