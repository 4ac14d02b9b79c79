use std::cell::RefCell;
use std::collections::BTreeSet;

use umbra_agent_ebpf::{BlockTotals, NicTotals, Thread};
use uuid::Uuid;

use super::*;
use crate::argv;
use crate::procfs::Qemu;

#[derive(Default)]
struct FakeKernel {
    now_ns: u64,
    watched: BTreeMap<u32, u32>,
    threads: BTreeMap<u32, Thread>,
    seeded: BTreeSet<u32>,
    block: BTreeMap<u32, BlockTotals>,
    nics: BTreeMap<NicKey, NicTotals>,
}

impl Kernel for FakeKernel {
    fn now_ns(&self) -> u64 {
        self.now_ns
    }
    fn watch(&mut self, pid: u32, slot: u32) -> Result<(), KernelError> {
        self.watched.insert(pid, slot);
        Ok(())
    }
    fn unwatch(&mut self, pid: u32) {
        self.watched.remove(&pid);
    }
    fn seed(&mut self, _: u32, tid: u32) {
        self.seeded.insert(tid);
    }
    fn unseed(&mut self, tid: u32) {
        self.seeded.remove(&tid);
    }
    fn threads(&self) -> Result<Vec<(u32, Thread)>, KernelError> {
        Ok(self.threads.iter().map(|(k, v)| (*k, *v)).collect())
    }
    fn forget(&mut self, tid: u32) {
        self.threads.remove(&tid);
    }
    fn block(&self, slot: u32) -> Result<BlockTotals, KernelError> {
        Ok(self.block.get(&slot).copied().unwrap_or_default())
    }
    fn watch_nic(&mut self, nic: NicKey) -> Result<(), KernelError> {
        self.nics.insert(nic, NicTotals::default());
        Ok(())
    }
    fn unwatch_nic(&mut self, nic: NicKey) {
        self.nics.remove(&nic);
    }
    fn nic(&self, nic: NicKey) -> Result<NicTotals, KernelError> {
        Ok(self.nics.get(&nic).copied().unwrap_or_default())
    }
    fn lost(&self) -> Lost {
        Lost::default()
    }
    fn ifindexes(&self, _: u32, _: u32, names: &[String]) -> Vec<(String, u32)> {
        let number = |n: &String| Some((n.clone(), n.strip_prefix("tap")?.parse().ok()?));
        names.iter().filter_map(number).collect()
    }
}

#[derive(Default)]
struct FakeMachine {
    running: BTreeMap<u32, (u64, Qemu)>,
    runnable: Vec<u32>,
    asleep_again: Vec<u32>,
    taps: RefCell<Vec<String>>,
    busy_ns: u64,
}

impl Processes for FakeMachine {
    fn pids(&self) -> std::io::Result<Vec<u32>> {
        Ok(self.running.keys().copied().collect())
    }
    fn start(&self, pid: u32) -> Option<u64> {
        self.running.get(&pid).map(|p| p.0)
    }
    fn qemu(&self, pid: u32) -> Option<Qemu> {
        self.running.get(&pid).map(|p| p.1.clone())
    }
}

impl Machine for FakeMachine {
    fn node(&self, _: &CpuList) -> std::io::Result<NodeTotals> {
        Ok(NodeTotals {
            cpu_busy_ns: self.busy_ns,
            ..NodeTotals::default()
        })
    }
    fn rss_bytes(&self, _: u32) -> u64 {
        4096
    }
    fn taps(&self, _: u32) -> Vec<String> {
        self.taps.borrow().clone()
    }
    fn runnable_threads(&self, _: u32) -> Vec<u32> {
        self.runnable.clone()
    }
    fn is_runnable(&self, _: u32, tid: u32) -> bool {
        !self.asleep_again.contains(&tid)
    }
}

const SECOND: Duration = Duration::from_secs(1);

struct Lab {
    collector: Collector<FakeKernel>,
    machine: FakeMachine,
    t: i64,
}

impl Lab {
    fn new() -> Self {
        let cpus: CpuList = "0-1".parse().unwrap();
        let collector = Collector::new(
            "a".parse().unwrap(),
            cpus,
            UnixMs(7),
            FakeKernel::default(),
            Tracker::new(None, 4),
            4,
        );
        Self {
            collector,
            machine: FakeMachine::default(),
            t: 0,
        }
    }

    fn start(&mut self, pid: u32, start: u64, vm: u128) {
        let line = format!(
            "-name vm{vm} -uuid {} -m 64 -netdev tap,ifname=tap{pid}",
            Uuid::from_u128(vm)
        );
        let args = argv::parse(line.split_whitespace());
        self.machine.running.insert(pid, (start, Qemu { args, netns: Some(1) }));
    }

    fn round(&mut self) -> Option<SampleBatch> {
        self.t += 1000;
        self.collector.kernel.now_ns += 1_000_000_000;
        let batch = self.collector.round(&self.machine, UnixMs(self.t), SECOND).unwrap();
        batch.inspect(|b| b.validate().unwrap())
    }

    fn kernel(&mut self) -> &mut FakeKernel {
        &mut self.collector.kernel
    }
}

