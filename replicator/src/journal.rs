//! What a replicator must not forget, one file a VM: the highest epoch it has seen, the orders it has taken, and how far
//! each side of a protection is. A change is on the disk before [`Journal::update`] returns.
//!
//! ```text
//! file    slot slot                      (16 KiB each)
//! slot    "UMBRAJ01"  sequence u64  length u64  xxh3 u64  json[length]      (little-endian)
//! ```
//! A write goes to the slot that does not hold the latest record, in place, followed by fdatasync: a crash leaves at least
//! one whole slot, and no metadata has to reach the disk. That is 3 ms here, where a new file with its rename and the
//! directory's fsync takes 12, and some of these writes happen while a guest is stopped.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use umbra_api::order::{Pacing, Peak, Refusal, Tier};
use umbra_api::replica::SwitchoverReport;
use umbra_api::{Epoch, HostId, OrderId, UnixMs, VmId};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::launch::ShadowRecord;
use crate::proc::ProcessId;
use crate::resume::held::HELD_FOR;
use crate::{source, target};

/// Orders that are remembered, so that one which is sent again does nothing new.
const ORDERS_KEPT: usize = 32;
/// Targets that can't be reached drop what they hold by themselves: only the latest are told.
const FAREWELLS_KEPT: usize = 8;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRecord {
    pub vm: VmId,
    pub name: String,
    /// Highest seen in an order or from a peer.
    pub epoch: Epoch,
    pub orders: VecDeque<OrderId>,
    pub source: Option<SourceRecord>,
    pub target: Option<TargetRecord>,
    /// A host that an operator declared dead, until it was told.
    #[serde(default)]
    pub fence: Option<Fence>,
    /// Copies from here whose targets may not know that they have ended.
    #[serde(default)]
    pub farewells: Vec<Farewell>,
}

/// A target that is to be told of a copy's end.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Farewell {
    pub host: HostId,
    pub link: String,
    pub epoch: Epoch,
    pub since: UnixMs,
}

impl Farewell {
    /// By now the target holds nothing any more, told or not. A clock that was set back makes nothing later.
    pub fn is_late(&self, now: UnixMs) -> bool {
        u128::from(now.since(self.since).unsigned_abs()) > HELD_FOR.as_millis()
    }
}

/// The copy on that host must end when it is back.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fence {
    pub host: HostId,
    /// Its link address; without it only an operator can tell it.
    pub link: Option<String>,
    pub epoch: Epoch,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceRecord {
    pub peer: HostId,
    /// The target's link address.
    pub link: String,
    pub epoch: Epoch,
    pub durable: source::machine::Durable,
    pub qemu: QemuRef,
    /// When that QEMU had taken the copy's last migration: see [`source::whose`].
    #[serde(default)]
    pub migrated_ms: Option<u64>,
    #[serde(default)]
    pub pacing: Pacing,
    pub since: UnixMs,
    pub report: Option<SwitchoverReport>,
    /// The primary was once a shadow here: what is to be cleaned up when it is retired.
    pub leftover: Option<ShadowRecord>,
    /// Numbers of mirrors that are, or may be, in this QEMU: on record before they are made. Others are not touched.
    #[serde(default)]
    pub mirrors: Vec<u64>,
}

impl SourceRecord {
    /// A new protection of a QEMU that may still have mirrors of the one before.
    pub fn after(mut self, before: Option<Self>) -> Self {
        let same = before.filter(|b| b.qemu.id == self.qemu.id);
        self.mirrors = same.map(|b| b.mirrors).unwrap_or_default();
        self
    }

    /// What a session of this record goes on with.
    pub fn plan(&self, vm: VmId, name: &str) -> source::session::Plan {
        source::session::Plan {
            vm,
            name: name.to_owned(),
            epoch: self.epoch,
            peer: self.peer.clone(),
            link: self.link.clone(),
            pacing: self.pacing,
            process: self.qemu.id,
            report: self.report,
        }
    }
}

/// Enough to find a QEMU process again after a restart.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuRef {
    pub id: ProcessId,
    pub qmp: Vec<PathBuf>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetRecord {
    pub peer: HostId,
    pub epoch: Epoch,
    pub durable: target::machine::Durable,
    pub shadow: Option<ShadowRecord>,
    /// The source's own link address.
    #[serde(default)]
    pub link: Option<String>,
    /// What the shadow was last told to use: the next one of the same protection is told it again.
    #[serde(default)]
    pub tier: Option<(Tier, Peak)>,
    pub since: UnixMs,
    pub error: Option<Refusal>,
}

