//! The images of a shadow's private disks, and the `qemu-storage-daemon` that fills them.
//!
//! ```text
//!  images, daemon ─> shadow's QEMU (its nodes are inactive) ─> … the source's mirrors write by NBD …
//!     ─> the daemon is stopped ─> the shadow's nodes become active ─> cont
//! ```
//! QEMU's own locks keep the order: while the daemon has the images for writing, the shadow can't activate its nodes, and is told
//! so. The daemon lives in a session of its own, so that a shadow's disks outlive the replicator like its memory does.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};
use umbra_api::VmId;
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::{Disk, DiskFormat, ShadowSpec};

use super::{LaunchConfig, ShadowRecord, local, make_dir, private_file, process};
use crate::proc::ProcessId;

/// The daemon's socket in the run directory.
const SOCKET: &str = "nbd.sock";
const EXTENSION: &str = "img";
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// It has flushed before, so its end is quick; a slow disk is waited for, because what it has not closed is not whole.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// A disk's image on this host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    pub path: PathBuf,
    pub format: DiskFormat,
    pub bytes: u64,
    /// Made for this shadow, and removed with it if it never ran.
    pub ours: bool,
    /// Node and image on the primary.
    #[serde(default)]
    pub of: (String, String),
}

impl Image {
    /// The same disk of the same QEMU, not only one that looks like it.
    pub fn is_of(&self, d: &Disk) -> bool {
        self.of == (d.node.clone(), d.path.clone()) && self.format == d.format && self.bytes == d.bytes
    }
}

/// Name of a disk's export.
pub fn export(disk: usize) -> String {
    format!("disk{disk}")
}

pub fn socket(dir: &Path) -> PathBuf {
    dir.join(SOCKET)
}

pub(super) fn plan(spec: &ShadowSpec, cfg: &LaunchConfig, vm: VmId, session: u64) -> Vec<Image> {
    let image = |(n, d): (usize, &Disk)| {
        let mapped = cfg.disks.get(&d.path);
        let new = || {
            cfg.disk_dir
                .join(format!("{}-{session}-{n}.{EXTENSION}", vm.0.simple()))
        };
        Image {
            path: mapped.cloned().unwrap_or_else(new),
            format: d.format,
            bytes: d.bytes,
            ours: mapped.is_none(),
            of: (d.node.clone(), d.path.clone()),
        }
    };
    spec.disks.iter().enumerate().map(image).collect()
}

fn lacks(what: String) -> Refusal {
    Refusal::new(RefusalCode::TargetLacks, what)
}

/// The tools, room for new images, and that those that an operator made are fit and free.
pub(super) fn check(images: &[Image], cfg: &LaunchConfig) -> Result<(), Refusal> {
    if images.is_empty() {
        return Ok(());
    }
    tool(cfg, "qemu-storage-daemon")?;
    tool(cfg, "qemu-img")?;
    for image in images {
        // Written between the options of a command line, or of its JSON.
        if image.path.to_string_lossy().contains([',', ' ', '"', '\\']) {
            let why = format!(
                "the image's path {} holds a comma, a blank, a quote or a backslash",
                image.path.display()
            );
            return Err(Refusal::new(RefusalCode::Local, why));
        }
    }
    for image in images.iter().filter(|i| !i.ours) {
        existing(image, cfg)?;
    }
    if images.iter().any(|i| i.ours) {
        make_dir(&cfg.disk_dir)?;
        room(images, &cfg.disk_dir)?;
    }
    Ok(())
}

fn room(images: &[Image], dir: &Path) -> Result<(), Refusal> {
    let failed = |e: io::Error| local(&format!("disk_dir {}", dir.display()), e);
    let fs = statvfs(dir).map_err(|e| failed(e.into()))?;
    let free = fs.blocks_available().saturating_mul(fs.fragment_size());
    let need: u64 = images
        .iter()
        .filter(|i| i.ours)
        .fold(0, |sum, i| sum.saturating_add(i.bytes));
    let promised = promised(dir).map_err(failed)?;
    if need.saturating_add(promised) <= free {
        return Ok(());
    }
    let mib = |b: u64| b.div_ceil(1 << 20);
    Err(lacks(format!(
        "the shadow's disks need {} MiB, disk_dir {} has {} MiB free, of which {} MiB are promised to other images",
        mib(need),
        dir.display(),
        mib(free),
        mib(promised)
    )))
}

/// What images that are there may still grow by.
fn promised(dir: &Path) -> io::Result<u64> {
    let mut sum = 0_u64;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|e| e == EXTENSION)
            && let Ok(meta) = entry.metadata()
        {
            let virtual_bytes = qcow2_bytes(&entry.path()).unwrap_or(meta.len());
            sum = sum.saturating_add(virtual_bytes.saturating_sub(meta.blocks().saturating_mul(512)));
        }
    }
    Ok(sum)
}

