//! What two replicators say to each other on a control connection: JSON, bounded by the frame.
//!
//! ```text
//! source                                   target
//!   Hello {vm, epoch, spec}        ──>
//!                                  <──     Welcome {session} | Refused
//!   (opens the ram connection: Attach {session}, and one a private disk: AttachDisk {session, disk})
//!                                  <──     Seeded, RoundDone …          (acks of the ram connection's marks)
//!   DisksEqual {epoch}             ──>      (with private disks)
//!   (device state, StreamEnd on the ram connection)
//!                                  <──     Prepared {epoch} | Refused
//!   [durable: relinquished, epoch; then SHUT(0)]
//!   Commit {epoch}                 ──>
//!                                  <──     Running {epoch}
//! ```
//! After a broken connection the source asks `Resolve {epoch}`; the target answers from its disk: `Prepared`, `Running` or `Aborted`.

use serde::{Deserialize, Serialize};

use super::WireError;
use crate::order::Refusal;
use crate::{Epoch, HostId, VmId};

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields, tag = "say")]
pub enum Message {
    /// Opens a session: a shadow of this VM, please.
    Hello {
        vm: VmId,
        name: String,
        epoch: Epoch,
        host: HostId,
        /// Port of the source's own link listener, at which it can be asked.
        #[serde(default)]
        port: Option<u16>,
        spec: Box<ShadowSpec>,
        /// The source's mirrors wait for the images that were kept under this number.
        #[serde(default)]
        resume: Option<u64>,
    },
    /// The shadow's QEMU waits; its RAM files are there.
    Welcome {
        session: u64,
        /// The kept images are the shadow's: the mirrors go on where they were.
        #[serde(default)]
        resumed: bool,
    },
    /// First message of a ram connection.
    Attach {
        session: u64,
    },
    /// First message of a disk connection; `disk` is the place in [`ShadowSpec::disks`].
    AttachDisk {
        session: u64,
        disk: usize,
    },
    /// The source asked for the end of a session, and the primary runs on.
    Goodbye {
        reason: String,
    },
    /// Everything up to this round is in the shadow's RAM.
    RoundDone {
        round: u64,
    },
    /// The next stream end is meant: prepare to run under this epoch.
    Prepare {
        epoch: Epoch,
    },
    /// The guest is stopped, and its private disks are equal on both sides: they are the shadow's from here on.
    DisksEqual {
        epoch: Epoch,
    },
    /// The shadow has loaded its device state, is paused, and that is on the target's disk.
    Prepared {
        epoch: Epoch,
        load_us: u64,
    },
    Commit {
        epoch: Epoch,
    },
    Abort {
        epoch: Epoch,
    },
    /// The shadow runs. `resume_unix_us` is QEMU's own time of the RESUME event.
    Running {
        epoch: Epoch,
        resume_unix_us: i64,
        resume_us: u64,
    },
    /// It will never run under this epoch: durable.
    Aborted {
        epoch: Epoch,
    },
    /// Asked on a new connection: how did `epoch` of `vm` end?
    Resolve {
        vm: VmId,
        epoch: Epoch,
    },
    /// Asked on a new connection: the copy of `vm` on the other side must never run below `epoch`. `dead`: nor go on running,
    /// since an operator declared that host dead. Answered by `Aborted` once it is durable and done.
    Fence {
        vm: VmId,
        epoch: Epoch,
        dead: bool,
    },
    /// Told on a new connection: the source's copy of `vm`, begun in `epoch`, is over, and nobody comes for its memory. Answered by
    /// `Aborted` once nothing of it is left.
    Ended {
        vm: VmId,
        epoch: Epoch,
        host: HostId,
    },
    /// Asked on a new connection: could a shadow like this be held? Nothing is started.
    Check {
        vm: VmId,
        host: HostId,
        spec: Box<ShadowSpec>,
    },
    /// All that is in the way of it.
    Checked {
        lacks: Vec<Refusal>,
    },
    /// Pages of the shadow's RAM are not what was sent: memory of the target is damaged, or either side has an error.
    Differs {
        block: String,
        pages: u64,
        /// The first one's number.
        first: u64,
    },
    /// Sums of the primary's disk, of ranges that follow each other from `from` on ([`super::disk`]): does the image have the same?
    DiskSums {
        disk: usize,
        from: u64,
        sums: Vec<u64>,
    },
    /// The answer: so many bytes were compared, and ranges that begin there differ.
    DiskLooked {
        disk: usize,
        from: u64,
        bytes: u64,
        differing: Vec<u64>,
    },
    Refused {
        refusal: Refusal,
    },
    /// Keeps a quiet connection alive, and notices a dead one.
    Ping {
        n: u64,
    },
    Pong {
        n: u64,
    },
}