impl VmRecord {
    pub fn new(vm: VmId) -> Self {
        Self {
            vm,
            name: String::new(),
            epoch: Epoch(0),
            orders: VecDeque::new(),
            source: None,
            target: None,
            fence: None,
            farewells: Vec::new(),
        }
    }

    pub fn knows(&self, order: OrderId) -> bool {
        self.orders.contains(&order)
    }

    pub fn remember(&mut self, order: OrderId) {
        self.orders.push_back(order);
        while self.orders.len() > ORDERS_KEPT {
            self.orders.pop_front();
        }
    }

    /// The source's side comes to this point.
    pub fn source_writes(&mut self, durable: source::machine::Durable, report: SwitchoverReport, now: UnixMs) {
        use source::machine::Durable;
        self.epoch = self.epoch.max(durable.epoch().unwrap_or(self.epoch));
        let Some(source) = self.source.as_mut() else { return };
        let copied = source.durable == Durable::Protecting;
        source.durable = durable;
        match durable {
            Durable::TakingBack { epoch } => {
                source.epoch = source.epoch.max(epoch);
                // It was a shadow here once, and is the VM again: its files are not to be cleaned up.
                if let Some(shadow) = source.leftover.take() {
                    self.target = Some(TargetRecord {
                        peer: source.peer.clone(),
                        epoch,
                        durable: target::machine::Durable::Running { epoch },
                        shadow: Some(shadow),
                        link: None,
                        tier: None,
                        since: now,
                        error: None,
                    });
                }
            }
            Durable::Fenced { epoch } => source.epoch = source.epoch.max(epoch),
            Durable::Released if copied => {
                self.farewells.push(Farewell {
                    host: source.peer.clone(),
                    link: source.link.clone(),
                    epoch: source.epoch,
                    since: now,
                });
                let oldest = self.farewells.len().saturating_sub(FAREWELLS_KEPT);
                self.farewells.drain(..oldest);
            }
            Durable::HandedOver { .. } => {
                source.report = Some(report);
                // The shadow that this VM once was here is now the stopped primary's.
                source.leftover = (self.target.take()).and_then(|t| t.shadow).or(source.leftover.take());
            }
            _ => {}
        }
    }

    /// The target's side comes to this point.
    pub fn target_writes(&mut self, durable: target::machine::Durable, error: Option<Refusal>) {
        self.epoch = self.epoch.max(durable.epoch().unwrap_or(self.epoch));
        if let Some(target) = self.target.as_mut() {
            (target.durable, target.error) = (durable, error);
        }
    }
}

const MAGIC: &[u8; 8] = b"UMBRAJ01";
const HEAD: usize = 32;
const SLOT: usize = 16 << 10;

struct Entry {
    file: File,
    sequence: u64,
    record: VmRecord,
}

pub struct Journal {
    dir: PathBuf,
    vms: Mutex<BTreeMap<VmId, Entry>>,
}

