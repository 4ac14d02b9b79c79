//! What the replicators last told, and what follows from it: above all, where a VM runs.

use std::collections::BTreeMap;

use umbra_api::replica::{Phase, ReplicaStatus, Role};
use umbra_api::{Epoch, HostId, UnixMs, VmId};

/// One configured host's replicator.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Report {
    /// `address:port` of its link listener, for other replicators.
    pub link: String,
    /// It answered the last time it was asked.
    pub up: bool,
    /// When the last question that was answered was asked: what it says is at least that fresh.
    pub asked_at: Option<UnixMs>,
    /// Since when it does not answer.
    pub down_since: Option<UnixMs>,
    pub error: Option<String>,
    pub replicas: Vec<ReplicaStatus>,
}

/// All configured hosts.
pub type Fleet = BTreeMap<HostId, Report>;

impl Report {
    /// The newest replica of this VM in this role: a host may hold the memory of earlier ones.
    pub fn replica(&self, vm: VmId, role: Role) -> Option<&ReplicaStatus> {
        self.replicas
            .iter()
            .filter(|r| r.vm == vm && r.role == role)
            .max_by_key(|r| r.epoch)
    }
}

pub fn replica<'a>(fleet: &'a Fleet, host: &HostId, vm: VmId, role: Role) -> Option<&'a ReplicaStatus> {
    fleet.get(host)?.replica(vm, role)
}

/// The highest epoch that anybody reports for this VM.
pub fn highest_epoch(fleet: &Fleet, vm: VmId) -> Epoch {
    let all = fleet.values().flat_map(|r| &r.replicas).filter(|r| r.vm == vm);
    all.map(|r| r.epoch.max(r.seen)).max().unwrap_or_default()
}

/// Who says that it runs a VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Witness {
    pub host: HostId,
    pub epoch: Epoch,
    /// It came to run there by a switchover under this epoch; otherwise a source protects it there.
    pub active: bool,
}

/// Where a VM runs by the word of the replicators: the witness with the highest epoch counts, for a switchover takes a
/// higher epoch than the protection it ends. A target that is active has the VM; a source has it until it gives it up.
///
/// `None` if nobody knows, or if the newest word is that the source gave the VM up and the target has not spoken.
pub fn runs_on(fleet: &Fleet, vm: VmId) -> Option<Witness> {
    let words = fleet.iter().flat_map(|(host, report)| {
        report.replicas.iter().filter(|r| r.vm == vm).filter_map(move |r| {
            // Of two words under one epoch the giving up and the taking over are the later ones.
            let (runs, rank) = match (r.role, r.phase) {
                (Role::Target, Phase::Active) => (Some(host), 2),
                (Role::Source, Phase::Relinquished | Phase::Retired) => (None, 1),
                (Role::Source, Phase::Seeding | Phase::Standby | Phase::Released) => (Some(host), 0),
                _ => return None,
            };
            Some((r.epoch, rank, runs))
        })
    });
    let (epoch, rank, host) = words.max_by_key(|(epoch, rank, _)| (*epoch, *rank))?;
    host.map(|h| Witness {
        host: h.clone(),
        epoch,
        active: rank == 2,
    })
}

#[cfg(test)]
mod tests {
    use umbra_api::replica::Progress;

    use super::*;

    fn vm() -> VmId {
        VmId(uuid::Uuid::from_u128(1))
    }

    fn status(role: Role, phase: Phase, epoch: u64) -> ReplicaStatus {
        ReplicaStatus {
            vm: vm(),
            name: "web".into(),
            role,
            peer: "p".parse().unwrap(),
            epoch: Epoch(epoch),
            seen: Epoch(epoch),
            phase,
            since: UnixMs(0),
            tier: None,
            memory: None,
            progress: Progress::default(),
            report: None,
            disks: Vec::new(),
            error: None,
        }
    }

    fn fleet(a: Vec<ReplicaStatus>, b: Vec<ReplicaStatus>) -> Fleet {
        let report = |replicas| Report {
            up: true,
            replicas,
            ..Report::default()
        };
        Fleet::from([("a".parse().unwrap(), report(a)), ("b".parse().unwrap(), report(b))])
    }

    fn place(a: Vec<ReplicaStatus>, b: Vec<ReplicaStatus>) -> Option<String> {
        runs_on(&fleet(a, b), vm()).map(|w| format!("{}@{}", w.host, w.epoch))
    }

    #[test]
    fn the_word_with_the_highest_epoch_counts() {
        use Phase::*;
        use Role::*;
        let s = status;
        assert_eq!(
            place(vec![s(Source, Standby, 1)], vec![s(Target, Standby, 1)]).as_deref(),
            Some("a@1")
        );
        assert_eq!(
            place(vec![s(Source, Relinquished, 2)], vec![s(Target, Active, 2)]).as_deref(),
            Some("b@2")
        );
        // Given up, and the target has not told yet: nobody knows.
        assert_eq!(
            place(vec![s(Source, Relinquished, 2)], vec![s(Target, Prepared, 1)]),
            None
        );
        // There and back: each host holds the memory of both moves.
        let a = vec![s(Source, Relinquished, 2), s(Target, Active, 4)];
        let b = vec![s(Target, Active, 2), s(Source, Relinquished, 4)];
        assert_eq!(place(a, b).as_deref(), Some("a@4"));
        // Away, and the way back holds.
        let a = vec![s(Source, Retired, 2), s(Target, Standby, 3)];
        let b = vec![s(Target, Active, 2), s(Source, Standby, 3)];
        assert_eq!(place(a, b).as_deref(), Some("b@3"));
        assert_eq!(place(vec![], vec![]), None);
    }
}
