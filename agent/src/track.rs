//! Which VMs come and go. Pure: [`Processes`] tells what runs, a scan tells what changed.
//!
//! A scan asks little. A known VM costs one `stat`, whose start time notices that a pid was used again. A process that is no QEMU is looked at
//! while it is young, since a new process becomes a QEMU only with its exec, and then once in [`SLOW_SCANS`] scans, spread
//! evenly.
//!
//! ```text
//!   unknown pid ──no QEMU──> other (looked at again now and then)
//!        │
//!        ├──QEMU, unusable──> named once, left out
//!        └──QEMU with uuid──> came ──gone, or another start──> gone
//! ```

use std::collections::{BTreeMap, BTreeSet};

use umbra_api::VmId;

use crate::argv::NoUuid;
use crate::procfs::{ProcId, Procfs, Qemu};

/// Scans during which a new process is looked at each time.
pub const YOUNG_SCANS: u64 = 10;
/// How seldom an old one is.
pub const SLOW_SCANS: u64 = 30;

/// What a scan asks.
pub trait Processes {
    fn pids(&self) -> std::io::Result<Vec<u32>>;
    /// When the process started, `None` if it is gone.
    fn start(&self, pid: u32) -> Option<u64>;
    fn qemu(&self, pid: u32) -> Option<Qemu>;
}

impl Processes for Procfs {
    fn pids(&self) -> std::io::Result<Vec<u32>> {
        Procfs::pids(self)
    }

    fn start(&self, pid: u32) -> Option<u64> {
        self.stat(pid).map(|s| s.start)
    }

