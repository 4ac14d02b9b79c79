//! What this host knows of a VM, for whoever has to find the way out: records, sessions, processes, and what lies about.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use umbra_api::VmId;
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::recover::{Copy, Decided, HostFacts, QemuFacts, SideFacts};
use umbra_api::replica::Phase;

use super::{Engine, local, shadows_of};
use crate::journal::{SourceRecord, TargetRecord, VmRecord};
use crate::launch::{self, ShadowRecord};
use crate::proc::QemuProcess;
use crate::qmp::Client;
use crate::source::machine::Durable as SourceDurable;
use crate::target::machine::Durable as TargetDurable;

/// A monitor that a session holds does not answer, and its session says enough.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// What was made here for shadows of a VM that no record knows.
pub(super) struct Strays {
    pub shadows: Vec<ShadowRecord>,
    pub files: Vec<PathBuf>,
}

impl Engine {
    /// A VM by its UUID or by the name that a record or a command line here gives it.
    pub fn find(&self, word: &str) -> Result<VmId, Refusal> {
        if let Ok(vm) = word.parse() {
            return Ok(vm);
        }
        let all = crate::proc::scan(self.core.config.scope).map_err(|e| local(&format!("/proc: {e}")))?;
        let running = all
            .iter()
            .filter(|q| q.name.as_deref() == Some(word))
            .filter_map(|q| q.uuid);
        let recorded = self
            .core
            .journal
            .all()
            .into_iter()
            .filter(|r| r.name == word)
            .map(|r| r.vm);
        let mut found: Vec<VmId> = running.map(VmId).chain(recorded).collect();
        found.sort_unstable();
        found.dedup();
        match found.as_slice() {
            [one] => Ok(*one),
            [] => Err(Refusal::new(
                RefusalCode::NoSuchVm,
                format!("no VM is called {word:?} here"),
            )),
            _ => Err(Refusal::new(
                RefusalCode::BadOrder,
                format!("{} VMs are called {word:?} here", found.len()),
            )),
        }
    }

    pub fn facts(&self, vm: VmId) -> Result<HostFacts, Refusal> {
        let qemus = self.qemus(vm)?;
        let vms = self.lock();
        let record = self.core.journal.get(vm);
        let entry = vms.get(&vm);
        let mut source = entry.and_then(|e| e.source.as_ref()).map(|s| s.status());
        let mut target = entry.and_then(|e| e.target.as_ref()).map(|t| t.status());
        drop(vms);
        // A session that is over says how it ended; that is what the record says, too.
        source.take_if(|s| matches!(s.phase, Phase::Released | Phase::Retired));
        target.take_if(|t| t.phase == Phase::Released);
        let record = record.unwrap_or_else(|| VmRecord::new(vm));
        let source = record
            .source
            .as_ref()
            .map(|s| source_facts(s, source.map(|s| s.phase), &qemus));
        let target = record.target.as_ref().map(|t| target_facts(t, target.map(|t| t.phase)));
        let strays = self.strays(vm)?;
        let stray = |s: &ShadowRecord| match s.alive() {
            true => format!("a shadow's QEMU in {}", s.dir.display()),
            false => format!("a shadow's files in {}", s.dir.display()),
        };
        let files = strays.files.iter().map(|p| p.display().to_string());
        Ok(HostFacts {
            host: self.core.config.host.clone(),
            vm,
            name: record.name.clone(),
            epoch: record.epoch,
            qemus: qemus
                .iter()
                .map(|q| qemu_facts(q, &record, source.as_ref(), target.as_ref()))
                .collect(),
            source,
            target,
            leftovers: strays.shadows.iter().map(stray).chain(files).collect(),
            belongings: belongings(&record),
            fence: record.fence.map(|f| f.host),
        })
    }

    /// Shadows on record in the run directory, and RAM files, that the journal does not know.
    pub(super) fn strays(&self, vm: VmId) -> Result<Strays, Refusal> {
        let cfg = self.core.config.launch();
        let known: Vec<(VmId, u64)> = self.core.journal.get(vm).iter().flat_map(shadows_of).collect();
        let records = launch::records(&cfg).map_err(|e| local(&format!("{}: {e}", cfg.run_dir.display())))?;
        let (mine, shadows): (Vec<_>, Vec<_>) = records
            .into_iter()
            .filter(|r| r.vm == vm)
            .partition(|r| known.contains(&(r.vm, r.session)));
        let kept: Vec<&PathBuf> = mine
            .iter()
            .chain(&shadows)
            .flat_map(|r| r.ram.iter().map(|(_, p)| p))
            .collect();
        let files = launch::ram_files(&cfg, vm).map_err(|e| local(&format!("{}: {e}", cfg.ram_dir.display())))?;
        let files = files.into_iter().filter(|p| !kept.contains(&p)).collect();
        Ok(Strays { shadows, files })
    }
}

