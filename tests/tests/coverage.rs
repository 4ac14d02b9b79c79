//! Each kind of VM that the documents name goes to another host, with all of its memory, on real QEMUs.
//!
//! One lab and one pair of replicators for all: a case costs a guest's boot and a move.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use umbra_tests::lab::hardware::{self, Hardware, HugePages, Ram};
use umbra_tests::lab::pair::{Pair, with_pair};
use umbra_tests::lab::sector;
use umbra_tests::lab::vm::{self, Boots, Console, VmSpec};

struct Case {
    name: &'static str,
    vcpus: u32,
    hardware: Hardware,
    /// It comes back, too: a shadow's command line is adopted in its turn.
    back: bool,
}

impl Case {
    fn new(name: &'static str, machine: &'static str, vcpus: u32, ram: Ram) -> Self {
        let hardware = Hardware {
            machine,
            ram,
            ..Hardware::default()
        };
        Self {
            name,
            vcpus,
            hardware,
            back: false,
        }
    }

    fn spec(&self, n: u8) -> VmSpec {
        VmSpec {
            vcpus: self.vcpus,
            pattern_mib: Some(16),
            scrub_s: 1,
            dirty: 500,
            hardware: self.hardware.clone(),
            ..VmSpec::new(&format!("v{n}"), n)
        }
    }
}

fn cases() -> Vec<Case> {
    let mut nics = Case::new("pc of 8.1, memfd, 3 NICs", "pc-i440fx-8.1", 1, Ram::Memfd);
    nics.hardware.nics = 3;
    let mut uefi = Case::new("q35, UEFI with variables", "q35", 1, Ram::Anonymous);
    uefi.hardware.uefi = true;
    uefi.back = true;
    let mut microvm = Case::new("microvm with PCIe", "microvm,pcie=on", 1, Ram::Anonymous);
    microvm.back = true;
    vec![
        Case::new("q35, 2 vCPUs, shared file", "q35", 2, Ram::File { share: true }),
        Case::new("pc, 2 vCPUs", "pc", 2, Ram::Anonymous),
        Case::new("q35 of 8.1, private file", "pc-q35-8.1", 1, Ram::File { share: false }),
        nics,
        microvm,
        uefi,
        Case::new("q35, huge pages", "q35", 1, Ram::HugePages),
    ]
}

/// Moves the VM and lets the guest verify its whole pattern.
fn go(pair: &mut Pair, from: &str, to: &str) -> Result<()> {
    pair.protect(from, to)?;
    pair.wait_standby(from)?;
    // These are warm sooner than the watcher looks for copies.
    pair.wait_watched(from)?;
    pair.wait_watched(to)?;
    let report = pair.switchover(from)?;
    ensure!(pair.wait_runs()? == to, "after the switchover it runs on {to}");
    println!(
        "  {from} to {to}: guest stopped {:.1} ms (reported)",
        report.guest_stopped_us as f64 / 1e3
    );
    Ok(())
}

/// Taps that a host's replicator has made.
fn taps(pair: &Pair, host: &str) -> Result<usize> {
    let names = pair.host(host)?.interfaces()?;
    Ok(names.iter().filter(|n| n.starts_with("um")).count())
}

fn run(pair: &mut Pair, case: &Case) -> Result<()> {
    go(pair, "a", "b")?;
    let nics = usize::from(case.hardware.nics);
    ensure!(taps(pair, "b")? == nics, "a tap a NIC, not {}", taps(pair, "b")?);
    if case.hardware.uefi {
        same_variables(pair)?;
    }
    pair.retire("a")?;
    if case.back {
        go(pair, "b", "a")?;
        pair.retire("b")?;
    }
    pair.verify()
}

/// The firmware wrote its variables when it booted; the shadow has them on an image of its own.
fn same_variables(pair: &Pair) -> Result<()> {
    let read = |path: PathBuf| std::fs::read(&path).with_context(|| path.display().to_string());
    let mut images = std::fs::read_dir(pair.host("b")?.folder("disks")?)?;
    let image = images.next().context("no image of the variables on b")??.path();
    let here = read(hardware::variables(pair.host("a")?, &pair.vm.spec.name))?;
    ensure!(here == read(image)?, "the variables on b are the ones on a");
    Ok(())
}