impl Journal {
    /// Reads all records. One that can't be read is an error that names the file: guessing an epoch could run a VM twice.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir).map_err(|e| named(dir, &e))?;
        let mut vms = BTreeMap::new();
        for entry in fs::read_dir(dir).map_err(|e| named(dir, &e))? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "journal") {
                let entry = read(&path).map_err(|e| named(&path, &e))?;
                vms.insert(entry.record.vm, entry);
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            vms: Mutex::new(vms),
        })
    }

    pub fn all(&self) -> Vec<VmRecord> {
        self.lock().values().map(|e| e.record.clone()).collect()
    }

    pub fn get(&self, vm: VmId) -> Option<VmRecord> {
        self.lock().get(&vm).map(|e| e.record.clone())
    }

    /// Changes a VM's record, on disk first. If the disk refuses, nothing is changed.
    pub fn update<T>(&self, vm: VmId, change: impl FnOnce(&mut VmRecord) -> T) -> io::Result<T> {
        let mut vms = self.lock();
        if let Some(entry) = vms.get_mut(&vm) {
            let mut record = entry.record.clone();
            let out = change(&mut record);
            write(&entry.file, entry.sequence + 1, &record).map_err(|e| named(&self.path(vm), &e))?;
            entry.sequence += 1;
            entry.record = record;
            return Ok(out);
        }
        let mut record = VmRecord::new(vm);
        let out = change(&mut record);
        let file = self.create(&record).map_err(|e| named(&self.path(vm), &e))?;
        vms.insert(
            vm,
            Entry {
                file,
                sequence: 1,
                record,
            },
        );
        Ok(out)
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.dir.join(format!("{vm}.journal"))
    }

    /// A new file appears under its name only when its first record is whole, and with all of its blocks in place.
    fn create(&self, record: &VmRecord) -> io::Result<File> {
        let new = self.dir.join(format!("{}.new", record.vm));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&new)?;
        file.write_all_at(&[0; 2 * SLOT], 0)?;
        write(&file, 1, record)?;
        file.sync_all()?;
        fs::rename(&new, self.path(record.vm))?;
        File::open(&self.dir)?.sync_all()?;
        Ok(file)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, Entry>> {
        // Nothing panics while an entry is half changed: record and sequence are replaced after the write.
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write(file: &File, sequence: u64, record: &VmRecord) -> io::Result<()> {
    let json = serde_json::to_vec(record)?;
    if HEAD + json.len() > SLOT {
        return Err(io::Error::other(format!(
            "a record of {} bytes, at most {} fit",
            json.len(),
            SLOT - HEAD
        )));
    }
    let mut slot = Vec::with_capacity(HEAD + json.len());
    slot.extend_from_slice(MAGIC);
    slot.extend_from_slice(&sequence.to_le_bytes());
    slot.extend_from_slice(&(json.len() as u64).to_le_bytes());
    slot.extend_from_slice(&xxh3_64_with_seed(&json, sequence).to_le_bytes());
    slot.extend_from_slice(&json);
    file.write_all_at(&slot, sequence % 2 * SLOT as u64)?;
    file.sync_data()
}

/// The later of the whole slots.
fn read(path: &Path) -> io::Result<Entry> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut bytes = [0; 2 * SLOT];
    file.read_exact_at(&mut bytes, 0)?;
    let (a, b) = bytes.split_at(SLOT);
    let latest = [a, b]
        .into_iter()
        .filter_map(whole)
        .max_by_key(|(sequence, _)| *sequence);
    let (sequence, json) = latest.ok_or_else(|| io::Error::other("neither slot holds a whole record"))?;
    Ok(Entry {
        record: serde_json::from_slice(json)?,
        file,
        sequence,
    })
}

fn whole(slot: &[u8]) -> Option<(u64, &[u8])> {
    let rest = slot.strip_prefix(MAGIC)?;
    let (head, body) = rest.split_at_checked(HEAD - MAGIC.len())?;
    let number = |i: usize| head.as_chunks::<8>().0.get(i).map(|b| u64::from_le_bytes(*b));
    let (sequence, len, sum) = (number(0)?, number(1)?, number(2)?);
    let json = body.get(..usize::try_from(len).ok()?)?;
    (xxh3_64_with_seed(json, sequence) == sum).then_some((sequence, json))
}

