//! Starts shadows: a QEMU over RAM files, with taps, sockets and files of its own, paused and waiting for its migration.
//!
//! ```text
//!  spec ─check─> record.json ─> files, taps ─> group ─> disks ─> QEMU ─> QMP: capabilities, getfd, migrate-incoming ─> Shadow
//!                     └── any step fails: discard(record), which undoes what is there ──> Refusal
//! ```
//! The record is on disk before the first thing is made, and every name in it follows from the VM and the session: whatever
//! dies in between, [`records`] finds it and [`discard`] cleans it up. A shadow lives in a session of its own and
//! survives its replicator, except that QEMU ends by itself if its migration breaks off half-way.

pub mod checks;
pub mod command;
pub mod disks;
pub mod kept;
mod lacks;
pub mod process;

pub use lacks::lacks;

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;
use umbra_api::VmId;
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::ShadowSpec;

use crate::adopt::ability;
use crate::memory::group::MemoryGroup;
use crate::proc::{self, ProcessId, Scope};
use crate::qmp::{Client, QmpError, Version};
use crate::resume::held;
use crate::tap;
use crate::tier::{Group, TierError, remove_group};
use process::Started;

/// Id of the chardev and monitor through which Umbra talks to QEMUs that it started.
pub const QMP_ID: &str = "umbra-qmp";
/// Its socket's name in the run directory.
pub const QMP_SOCKET: &str = "umbra.qmp";
/// Where the record goes of a shadow that was handed over to somebody else.
const SET_ASIDE: &str = "handed-over.json";
const RECORD: &str = "record.json";
const RAM_EXTENSION: &str = "ram";

/// A cold QEMU opens its monitor within half a second, on a busy host within some.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// After SIGKILL: the kernel frees the guest's memory before the process counts as dead.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// How shadows are started on this host.
#[derive(Clone, PartialEq, Debug)]
pub struct LaunchConfig {
    /// A directory a shadow: sockets, logs, the record. Short, because a socket's path has at most 107 bytes.
    pub run_dir: PathBuf,
    /// On tmpfs or hugetlbfs.
    pub ram_dir: PathBuf,
    /// Where QEMU binaries are looked for instead of the PATH.
    pub qemu_dir: Option<PathBuf>,
    /// Parent of the shadows' groups in the cpu hierarchy: `umbra`.
    pub cgroup: Option<String>,
    /// The cores that shadows may use; all that the replicator may use if `None`.
    pub cpus: Option<Vec<usize>>,
    /// Bridges of other hosts by what they are called here.
    pub bridges: BTreeMap<String, String>,
    /// The bridge of a NIC whose primary's tap is in none.
    pub default_bridge: Option<String>,
    /// Where images of private disks are made.
    pub disk_dir: PathBuf,
    /// Images that an operator set aside, by the path of the primary's.
    pub disks: BTreeMap<String, PathBuf>,
}

impl Default for LaunchConfig {
    fn default() -> Self {
        Self {
            run_dir: "/run/umbra/vm".into(),
            ram_dir: "/dev/shm/umbra".into(),
            qemu_dir: None,
            cgroup: Some("umbra".into()),
            cpus: None,
            bridges: BTreeMap::new(),
            default_bridge: None,
            disk_dir: "/var/lib/umbra/disks".into(),
            disks: BTreeMap::new(),
        }
    }
}

/// All that is needed to find a shadow again and to clean up after it. Kept as `record.json` in its run directory from
/// before the first thing is made.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShadowRecord {
    pub vm: VmId,
    pub session: u64,
    /// `None` while it is being started.
    pub process: Option<ProcessId>,
    pub dir: PathBuf,
    pub qmp_path: PathBuf,
    pub log: PathBuf,
    /// RAM block and its file.
    pub ram: Vec<(String, PathBuf)>,
    pub taps: Vec<String>,
    /// The command line's files in the run directory: `serial0.log` and its path.
    pub run_files: Vec<(String, PathBuf)>,
    pub cgroup: Option<PathBuf>,
    /// To which its memory is charged. On cgroup v2 the same.
    #[serde(default)]
    pub memory_cgroup: Option<PathBuf>,
    #[serde(default)]
    pub disks: Vec<disks::Image>,
    /// The daemon that fills the images.
    #[serde(default)]
    pub storage: Option<ProcessId>,
    /// The number of the images: the session's that made them.
    #[serde(default)]
    pub token: u64,
}

