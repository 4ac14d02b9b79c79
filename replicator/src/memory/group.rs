//! The cgroup to which a shadow's memory is charged, and what it is asked to give back.

use std::io;
use std::path::Path;

use crate::tier::{Cgroup, Kind, TierError};

const CONTROLLER: &str = "memory";
/// A limit that is none.
const V1_NONE: &str = "-1";

/// One shadow's group in the memory hierarchy: on v2 that of its CPU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemoryGroup(Cgroup);

impl MemoryGroup {
    pub fn create(parent: &str, name: &str) -> Result<Self, TierError> {
        Cgroup::create(CONTROLLER, parent, name).map(Self)
    }

    /// The group of a record.
    pub fn open(path: &Path) -> Self {
        Self(Cgroup::open(path, "memory.limit_in_bytes"))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn add(&self, pid: i32) -> Result<(), TierError> {
        self.0.add(pid)
    }

    pub fn usage(&self) -> Result<u64, TierError> {
        self.0.read(match self.0.kind() {
            Kind::V1 => "memory.usage_in_bytes",
            Kind::V2 => "memory.current",
        })
    }

    /// Lets the kernel take back RAM until no more than this is charged. No limit stays behind: one that outlived its purpose
    /// would throttle or kill what is a VM by then. That less was found than asked for is no error.
    pub fn reclaim_to(&self, bytes: u64) -> Result<(), TierError> {
        let excess = self.usage()?.saturating_sub(bytes);
        if excess == 0 {
            return Ok(());
        }
        match self.0.kind() {
            Kind::V1 => {
                let shrunk = self.0.write("memory.limit_in_bytes", &bytes.to_string());
                self.lift()?;
                less_is_fine(shrunk)
            }
            Kind::V2 => match self.0.write("memory.reclaim", &excess.to_string()) {
                // Before Linux 5.19.
                Err(TierError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    let shrunk = self.0.write("memory.high", &bytes.to_string());
                    self.lift()?;
                    less_is_fine(shrunk)
                }
                other => less_is_fine(other),
            },
        }
    }

    /// Removes a limit that a replicator left which died over it.
    pub fn lift(&self) -> Result<(), TierError> {
        match self.0.kind() {
            Kind::V1 => self.0.write("memory.limit_in_bytes", V1_NONE),
            Kind::V2 => self.0.write("memory.high", "max"),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// As on v2 before Linux 5.19, which had no `memory.reclaim`.
    #[test]
    fn without_reclaim_a_limit_is_set_and_lifted() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [("memory.current", "500\n"), ("memory.high", "max\n")] {
            std::fs::write(dir.path().join(file), text).unwrap();
        }
        let group = MemoryGroup::open(dir.path());
        group.reclaim_to(600).unwrap();
        group.reclaim_to(70).unwrap();
        let high = || std::fs::read_to_string(dir.path().join("memory.high")).unwrap();
        assert_eq!(high(), "max\n");
        assert!(!dir.path().join("memory.reclaim").exists());
        std::fs::remove_file(dir.path().join("memory.high")).unwrap();
        let e = group.reclaim_to(70).unwrap_err().to_string();
        assert!(e.contains("memory.high"), "{e}");
    }
}