fn source_facts(s: &SourceRecord, phase: Option<Phase>, qemus: &[QemuProcess]) -> SideFacts {
    let (decided, epoch) = match s.durable {
        SourceDurable::Protecting => (Decided::Nothing, s.epoch),
        SourceDurable::Preparing { epoch } | SourceDurable::Aborting { epoch } => (Decided::Begun, epoch),
        SourceDurable::Relinquished { epoch } => (Decided::Ready, epoch),
        SourceDurable::HandedOver { epoch } => (Decided::Done, epoch),
        SourceDurable::TakingBack { epoch } => (Decided::TakingBack, epoch),
        SourceDurable::Fenced { epoch } => (Decided::Fenced, epoch),
        SourceDurable::Released | SourceDurable::Retired => (Decided::Over, s.epoch),
    };
    let copy = match phase {
        _ if !s.qemu.id.alive() => Copy::Gone,
        Some(Phase::Provisioning | Phase::Seeding | Phase::Standby) => Copy::Runs,
        Some(Phase::Switching) => Copy::Switching,
        _ => qemus.iter().find(|q| q.id == s.qemu.id).map_or(Copy::Gone, ask),
    };
    SideFacts {
        peer: s.peer.clone(),
        epoch,
        decided,
        phase,
        since: s.since,
        copy,
    }
}

fn target_facts(t: &TargetRecord, phase: Option<Phase>) -> SideFacts {
    let (decided, epoch) = match t.durable {
        TargetDurable::Admitted | TargetDurable::Shadow | TargetDurable::Held => (Decided::Nothing, t.epoch),
        TargetDurable::Prepared { epoch } => (Decided::Ready, epoch),
        TargetDurable::Running { epoch } | TargetDurable::Exited { epoch } => (Decided::Done, epoch),
        TargetDurable::Aborted { epoch } => (Decided::Over, epoch),
        TargetDurable::Fenced { epoch } => (Decided::Fenced, epoch),
        TargetDurable::Discarded => (Decided::Over, t.epoch),
    };
    let alive = t.shadow.as_ref().is_some_and(ShadowRecord::alive);
    let copy = match (alive, decided) {
        (false, _) => Copy::Gone,
        (true, Decided::Done) => Copy::Runs,
        (true, _) => Copy::Waits,
    };
    SideFacts {
        peer: t.peer.clone(),
        epoch,
        decided,
        phase,
        since: t.since,
        copy,
    }
}

fn qemu_facts(q: &QemuProcess, record: &VmRecord, source: Option<&SideFacts>, target: Option<&SideFacts>) -> QemuFacts {
    let mine = |id: Option<crate::proc::ProcessId>| id == Some(q.id);
    let as_source = mine(record.source.as_ref().map(|s| s.qemu.id))
        .then_some(source)
        .flatten();
    let shadow = record
        .target
        .as_ref()
        .and_then(|t| t.shadow.as_ref())
        .and_then(|s| s.process);
    let as_target = mine(shadow).then_some(target).flatten();
    let side = as_source.filter(|s| s.phase.is_some()).or(as_target).or(as_source);
    QemuFacts {
        pid: q.id.pid,
        copy: side.map_or_else(|| ask(q), |s| s.copy),
        known: side.is_some(),
        args: q.args.clone(),
        qmp: q.qmp.iter().map(|p| p.display().to_string()).collect(),
    }
}

/// What a QEMU says of itself, if its monitor is free.
fn ask(q: &QemuProcess) -> Copy {
    let status = |p: &PathBuf| {
        let qmp = Client::connect(p, ANSWERS_WITHIN).ok()?;
        let answer = qmp.execute_for("query-status", Value::Null, ANSWERS_WITHIN).ok()?;
        answer["status"].as_str().map(str::to_owned)
    };
    match q.qmp.iter().find_map(status).as_deref() {
        Some("running") => Copy::Runs,
        Some("postmigrate") => Copy::Stopped,
        Some("inmigrate") => Copy::Waits,
        Some("finish-migrate") => Copy::Switching,
        Some("paused") if q.incoming => Copy::Waits,
        Some(_) => Copy::Paused,
        None => Copy::Silent,
    }
}

/// What was made here for the copy that is on record: all of it stays in use as long as that copy runs.
fn belongings(record: &VmRecord) -> Vec<String> {
    let leftover = record.source.as_ref().and_then(|s| s.leftover.as_ref());
    let shadow = record.target.as_ref().and_then(|t| t.shadow.as_ref()).or(leftover);
    let Some(s) = shadow else { return Vec::new() };
    let path = |p: &PathBuf| p.display().to_string();
    let ram = s.ram.iter().map(|(block, p)| format!("RAM {block}: {}", path(p)));
    let disks = s.disks.iter().map(|d| format!("disk: {}", path(&d.path)));
    let taps = s.taps.iter().map(|t| format!("tap: {t}"));
    let group = s.cgroup.iter().map(|g| format!("cgroup: {}", path(g)));
    std::iter::once(format!("directory: {}", path(&s.dir)))
        .chain([
            format!("QMP: {}", path(&s.qmp_path)),
            format!("QEMU's output: {}", path(&s.log)),
        ])
        .chain(ram)
        .chain(disks)
        .chain(taps)
        .chain(group)
        .collect()
}
