//! `cargo xtask setup`: makes the machine ready, step by step. Each step looks first, and does nothing where nothing is missing;
//! so the second run is quick and asks nothing of the network.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::debian::{self, Apt};
use crate::{ebpf, guest, run};

/// The first QEMU that can hold a migration open (capability `switchover-ack`).
const QEMU_LEAST: &str = "1:8.1";

#[derive(Args, Default)]
pub struct Options {
    /// Only list the steps, why each is there, and what is missing
    #[arg(long)]
    print: bool,
}

pub struct Context {
    root: PathBuf,
    apt: Apt,
}

enum Look {
    /// Nothing to do, and what was found.
    There(String),
    /// What the step would do.
    Missing(String),
}

struct Step {
    name: &'static str,
    why: &'static str,
    look: fn(&Context) -> Result<Look>,
    act: fn(&mut Context) -> Result<String>,
    needs_root: bool,
    /// Umbra can do without: a failure is told, and setup goes on.
    optional: bool,
}

const STEPS: &[Step] = &[
    Step {
        name: "backports source",
        why: "Debian 12's own QEMU is 7.2; Umbra needs 8.1 or newer, which backports have",
        look: look_backports,
        act: add_backports,
        needs_root: true,
        optional: false,
    },
    Step {
        name: "security source",
        why: "a compiler for the kernel programs (rustc-web, libllvm22) is in Debian 12's security archive only",
        look: look_security,
        act: add_security,
        needs_root: true,
        optional: false,
    },
    Step {
        name: "Debian packages",
        why: "QEMU, UEFI firmware for a test, network namespaces, a C compiler for bundled libraries, a compiler for the kernel programs",
        look: look_packages,
        act: install_packages,
        needs_root: true,
        optional: false,
    },
    Step {
        name: "eBPF toolchain",
        why: "bpf-linker, and a folder that joins cargo with a compiler that builds for the kernel",
        look: look_ebpf,
        act: setup_ebpf,
        needs_root: false,
        optional: false,
    },
    Step {
        name: "tracefs",
        why: "to watch the kernel's tracepoints by hand; the agent itself needs only BTF",
        look: look_tracefs,
        act: mount_tracefs,
        needs_root: true,
        optional: true,
    },
    Step {
        name: "guest image",
        why: "Debian's cloud kernel (fetched, not installed) and a program that notices a single wrong page of its memory",
        look: look_guest,
        act: make_guest,
        needs_root: false,
        optional: false,
    },
];

pub fn run(options: &Options) -> Result<()> {
    let mut context = Context {
        root: run::root(),
        apt: Apt::default(),
    };
    for step in STEPS {
        let look = (step.look)(&context).with_context(|| format!("setup, {}", step.name))?;
        match look {
            Look::There(found) => println!("  ok       {}: {found}", step.name),
            Look::Missing(what) => {
                println!("  missing  {}: {what}", step.name);
                println!("           why: {}", step.why);
                if !options.print {
                    act(step, &mut context)?;
                }
            }
        }
    }
    Ok(())
}

fn act(step: &Step, context: &mut Context) -> Result<()> {
    if step.needs_root && !run::is_root() {
        let message = format!(
            "setup, {}: this step needs root. Run `cargo xtask setup` once as root",
            step.name
        );
        if step.optional {
            println!("  skipped  {message}");
            return Ok(());
        }
        bail!(message);
    }
    match (step.act)(context) {
        Ok(done) => println!("  done     {}: {done}", step.name),
        Err(error) if step.optional => println!("  skipped  {}: {error:#}", step.name),
        Err(error) => return Err(error.context(format!("setup, {}", step.name))),
    }
    Ok(())
}

fn needs_new_qemu() -> bool {
    !debian::has("qemu-system-x86", QEMU_LEAST) || !debian::has("qemu-utils", QEMU_LEAST)
}

/// Debian 12 is the one release that needs a second source; newer ones have a QEMU that is new enough.
fn bookworm_backports() -> Option<&'static str> {
    (debian::codename()? == "bookworm").then_some("bookworm-backports")
}

fn look_backports(_: &Context) -> Result<Look> {
    let Some(suite) = bookworm_backports() else {
        return Ok(Look::There("not needed on this release".into()));
    };
    if debian::sources().iter().any(|source| source.suite == suite) {
        return Ok(Look::There(format!("{suite} is configured")));
    }
    if !needs_new_qemu() {
        return Ok(Look::There("not needed, QEMU is new enough".into()));
    }
    Ok(Look::Missing(format!(
        "writes /etc/apt/sources.list.d/umbra-backports.sources for {suite}"
    )))
}