impl ShadowRecord {
    fn plan(spec: &ShadowSpec, cfg: &LaunchConfig, vm: VmId, session: u64) -> Self {
        // Short for the sockets' sake; that two VMs share it in the same session is refused when it is made.
        let short = vm.0.simple().to_string();
        let dir = cfg
            .run_dir
            .join(format!("{}-{session:x}", short.get(..8).unwrap_or(&short)));
        let ram = |name: &str| {
            cfg.ram_dir
                .join(format!("{}-{session}-{name}.{RAM_EXTENSION}", vm.0.simple()))
        };
        Self {
            vm,
            session,
            process: None,
            qmp_path: dir.join(QMP_SOCKET),
            log: dir.join("qemu.log"),
            ram: spec.ram.iter().map(|r| (r.name.clone(), ram(&r.name))).collect(),
            taps: (0..spec.nics.len()).map(|n| tap::name_of(vm, session, n)).collect(),
            run_files: command::run_files(spec)
                .into_iter()
                .map(|f| (f.to_owned(), dir.join(f)))
                .collect(),
            cgroup: None,
            memory_cgroup: None,
            disks: disks::plan(spec, cfg, vm, session),
            storage: None,
            token: session,
            dir,
        }
    }

    /// Written beside and renamed, so that a crash leaves the old one or the new one.
    fn save(&self) -> io::Result<()> {
        let path = self.dir.join(RECORD);
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(self)?)?;
        File::open(&new)?.sync_all()?;
        fs::rename(new, path)
    }

    /// Its images were there before it.
    fn keeps_on(&self) -> bool {
        self.token != self.session
    }

    /// Whether its QEMU still runs.
    pub fn alive(&self) -> bool {
        self.process.is_some_and(|p| p.alive())
    }

    /// The end of QEMU's own output: why it died, in its words.
    pub fn last_words(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text =
            String::from_utf8_lossy(text.get(text.len().saturating_sub(2048)..).unwrap_or_default()).into_owned();
        let lines: Vec<_> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        lines
            .get(lines.len().saturating_sub(5)..)
            .unwrap_or_default()
            .join("; ")
    }
}

/// A shadow QEMU that waits. Dropping it leaves the QEMU running: [`discard`] ends it.
pub struct Shadow {
    pub record: ShadowRecord,
    pub qmp: Client,
    /// Our end of the socket on which QEMU reads its migration; `None` if [`reopen`]ed.
    pub incoming: Option<OwnedFd>,
    /// What works, but not as well as it should.
    pub warnings: Vec<String>,
}

impl Shadow {
    /// Its cgroup, if this host has one to give.
    pub fn group(&self) -> Option<Group> {
        self.record.cgroup.as_deref().map(Group::open)
    }
}

/// One at a time: free memory is checked and taken in two steps.
static LAUNCHING: Mutex<()> = Mutex::new(());

/// Starts a shadow. After a refusal nothing of it is left.
pub fn launch(spec: &ShadowSpec, cfg: &LaunchConfig, vm: VmId, session: u64) -> Result<Shadow, Refusal> {
    launch_on(spec, cfg, vm, session, None)
}

/// The same, with images that were kept under a number.
pub fn launch_on(
    spec: &ShadowSpec,
    cfg: &LaunchConfig,
    vm: VmId,
    session: u64,
    kept: Option<(u64, Vec<disks::Image>)>,
) -> Result<Shadow, Refusal> {
    let _one = LAUNCHING.lock().unwrap_or_else(PoisonError::into_inner);
    command::check(spec)?;
    let mut record = ShadowRecord::plan(spec, cfg, vm, session);
    let fresh = kept.is_none();
    if let Some((token, images)) = kept {
        (record.token, record.disks) = (token, images);
    }
    command::check_dir(&record.dir, spec)?;
    let binary = checks::binary(spec, cfg)?;
    checks::files(spec)?;
    checks::cpu(spec)?;
    checks::vhost(spec)?;
    let bridges = checks::bridges(spec, cfg)?;
    make_dir(&cfg.ram_dir)?;
    make_room(spec, cfg, vm)?;
    if fresh {
        disks::check(&record.disks, cfg)?;
    }
    make_dir(&cfg.run_dir)?;
    // Not made by make_dir: that it is new shows that no other shadow has this name.
    DirBuilder::new()
        .mode(0o700)
        .create(&record.dir)
        .map_err(|e| local(&record.dir.display().to_string(), e))?;
    start(spec, cfg, &binary, &bridges, &mut record).inspect_err(|_| {
        if let Err(left) = discard(&record, Images::Remove) {
            tracing::warn!(%vm, session, refusal = %left, "a shadow that failed to start could not be cleaned up");
        }
    })
}