/// The size that a qcow2 image shows, from its header.
fn qcow2_bytes(path: &Path) -> Option<u64> {
    let mut head = [0; 32];
    File::open(path).ok()?.read_exact(&mut head).ok()?;
    let (magic, size) = (head.first_chunk::<4>()?, head.last_chunk::<8>()?);
    (magic == b"QFI\xfb").then(|| u64::from_be_bytes(*size))
}

/// An image that an operator set aside for this disk: QEMU itself says how large it is, and refuses one that is in use.
fn existing(image: &Image, cfg: &LaunchConfig) -> Result<(), Refusal> {
    let shown = image.path.display();
    if !fs::metadata(&image.path).is_ok_and(|m| m.is_file()) {
        return Err(lacks(format!(
            "no file {shown}, which is configured for a disk of this VM"
        )));
    }
    let mut info = Command::new(tool(cfg, "qemu-img")?);
    info.args(["info", "--output=json", "-f", image.format.name()])
        .arg(&image.path);
    let answer = run(&mut info).map_err(|e| lacks(format!("the image {shown} can't be used: {e}")))?;
    let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap_or_default();
    let bytes = answer["virtual-size"].as_u64().unwrap_or(0);
    match answer.get("backing-filename") {
        Some(backing) => Err(lacks(format!("the image {shown} has a backing file, {backing}"))),
        None if bytes != image.bytes => Err(lacks(format!(
            "the image {shown} has {bytes} bytes, the VM's disk has {}: they must be the same",
            image.bytes
        ))),
        None => Ok(()),
    }
}

fn tool(cfg: &LaunchConfig, name: &str) -> Result<PathBuf, Refusal> {
    super::checks::program(name, cfg)
}

fn run(command: &mut Command) -> Result<Vec<u8>, String> {
    let out = command.output().map_err(|e| e.to_string())?;
    match out.status.success() {
        true => Ok(out.stdout),
        false => Err(String::from_utf8_lossy(&out.stderr).trim().to_owned()),
    }
}

