//! What the kernel's command line asks of the guest. A bad value is told on the console and its default taken:
//! a test guest that stops for a typo tells less than one that runs and says so.

use std::net::Ipv4Addr;

use crate::schedule::Schedule;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatternSize {
    /// 60 % of what is free at boot.
    Auto,
    Mib(u64),
}

#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    pub ip: Option<(Ipv4Addr, Ipv4Addr)>,
    pub gateway: Option<Ipv4Addr>,
    pub pattern: PatternSize,
    pub dirty_pages_per_s: u64,
    /// In which each page is to be verified once.
    pub scrub_s: u64,
    pub tick_ms: u64,
    pub burn: Schedule,
    pub work_us: u64,
    /// Names of disks to write journals on: `vda`.
    pub disks: Vec<String>,
    pub disk_records_per_s: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            ip: None,
            gateway: None,
            pattern: PatternSize::Auto,
            dirty_pages_per_s: 0,
            scrub_s: 10,
            tick_ms: 100,
            burn: Schedule::idle(),
            work_us: 2000,
            disks: Vec::new(),
            disk_records_per_s: 50,
        }
    }
}

impl Options {
    /// Reads `umbra.*` words and leaves the kernel's own alone. Also gives back what it could not read.
    pub fn parse(cmdline: &str) -> (Options, Vec<String>) {
        let mut options = Options::default();
        let mut complaints = Vec::new();
        for word in cmdline.split_ascii_whitespace() {
            let Some((key, value)) = word.strip_prefix("umbra.").and_then(|rest| rest.split_once('=')) else {
                continue;
            };
            if let Err(reason) = options.set(key, value) {
                complaints.push(format!("umbra.{key}={value}: {reason}"));
            }
        }
        (options, complaints)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "ip" => self.ip = Some(network(value)?),
            "gw" => self.gateway = Some(value.parse().map_err(|_| "not an IPv4 address")?),
            "pattern" if value == "auto" => self.pattern = PatternSize::Auto,
            "pattern" => self.pattern = PatternSize::Mib(number(value)?),
            "dirty" => self.dirty_pages_per_s = number(value)?,
            "scrub_s" => self.scrub_s = number(value)?.clamp(1, 3600),
            "tick_ms" => self.tick_ms = number(value)?.clamp(1, 60_000),
            "burn" => self.burn = value.parse()?,
            "work_us" => self.work_us = number(value)?.min(10_000_000),
            "disk" => self.disks = value.split(',').map(disk).collect::<Result<_, _>>()?,
            "disk_rate" => self.disk_records_per_s = number(value)?.clamp(1, 10_000),
            _ => return Err("unknown option".into()),
        }
        Ok(())
    }
}

fn disk(name: &str) -> Result<String, String> {
    match !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric()) {
        true => Ok(name.to_owned()),
        false => Err(format!("{name:?} is no name of a disk")),
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "not a whole number".into())
}

/// `10.99.0.2/24` as the address and its mask.
fn network(text: &str) -> Result<(Ipv4Addr, Ipv4Addr), String> {
    let (address, bits) = text.split_once('/').unwrap_or((text, "24"));
    let address = address.parse().map_err(|_| "not an IPv4 address")?;
    let bits: u32 = bits
        .parse()
        .ok()
        .filter(|bits| *bits <= 32)
        .ok_or("the prefix is 0 to 32 bits")?;
    Ok((address, Ipv4Addr::from(u32::MAX.checked_shl(32 - bits).unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_option() {
        let line = "console=ttyS0 umbra.ip=10.99.0.2/16 umbra.gw=10.99.0.1 umbra.pattern=64 umbra.dirty=1000 \
                    umbra.tick_ms=50 umbra.burn=0:0.5 umbra.work_us=300 umbra.disk=vda,sda umbra.disk_rate=200 umbra.scrub_s=2";
        let (options, complaints) = Options::parse(line);
        assert!(complaints.is_empty(), "{complaints:?}");
        assert_eq!(
            options.ip,
            Some((Ipv4Addr::new(10, 99, 0, 2), Ipv4Addr::new(255, 255, 0, 0)))
        );
        assert_eq!(options.gateway, Some(Ipv4Addr::new(10, 99, 0, 1)));
        assert_eq!(options.pattern, PatternSize::Mib(64));
        assert_eq!(
            (
                options.dirty_pages_per_s,
                options.tick_ms,
                options.work_us,
                options.scrub_s
            ),
            (1000, 50, 300, 2)
        );
        assert_eq!(options.burn.share_at(1.0), 0.5);
        assert_eq!(
            (options.disks.join(" ").as_str(), options.disk_records_per_s),
            ("vda sda", 200)
        );
    }

    #[test]
    fn bad_values_are_told_and_defaults_kept() {
        let (options, complaints) =
            Options::parse("umbra.dirty=many umbra.colour=red umbra.disk=../mem umbra.ip=10.0.0.1/99 umbra.tick_ms=0");
        assert_eq!(complaints.len(), 4);
        assert_eq!(
            options,
            Options {
                tick_ms: 1,
                ..Options::default()
            }
        );
    }

    #[test]
    fn masks_at_both_ends() {
        assert_eq!(network("1.2.3.4/0").unwrap().1, Ipv4Addr::UNSPECIFIED);
        assert_eq!(network("1.2.3.4/32").unwrap().1, Ipv4Addr::BROADCAST);
    }
}