fn start(
    spec: &ShadowSpec,
    cfg: &LaunchConfig,
    binary: &Path,
    bridges: &[String],
    record: &mut ShadowRecord,
) -> Result<Shadow, Refusal> {
    let save = |r: &ShadowRecord| r.save().map_err(|e| local("the shadow's record", e));
    save(record)?;
    let mut warnings = Vec::new();
    for (block, (_, path)) in spec.ram.iter().zip(&record.ram) {
        make_ram(path, block.bytes).map_err(|e| local(&path.display().to_string(), e))?;
    }
    for (n, (name, bridge)) in record.taps.iter().zip(bridges).enumerate() {
        tap::create(name, command::queues(spec, n) > 1).map_err(|e| local(&format!("tap {name}"), e))?;
        tap::plug(name, bridge).map_err(|e| local(&format!("tap {name} into bridge {bridge}"), e))?;
    }
    let groups = Groups::make(cfg, record, &mut warnings);
    record.cgroup = groups.cpu.as_ref().map(|g| g.path().to_owned());
    record.memory_cgroup = groups.memory.as_ref().map(|g| g.path().to_owned());
    save(record)?;

    disks::start(record, cfg)?;
    let log = private_file(&record.log).map_err(|e| local(&record.log.display().to_string(), e))?;
    let args = command::build(spec, record);
    let started = process::start(binary, &args, log, cfg.cpus.as_deref())
        .map_err(|e| local(&format!("{} does not start", binary.display()), e))?;
    record.process = Some(started.id);
    save(record)?;
    groups.add(started.id.pid, &mut warnings);
    let qmp = connect(record, &started)?;
    let incoming = prepare(spec, record, &qmp, &mut warnings)?;
    Ok(Shadow {
        record: record.clone(),
        qmp,
        incoming: Some(incoming),
        warnings,
    })
}

/// The shadow's cgroups: on v2 they are one.
#[derive(Default)]
struct Groups {
    cpu: Option<Group>,
    memory: Option<MemoryGroup>,
}

impl Groups {
    fn make(cfg: &LaunchConfig, record: &ShadowRecord, warnings: &mut Vec<String>) -> Self {
        let Some(parent) = &cfg.cgroup else {
            return Self::default();
        };
        let name = format!("vm-{}-{}", record.vm.0.simple(), record.session);
        Self {
            cpu: noted(Group::create(parent, &name), NO_CPU, warnings),
            memory: noted(MemoryGroup::create(parent, &name), NO_MEMORY, warnings),
        }
    }

    fn add(&self, pid: i32, warnings: &mut Vec<String>) {
        noted(self.cpu.as_ref().map_or(Ok(()), |g| g.add(pid)), NO_CPU, warnings);
        noted(self.memory.as_ref().map_or(Ok(()), |g| g.add(pid)), NO_MEMORY, warnings);
    }
}

const NO_CPU: &str = "the shadow has no CPU tier";
const NO_MEMORY: &str = "the shadow's memory is not counted by itself";

fn noted<T>(result: Result<T, TierError>, what: &str, warnings: &mut Vec<String>) -> Option<T> {
    result.map_err(|e| warnings.push(format!("{what}: {e}"))).ok()
}

