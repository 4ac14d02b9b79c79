//! Lists of CPUs as the kernel writes them: `0-3,8`.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// Highest CPU number taken: more than any Linux is built for (NR_CPUS).
pub const CPU_MAX: u32 = 8191;

#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(try_from = "String")]
pub struct CpuList(BTreeSet<u32>);

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CpuListError {
    #[error("expected CPUs such as \"0-3,8\", found nothing")]
    Empty,
    #[error("{0:?} is no CPU and no range such as 0-3")]
    Malformed(String),
    #[error("the range {0}-{1} runs backwards")]
    Backwards(u32, u32),
    #[error("CPU {0} is above {CPU_MAX}")]
    TooHigh(u32),
}

impl CpuList {
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    pub fn contains(&self, cpu: u32) -> bool {
        self.0.contains(&cpu)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those of `self` that `other` has not.
    pub fn missing_in(&self, other: &Self) -> Vec<u32> {
        self.0.difference(&other.0).copied().collect()
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let mut cpus = BTreeSet::new();
        for part in text.trim().split(',').map(str::trim) {
            if part.is_empty() && text.trim().is_empty() {
                return Err(CpuListError::Empty);
            }
            let number = |s: &str| {
                s.trim()
                    .parse::<u32>()
                    .map_err(|_| CpuListError::Malformed(part.to_owned()))
            };
            let (first, last) = match part.split_once('-') {
                Some((a, b)) => (number(a)?, number(b)?),
                None => (number(part)?, number(part)?),
            };
            if last < first {
                return Err(CpuListError::Backwards(first, last));
            }
            if last > CPU_MAX {
                return Err(CpuListError::TooHigh(last));
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }
}

impl TryFrom<String> for CpuList {
    type Error = CpuListError;

    fn try_from(text: String) -> Result<Self, CpuListError> {
        text.parse()
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.iter().copied().peekable();
        let mut comma = "";
        while let Some(first) = rest.next() {
            let mut last = first;
            while let Some(next) = rest.next_if_eq(&(last + 1)) {
                last = next;
            }
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
            comma = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_survive_the_round_trip() {
        for text in ["0", "0-3", "0-3,8", "1,3,5-7,100"] {
            assert_eq!(text.parse::<CpuList>().unwrap().to_string(), text);
        }
        assert_eq!(" 3, 1-2 ,2".parse::<CpuList>().unwrap().to_string(), "1-3");
    }

    #[test]
    fn bad_lists_say_why() {
        let error = |s: &str| s.parse::<CpuList>().unwrap_err();
        assert_eq!(error(""), CpuListError::Empty);
        assert_eq!(error("0,,1"), CpuListError::Malformed("".into()));
        assert_eq!(error("a-b"), CpuListError::Malformed("a-b".into()));
        assert_eq!(error("-3"), CpuListError::Malformed("-3".into()));
        assert_eq!(error("3-1"), CpuListError::Backwards(3, 1));
        assert_eq!(error("0-4294967295"), CpuListError::TooHigh(u32::MAX));
        assert!(matches!(error("99999999999"), CpuListError::Malformed(_)));
    }
}