fn add_backports(_: &mut Context) -> Result<String> {
    let suite = bookworm_backports().context("not Debian 12")?;
    let archive = debian::archive_of(&debian::sources(), "bookworm");
    debian::add_source("umbra-backports.sources", "QEMU 8.1 or newer", &archive, suite)?;
    Ok(format!("{suite} of {}", archive.uri))
}

fn missing_ebpf_packages() -> Vec<&'static str> {
    // Whoever has rustup's nightly with its sources and a linker needs none of them.
    if ebpf::check_tools().is_ok() {
        return Vec::new();
    }
    ebpf::DEBIAN_PACKAGES
        .iter()
        .copied()
        .filter(|name| !debian::has(name, ""))
        .collect()
}

fn look_security(_: &Context) -> Result<Look> {
    let there = debian::sources()
        .iter()
        .any(|source| source.suite.ends_with("-security"));
    if there || debian::codename().as_deref() != Some("bookworm") || missing_ebpf_packages().is_empty() {
        return Ok(Look::There("configured or not needed".into()));
    }
    Ok(Look::Missing(
        "writes /etc/apt/sources.list.d/umbra-security.sources".into(),
    ))
}

fn add_security(_: &mut Context) -> Result<String> {
    let archive = debian::archive_of(&debian::sources(), "bookworm");
    // Debian's mirrors carry it beside the archive, under this name.
    let uri = format!("{}-security", archive.uri.trim_end_matches('/'));
    let security = debian::Source { uri, ..archive };
    debian::add_source(
        "umbra-security.sources",
        "rustc-web and libllvm22",
        &security,
        "bookworm-security",
    )?;
    Ok(security.uri)
}

/// Package and the oldest version that will do.
const PACKAGES: &[(&str, &str)] = &[
    ("qemu-system-x86", QEMU_LEAST),
    ("qemu-utils", QEMU_LEAST),
    ("ovmf", ""),
    ("iproute2", ""),
    ("build-essential", ""),
    ("pkg-config", ""),
    ("xz-utils", ""),
    // For the scorer of the traces, which a test compares with ours.
    ("python3-numpy", ""),
    ("zstd", ""),
];

fn missing_packages() -> Vec<&'static str> {
    let missing = PACKAGES
        .iter()
        .filter(|(name, least)| !debian::has(name, least))
        .map(|(name, _)| *name);
    missing.chain(missing_ebpf_packages()).collect()
}

fn look_packages(_: &Context) -> Result<Look> {
    let missing = missing_packages();
    if missing.is_empty() {
        let qemu = debian::installed("qemu-system-x86").unwrap_or_default();
        return Ok(Look::There(format!("all are installed, QEMU {qemu}")));
    }
    Ok(Look::Missing(format!("installs {}", missing.join(" "))))
}

fn install_packages(context: &mut Context) -> Result<String> {
    debian::require_apt()?;
    let missing = missing_packages();
    let (qemu, rest): (Vec<_>, Vec<_>) = missing.iter().partition(|name| name.starts_with("qemu"));
    context.apt.install(&rest, None)?;
    context.apt.install(&qemu, bookworm_backports())?;
    let still = missing_packages();
    if !still.is_empty() {
        bail!(
            "apt installed them, but these are still missing or too old: {}",
            still.join(" ")
        );
    }
    Ok(missing.join(" "))
}

fn look_ebpf(_: &Context) -> Result<Look> {
    Ok(match ebpf::check_tools() {
        Ok(()) => Look::There("ready".into()),
        Err(missing) => Look::Missing(format!("{missing:#}")),
    })
}

fn setup_ebpf(_: &mut Context) -> Result<String> {
    ebpf::setup_tools(&|line| println!("    {line}"))?;
    Ok("ready".into())
}

fn look_tracefs(_: &Context) -> Result<Look> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read the mounts")?;
    let mounted = mounts.lines().find(|line| line.split(' ').nth(2) == Some("tracefs"));
    Ok(match mounted.and_then(|line| line.split(' ').nth(1)) {
        Some(place) => Look::There(format!("mounted on {place}")),
        None => Look::Missing("mounts it on /sys/kernel/tracing".into()),
    })
}

fn mount_tracefs(_: &mut Context) -> Result<String> {
    run::output(Command::new("mount").args(["-t", "tracefs", "nodev", "/sys/kernel/tracing"]))?;
    Ok("mounted until the next boot".into())
}

fn look_guest(context: &Context) -> Result<Look> {
    Ok(if guest::looks_current(&context.root) {
        Look::There("target/guest/vmlinuz and initrd.img".into())
    } else {
        Look::Missing("target/guest/vmlinuz and initrd.img, made anew if their sources changed".into())
    })
}

fn make_guest(context: &mut Context) -> Result<String> {
    guest::make(&context.root, &mut context.apt)
}
