//! The real programs in the real kernel, on a small real QEMU. Needs root, BTF and QEMU; without them each test says why and ends.

mod lab;

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use umbra_api::sample::{BlockSample, CpuSample, NetSample};

use lab::{Lab, Vm, skip};

/// The programs' run time and run-queue wait are the kernel's own, for a vCPU that shares its CPU with a competitor.
#[test]
fn cpu_time_agrees_with_schedstat() {
    let Some(mut lab) = Lab::new("cpu") else { return };
    // A boot sector that spins: a vCPU that wants a whole CPU.
    let image = lab.file("boot.img", 1 << 20);
    image.write_all_at(&[0xfa, 0xeb, 0xfe], 0).unwrap();
    image.write_all_at(&[0x55, 0xaa], 510).unwrap();
    let drive = format!("file={},format=raw,if=ide", lab.path("boot.img").display());
    let vm = Vm::start(&lab, "taskset", &["-c", "0"], &["-M", "pc", "-drive", &drive]);
    let rival = lab::Guarded::start("taskset", &["-c", "0", "sh", "-c", "while :; do :; done"]);
    // Once it answers, its start is over.
    drop(vm.qmp(&lab));
    lab.until_found(&vm);

    let begin = vm.around(|| lab.round());
    let mut cpu = CpuSample::default();
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        std::thread::sleep(Duration::from_millis(500));
        umbra_agent::meter::add_cpu(&mut cpu, &lab.round_of(&vm).cpu);
    }
    let end = vm.around(|| umbra_agent::meter::add_cpu(&mut cpu, &lab.round_of(&vm).cpu));
    drop(rival);

    eprintln!("schedstat: from {begin:?} to {end:?}; programs: {cpu:?}");
    close("run time", cpu.run_ns(), begin.map(|s| s.run_ns), end.map(|s| s.run_ns));
    match end[1].wait_ns {
        0 => skip("run-queue wait", "this kernel does not account it (task_delayacct)"),
        _ => close(
            "run-queue wait",
            cpu.wait_ns(),
            begin.map(|s| s.wait_ns),
            end.map(|s| s.wait_ns),
        ),
    }
    assert!(
        cpu.vcpu_run_ns > cpu.emulator_run_ns,
        "the vCPU is told from other threads: {cpu:?}"
    );
}

/// Each end of the interval was read from schedstat before and after the programs were. 5 % and 100 ms on top: schedstat lags behind by
/// the stretch that a thread is in.
fn close(what: &str, ours: u64, begin: [u64; 2], end: [u64; 2]) {
    let (least, most) = (end[0].saturating_sub(begin[1]), end[1] - begin[0]);
    let slack = most / 20 + 100_000_000;
    assert!(
        ours + slack > least && ours < most + slack,
        "{what}: {ours} ns, the kernel says {least} to {most} ns"
    );
}

/// Frames in both directions through a tap in another network namespace, byte by byte. QEMU's hub joins the tap and a datagram socket that is
/// the test's, so that no guest needs to run.
#[test]
fn network_traffic_is_exact() {
    let Some(mut lab) = Lab::new("net") else { return };
    let Some(ns) = lab::NetNs::new(&lab) else { return };
    let (host, qemu) = (lab.path("host.sock"), lab.path("qemu.sock"));
    let socket = UnixDatagram::bind(&host).unwrap();
    // QEMU takes and gives frames only while the VM runs; a test must end even then.
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    let dgram = format!(
        "dgram,id=s0,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        qemu.display(),
        host.display()
    );
    let vm = Vm::start(
        &lab,
        "ip",
        &["netns", "exec", &ns.name],
        &[
            "-M",
            "q35",
            "-netdev",
            "tap,id=t0,ifname=umbraA0,script=no,downscript=no",
            "-netdev",
            &dgram,
            "-netdev",
            "hubport,id=h0,hubid=0,netdev=t0",
            "-netdev",
            "hubport,id=h1,hubid=0,netdev=s0",
        ],
    );
    // Once it answers, tap and sockets are there.
    drop(vm.qmp(&lab));
    ns.ip("addr add 10.99.0.1/24 dev umbraA0");
    ns.ip("link set umbraA0 up");
    ns.ip("neigh add 10.99.0.2 lladdr 52:54:00:00:00:02 dev umbraA0");
    lab.until_found(&vm);
    lab.round();

    // The guest sends: Ethernet frames of an unassigned type, which nobody answers.
    let mut frame = vec![0xffu8; 600];
    frame[6..14].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 2, 0x88, 0xb5]);
    for _ in 0..100 {
        socket.send_to(&frame, &qemu).unwrap();
    }
    // The guest receives: 50 datagrams of 1000 bytes, 42 more on the wire.
    ns.send_udp("10.99.0.2:9", 50, 1000);
    let mut received = 0;
    let mut buffer = [0u8; 4096];
    while received < 50 {
        received += usize::from(socket.recv(&mut buffer).unwrap() == 1042);
    }
    let mut net = NetSample::default();
    // What QEMU took from the test's socket may still be on its way to the tap.
    lab::wait_for("100 frames from the tap", || {
        umbra_agent::meter::add_net(&mut net, &lab.round_of(&vm).net);
        net.tx_packets >= 100
    });
    assert_eq!((net.tx_packets, net.tx_bytes), (100, 100 * 600));
    assert_eq!((net.rx_packets, net.rx_bytes), (50, 50 * 1042));
}

