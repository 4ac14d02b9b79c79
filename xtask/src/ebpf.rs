//! Builds the agent's kernel programs, once for every profile, into `<target>/ebpf/umbra-agent.bpf.o`; `agent/build.rs` embeds that file.
//!
//! Programs for bpfel-unknown-none need three things that cargo alone does not bring: the sources of `core`, a compiler that takes
//! `-Z build-std`, and `bpf-linker`, which links with the compiler's own version of LLVM. There are two ways to have them:
//!
//! | | compiler | `core` | LLVM for bpf-linker |
//! |---|---|---|---|
//! | `rustup` | nightly | component rust-src | a libLLVM with headers, installed by hand: bpf-linker is taken from PATH |
//! | `debian` | rustc-web, with RUSTC_BOOTSTRAP in the inner build alone | rust-web-src | libllvm22, all three of one version |
//!
//! The Debian way is taken where its packages are, because it can be set up without asking anybody: `setup_tools` builds bpf-linker
//! and lays out a folder that looks like a toolchain. UMBRA_EBPF_TOOLCHAIN = `rustup` or `debian` overrules.

use std::collections::hash_map::DefaultHasher;
use std::ffi::OsString;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What the Debian way needs from apt. Debian 12 has them in its security archive.
pub const DEBIAN_PACKAGES: &[&str] = &["rustc-web", "rust-web-src", "libllvm22"];

const BPF_LINKER: &str = "0.13.0";
const PACKAGE: &str = "umbra-agent-ebpf";
const BIN: &str = "umbra-agent-bpf";
const TARGET: &str = "bpfel-unknown-none";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_RUSTLIB: &str = "/usr/lib/rustlib";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Rustup,
    Debian,
}

/// Where the tools are kept: `$UMBRA_CACHE`, else `~/.cache/umbra`.
pub fn cache_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("UMBRA_CACHE") {
        return Ok(dir.into());
    }
    let home = std::env::var_os("HOME").context("neither UMBRA_CACHE nor HOME is set")?;
    Ok(PathBuf::from(home).join(".cache/umbra"))
}

/// The workspace's target folder, which CARGO_TARGET_DIR may move.
pub fn target_dir(root: &Path) -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root.join(dir),
        None => root.join("target"),
    }
}

/// Whether `build` could run now; if not, why.
pub fn check_tools() -> Result<()> {
    let cache = cache_dir()?;
    match way() {
        Some(Way::Rustup) => Ok(()),
        Some(Way::Debian) => match linker(&cache).is_file() && toolchain(&cache).join("bin/rustc").exists() {
            true => Ok(()),
            false => bail!(
                "bpf-linker or the toolchain folder is missing under {}",
                cache.display()
            ),
        },
        None => bail!(
            "no compiler for eBPF: neither {DEBIAN_RUSTC} with its sources, nor rustup's nightly with rust-src and bpf-linker"
        ),
    }
}

/// Makes what `build` needs and is not there yet. The packages of the Debian way must be installed before. `say` gets one line
/// a step that does something; with everything in place it is silent.
pub fn setup_tools(say: &dyn Fn(&str)) -> Result<()> {
    let cache = cache_dir()?;
    match way() {
        Some(Way::Rustup) => return Ok(()),
        Some(Way::Debian) => {}
        None => bail!(
            "install {} first, or rustup's nightly with rust-src and a bpf-linker on PATH",
            DEBIAN_PACKAGES.join(", ")
        ),
    }
    lay_out_toolchain(&cache, say)?;
    build_linker(&cache, say)
}

