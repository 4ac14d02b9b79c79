//! A guest with real programs of this machine: its image, and how it is started.
//!
//! The test guest's own initramfs, and behind it a second archive, which the kernel unpacks over the first: busybox, GCC's
//! compiler, the assembler and sqlite3 with the libraries that they want, a tree of files to serve, and `mix.sh` as the first process.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::lab::host::Host;
use crate::lab::process::{Process, output, wait_for};
use crate::lab::qmp::Qmp;
use crate::lab::vm::{GuestImage, qemu, tail};

/// Compiling under TCG on a busy machine.
const READY: Duration = Duration::from_secs(240);
pub const MEM_MIB: u32 = 512;

/// What is served: bytes of files of each folder, in the order of their names, none above 2 MB.
const SERVED: [(&str, u64); 3] = [
    ("/usr/include", 20 << 20),
    ("/usr/lib/x86_64-linux-gnu", 20 << 20),
    ("/usr/share/doc", 20 << 20),
];
const FILE_MAX: u64 = 2 << 20;

const SCRIPTS: [(&str, &str); 3] = [
    ("mix", include_str!("mix.sh")),
    ("sql/make", include_str!("make.sql")),
    ("sql/step", include_str!("step.sql")),
];

fn which(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|d| d.join(program))
        .find(|p| p.is_file())
        .with_context(|| format!("{program} is not installed"))
}

fn line(cmd: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&output(cmd)?).trim().to_owned())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("a file without a folder")?;
    fs::create_dir_all(folder)?;
    fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    Ok(())
}

/// `/usr/include/a.h` below `tree`.
fn below(tree: &Path, path: &Path) -> PathBuf {
    tree.join(path.strip_prefix("/").unwrap_or(path))
}

fn programs(tree: &Path) -> Result<()> {
    let compiler = PathBuf::from(line(Command::new("gcc").arg("-print-prog-name=cc1"))?);
    let mut all = vec![("cc1", compiler)];
    for name in ["busybox", "as", "sqlite3"] {
        all.push((name, which(name)?));
    }
    let mut libraries = BTreeSet::new();
    for (name, path) in &all {
        copy(path, &tree.join("bin").join(name))?;
        // A static program has none, and ldd says so by failing.
        let told = line(Command::new("ldd").arg(path)).unwrap_or_default();
        libraries.extend(
            told.split_ascii_whitespace()
                .filter(|w| w.starts_with('/'))
                .map(PathBuf::from),
        );
    }
    libraries.iter().try_for_each(|l| copy(l, &below(tree, l)))
}

/// zstd's sources as cargo fetched them for the replicator.
fn zstd_sources() -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let registry = home.context("no CARGO_HOME and no HOME")?.join("registry/src");
    let entries = |p: &Path| -> Vec<PathBuf> {
        let read = fs::read_dir(p).into_iter().flatten().flatten();
        read.map(|e| e.path()).collect()
    };
    let crates = entries(&registry).into_iter().flat_map(|index| entries(&index));
    let mut found: Vec<_> = crates
        .filter(|p| {
            p.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("zstd-sys-"))
        })
        .collect();
    found.sort();
    let newest = found
        .pop()
        .with_context(|| format!("no zstd-sys in {}", registry.display()))?;
    Ok(newest.join("zstd/lib"))
}

fn sources(tree: &Path) -> Result<()> {
    let zstd = zstd_sources()?;
    for folder in [".", "common", "compress"] {
        for entry in fs::read_dir(zstd.join(folder))? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "c" || e == "h") {
                copy(
                    &path,
                    &tree.join("src").join(folder).join(path.file_name().unwrap_or_default()),
                )?;
            }
        }
    }
    // The headers that they include, as the compiler itself finds them.
    let own = PathBuf::from(line(Command::new("gcc").arg("-print-file-name=include"))?);
    let units = fs::read_dir(zstd.join("compress"))?.flatten().map(|e| e.path());
    let units = units.filter(|p| p.extension().is_some_and(|e| e == "c"));
    let told = line(Command::new("gcc").args(["-O1", "-M"]).args(units))?;
    let headers: BTreeSet<_> = told.split([' ', '\\', '\n']).filter(|w| w.starts_with('/')).collect();
    for header in headers.into_iter().map(Path::new).filter(|h| !h.starts_with(&zstd)) {
        match header.strip_prefix(&own) {
            Ok(name) => copy(header, &tree.join("gcc").join(name))?,
            Err(_) => copy(header, &below(tree, header))?,
        }
    }
    Ok(())
}