/// Waits for QEMU's monitor, or for QEMU's end.
fn connect(record: &ShadowRecord, started: &Started) -> Result<Client, Refusal> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let error = match Client::connect(&record.qmp_path, left.max(Duration::from_millis(1))) {
            Ok(client) => return Ok(client),
            Err(e) => e,
        };
        if let Some(how) = started.ended() {
            let why = format!("QEMU does not start here ({how}): {}", record.last_words());
            return Err(Refusal::new(RefusalCode::TargetLacks, why));
        }
        // Not there yet, or closed by a QEMU whose end is not noted yet: look again.
        if left.is_zero() || !matches!(error, QmpError::Unavailable { .. } | QmpError::Closed) {
            return Err(error.into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// From a started QEMU to one that reads its migration.
fn prepare(
    spec: &ShadowSpec,
    record: &ShadowRecord,
    qmp: &Client,
    warnings: &mut Vec<String>,
) -> Result<OwnedFd, Refusal> {
    check_version(spec, qmp.version(), warnings)?;
    let missing = ability::missing(qmp, &CAPABILITIES)?;
    if !missing.is_empty() {
        let why = format!(
            "the target's QEMU {} has no migration capability {}, which a shadow needs; install another QEMU there",
            qmp.version(),
            missing.join(", ")
        );
        return Err(Refusal::new(RefusalCode::TargetLacks, why));
    }
    let on = CAPABILITIES.map(|name| json!({"capability": name, "state": true}));
    let capabilities = json!({ "capabilities": on });
    qmp.execute("migrate-set-capabilities", capabilities)?;
    let (ours, theirs) = UnixStream::pair().map_err(|e| local("a socket pair", e))?;
    qmp.execute_with_fd("getfd", json!({"fdname": "umbra-incoming"}), theirs.as_fd())?;
    qmp.execute("migrate-incoming", json!({"uri": "fd:umbra-incoming"}))?;
    let status = qmp.execute("query-status", serde_json::Value::Null)?;
    match status.get("status").and_then(|s| s.as_str()) {
        Some("inmigrate") => Ok(ours.into()),
        other => {
            let why = format!("the shadow is {other:?} instead of inmigrate: {}", record.last_words());
            Err(Refusal::new(RefusalCode::Local, why))
        }
    }
}

/// late-block-activate: images that both sides share stay the primary's until `cont`.
const CAPABILITIES: [&str; 3] = ["x-ignore-shared", "events", "late-block-activate"];

fn check_version(spec: &ShadowSpec, here: Version, warnings: &mut Vec<String>) -> Result<(), Refusal> {
    let (major, minor, micro) = spec.qemu_version;
    let there = Version { major, minor, micro };
    if here < Version::OLDEST {
        let why = format!("the target's QEMU is {here}, {} or newer is needed", Version::OLDEST);
        return Err(Refusal::new(RefusalCode::QemuTooOld, why));
    }
    let same_series = (here.major, here.minor) == (there.major, there.minor);
    if spec.machine == "microvm" && !same_series {
        let why = format!("QEMU {there}: microvm has no versions, so both sides need the same one; here is {here}");
        return Err(Refusal::new(RefusalCode::TargetLacks, why));
    }
    if here < there && !same_series {
        warnings.push(format!(
            "the target's QEMU {here} is older than the primary's {there}: it may refuse its state"
        ));
    }
    Ok(())
}

/// Finds a shadow again that outlived its replicator.
pub fn reopen(record: ShadowRecord, timeout: Duration) -> Result<Shadow, Refusal> {
    if !record.alive() {
        let why = format!("the shadow's QEMU is gone: {}", record.last_words());
        return Err(Refusal::new(RefusalCode::NoSuchVm, why));
    }
    let qmp = Client::connect(&record.qmp_path, timeout)?;
    Ok(Shadow {
        record,
        qmp,
        incoming: None,
        warnings: Vec::new(),
    })
}

/// The records of all shadows that were started under this configuration and not discarded, whether they run or not.
pub fn records(cfg: &LaunchConfig) -> io::Result<Vec<ShadowRecord>> {
    let entries = match fs::read_dir(&cfg.run_dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path().join(RECORD);
        let Ok(text) = fs::read(&path) else { continue };
        match serde_json::from_slice(&text) {
            Ok(record) => found.push(record),
            Err(error) => tracing::warn!(path = %path.display(), %error, "no record of a shadow"),
        }
    }
    Ok(found)
}

/// The RAM files of a VM's shadows, known or not.
pub fn ram_files(cfg: &LaunchConfig, vm: VmId) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(&cfg.ram_dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let prefix = format!("{}-", vm.0.simple());
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name.starts_with(&prefix) && path.extension().is_some_and(|e| e == RAM_EXTENSION) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Takes a shadow that became the VM off the books: [`records`] does not name it any more, and nothing of it is touched.
pub fn set_aside(record: &ShadowRecord) -> io::Result<()> {
    match fs::rename(record.dir.join(RECORD), record.dir.join(SET_ASIDE)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// What becomes of the images of a shadow's disks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Images {
    Remove,
    /// They may be the only ones: the shadow was the VM, or nobody knows.
    Keep,
    /// Noted for a source that comes again: see [`kept`].
    Noted,
}

/// Ends a shadow's QEMU and removes all that was made for it. What is gone already is no error; of several errors the
/// first is told, after everything was tried.
pub fn discard(record: &ShadowRecord, images: Images) -> Result<(), Refusal> {
    let mut first = None;
    let mut note = |what: &str, result: io::Result<()>| match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => first = first.take().or_else(|| Some(local(what, e))),
        _ => {}
    };
    note("the shadow's QEMU", end(record));
    note("the storage daemon", disks::end(record, KILL_TIMEOUT));
    for image in record.disks.iter().filter(|i| i.ours) {
        match images {
            Images::Remove => note(&image.path.display().to_string(), fs::remove_file(&image.path)),
            Images::Noted => {}
            Images::Keep => tracing::warn!(vm = %record.vm, image = %image.path.display(), "the image is kept"),
        }
    }
    for name in &record.taps {
        note(name, tap::remove(name));
    }
    for (_, path) in &record.ram {
        note(&path.display().to_string(), fs::remove_file(path));
    }
    for path in record.cgroup.iter().chain(&record.memory_cgroup) {
        note(
            &path.display().to_string(),
            remove_group(path).map_err(io::Error::other),
        );
    }
    // The record goes last: as long as something is left, it says what.
    if first.is_none() {
        let mut note = |result: io::Result<()>| match result {
            Err(e) if e.kind() != io::ErrorKind::NotFound => first = Some(local(&record.dir.display().to_string(), e)),
            _ => {}
        };
        note(fs::remove_dir_all(&record.dir));
    }
    first.map_or(Ok(()), Err)
}

/// Discards a shadow that never ran, but keeps its RAM for the source to come back. The caller no longer writes it.
pub fn hold(record: &ShadowRecord, images: Images) -> Result<(), Refusal> {
    // Memory that a QEMU may still map, or that can't be put aside, goes the way of all else.
    let held = end(record).and_then(|()| held::hold(record, crate::engine::unix_ms()));
    if let Err(e) = held {
        tracing::warn!(vm = %record.vm, "the shadow's memory is not kept: {e}");
    }
    discard(record, images)
}

/// Memory that is held for other VMs makes room, the oldest first.
fn make_room(spec: &ShadowSpec, cfg: &LaunchConfig, vm: VmId) -> Result<(), Refusal> {
    let own = held::bytes_of(&cfg.ram_dir, vm);
    loop {
        match checks::memory(spec, &cfg.ram_dir, own) {
            Err(refusal) if !held::make_room(&cfg.ram_dir, vm) => return Err(refusal),
            Err(_) => {}
            Ok(()) => return Ok(()),
        }
    }
}

fn end(record: &ShadowRecord) -> io::Result<()> {
    if let Some(id) = record.process {
        return process::kill(id, KILL_TIMEOUT);
    }
    // The replicator died between the start and the second record: the socket's path identifies the process.
    let path = record.qmp_path.display().to_string();
    for found in proc::scan(Scope::All)?
        .into_iter()
        .filter(|q| q.args.iter().any(|a| a.contains(&path)))
    {
        process::kill(found.id, KILL_TIMEOUT)?;
    }
    Ok(())
}

fn local(what: &str, e: io::Error) -> Refusal {
    Refusal::new(RefusalCode::Local, format!("{what}: {e}"))
}

pub(crate) fn make_dir(path: &Path) -> Result<(), Refusal> {
    // A guest's memory and its consoles are nobody else's business.
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| local(&path.display().to_string(), e))
}

fn private_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn make_ram(path: &Path, bytes: u64) -> io::Result<()> {
    private_file(path)?.set_len(bytes)
}
