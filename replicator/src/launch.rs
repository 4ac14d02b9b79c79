//! Starts shadows: a QEMU over RAM files, with taps, sockets and files of its own, paused and waiting for its migration.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use umbra_api::VmId;

use crate::proc::ProcessId;
use crate::qmp::Client;

/// Id of the chardev and monitor through which Umbra talks to QEMUs that it started.
pub const QMP_ID: &str = "umbra-qmp";

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
}

/// A shadow QEMU that waits.
pub struct Shadow {
    pub record: ShadowRecord,
    pub qmp: Client,
    /// Our end of the socket on which QEMU reads its migration; `None` after [`reopen`](Shadow).
    pub incoming: Option<OwnedFd>,
    pub warnings: Vec<String>,
}
