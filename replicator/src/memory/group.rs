//! The cgroup to which a shadow's memory is charged, and what it is asked to give back.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::tier::{Hierarchy, Kind, TierError, below, remove_group};

const CONTROLLER: &str = "memory";
/// A limit that is none.
const V1_NONE: &str = "-1";

/// One shadow's group in the memory hierarchy: on v2 that of its CPU. Dropping it leaves it in place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemoryGroup {
    kind: Kind,
    path: PathBuf,
}

impl MemoryGroup {
    pub fn create(parent: &str, name: &str) -> Result<Self, TierError> {
        let hierarchy = Hierarchy::detect(CONTROLLER)?;
        let path = below(&hierarchy, parent, name)?;
        Ok(Self {
            kind: hierarchy.kind(),
            path,
        })
    }

    /// The group of a record.
    pub fn open(path: &Path) -> Self {
        let kind = match path.join("memory.limit_in_bytes").exists() {
            true => Kind::V1,
            false => Kind::V2,
        };
        Self {
            kind,
            path: path.to_owned(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A process with all its threads. What it has touched already stays charged where it is.
    pub fn add(&self, pid: i32) -> Result<(), TierError> {
        self.write("cgroup.procs", &pid.to_string())
    }

    pub fn usage(&self) -> Result<u64, TierError> {
        let file = match self.kind {
            Kind::V1 => "memory.usage_in_bytes",
            Kind::V2 => "memory.current",
        };
        let path = self.path.join(file);
        let text = fs::read_to_string(&path);
        let read = text.and_then(|t| t.trim().parse().map_err(io::Error::other));
        read.map_err(|source| TierError::Io { path, source })
    }

    /// Lets the kernel take back RAM until no more than this is charged. No limit stays behind: one that outlived its purpose
    /// would throttle or kill what is a VM by then. That less was found than asked for is no error.
    pub fn reclaim_to(&self, bytes: u64) -> Result<(), TierError> {
        let excess = self.usage()?.saturating_sub(bytes);
        if excess == 0 {
            return Ok(());
        }
        match self.kind {
            Kind::V1 => {
                let shrunk = self.write("memory.limit_in_bytes", &bytes.to_string());
                self.lift()?;
                less_is_fine(shrunk)
            }
            Kind::V2 => match self.write("memory.reclaim", &excess.to_string()) {
                // Before Linux 5.19.
                Err(TierError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    let shrunk = self.write("memory.high", &bytes.to_string());
                    self.lift()?;
                    less_is_fine(shrunk)
                }
                other => less_is_fine(other),
            },
        }
    }

    /// Removes a limit that a replicator left which died over it.
    pub fn lift(&self) -> Result<(), TierError> {
        match self.kind {
            Kind::V1 => self.write("memory.limit_in_bytes", V1_NONE),
            Kind::V2 => self.write("memory.high", "max"),
        }
    }

    pub fn remove(self) -> Result<(), TierError> {
        remove_group(self.path)
    }

    fn write(&self, file: &str, value: &str) -> Result<(), TierError> {
        let path = self.path.join(file);
        fs::write(&path, value).map_err(|source| TierError::Io { path, source })
    }
}

/// v1 says 'busy' and v2 'again' when not all could be reclaimed.
fn less_is_fine(written: Result<(), TierError>) -> Result<(), TierError> {
    match written {
        Err(TierError::Io { source, .. })
            if matches!(source.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN | libc::EINTR)) =>
        {
            Ok(())
        }
        other => other,
    }
}