fn named(path: &Path, e: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> VmId {
        VmId(uuid::Uuid::from_u128(5))
    }

    #[test]
    fn a_change_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let j = Journal::open(dir.path()).unwrap();
        let order = OrderId(uuid::Uuid::from_u128(9));
        j.update(vm(), |r| {
            r.epoch = Epoch(4);
            r.remember(order);
        })
        .unwrap();
        let r = Journal::open(dir.path()).unwrap().get(vm()).unwrap();
        assert_eq!((r.epoch, r.knows(order)), (Epoch(4), true));
    }

    #[test]
    fn a_shadows_files_go_with_the_copy_that_it_became() {
        use source::machine::Durable as Source;
        use target::machine::Durable as Target;
        let epoch = Epoch;
        let mut r: VmRecord = serde_json::from_value(serde_json::json!({
            "vm": vm(), "name": "web", "epoch": 4, "orders": [],
            "source": {
                "peer": "b", "link": "b:1", "epoch": 4, "durable": {"phase": "protecting"}, "since": 0, "report": null,
                "qemu": {"id": {"pid": 1, "starttime": 1}, "qmp": []}, "leftover": null,
            },
            "target": {
                "peer": "b", "epoch": 3, "durable": {"phase": "running", "epoch": 3}, "since": 0, "error": null,
                "shadow": {
                    "vm": vm(), "session": 9, "process": null, "dir": "/d", "qmp_path": "/d/q", "log": "/d/l", "ram": [],
                    "taps": [], "run_files": [], "cgroup": null,
                },
            },
        }))
        .unwrap();
        let report = SwitchoverReport::default();
        r.source_writes(Source::HandedOver { epoch: epoch(5) }, report, UnixMs(1));
        assert_eq!(r.epoch, epoch(5));
        assert!(
            r.target.is_none(),
            "what ran here as a former shadow is the stopped primary now"
        );
        let leftover = |r: &VmRecord| r.source.as_ref().unwrap().leftover.as_ref().map(|s| s.session);
        assert_eq!(leftover(&r), Some(9));
        r.source_writes(Source::TakingBack { epoch: epoch(6) }, report, UnixMs(2));
        assert_eq!(leftover(&r), None);
        let target = r.target.as_ref().unwrap();
        assert_eq!(target.durable, Target::Running { epoch: epoch(6) }, "and the VM again");
        assert_eq!(target.shadow.as_ref().map(|s| s.session), Some(9));
        r.target_writes(Target::Fenced { epoch: epoch(2) }, None);
        assert_eq!(r.epoch, epoch(6), "an epoch never sinks");
    }

    #[test]
    fn only_a_copy_that_ends_undecided_leaves_its_target_a_word() {
        use source::machine::Durable as Source;
        let mut r: VmRecord = serde_json::from_value(serde_json::json!({
            "vm": vm(), "name": "web", "epoch": 4, "orders": [], "target": null,
            "source": {
                "peer": "b", "link": "b:1", "epoch": 4, "durable": {"phase": "protecting"}, "since": 0, "report": null,
                "qemu": {"id": {"pid": 1, "starttime": 1}, "qmp": []}, "leftover": null,
            },
        }))
        .unwrap();
        let report = SwitchoverReport::default();
        let told = |r: &VmRecord| r.farewells.iter().map(|f| f.epoch.0).collect::<Vec<_>>();
        let epoch = Epoch(5);
        // Its target is asked about that epoch, and answers.
        r.source_writes(Source::Aborting { epoch }, report, UnixMs(1));
        r.source_writes(Source::Released, report, UnixMs(2));
        assert!(told(&r).is_empty());
        for n in 6..16 {
            let source = r.source.as_mut().unwrap();
            (source.durable, source.epoch) = (Source::Protecting, Epoch(n));
            r.source_writes(Source::Released, report, UnixMs(n as i64));
            r.source_writes(Source::Released, report, UnixMs(n as i64));
        }
        assert_eq!(told(&r), (8..16).collect::<Vec<_>>(), "each once, the latest ones");
        let first = &r.farewells[0];
        let late = first.since.0 + HELD_FOR.as_millis() as i64;
        assert!(!first.is_late(UnixMs(late)) && first.is_late(UnixMs(late + 1)));
    }

    #[test]
    fn a_torn_write_leaves_the_record_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let j = Journal::open(dir.path()).unwrap();
        for n in 1..=3 {
            j.update(vm(), |r| r.epoch = Epoch(n)).unwrap();
        }
        let path = j.path(vm());
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        // Record 3 lies in the second slot.
        file.write_all_at(b"torn", (SLOT + HEAD + 5) as u64).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().get(vm()).unwrap().epoch, Epoch(2));
        file.write_all_at(b"torn", (HEAD + 5) as u64).unwrap();
        let e = Journal::open(dir.path()).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains(&vm().to_string()) && e.contains("neither slot"), "{e}");
    }

    #[test]
    fn a_record_that_does_not_fit_is_refused_and_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let j = Journal::open(dir.path()).unwrap();
        j.update(vm(), |r| r.epoch = Epoch(1)).unwrap();
        let e = j.update(vm(), |r| r.name = "x".repeat(SLOT)).unwrap_err().to_string();
        assert!(e.contains("at most"), "{e}");
        assert_eq!(j.get(vm()).unwrap().name, "");
        fs::remove_dir_all(dir.path()).unwrap();
        let other = VmId(uuid::Uuid::from_u128(6));
        assert!(
            j.update(other, |r| r.epoch = Epoch(4))
                .unwrap_err()
                .to_string()
                .contains(&other.to_string())
        );
        assert!(j.get(other).is_none());
    }
}