/// Builds the object unless its sources and tools are the same as last time, and returns its path.
pub fn build(root: &Path) -> Result<PathBuf> {
    let cache = cache_dir()?;
    let out = target_dir(root).join("ebpf");
    let object = out.join("umbra-agent.bpf.o");
    let stamp = out.join("umbra-agent.bpf.stamp");
    check_tools().context("run `cargo xtask setup`")?;
    let way = way().context("no compiler for eBPF")?;
    let wanted = fingerprint(root, way)?;
    if object.is_file() && fs::read_to_string(&stamp).is_ok_and(|s| s == wanted) {
        return Ok(object);
    }
    let inner = out.join("build");
    fs::create_dir_all(&inner).with_context(|| inner.display().to_string())?;
    let mut cargo = inner_cargo(root, &cache, way, &inner)?;
    let status = cargo.status().with_context(|| format!("{cargo:?}"))?;
    if !status.success() {
        bail!("the build of the eBPF programs failed ({status}): {cargo:?}");
    }
    let built = inner.join(TARGET).join("release").join(BIN);
    // Renamed into place: a build of the agent that runs beside this one never reads half a file.
    let staged = out.join("umbra-agent.bpf.o.new");
    fs::copy(&built, &staged).with_context(|| format!("{} to {}", built.display(), staged.display()))?;
    fs::rename(&staged, &object).with_context(|| object.display().to_string())?;
    fs::write(&stamp, wanted).with_context(|| stamp.display().to_string())?;
    Ok(object)
}

fn way() -> Option<Way> {
    let debian = Path::new(DEBIAN_RUSTC).exists()
        && Path::new(DEBIAN_RUSTLIB).join("src/rust/library/core").is_dir()
        && libllvm().is_some();
    let rustup = || {
        let out = Command::new("rustup")
            .args(["run", "nightly", "rustc", "--print", "sysroot"])
            .output()
            .ok();
        let sysroot = out
            .filter(|o| o.status.success())
            .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
        sysroot.is_some_and(|s| Path::new(&s).join("lib/rustlib/src/rust/library/core").is_dir())
            && on_path("bpf-linker")
    };
    match std::env::var("UMBRA_EBPF_TOOLCHAIN").as_deref() {
        Ok("rustup") => Some(Way::Rustup),
        Ok("debian") => Some(Way::Debian),
        _ if debian => Some(Way::Debian),
        _ => rustup().then_some(Way::Rustup),
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|d| d.join(program).is_file())
}

/// LLVM 22 of any minor version: its ABI is stable within a major one.
fn libllvm() -> Option<PathBuf> {
    let dir = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    let libraries = fs::read_dir(dir).ok()?.filter_map(|e| Some(e.ok()?.path()));
    let is_22 = |p: &PathBuf| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("libLLVM.so.22.")
    };
    libraries.filter(is_22).max()
}

fn linker(cache: &Path) -> PathBuf {
    cache.join(format!("bpf-linker-{BPF_LINKER}/bin/bpf-linker"))
}

fn toolchain(cache: &Path) -> PathBuf {
    cache.join("ebpf-toolchain")
}

/// rustup's cargo beside Debian's rustc and sources: cargo looks for `core` relative to the compiler's sysroot, and rustup's is newer
/// than Debian's own.
fn lay_out_toolchain(cache: &Path, say: &dyn Fn(&str)) -> Result<()> {
    let dir = toolchain(cache);
    let cargo = match Command::new("rustup").args(["which", "cargo"]).output() {
        Ok(o) if o.status.success() => PathBuf::from(String::from_utf8_lossy(&o.stdout).trim()),
        _ => std::env::var_os("CARGO")
            .map(PathBuf::from)
            .context("no cargo: run this by `cargo xtask`")?,
    };
    let links = [
        (PathBuf::from(DEBIAN_RUSTC), dir.join("bin/rustc")),
        (cargo, dir.join("bin/cargo")),
        (PathBuf::from(DEBIAN_RUSTLIB), dir.join("lib/rustlib")),
        (
            libllvm().context("libllvm22 is not installed")?,
            cache.join("llvm22/lib/libLLVM.so"),
        ),
    ];
    for (to, link) in links {
        if fs::read_link(&link).is_ok_and(|t| t == to) {
            continue;
        }
        say(&format!(
            "{} -> {}: part of the eBPF toolchain",
            link.display(),
            to.display()
        ));
        if let Some(parent) = link.parent() {
            fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        }
        match fs::remove_file(&link) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).context(link.display().to_string()),
            _ => symlink(&to, &link).with_context(|| link.display().to_string())?,
        }
    }
    Ok(())
}