/// Makes the images and starts the daemon over them. Its process is in the record before it is waited for.
pub(super) fn start(record: &mut ShadowRecord, cfg: &LaunchConfig) -> Result<(), Refusal> {
    if record.disks.is_empty() {
        return Ok(());
    }
    for image in record.disks.iter().filter(|i| i.ours && !record.keeps_on()) {
        let shown = image.path.display().to_string();
        // A guest's disk is nobody else's business: the file is there, and private, before it is written.
        private_file(&image.path).map_err(|e| local(&shown, e))?;
        let mut create = Command::new(tool(cfg, "qemu-img")?);
        create
            .args(["create", "-q", "-f", image.format.name()])
            .arg(&image.path);
        run(create.arg(image.bytes.to_string())).map_err(|e| local(&shown, io::Error::other(e)))?;
    }
    let log = private_file(&log(record)).map_err(|e| local("the log of the disks", e))?;
    let program = tool(cfg, "qemu-storage-daemon")?;
    let started = process::start(&program, &arguments(&record.disks, &socket(&record.dir)), log, None)
        .map_err(|e| local(&program.display().to_string(), e))?;
    record.storage = Some(started.id);
    record.save().map_err(|e| local("the shadow's record", e))?;
    let deadline = Instant::now() + START_TIMEOUT;
    while let Err(e) = UnixStream::connect(socket(&record.dir)) {
        if let Some(how) = started.ended() {
            let log = fs::read_to_string(self::log(record)).unwrap_or_default();
            return Err(lacks(format!(
                "qemu-storage-daemon does not start here ({how}): {}",
                log.trim()
            )));
        }
        if Instant::now() > deadline {
            return Err(local("the socket of qemu-storage-daemon", e));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// What the daemon complained of.
pub fn log(record: &ShadowRecord) -> PathBuf {
    record.dir.join("disks.log")
}

fn arguments(images: &[Image], socket: &Path) -> Vec<String> {
    let mut args = Vec::new();
    for (n, image) in images.iter().enumerate() {
        let file = format!(
            "driver=file,node-name=f{n},filename={},discard=unmap",
            image.path.display()
        );
        let node = format!("driver={},node-name=d{n},file=f{n},discard=unmap", image.format.name());
        args.extend(["--blockdev".into(), file, "--blockdev".into(), node]);
    }
    args.extend([
        "--nbd-server".into(),
        format!("addr.type=unix,addr.path={}", socket.display()),
    ]);
    for n in 0..images.len() {
        let export = format!("type=nbd,id=x{n},node-name=d{n},name={},writable=on", export(n));
        args.extend(["--export".into(), export]);
    }
    args
}

/// Has the daemon write all that it was told to, and say that each of these writes, from the first one on, went well.
pub(super) fn flush(record: &ShadowRecord, cfg: &LaunchConfig) -> Result<(), String> {
    let program = tool(cfg, "qemu-io").map_err(|e| e.to_string())?;
    for n in 0..record.disks.len() {
        let url = format!("nbd+unix:///{}?socket={}", export(n), socket(&record.dir).display());
        let mut command = Command::new(&program);
        command.args(["-f", "raw", "-c", "flush", &url]).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::null()).spawn().map_err(|e| e.to_string())?;
        let deadline = Instant::now() + STOP_TIMEOUT;
        let status = loop {
            match child.try_wait().map_err(|e| e.to_string())? {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    let _ = child.kill();
                    break child.wait().map_err(|e| e.to_string())?;
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        if !status.success() {
            return Err(format!("disk {n} can't be flushed: qemu-io, {status}"));
        }
    }
    Ok(())
}

/// Ends the daemon so that it closes its images: from here on they are the shadow's. That it is gone already is no error.
pub fn stop(record: &ShadowRecord) -> io::Result<()> {
    match record.storage {
        Some(id) => process::terminate(id, STOP_TIMEOUT),
        None => Ok(()),
    }
}

/// Ends the daemon in whatever state, also one that was started and not recorded.
pub(super) fn end(record: &ShadowRecord, patience: Duration) -> io::Result<()> {
    if record.disks.is_empty() {
        return Ok(());
    }
    if let Some(id) = record.storage {
        return process::kill(id, patience);
    }
    let path = format!("addr.path={}", socket(&record.dir).display());
    for id in daemons(&path)? {
        process::kill(id, patience)?;
    }
    Ok(())
}

/// The socket's path identifies it.
fn daemons(argument: &str) -> io::Result<Vec<ProcessId>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let pid = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok());
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if line.split(|b| *b == 0).any(|a| a.ends_with(argument.as_bytes())) {
            found.extend(pid.and_then(|p| ProcessId::of(p).ok()));
        }
    }
    Ok(found)
}

/// The operator's map of images may name a disk only once.
pub fn duplicate(disks: &BTreeMap<String, PathBuf>) -> Option<&Path> {
    let mut seen = Vec::new();
    disks.values().map(PathBuf::as_path).find(|p| {
        let twice = seen.contains(p);
        seen.push(*p);
        twice
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(path: PathBuf, bytes: u64) -> Image {
        Image {
            path,
            format: DiskFormat::Qcow2,
            bytes,
            ours: true,
            of: Default::default(),
        }
    }

    #[test]
    fn room_is_counted_with_what_other_images_were_promised() {
        let dir = tempfile::tempdir().unwrap();
        let new = image(dir.path().join("new.img"), 1 << 20);
        room(std::slice::from_ref(&new), dir.path()).unwrap();
        let refusal = room(&[image("x".into(), 1 << 60)], dir.path()).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::TargetLacks);
        assert!(refusal.detail.contains("1099511627776 MiB"), "{refusal}");
        // A sparse image and a qcow2 one, which says in its header what it may become.
        File::create(dir.path().join("a.img"))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let mut head = [0; 512];
        head[..4].copy_from_slice(b"QFI\xfb");
        head[24..32].copy_from_slice(&(1_u64 << 30).to_be_bytes());
        fs::write(dir.path().join("b.img"), head).unwrap();
        fs::write(dir.path().join("c.other"), head).unwrap();
        let sum = promised(dir.path()).unwrap();
        assert!((1 << 30..=(1 << 30) + (1 << 20)).contains(&sum), "{sum}");
    }

    #[test]
    fn the_daemon_exports_each_image_under_its_number() {
        let images = [image("/d/a.img".into(), 1), image("/d/b.img".into(), 1)];
        let line = arguments(&images, Path::new("/run/s")).join(" ");
        assert!(line.contains("driver=qcow2,node-name=d1,file=f1"), "{line}");
        assert!(
            line.ends_with("type=nbd,id=x1,node-name=d1,name=disk1,writable=on"),
            "{line}"
        );
    }

    #[test]
    fn an_image_for_two_disks_is_noticed() {
        let map = |b: &str| BTreeMap::from([("/x".to_owned(), "/a".into()), ("/y".to_owned(), b.into())]);
        assert_eq!(duplicate(&map("/b")), None);
        assert_eq!(duplicate(&map("/a")), Some(Path::new("/a")));
    }
}
