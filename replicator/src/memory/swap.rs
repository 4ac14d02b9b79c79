//! Whether this host has somewhere to put pages that are not in RAM.

use std::fs;

/// Free swap of which a host without much of it keeps the rest for others.
const KEEP: f64 = 0.1;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Swap {
    pub total_bytes: u64,
    pub free_bytes: u64,
}

impl Swap {
    /// What `/proc/meminfo` says.
    pub fn of_this_host() -> Self {
        fs::read_to_string("/proc/meminfo").map_or_else(|_| Self::default(), |text| Self::parse(&text))
    }

    pub fn parse(meminfo: &str) -> Self {
        let kib = |name: &str| {
            let line = meminfo.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
            let value = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
            value.unwrap_or(0).saturating_mul(1024)
        };
        Self {
            total_bytes: kib("SwapTotal"),
            free_bytes: kib("SwapFree"),
        }
    }

    /// How much may still be written out. A tenth stays free, for what else the host must swap.
    pub fn room(self) -> u64 {
        self.free_bytes.saturating_sub((self.total_bytes as f64 * KEEP) as u64)
    }

    /// Why nothing can be written out, with the remedy.
    pub fn refuses(self) -> Option<String> {
        if self.total_bytes == 0 {
            return Some(
                "this host has no swap, so a shadow's RAM can't be shrunk: add some (swapon, zram), zswap helps".into(),
            );
        }
        (self.room() == 0).then(|| {
            let mib = |b: u64| b >> 20;
            format!(
                "this host's swap is nearly full ({} of {} MiB free): a shadow's RAM is not shrunk further",
                mib(self.free_bytes),
                mib(self.total_bytes)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_swap_and_full_swap_are_told_with_the_reason() {
        let none = Swap::parse("MemTotal: 5 kB\nSwapTotal:             0 kB\nSwapFree:              0 kB\n");
        assert!(none.refuses().unwrap().contains("no swap"));
        assert_eq!(Swap::parse("nonsense"), none);
        let some = Swap::parse("SwapCached: 7 kB\nSwapTotal: 10240 kB\nSwapFree: 2048 kB\n");
        assert_eq!((some.total_bytes, some.room()), (10 << 20, 1 << 20));
        assert_eq!(some.refuses(), None);
        let full = Swap {
            free_bytes: 1 << 20,
            ..some
        };
        assert!(full.refuses().unwrap().contains("1 of 10 MiB free"));
    }
}