fn build_linker(cache: &Path, say: &dyn Fn(&str)) -> Result<()> {
    if linker(cache).is_file() {
        return Ok(());
    }
    say(&format!(
        "cargo install bpf-linker {BPF_LINKER}: links the kernel programs; its default wants LLVM 23, Debian has 22"
    ));
    let root = cache.join(format!("bpf-linker-{BPF_LINKER}"));
    let status = Command::new("cargo")
        .args([
            "install",
            "bpf-linker",
            "--version",
            BPF_LINKER,
            "--locked",
            "--no-default-features",
            "--features",
            "llvm-22",
        ])
        .arg("--root")
        .arg(&root)
        .env("LLVM_PREFIX", cache.join("llvm22"))
        // Not the repository's target folder, and not its flags.
        .current_dir(cache)
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("RUSTFLAGS")
        .status()
        .context("cargo install bpf-linker")?;
    match status.success() {
        true => Ok(()),
        false => bail!("cargo install bpf-linker: {status}"),
    }
}

fn inner_cargo(root: &Path, cache: &Path, way: Way, target_dir: &Path) -> Result<Command> {
    let mut cmd = match way {
        Way::Rustup => {
            let mut c = Command::new("rustup");
            c.args(["run", "nightly", "cargo"]);
            c
        }
        Way::Debian => {
            let dir = toolchain(cache);
            let mut c = Command::new(dir.join("bin/cargo"));
            let linker_dir = linker(cache).parent().map(Path::to_owned).unwrap_or_default();
            let path = std::env::var_os("PATH").unwrap_or_default();
            let dirs = [dir.join("bin"), linker_dir]
                .into_iter()
                .chain(std::env::split_paths(&path));
            c.env("PATH", std::env::join_paths(dirs).context("PATH")?);
            c.env("RUSTC", dir.join("bin/rustc"));
            // A release compiler takes -Z flags only so; it is set for this build alone.
            c.env("RUSTC_BOOTSTRAP", "1");
            c
        }
    };
    if way == Way::Rustup {
        cmd.env_remove("RUSTC");
    }
    cmd.current_dir(root)
        .args([
            "build",
            "--release",
            "--quiet",
            "-Z",
            "build-std=core",
            "--target",
            TARGET,
        ])
        .args(["--package", PACKAGE, "--bin", BIN, "--features", "programs"])
        .arg("--target-dir")
        .arg(target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags())
        // The workspace's release profile is meant for daemons.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
    for key in [
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "CARGO_TARGET_DIR",
        "CARGO_BUILD_TARGET",
    ] {
        cmd.env_remove(key);
    }
    Ok(cmd)
}

/// The bindings differ by the host's architecture; `--btf` keeps the types of maps and programs in the object.
fn rustflags() -> OsString {
    let arch = std::env::consts::ARCH;
    [
        format!("--cfg=bpf_target_arch=\"{arch}\""),
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
    ]
    .join("\x1f")
    .into()
}

/// Changes whenever the object could: with the sources' text, the way, and the compiler.
fn fingerprint(root: &Path, way: Way) -> Result<String> {
    let mut h = DefaultHasher::new();
    let dir = root.join("agent-ebpf");
    let mut files = vec![dir.join("Cargo.toml")];
    for entry in fs::read_dir(dir.join("src")).with_context(|| dir.display().to_string())? {
        files.push(entry?.path());
    }
    files.sort();
    for f in files {
        f.file_name().hash(&mut h);
        fs::read(&f).with_context(|| f.display().to_string())?.hash(&mut h);
    }
    let rustc = match way {
        Way::Debian => Command::new(DEBIAN_RUSTC).arg("-V").output(),
        Way::Rustup => Command::new("rustup").args(["run", "nightly", "rustc", "-V"]).output(),
    };
    rustc.context("rustc -V")?.stdout.hash(&mut h);
    Ok(format!("{way:?} {:016x}\n", h.finish()))
}