#[test]
fn each_kind_of_vm_goes_with_all_of_its_memory() {
    let cases = cases();
    let Some(first) = cases.first() else { return };
    with_pair("coverage", &first.spec(10), |pair| {
        for (n, case) in (10..).zip(&cases) {
            let start = Instant::now();
            println!("{}", case.name);
            if let Some(why) = case.hardware.missing() {
                println!("SKIPPED: {}: {why}", case.name);
                continue;
            }
            let spec = case.spec(n);
            let _huge = match case.hardware.ram {
                Ram::HugePages => match HugePages::reserve(spec.mem_mib) {
                    Ok(reserved) => Some(reserved),
                    Err(why) => {
                        println!("SKIPPED: {}: {why:#}", case.name);
                        continue;
                    }
                },
                _ => None,
            };
            if n > 10 {
                pair.replace_vm(&spec).with_context(|| case.name)?;
            }
            run(pair, case).with_context(|| case.name)?;
            println!("  {:.1} s in all", start.elapsed().as_secs_f64());
        }
        Ok(())
    });
}

/// Machine and accelerator. Two vCPUs: the second one waits for ever, and its state goes along.
const KVM: [(&str, &str, u32); 2] = [("q35", "kvm", 1), ("pc", "kvm,dirty-ring-size=4096", 2)];

fn kvm_spec(n: u8, (machine, accel, vcpus): (&'static str, &'static str, u32)) -> VmSpec {
    VmSpec {
        mem_mib: 64,
        vcpus,
        boots: Boots::Sector,
        hardware: Hardware {
            machine,
            accel: Some(accel),
            ram: Ram::File { share: true },
            ..Hardware::default()
        },
        ..VmSpec::new(&format!("k{n}"), n)
    }
}

/// The console of the QEMU that ran on a host, copied before the QEMU goes.
fn console(pair: &Pair, host: &str) -> Result<String> {
    let pids = vm::qemus(pair.host(host)?, pair.id());
    let path = pids
        .into_iter()
        .find_map(vm::console_of)
        .context("no QEMU with a console")?;
    Ok(String::from_utf8_lossy(&std::fs::read(path)?).into_owned())
}

/// The stopped primary's RAM is the shadow's, but for what the guest wrote since.
fn same_ram(pair: &Pair) -> Result<()> {
    let primary = hardware::ram_file(pair.host("a")?, &pair.vm.spec.name)?;
    let shadows = pair.ram_files("b")?;
    let [shadow] = shadows.as_slice() else {
        anyhow::bail!("one RAM file on b, not {shadows:?}")
    };
    let (old, new) = (std::fs::read(primary)?, std::fs::read(shadow)?);
    ensure!(
        old.len() == new.len() && old.len() == 64 << 20,
        "{} and {} bytes",
        old.len(),
        new.len()
    );
    let pages = (0u64..).zip(old.chunks(4096).zip(new.chunks(4096)));
    let wrong: Vec<u64> = pages
        .filter(|(n, (a, b))| a != b && !sector::is_written(*n))
        .map(|(n, _)| n)
        .collect();
    ensure!(wrong.is_empty(), "pages differ that nobody wrote: {wrong:x?}");
    ensure!(
        old.chunks(4096).filter(|p| p.iter().any(|b| *b != 0)).count() > 64,
        "there was something to compare"
    );
    Ok(())
}

#[test]
fn a_guest_under_kvm_counts_on_there_and_back() {
    if let Err(e) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        println!("SKIPPED: /dev/kvm: {e}");
        return;
    }
    with_pair("kvm", &kvm_spec(30, KVM[0]), |pair| {
        for (n, kind) in (30..).zip(KVM) {
            println!("{kind:?}");
            if n > 30 {
                pair.replace_vm(&kvm_spec(n, kind))?;
            }
            go(pair, "a", "b")?;
            same_ram(pair)?;
            let mut told = console(pair, "a")?;
            pair.retire("a")?;
            go(pair, "b", "a")?;
            told += &console(pair, "b")?;
            told += &console(pair, "a")?;
            pair.retire("b")?;
            let story = Console::of(&told);
            println!("  {story:?}");
            ensure!(story.errors == 0, "{} pages were wrong", story.errors);
            ensure!(
                story.jumps == 0 && story.last_counter > 20,
                "it counts on from host to host: {story:?}"
            );
        }
        Ok(())
    });
}
