//! Ids are types of their own, so that a host's name never stands where a VM's id belongs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A VM's identity: the `-uuid` that its QEMU runs with. It stays the same wherever the VM runs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VmId(pub Uuid);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for VmId {
    type Err = uuid::Error;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        s.parse().map(Self)
    }
}

/// One order of the RPS. Sending an order again with the same id has no further effect.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OrderId(pub Uuid);

impl fmt::Display for OrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One decision of the planner; ids grow with time within one store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DecisionId(pub u64);

impl fmt::Display for DecisionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who may run a VM is a matter of epochs: each protection and each switchover takes the next one, both
/// replicators keep the highest they have seen on disk, and refuse every order below it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Longest host name accepted, in bytes: what DNS allows.
pub const HOST_ID_MAX: usize = 253;

/// A hypervisor host, by the name its operator gave it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostId(String);

/// Why a string is no host name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HostIdError {
    #[error("a host name may not be empty")]
    Empty,
    #[error("a host name has at most {HOST_ID_MAX} characters, this one has {0}")]
    TooLong(usize),
    #[error("a host name is made of letters, digits, '.', '-' and '_'; {0:?} is none of them")]
    BadChar(char),
}

impl HostId {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for HostId {
    type Error = HostIdError;

    fn try_from(s: String) -> Result<Self, HostIdError> {
        if s.is_empty() {
            return Err(HostIdError::Empty);
        }
        if s.len() > HOST_ID_MAX {
            return Err(HostIdError::TooLong(s.len()));
        }
        match s.chars().find(|c| !c.is_ascii_alphanumeric() && !".-_".contains(*c)) {
            Some(c) => Err(HostIdError::BadChar(c)),
            None => Ok(Self(s)),
        }
    }
}

impl FromStr for HostId {
    type Err = HostIdError;

    fn from_str(s: &str) -> Result<Self, HostIdError> {
        s.to_owned().try_into()
    }
}

impl From<HostId> for String {
    fn from(h: HostId) -> Self {
        h.0
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_are_checked_where_they_come_in() {
        assert_eq!("kvm-07.rack_2".parse::<HostId>().unwrap().as_str(), "kvm-07.rack_2");
        assert_eq!("".parse::<HostId>(), Err(HostIdError::Empty));
        assert_eq!("a/b".parse::<HostId>(), Err(HostIdError::BadChar('/')));
        assert_eq!("a".repeat(254).parse::<HostId>(), Err(HostIdError::TooLong(254)));
        assert!(serde_json::from_str::<HostId>("\"a b\"").is_err());
    }
}