    fn qemu(&self, pid: u32) -> Option<Qemu> {
        Procfs::qemu(self, pid)
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    Came(Box<Vm>),
    Gone(ProcId),
    /// A QEMU that can't be followed; told once.
    LeftOut {
        id: ProcId,
        name: String,
        reason: LeftOut,
    },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vm {
    pub id: ProcId,
    pub vm: VmId,
    pub qemu: Qemu,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LeftOut {
    #[error(transparent)]
    NoUuid(#[from] NoUuid),
    #[error("process {first} runs VM {vm} already")]
    Twice { vm: VmId, first: u32 },
    #[error("{0} VMs are followed already, which is max_vms")]
    TooMany(usize),
}

enum Known {
    Vm {
        id: ProcId,
        vm: VmId,
        incoming: bool,
    },
    /// Left out for good: its command line will not change.
    Useless(ProcId),
    Other {
        seen_at: u64,
    },
}

pub struct Tracker {
    /// Only QEMUs in this network namespace.
    netns: Option<u32>,
    max_vms: usize,
    scans: u64,
    known: BTreeMap<u32, Known>,
    /// Left out, but looked at again: told only once.
    told: BTreeSet<ProcId>,
}

impl Tracker {
    pub fn new(netns: Option<u32>, max_vms: usize) -> Self {
        Self {
            netns,
            max_vms,
            scans: 0,
            known: BTreeMap::new(),
            told: BTreeSet::new(),
        }
    }

    /// VMs that are followed.
    pub fn followed(&self) -> usize {
        self.known.values().filter(|k| matches!(k, Known::Vm { .. })).count()
    }

    /// QEMUs that run and are not followed.
    pub fn left_out(&self) -> usize {
        self.told.len()
    }

    pub fn scan(&mut self, processes: &impl Processes) -> std::io::Result<Vec<Change>> {
        self.scans += 1;
        let pids: BTreeSet<u32> = processes.pids()?.into_iter().collect();
        let mut changes = Vec::new();
        // Those that went first: a VM may come back under its uuid within one scan.
        self.forget(&pids, processes, &mut changes);
        for pid in pids {
            if self.wants_look(pid) {
                self.look(pid, processes, &mut changes);
            }
        }
        Ok(changes)
    }

    fn forget(&mut self, pids: &BTreeSet<u32>, processes: &impl Processes, changes: &mut Vec<Change>) {
        let alive = |id: &ProcId| pids.contains(&id.pid) && processes.start(id.pid) == Some(id.start);
        self.told.retain(alive);
        self.known.retain(|pid, known| match known {
            Known::Vm { id, .. } => {
                let stays = alive(id);
                if !stays {
                    changes.push(Change::Gone(*id));
                }
                stays
            }
            Known::Useless(id) => alive(id),
            Known::Other { .. } => pids.contains(pid),
        });
    }

    fn wants_look(&self, pid: u32) -> bool {
        match self.known.get(&pid) {
            None => true,
            Some(Known::Other { seen_at }) => {
                self.scans - seen_at <= YOUNG_SCANS || (self.scans + u64::from(pid)).is_multiple_of(SLOW_SCANS)
            }
            Some(_) => false,
        }
    }

    fn look(&mut self, pid: u32, processes: &impl Processes, changes: &mut Vec<Change>) {
        let ours = |q: &Qemu| self.netns.is_none() || q.netns == self.netns;
        let found = processes.start(pid).zip(processes.qemu(pid).filter(ours));
        let Some((start, qemu)) = found else {
            let scans = self.scans;
            self.known.entry(pid).or_insert(Known::Other { seen_at: scans });
            return;
        };
        let id = ProcId { pid, start };
        match self.judge(&qemu) {
            Ok(vm) => {
                self.told.remove(&id);
                let incoming = qemu.args.incoming;
                self.known.insert(pid, Known::Vm { id, vm, incoming });
                changes.push(Change::Came(Box::new(Vm { id, vm, qemu })));
            }
            Err(reason) => {
                match reason {
                    LeftOut::NoUuid(_) => self.known.insert(pid, Known::Useless(id)),
                    // The other one may go: look again.
                    LeftOut::Twice { .. } | LeftOut::TooMany(_) => self.known.remove(&pid),
                };
                if self.told.insert(id) {
                    let name = qemu.args.name;
                    changes.push(Change::LeftOut { id, name, reason });
                }
            }
        }
    }

    fn judge(&self, qemu: &Qemu) -> Result<VmId, LeftOut> {
        let vm = VmId(qemu.args.uuid.clone()?);
        // A primary and its shadow may share a host; two that call themselves the same would be summed into nonsense.
        let twin = self.known.values().find_map(|k| match k {
            Known::Vm { id, vm: v, incoming } if *v == vm && *incoming == qemu.args.incoming => Some(id.pid),
            _ => None,
        });
        match twin {
            Some(first) => Err(LeftOut::Twice { vm, first }),
            None if self.followed() >= self.max_vms => Err(LeftOut::TooMany(self.max_vms)),
            None => Ok(vm),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use uuid::Uuid;

    use super::*;
    use crate::argv;

    #[derive(Default)]
    struct World {
        running: BTreeMap<u32, (u64, Option<Qemu>)>,
        looks: Cell<usize>,
    }

    impl Processes for World {
        fn pids(&self) -> std::io::Result<Vec<u32>> {
            Ok(self.running.keys().copied().collect())
        }

        fn start(&self, pid: u32) -> Option<u64> {
            self.running.get(&pid).map(|p| p.0)
        }

        fn qemu(&self, pid: u32) -> Option<Qemu> {
            self.looks.set(self.looks.get() + 1);
            self.running.get(&pid).and_then(|p| p.1.clone())
        }
    }

    fn qemu(line: &str) -> Option<Qemu> {
        Some(Qemu {
            args: argv::parse(line.split_whitespace()),
            netns: Some(7),
        })
    }

    fn uuid(n: u128) -> String {
        format!("-uuid {}", Uuid::from_u128(n))
    }

    fn text(changes: &[Change]) -> Vec<String> {
        let one = |c: &Change| match c {
            Change::Came(v) => format!("came {} {}", v.id.pid, v.qemu.args.name),
            Change::Gone(id) => format!("gone {}/{}", id.pid, id.start),
            Change::LeftOut { id, reason, .. } => format!("out {}: {reason}", id.pid),
        };
        changes.iter().map(one).collect()
    }

    #[test]
    fn vms_come_go_and_come_back_renamed() {
        let mut w = World::default();
        let mut t = Tracker::new(None, 10);
        w.running.insert(1, (1, None));
        w.running.insert(5, (50, qemu(&format!("-name a {}", uuid(1)))));
        assert_eq!(text(&t.scan(&w).unwrap()), ["came 5 a"]);
        assert!(t.scan(&w).unwrap().is_empty());
        // Restarted under another name, with the same pid, between two scans.
        w.running.insert(5, (51, qemu(&format!("-name b {}", uuid(1)))));
        assert_eq!(text(&t.scan(&w).unwrap()), ["gone 5/50", "came 5 b"]);
        w.running.remove(&5);
        assert_eq!(text(&t.scan(&w).unwrap()), ["gone 5/51"]);
        assert_eq!(t.followed(), 0);
    }

    #[test]
    fn an_exec_is_noticed_soon_in_a_young_process_and_later_in_an_old_one() {
        let mut w = World::default();
        let mut t = Tracker::new(None, 10);
        w.running.insert(5, (50, None));
        t.scan(&w).unwrap();
        w.running.insert(5, (50, qemu(&uuid(1))));
        assert_eq!(t.scan(&w).unwrap().len(), 1);
        w.running.insert(6, (60, None));
        (0..100).for_each(|_| assert!(t.scan(&w).unwrap().is_empty()));
        let before = w.looks.get();
        (0..SLOW_SCANS).for_each(|_| assert!(t.scan(&w).unwrap().is_empty()));
        assert_eq!(
            w.looks.get() - before,
            1,
            "an old process is looked at once in SLOW_SCANS"
        );
        w.running.insert(6, (60, qemu(&uuid(2))));
        let came: usize = (0..SLOW_SCANS).map(|_| t.scan(&w).unwrap().len()).sum();
        assert_eq!(came, 1);
    }

    #[test]
    fn what_can_not_be_followed_is_told_once() {
        let mut w = World::default();
        let mut t = Tracker::new(None, 2);
        w.running.insert(1, (1, qemu("-name x")));
        w.running.insert(2, (1, qemu(&uuid(2))));
        w.running.insert(3, (1, qemu(&uuid(2))));
        w.running.insert(4, (1, qemu(&format!("{} -incoming defer", uuid(2)))));
        w.running.insert(5, (1, qemu(&uuid(5))));
        let first = text(&t.scan(&w).unwrap());
        let second = format!("out 3: process 2 runs VM {} already", Uuid::from_u128(2));
        assert_eq!(
            first,
            [
                "out 1: it has no -uuid",
                "came 2 ",
                &second,
                "came 4 ",
                "out 5: 2 VMs are followed already, which is max_vms"
            ]
        );
        assert!(t.scan(&w).unwrap().is_empty());
        assert_eq!(t.left_out(), 3);
        // The first goes: its twin takes its place.
        w.running.remove(&2);
        assert_eq!(text(&t.scan(&w).unwrap()), ["gone 2/1", "came 3 "]);
    }

    #[test]
    fn another_namespace_is_another_host() {
        let mut w = World::default();
        w.running.insert(1, (1, qemu(&uuid(1))));
        assert!(Tracker::new(Some(8), 10).scan(&w).unwrap().is_empty());
        assert_eq!(Tracker::new(Some(7), 10).scan(&w).unwrap().len(), 1);
    }
}