fn thread(pid: u32, vcpu: u32, run_ns: u64, wait_ns: u64) -> Thread {
    Thread {
        born_ns: 1,
        tgid: pid,
        vcpu,
        run_ns,
        wait_ns,
        ..Thread::default()
    }
}

#[test]
fn a_vm_is_found_counted_and_forgotten() {
    let mut lab = Lab::new();
    lab.machine.runnable = vec![11, 12];
    lab.machine.asleep_again = vec![12];
    assert!(lab.round().is_none(), "the first round has no interval");
    lab.start(10, 1, 1);
    assert_eq!(lab.round().unwrap().vms, [], "its first interval begins now");
    assert_eq!(lab.kernel().seeded, BTreeSet::from([11]));
    assert_eq!(lab.kernel().watched.len(), 1);
    lab.kernel().threads.insert(11, thread(10, 1, 300, 40));
    lab.kernel().threads.insert(12, thread(10, 0, 5, 6));
    lab.kernel()
        .nics
        .get_mut(&NicKey { netns: 1, ifindex: 10 })
        .unwrap()
        .rx_bytes = 77;
    lab.machine.busy_ns = 500;
    let b = lab.round().unwrap();
    assert_eq!(
        (b.seq, b.t, b.interval_ms, b.node.cpu_busy_ns, b.node.cpus),
        (2, UnixMs(3000), 1000, 500, 2.0)
    );
    let vm = &b.vms[0];
    assert_eq!(
        (
            vm.cpu.vcpu_run_ns,
            vm.cpu.vcpu_wait_ns,
            vm.cpu.emulator_run_ns,
            vm.cpu.emulator_wait_ns
        ),
        (300, 40, 5, 6)
    );
    assert_eq!(
        (vm.net.rx_bytes, vm.mem.rss_bytes, vm.mem.guest_bytes, vm.name.as_str()),
        (77, 4096, 64 << 20, "vm1")
    );
    assert_eq!(lab.round().unwrap().vms[0].cpu, CpuSample::default(), "nothing new");
    let used = &lab.collector.snapshot().vms[0].used;
    assert_eq!((used.cpu.run_ns(), used.net.rx_bytes), (305, 77));
    lab.machine.running.clear();
    assert_eq!(lab.round().unwrap().vms, []);
    assert!(lab.kernel().watched.is_empty() && lab.kernel().threads.is_empty() && lab.kernel().nics.is_empty());
    assert!(lab.collector.threads.is_empty());
}

#[test]
fn a_vcpu_that_never_switches_is_counted_all_the_same() {
    let mut lab = Lab::new();
    lab.start(10, 1, 1);
    lab.round();
    let now = lab.kernel().now_ns;
    let running = Thread {
        since_ns: now,
        state: state::RUNNING,
        ..thread(10, 1, 0, 0)
    };
    lab.kernel().threads.insert(11, running);
    for _ in 0..3 {
        assert_eq!(lab.round().unwrap().vms[0].cpu.vcpu_run_ns, 1_000_000_000);
    }
}

#[test]
fn a_thread_that_ends_leaves_its_last_stretch() {
    let mut lab = Lab::new();
    lab.start(10, 1, 1);
    lab.round();
    lab.kernel().threads.insert(11, thread(10, 0, 100, 0));
    assert_eq!(lab.round().unwrap().vms[0].cpu.emulator_run_ns, 100);
    let dead = Thread {
        state: state::DEAD,
        ..thread(10, 0, 130, 0)
    };
    lab.kernel().threads.insert(11, dead);
    assert_eq!(lab.round().unwrap().vms[0].cpu.emulator_run_ns, 30);
    assert!(lab.kernel().threads.is_empty() && lab.collector.threads.is_empty());
}

#[test]
fn a_pid_that_is_used_again_is_another_vm() {
    let mut lab = Lab::new();
    lab.start(10, 1, 1);
    lab.round();
    let slot = lab.kernel().watched[&10];
    lab.kernel().block.entry(slot).or_default().read_ops = 9;
    lab.kernel().threads.insert(11, thread(10, 0, 100, 0));
    lab.round();
    lab.start(10, 2, 2);
    assert_eq!(lab.round().unwrap().vms, []);
    let b = lab.round().unwrap();
    assert_eq!(
        (b.vms[0].name.as_str(), b.vms[0].block.read_ops),
        ("vm2", 0),
        "the slot's past is not the new VM's"
    );
    assert_eq!(b.vms[0].cpu, CpuSample::default());
}

#[test]
fn taps_come_and_go() {
    let mut lab = Lab::new();
    lab.start(10, 1, 1);
    lab.round();
    lab.machine.taps.borrow_mut().push("tap3".into());
    lab.round();
    assert_eq!(
        lab.kernel().nics.len(),
        2,
        "one from the command line, one by its descriptor"
    );
    lab.machine.taps.borrow_mut().clear();
    (0..TAP_ROUNDS).for_each(|_| drop(lab.round()));
    assert_eq!(lab.kernel().nics.len(), 1);
}

#[test]
fn a_round_without_time_tells_nothing() {
    let mut lab = Lab::new();
    lab.round();
    let none = lab
        .collector
        .round(&lab.machine, UnixMs(0), Duration::from_micros(10))
        .unwrap();
    assert!(none.is_none());
    assert_eq!(lab.round().unwrap().seq, 1);
}
