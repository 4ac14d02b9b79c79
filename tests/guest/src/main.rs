//! The test guest's only program, PID 1 of a Linux without anything else. It is made so that a memory which is not exactly the
//! primary's, down to a page, is noticed in the guest and told on its console. See `options.rs` for what it can be asked at boot.
//!
//! Console: `C <ticks> err=<faults> t=<ms since boot> dirty=<pages written>`, one line a tick; `D <disk> <records acknowledged>`,
//! one a disk and tick; `E …` describes a fault.

mod burn;
mod disk;
mod http;
mod keeper;
mod options;
mod pattern;
mod record;
mod schedule;
mod state;
mod sys;

use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use burn::{Burner, Work};
use options::Options;
use pattern::Pattern;
use state::State;

fn main() {
    if std::process::id() != 1 {
        eprintln!("umbra-guest is the first process of a test guest, started by its kernel");
        std::process::exit(2);
    }
    mount_all();
    let (options, complaints) = Options::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    for complaint in complaints {
        say(&format!("W {complaint}"));
    }
    load_modules();
    if let Err(error) = configure_network(&options) {
        say(&format!("W network: {error}"));
    }
    let state = Arc::new(State::new(
        Burner::new(options.burn.clone()),
        Work::calibrate(options.work_us),
        options.dirty_pages_per_s,
        &options.disks,
        options.disk_records_per_s,
    ));
    start_services(&state);
    start_pattern(&options, &state);
    start_disks(&state);
    say("UP");
    tick(&state, Duration::from_millis(options.tick_ms));
}

fn say(line: &str) {
    // Nobody may be reading the console; that is no reason to stop.
    let _ = writeln!(io::stdout().lock(), "{line}");
}

fn mount_all() {
    let mounts = [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")];
    let failed: Vec<_> = mounts
        .iter()
        .filter_map(|(kind, target)| sys::mount(kind, target).err().map(|e| (target, e)))
        .collect();
    let _ = sys::use_console("/dev/console");
    for (target, error) in failed {
        say(&format!("W mount {target}: {error}"));
    }
    // The console is the guest's own: no kernel message in the middle of a line, unless the kernel dies.
    let _ = fs::write("/proc/sys/kernel/printk", "1 1 1 1");
}

/// Loads the modules in the order that the image's builder wrote down.
fn load_modules() {
    for name in fs::read_to_string("/modules/order").unwrap_or_default().lines() {
        if let Err(error) = sys::load_module(&format!("/modules/{name}")) {
            say(&format!("W module {name}: {error}"));
        }
    }
}

fn configure_network(options: &Options) -> io::Result<()> {
    // No router solicitations and no duplicate address detection: the wire carries what a test sends.
    let _ = fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let interfaces = sys::Interfaces::open()?;
    interfaces.up("lo")?;
    let Some((address, mask)) = options.ip else {
        return Ok(());
    };
    // The driver may still be probing when its module is loaded.
    let give_up = Instant::now() + Duration::from_secs(10);
    while !Path::new("/sys/class/net/eth0").exists() && Instant::now() < give_up {
        std::thread::sleep(Duration::from_millis(20));
    }
    interfaces.set_address("eth0", address, mask)?;
    interfaces.up("eth0")?;
    options
        .gateway
        .map_or(Ok(()), |gateway| interfaces.set_gateway(gateway))
}

fn start_services(state: &Arc<State>) {
    for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
        let state = state.clone();
        spawn("burner", move || state.burner.run());
    }
    match TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80)) {
        Ok(listener) => spawn("http", {
            let state = state.clone();
            move || http::serve(&listener, &state)
        }),
        Err(error) => say(&format!("W port 80: {error}")),
    }
    match UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 7)) {
        Ok(socket) => spawn("echo", move || echo(&socket)),
        Err(error) => say(&format!("W UDP port 7: {error}")),
    }
}

fn start_pattern(options: &Options, state: &Arc<State>) {
    match keeper::memory(options.pattern) {
        Ok(memory) => {
            let pattern = Pattern::fill(memory);
            state.pattern_pages.store(pattern.pages() as u64, Relaxed);
            let (state, scrub_s) = (state.clone(), options.scrub_s);
            spawn("keeper", move || keeper::run(pattern, &state, scrub_s));
        }
        Err(error) => say(&format!("W no memory for the pattern: {error}")),
    }
}

fn start_disks(state: &Arc<State>) {
    for n in 0..state.disks.len() {
        let state = state.clone();
        spawn("disk", move || {
            if let Some(disk) = state.disks.get(n) {
                disk::run(disk, &state);
            }
        });
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) {
    if let Err(error) = std::thread::Builder::new()
        .name(name.into())
        .stack_size(256 << 10)
        .spawn(body)
    {
        say(&format!("W thread {name}: {error}"));
    }
}

fn echo(socket: &UdpSocket) -> ! {
    let mut buffer = [0; 2048];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(buffer.get(..length).unwrap_or_default(), from);
        }
    }
}

fn tick(state: &State, every: Duration) -> ! {
    let mut next = Instant::now();
    loop {
        say(&state.console_line());
        for disk in &state.disks {
            say(&format!("D {} {}", disk.name, disk.acknowledged.load(Relaxed)));
        }
        state.counter.fetch_add(1, Relaxed);
        // Ticks that a stopped guest missed are not made up for.
        next = (next + every).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}
