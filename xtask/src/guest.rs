//! The test guest's image: Debian's cloud kernel, and an initramfs of one static program with the modules it loads.
//!
//! ```text
//! cache/kernel/<package>/  vmlinuz, modules/*.ko, modules/order      fetched once, never installed
//! target/guest/            vmlinuz, initrd.img, stamp                what tests and the demo boot
//! ```

use std::collections::HashMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

use crate::cpio::Archive;
use crate::debian::Apt;
use crate::{ebpf, run};

const KERNEL: &str = "linux-image-cloud-amd64";
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What the guest drives; their dependencies are found from the modules themselves.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_net", "virtio_blk", "virtio_scsi", "sd_mod"];
/// In the cache beside the modules: for which list they were picked.
const WANTED: &str = "modules/wanted";

pub fn folder(root: &Path) -> PathBuf {
    ebpf::target_dir(root).join("guest")
}

/// Whether an image is there that is newer than the sources of its program: a quick look, for `--print`.
pub fn looks_current(root: &Path) -> bool {
    let made = modified(&folder(root).join("stamp"));
    let sources = [
        "tests/guest/Cargo.toml",
        "tests/guest/src",
        "xtask/src/guest.rs",
        "xtask/src/cpio.rs",
    ]
    .map(|path| newest(&root.join(path)));
    made.is_some_and(|made| sources.into_iter().flatten().all(|source| source <= made))
        && folder(root).join("initrd.img").exists()
        && folder(root).join("vmlinuz").exists()
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|meta| meta.modified()).ok()
}

fn newest(path: &Path) -> Option<SystemTime> {
    let inside = fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| newest(&entry.path()));
    inside.chain(modified(path)).max()
}

/// Makes the image if anything in it changed. The answer says which kernel it has, and whether it was made anew.
pub fn make(root: &Path, apt: &mut Apt) -> Result<String> {
    let kernel = kernel(apt)?;
    let program = fs::read(program(root)?)?;
    let image = initramfs(&kernel, &program)?;
    let folder = folder(root);
    let name = kernel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut hasher = DefaultHasher::new();
    image.hash(&mut hasher);
    let stamp = format!("{name} {:016x}\n", hasher.finish());
    let there = ["vmlinuz", "initrd.img"].iter().all(|file| folder.join(file).exists());
    let stamp_file = folder.join("stamp");
    if there && fs::read_to_string(&stamp_file).is_ok_and(|old| old == stamp) {
        // Touched, so that the quick look sees it as newer than sources that changed without a change of the program.
        fs::write(&stamp_file, &stamp)?;
        return Ok(format!("{name}, unchanged"));
    }
    fs::create_dir_all(&folder)?;
    replace(&folder.join("initrd.img"), &image)?;
    replace(&folder.join("vmlinuz"), &fs::read(kernel.join("vmlinuz"))?)?;
    replace(&stamp_file, stamp.as_bytes())?;
    Ok(format!("{name}, initramfs of {} KiB made", image.len() / 1024))
}