fn files(folder: &Path, out: &mut Vec<(PathBuf, u64)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(m) if m.is_dir() => files(&entry.path(), out),
            Ok(m) if m.is_file() && m.len() <= FILE_MAX => out.push((entry.path(), m.len())),
            _ => {}
        }
    }
}

fn served(tree: &Path) -> Result<()> {
    for (folder, bytes) in SERVED {
        let (mut all, mut left) = (Vec::new(), bytes);
        files(Path::new(folder), &mut all);
        all.sort();
        for (path, len) in all {
            let Some(rest) = left.checked_sub(len) else { break };
            left = rest;
            copy(&path, &below(&tree.join("srv/files"), &path))?;
        }
    }
    Ok(())
}

/// Makes the image in `dir`.
pub fn image(dir: &Path) -> Result<GuestImage> {
    let base = GuestImage::find()?;
    let tree = dir.join("tree");
    for make in [programs, sources, served] {
        make(&tree)?;
    }
    for (name, text) in SCRIPTS {
        let path = tree.join(name);
        fs::create_dir_all(path.parent().unwrap_or(&tree))?;
        fs::write(&path, text)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&path, mode)?;
    }
    let initrd = dir.join("mix.img");
    let mut archive = fs::read(&base.initrd)?;
    archive.extend(pack(&tree)?);
    fs::write(&initrd, archive)?;
    fs::remove_dir_all(&tree)?;
    Ok(GuestImage {
        kernel: base.kernel,
        initrd,
    })
}

fn pack(tree: &Path) -> Result<Vec<u8>> {
    let mut names = Vec::new();
    list(tree, tree, &mut names)?;
    names.sort();
    let mut cpio = Command::new("busybox")
        .args(["cpio", "-o", "-H", "newc"])
        .current_dir(tree)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("starting busybox cpio")?;
    let mut input = cpio.stdin.take().context("no standard input")?;
    let feeder = std::thread::spawn(move || input.write_all(names.join("\n").as_bytes()));
    let out = cpio.wait_with_output()?;
    // It reads all names or has failed.
    let _ = feeder.join();
    match out.status.success() {
        true => Ok(out.stdout),
        false => bail!("busybox cpio: {}", out.status),
    }
}

fn list(root: &Path, folder: &Path, names: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        names.push(path.strip_prefix(root)?.to_string_lossy().into_owned());
        if path.is_dir() {
            list(root, &path, names)?;
        }
    }
    Ok(())
}

pub struct Guest {
    pub process: Process,
    pub qmp: Qmp,
}

impl Guest {
    /// Starts a guest, and waits until its load is under way.
    pub fn start(host: &Host, image: &GuestImage, mix: &str) -> Result<Self> {
        let (socket, serial) = (host.file(&format!("{mix}.qmp")), host.file(&format!("{mix}.serial")));
        let mut cmd = Command::new(qemu()?);
        cmd.args(["-name", &format!("{mix},debug-threads=on")])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-M", "q35", "-accel", "tcg", "-m", &MEM_MIB.to_string()])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initrd)
            .args([
                "-append",
                &format!("console=ttyS0 quiet panic=-1 rdinit=/mix mix={mix}"),
            ])
            .args(["-serial", &format!("file:{}", serial.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        let mut process = host.spawn(mix, cmd)?;
        let qmp = Qmp::connect(&socket, Duration::from_secs(30))?;
        let up = wait_for(&format!("the load '{mix}'"), READY, || {
            process.check()?;
            let text = fs::read(&serial).unwrap_or_default();
            Ok(String::from_utf8_lossy(&text).contains("READY").then_some(()))
        });
        up.with_context(|| format!("its console says: {}", tail(&serial)))?;
        Ok(Self { process, qmp })
    }
}