/// Direct writes and reads on a loop device, byte by byte.
#[test]
fn disk_requests_are_exact() {
    let Some(mut lab) = Lab::new("disk") else { return };
    drop(lab.file("disk.img", 16 << 20));
    let Some(device) = lab::LoopDevice::new(&lab.path("disk.img")) else {
        return;
    };
    let node = format!(
        "driver=host_device,filename={},node-name=d0,cache.direct=on,aio=threads",
        device.path
    );
    let vm = Vm::start(&lab, "env", &[], &["-M", "q35", "-S", "-blockdev", &node]);
    // Once it answers it has opened the disk, and read from it what it probes.
    let mut qmp = vm.qmp(&lab);
    lab.until_found(&vm);
    lab.round();
    for i in 0..8 {
        qmp.human(&format!("qemu-io d0 \\\"write {i}M 1M\\\""));
    }
    for i in 0..4 {
        qmp.human(&format!("qemu-io d0 \\\"read {i}M 1M\\\""));
    }
    // Someone else's requests on the same device are not the VM's.
    let noise = Command::new("dd")
        .args([
            &format!("if={}", device.path),
            "of=/dev/null",
            "bs=1M",
            "count=4",
            "iflag=direct",
        ])
        .stderr(Stdio::null())
        .status();
    assert!(noise.unwrap().success());
    let block: BlockSample = lab.round_of(&vm).block;
    assert_eq!((block.write_bytes, block.read_bytes), (8 << 20, 4 << 20), "{block:?}");
    assert!(block.write_ops >= 8 && block.read_ops >= 4, "{block:?}");
    let counted: u64 = block.latency_us_log2.iter().sum();
    assert_eq!(counted, block.write_ops + block.read_ops);
}

/// A VM that ends, and one that begins, while the agent runs; and what the programs cost, which is only printed.
#[test]
fn vms_come_and_go_and_the_cost_is_told() {
    let Some(mut lab) = Lab::new("cost") else { return };
    let _stats = aya::sys::enable_stats(aya::sys::Stats::RunTime).unwrap();
    let first = Vm::start(&lab, "env", &[], &["-M", "q35"]);
    lab.until_found(&first);
    // Two processes that hand a byte to and fro on one CPU switch as often as can be.
    let ping = "import os\nr,w=os.pipe();s,x=os.pipe()\nn=40000\nif os.fork()==0:\n for _ in range(n): os.read(r,1);os.write(x,b'x')\nelse:\n for _ in range(n): os.write(w,b'x');os.read(s,1)\n";
    match Command::new("taskset")
        .args(["-c", "1", "python3", "-c", ping])
        .status()
    {
        Ok(s) if s.success() => {}
        _ => eprintln!("no python3: the cost is that of the machine's own switches"),
    }
    for c in lab.costs().iter().filter(|c| c.runs > 0) {
        eprintln!(
            "{:20} {:>9} runs {:>6.0} ns a run",
            c.name,
            c.runs,
            c.run_ns as f64 / c.runs as f64
        );
    }
    drop(first);
    lab.round();
    assert!(lab.vms().is_empty());
    let second = Vm::start(&lab, "env", &[], &["-M", "q35"]);
    lab.until_found(&second);
    assert_eq!(lab.vms(), [second.pid()]);
}