impl Message {
    pub fn encode(&self) -> Vec<u8> {
        // Serializing these types into a Vec cannot fail: no map with non-string keys, no failing writer.
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        serde_json::from_slice(payload).map_err(|e| WireError::Json(e.to_string()))
    }
}

/// All that the target needs to start a QEMU that can take over: the primary's command line, already free of what
/// belongs to its host, and what has to be filled in on the target.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShadowSpec {
    pub qemu_version: (u32, u32, u32),
    /// Name of the QEMU binary, found on the target by its PATH or configuration: `qemu-system-x86_64`.
    pub binary: String,
    /// Versioned machine type, without options: `pc-q35-10.0`.
    pub machine: String,
    pub args: Vec<Arg>,
    /// The RAM blocks that become files, in the order of QEMU's block list.
    pub ram: Vec<RamBlock>,
    pub nics: Vec<Nic>,
    /// Files that the command line names and that must exist on the target: kernels, firmware, shared images.
    pub files: Vec<String>,
    /// Writable disks that are copied to images of the target's.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// The primary's host's CPU, if the guest sees it as it is.
    #[serde(default)]
    pub host_cpu: Option<HostCpu>,
}

/// A CPU as a guest would see it through `-cpu host`, in the words of /proc/cpuinfo.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostCpu {
    pub vendor: String,
    pub family: String,
    pub model: String,
    pub name: String,
    /// Sorted, with blanks between them.
    pub flags: String,
}

/// One argument of the shadow's command line.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Arg {
    /// As it is.
    Plain(String),
    /// `-netdev` of the NIC with this index: the target inserts its own tap.
    Netdev { nic: usize, prefix: String, suffix: String },
    /// Names the disk with this index: the target inserts its own image's path.
    Disk {
        disk: usize,
        prefix: String,
        suffix: String,
    },
    /// A path that the target makes in its own run directory: `prefix` + path + `suffix`.
    RunFile {
        prefix: String,
        file: String,
        suffix: String,
    },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RamBlock {
    /// Its name in the migration stream, which is also the id of the backend object: `pc.ram`.
    pub name: String,
    pub bytes: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// The bridge that the primary's tap is a port of.
    pub bridge: Option<String>,
    pub tap: String,
}

/// A private disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// QEMU's name of the node at the top, on the primary.
    pub node: String,
    /// What the guest sees it as, on the primary: an id or a path of QEMU's.
    pub device: String,
    /// The primary's image.
    pub path: String,
    pub format: DiskFormat,
    /// As the guest sees it.
    pub bytes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

impl DiskFormat {
    /// As QEMU calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_and_strangers_are_named() {
        let m = Message::Prepared {
            epoch: Epoch(4),
            load_us: 3900,
        };
        assert_eq!(Message::decode(&m.encode()), Ok(m));
        let e = Message::decode(br#"{"say":"sing"}"#).unwrap_err();
        assert!(e.to_string().contains("sing"), "{e}");
        let e = Message::decode(br#"{"say":"commit","epoch":1,"sure":true}"#).unwrap_err();
        assert!(e.to_string().contains("sure"), "{e}");
        let m = Message::decode(br#"{"say":"commit","epoch":1"#);
        assert!(m.is_err());
    }
}