/// A running QEMU keeps the file that it opened: the new one gets the name in one step.
fn replace(path: &Path, data: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, data)
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Builds the guest's program, static, in a target folder of its own: its flags would make cargo build everything else anew.
fn program(root: &Path) -> Result<PathBuf> {
    let target = ebpf::target_dir(root).join("guest-build");
    let mut cargo = run::cargo();
    cargo
        .args([
            "build",
            "--quiet",
            "--release",
            "-p",
            "umbra-guest",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(&target);
    cargo
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    for (key, value) in [
        ("LTO", "true"),
        ("PANIC", "abort"),
        ("STRIP", "true"),
        ("DEBUG", "0"),
        ("CODEGEN_UNITS", "1"),
    ] {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{key}"), value);
    }
    run::run(&mut cargo)?;
    Ok(target.join(TARGET).join("release/umbra-guest"))
}

/// The kernel's folder in the cache. One that is there is taken, whatever its version: nothing is asked of the network then.
fn kernel(apt: &mut Apt) -> Result<PathBuf> {
    let cache = ebpf::cache_dir()?.join("kernel");
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let wanted = MODULES.join(" ");
    let complete = |entry: &PathBuf| {
        fs::read_to_string(entry.join(WANTED)).is_ok_and(|had| had == wanted) && entry.join("vmlinuz").exists()
    };
    let mut there: Vec<_> = fs::read_dir(&cache)?
        .flatten()
        .map(|entry| entry.path())
        .filter(complete)
        .collect();
    there.sort();
    if let Some(newest) = there.pop() {
        return Ok(newest);
    }
    fetch_kernel(apt, &cache)
}

fn fetch_kernel(apt: &mut Apt, cache: &Path) -> Result<PathBuf> {
    println!("    fetching Debian's cloud kernel");
    apt.refresh()?;
    let package = apt.depends(KERNEL)?;
    let work = cache.join(format!(".fetch-{}", std::process::id()));
    fs::create_dir_all(&work)?;
    let result = unpack_kernel(apt, &package, &work).and_then(|()| {
        let place = cache.join(&package);
        // Made for an older list of modules.
        if place.exists() && !matches!(fs::read_to_string(place.join(WANTED)), Ok(had) if had == MODULES.join(" ")) {
            fs::remove_dir_all(&place).with_context(|| format!("cannot remove {}", place.display()))?;
        }
        let moved = fs::rename(work.join("ready"), &place);
        // Another setup may have been quicker; its kernel is as good.
        if !place.join("vmlinuz").exists() {
            moved.with_context(|| format!("cannot make {}", place.display()))?;
        }
        Ok(place)
    });
    fs::remove_dir_all(&work)?;
    result
}

fn unpack_kernel(apt: &mut Apt, package: &str, work: &Path) -> Result<()> {
    apt.download(package, work)?;
    let deb = fs::read_dir(work)?
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "deb"));
    let tree = work.join("tree");
    run::run(
        Command::new("dpkg-deb")
            .arg("-x")
            .arg(deb.context("apt-get download left no file")?)
            .arg(&tree),
    )?;
    let release = package.strip_prefix("linux-image-").unwrap_or(package);
    let ready = work.join("ready");
    fs::create_dir_all(ready.join("modules"))?;
    fs::copy(tree.join(format!("boot/vmlinuz-{release}")), ready.join("vmlinuz"))
        .context("no vmlinuz in the package")?;
    // Newer Debians merged /lib into /usr/lib.
    let folders = ["lib/modules", "usr/lib/modules"].map(|folder| tree.join(folder).join(release));
    let folder = folders
        .iter()
        .find(|f| f.exists())
        .context("no modules in the package")?;
    let mut order = String::new();
    for (name, data) in modules_in_order(folder)? {
        fs::write(ready.join("modules").join(&name), data)?;
        order += &format!("{name}\n");
    }
    fs::write(ready.join("modules/order"), order)?;
    fs::write(ready.join(WANTED), MODULES.join(" "))?;
    Ok(())
}

/// File name and content of each module that is needed, each after those that it depends on.
fn modules_in_order(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = HashMap::new();
    find_modules(folder, &mut files)?;
    let builtin = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
    let builtin: Vec<_> = builtin
        .lines()
        .filter_map(|line| module_name(Path::new(line)))
        .collect();
    let mut order = Vec::new();
    for name in MODULES {
        add_module(name, &files, &builtin, &mut order)?;
    }
    Ok(order)
}

fn add_module(
    name: &str,
    files: &HashMap<String, PathBuf>,
    builtin: &[String],
    order: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    let file = format!("{name}.ko");
    if builtin.iter().any(|b| b == name) || order.iter().any(|(known, _)| *known == file) {
        return Ok(());
    }
    let Some(path) = files.get(name) else {
        bail!("the kernel has no module {name}")
    };
    let data = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => {
            Command::new("xz")
                .arg("-dc")
                .arg(path)
                .output()
                .context("cannot start xz")?
                .stdout
        }
        _ => fs::read(path)?,
    };
    for needed in dependencies(&data) {
        add_module(&needed, files, builtin, order)?;
    }
    order.push((file, data));
    Ok(())
}

fn find_modules(folder: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            find_modules(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `virtio-rng.ko.xz` is the module `virtio_rng`: the kernel knows no dashes.
fn module_name(path: &Path) -> Option<String> {
    let (name, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

/// A module names what it needs in its `.modinfo` section, as `depends=a,b` between NUL bytes.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value: Vec<u8> = module
        .iter()
        .skip(at + KEY.len())
        .copied()
        .take_while(|byte| *byte != 0)
        .collect();
    let names = String::from_utf8_lossy(&value).replace('-', "_");
    names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_string)
        .collect()
}

fn initramfs(kernel: &Path, program: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "modules"] {
        archive.directory(folder);
    }
    // PID 1 gets its standard output from it, before it can mount anything.
    archive.device("dev/console", 5, 1);
    archive.file("init", program);
    let order = fs::read_to_string(kernel.join("modules/order"))?;
    archive.file("modules/order", order.as_bytes());
    for name in order.lines() {
        archive.file(
            &format!("modules/{name}"),
            &fs::read(kernel.join("modules").join(name))?,
        );
    }
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_the_module() {
        assert_eq!(
            dependencies(b"ELF\0license=GPL\0depends=virtio,virtio-ring\0retpoline=Y\0"),
            ["virtio", "virtio_ring"]
        );
        assert!(dependencies(b"\0depends=\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
        assert_eq!(dependencies(b"\0depends=cut"), ["cut"]);
    }

    #[test]
    fn module_names() {
        assert_eq!(
            module_name(Path::new("a/virtio-rng.ko.xz")).as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(module_name(Path::new("a/modules.dep")), None);
    }
}
