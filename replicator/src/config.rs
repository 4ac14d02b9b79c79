//! `umbra-replicator.toml`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use umbra_api::HostId;
use umbra_daemon::config::{Check, Invalid};

use crate::adopt::Storage;
use crate::encode;
use crate::launch::LaunchConfig;
use crate::limits::Limits;
use crate::link::Security;
use crate::link::tls::{Files, Tls};
use crate::memory::keeper::Shares;
use crate::pacing::control::Bounds;
use crate::proc::Scope;

/// Beyond it zstd takes several times as long for a few percent.
const ZSTD_LEVEL_MAX: i32 = 6;
/// Of pages that are told whole: a fifth (text, programs) to half (the test guest's) less CPU time than level 1, and up to two fifths (text)
/// more bytes, a fifth of programs.
const ROUNDS_LEVEL: i32 = -3;
const DELTA_CACHE_MIB_MAX: u32 = 64 << 10;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This host's name, as the RPS knows it.
    pub host: HostId,
    /// HTTP: orders, replicas, metrics. Loopback unless configured.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Where other replicators connect to. Off where absent: then this host can't be a target.
    pub link_listen: Option<SocketAddr>,
    /// What must survive a restart: epochs and the state of each replica.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Sockets, logs and console files of the shadows.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// RAM of the shadows. A tmpfs or hugetlbfs.
    #[serde(default = "default_ram_dir")]
    pub ram_dir: PathBuf,
    /// Which QEMU processes are this host's: `all`, or `netns` for those in the replicator's own network namespace.
    #[serde(default)]
    pub scope: Scope,
    /// Writable disks of the VMs: `private` ones are copied to images of the target's, `shared` ones are reached by all hosts under
    /// the same path.
    #[serde(default)]
    pub storage: Storage,
    /// Images of the shadows' private disks.
    #[serde(default = "default_disk_dir")]
    pub disk_dir: PathBuf,
    /// Images that were set aside here for disks of other hosts, by the path there: `"/srv/web.qcow2" = "/data/web.qcow2"`.
    #[serde(default)]
    pub disks: BTreeMap<String, PathBuf>,
    /// Where QEMU's binaries are looked for, before PATH.
    pub qemu_dir: Option<PathBuf>,
    /// Parent cgroup of the shadows, for their tiers, below the cpu controller's mount. Empty: no tiers.
    #[serde(default = "default_cgroup")]
    pub cgroup: String,
    /// Bridges of other hosts by what they are called here: `br-prod = "vmbr0"`.
    #[serde(default)]
    pub bridges: BTreeMap<String, String>,
    /// The bridge for a NIC whose primary's tap is a port of none.
    pub default_bridge: Option<String>,
    /// Tests alone: see [`crate::faults`].
    pub test_faults: Option<PathBuf>,
    #[serde(default)]
    pub tiers: Tiers,
    #[serde(default)]
    pub link: Link,
    #[serde(default)]
    pub switchover: Switchover,
    #[serde(default)]
    pub pacing: Pacing,
}

/// What the copies may cost this host, whatever lag they are to keep. Each VM's copy by itself, the first one too: that is slowed down
/// to a tenth of what it could do, but no further.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pacing {
    /// Of one CPU, for QEMU's migration threads …
    pub qemu_cpu_pct: f64,
    /// … and for the replicator's thread that carries the pages.
    pub own_cpu_pct: f64,
    /// The host is hot when somebody waits for a CPU for so much of the time: then copies back off.
    pub hot_pct: f64,
}

impl Default for Pacing {
    fn default() -> Self {
        Self {
            qemu_cpu_pct: 25.0,
            own_cpu_pct: 25.0,
            hot_pct: 80.0,
        }
    }
}

impl Pacing {
    pub fn bounds(&self) -> Bounds {
        Bounds {
            qemu_cpu: self.qemu_cpu_pct / 100.0,
            own_cpu: self.own_cpu_pct / 100.0,
            hot: self.hot_pct / 100.0,
        }
    }

    fn check(&self) -> Result<(), Invalid> {
        let shares = [
            ("pacing.qemu_cpu_pct", self.qemu_cpu_pct),
            ("pacing.own_cpu_pct", self.own_cpu_pct),
            ("pacing.hot_pct", self.hot_pct),
        ];
        match shares.into_iter().find(|(_, pct)| !(0.1..=100.0).contains(pct)) {
            Some((key, pct)) => Err(Invalid::new(key, format!("{pct} is not between 0.1 and 100"))),
            None => Ok(()),
        }
    }
}

/// What a shadow gets of its expected peak while it waits; a running VM has all of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tiers {
    /// Share of CPU and RAM, above 0 to 1, of a warm shadow (tier 0).
    pub standby: f64,
    /// The same when contention is near (tier 1).
    pub armed: f64,
    /// Let what is above the share of RAM wait in swap. Without swap nothing is shrunk, and the status says so.
    pub shrink_ram: bool,
    /// In how many seconds the scrub looks at all that waits in swap, which is read and written once for it; 0: never.
    pub scrub_swap_s: u64,
}

impl Default for Tiers {
    fn default() -> Self {
        let shares = Shares::default();
        Self {
            standby: shares.standby,
            armed: shares.armed,
            shrink_ram: shares.shrink_ram,
            scrub_swap_s: 24 * 3600,
        }
    }
}

impl Tiers {
    pub fn scrub_swap(&self) -> Option<Duration> {
        (self.scrub_swap_s > 0).then(|| Duration::from_secs(self.scrub_swap_s))
    }

    pub fn shares(&self) -> Shares {
        Shares {
            standby: self.standby,
            armed: self.armed,
            shrink_ram: self.shrink_ram,
        }
    }

    fn check(&self) -> Result<(), Invalid> {
        let shares = [("tiers.standby", self.standby), ("tiers.armed", self.armed)];
        if let Some((key, share)) = shares.into_iter().find(|(_, s)| !(*s > 0.0 && *s <= 1.0)) {
            return Err(Invalid::new(key, format!("{share} is not above 0 and at most 1")));
        }
        if self.armed < self.standby {
            let why = format!("{} is below tiers.standby, {}", self.armed, self.standby);
            return Err(Invalid::new("tiers.armed", why));
        }
        Ok(())
    }
}

/// How the link behaves.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Link {
    /// Certificates for TLS with the other replicators.
    pub tls: Option<Files>,
    /// No encryption and no proof of who speaks, for a network that nobody else is on. Instead of `tls`.
    pub plaintext: bool,
    /// zstd's lowest level, 1 to 19, and the highest (absent: 6, or the lowest if that is more): it follows the link's speed and the CPU's in
    /// between. Pages that do not shrink travel as they are.
    pub zstd_level: i32,
    pub zstd_level_max: Option<i32>,
    /// The lowest of rounds, -7 to `zstd_level` but 0 (absent: -3, or `zstd_level` if that is above 1). Below 0 are zstd's fast levels.
    pub zstd_level_rounds: Option<i32>,
    /// Memory of the source, for each VM that it protects, for the versions of pages that deltas are made against. 0: no deltas.
    pub delta_cache_mib: u32,
    /// Megabits a second that all protections of this host may send together. Absent: as fast as it goes.
    pub bandwidth_mbit: Option<u32>,
    /// The last pass of a switchover, in which the guest stands still, keeps to it too.
    pub bandwidth_in_switchover: bool,
    pub connect_timeout_ms: u64,
    /// A peer that is silent for so long, or takes nothing for so long, is lost.
    pub silence_ms: u64,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            tls: None,
            plaintext: false,
            zstd_level: 1,
            zstd_level_max: None,
            zstd_level_rounds: None,
            delta_cache_mib: 64,
            bandwidth_mbit: None,
            bandwidth_in_switchover: false,
            connect_timeout_ms: 3_000,
            silence_ms: 10_000,
        }
    }
}

impl Link {
    pub fn encoding(&self) -> encode::Settings {
        encode::Settings {
            level_min: self.zstd_level,
            level_rounds: self.zstd_level_rounds.unwrap_or(match self.zstd_level {
                1 => ROUNDS_LEVEL,
                more => more,
            }),
            level_max: self.zstd_level_max.unwrap_or(ZSTD_LEVEL_MAX.max(self.zstd_level)),
            delta_cache_bytes: (self.delta_cache_mib as usize) << 20,
        }
    }

    fn check(&self) -> Result<(), Invalid> {
        let encoding = self.encoding();
        let (low, high) = (encoding.level_min, encoding.level_max);
        if !(1..=19).contains(&low) {
            return Err(Invalid::new(
                "link.zstd_level",
                format!("{low} is not between 1 and 19"),
            ));
        }
        if !(low..=19).contains(&high) {
            let why = format!("{high} is not between zstd_level ({low}) and 19");
            return Err(Invalid::new("link.zstd_level_max", why));
        }
        let rounds = encoding.level_rounds;
        if !(-7..=low).contains(&rounds) || rounds == 0 {
            let why = format!("{rounds} is not between -7 and zstd_level ({low}), or is 0");
            return Err(Invalid::new("link.zstd_level_rounds", why));
        }
        if self.delta_cache_mib > DELTA_CACHE_MIB_MAX {
            let why = format!("{} is more than {DELTA_CACHE_MIB_MAX}", self.delta_cache_mib);
            return Err(Invalid::new("link.delta_cache_mib", why));
        }
        if self.bandwidth_mbit == Some(0) {
            return Err(Invalid::new(
                "link.bandwidth_mbit",
                "0 is no bandwidth; leave it out for no limit",
            ));
        }
        Ok(())
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Switchover {
    /// From the order to 'prepared'; past it the switchover is given up and the guest runs on where it was.
    pub timeout_ms: u64,
}

impl Default for Switchover {
    fn default() -> Self {
        Self { timeout_ms: 5_000 }
    }
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7403))
}

fn default_state_dir() -> PathBuf {
    "/var/lib/umbra/replicator".into()
}

fn default_cgroup() -> String {
    "umbra".into()
}

fn default_run_dir() -> PathBuf {
    "/run/umbra".into()
}

fn default_disk_dir() -> PathBuf {
    "/var/lib/umbra/disks".into()
}

fn default_ram_dir() -> PathBuf {
    "/dev/shm/umbra".into()
}

impl Config {
    pub fn launch(&self) -> LaunchConfig {
        LaunchConfig {
            run_dir: self.run_dir.clone(),
            ram_dir: self.ram_dir.clone(),
            qemu_dir: self.qemu_dir.clone(),
            cgroup: Some(self.cgroup.clone()).filter(|c| !c.is_empty()),
            cpus: None,
            bridges: self.bridges.clone(),
            default_bridge: self.default_bridge.clone(),
            disk_dir: self.disk_dir.clone(),
            disks: self.disks.clone(),
        }
    }
}

impl Config {
    pub fn limits(&self) -> Limits {
        Limits {
            bandwidth_mbit: self.link.bandwidth_mbit,
        }
    }

    /// How the link is protected. Reads the certificates.
    pub fn security(&self) -> Result<Security, Invalid> {
        match (&self.link.tls, self.link.plaintext) {
            (Some(files), false) => Tls::load(files, &self.host)
                .map(|tls| Security::Tls(Arc::new(tls)))
                .map_err(|e| Invalid::new(format!("link.tls.{}", e.key), e.to_string())),
            (None, true) => Ok(Security::Plaintext),
            (Some(_), true) => Err(Invalid::new(
                "link.plaintext",
                "there is a [link.tls] table too: only one of them can be meant",
            )),
            (None, false) => Err(Invalid::new(
                "link",
                "nothing says how to protect the link: name certificates in [link.tls] (cert, key, ca; \
                 'umbra pki' makes some), or set plaintext = true on a network that nobody else is on",
            )),
        }
    }
}

impl Check for Config {
    fn check(&self) -> Result<(), Invalid> {
        let absolute = [
            ("state_dir", &self.state_dir),
            ("run_dir", &self.run_dir),
            ("ram_dir", &self.ram_dir),
            ("disk_dir", &self.disk_dir),
        ];
        let images = self.disks.values().map(|p| ("disks", p));
        if let Some((key, path)) = absolute.into_iter().chain(images).find(|(_, p)| !p.is_absolute()) {
            return Err(Invalid::new(key, format!("{} is not an absolute path", path.display())));
        }
        if let Some(path) = crate::launch::disks::duplicate(&self.disks) {
            return Err(Invalid::new(
                "disks",
                format!("{} is set aside for two disks", path.display()),
            ));
        }
        self.tiers.check()?;
        self.link.check()?;
        self.pacing.check()?;
        let times = [
            ("link.connect_timeout_ms", self.link.connect_timeout_ms),
            ("link.silence_ms", self.link.silence_ms),
            ("switchover.timeout_ms", self.switchover.timeout_ms),
        ];
        match times.into_iter().find(|(_, ms)| !(100..=600_000).contains(ms)) {
            Some((key, ms)) => Err(Invalid::new(key, format!("{ms} is not between 100 and 600000"))),
            None => self.security().map(|_| ()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use umbra_daemon::config;

    use super::*;

    #[test]
    fn defaults_and_errors() {
        let c: Config = config::parse(Path::new("r.toml"), "host = 'a'\n[link]\nplaintext = true\n").unwrap();
        let encoding = c.link.encoding();
        assert_eq!((c.listen.port(), encoding.level_min, encoding.level_max), (7403, 1, 6));
        let high: Config = config::parse(
            Path::new("r.toml"),
            "host = 'a'\n[link]\nplaintext = true\nzstd_level = 9\n",
        )
        .unwrap();
        assert_eq!(
            (high.link.encoding().level_max, high.link.encoding().level_rounds),
            (9, 9)
        );
        assert_eq!(encoding.level_rounds, -3);
        let error = |text: &str| {
            config::parse::<Config>(Path::new("r.toml"), text)
                .unwrap_err()
                .to_string()
        };
        assert!(error("host = 'a b'\n").starts_with("r.toml: host: "));
        assert_eq!(
            error("host = 'a'\nrun_dir = 'x'\n"),
            "r.toml: run_dir: x is not an absolute path"
        );
        let e = error("host = 'a'\n[link]\nzstd_level = 77\n");
        assert_eq!(e, "r.toml: link.zstd_level: 77 is not between 1 and 19");
        let e = error("host = 'a'\n[link]\nzstd_level = 7\nzstd_level_max = 6\n");
        assert_eq!(e, "r.toml: link.zstd_level_max: 6 is not between zstd_level (7) and 19");
        for wrong in [-8, 0, 2] {
            let e = error(&format!("host = 'a'\n[link]\nzstd_level_rounds = {wrong}\n"));
            assert_eq!(
                e,
                format!("r.toml: link.zstd_level_rounds: {wrong} is not between -7 and zstd_level (1), or is 0")
            );
        }
        let e = error("host = 'a'\n[link]\ndelta_cache_mib = 70000\n");
        assert_eq!(e, "r.toml: link.delta_cache_mib: 70000 is more than 65536");
        let e = error("host = 'a'\n[link]\nbandwidth_mbit = 0\n");
        assert!(e.starts_with("r.toml: link.bandwidth_mbit: 0 "), "{e}");
        let e = error("host = 'a'\n[tiers]\nstandby = 0\n");
        assert_eq!(e, "r.toml: tiers.standby: 0 is not above 0 and at most 1");
        let e = error("host = 'a'\n[tiers]\nstandby = 0.7\n");
        assert_eq!(e, "r.toml: tiers.armed: 0.5 is below tiers.standby, 0.7");
        let e = error("host = 'a'\n[pacing]\nhot_pct = 120\n");
        assert_eq!(e, "r.toml: pacing.hot_pct: 120 is not between 0.1 and 100");
        assert!(error("host = 'a'\nhots = 1\n").contains("hots"));
    }

    #[test]
    fn how_the_link_is_protected_must_be_said_and_said_once() {
        let error = |text: &str| {
            config::parse::<Config>(Path::new("r.toml"), text)
                .unwrap_err()
                .to_string()
        };
        let e = error("host = 'a'\n");
        assert!(
            e.starts_with("r.toml: link: ") && e.contains("[link.tls]") && e.contains("plaintext = true"),
            "{e}"
        );
        let files = "[link.tls]\ncert = '/nonexistent/a.crt'\nkey = '/nonexistent/a.key'\nca = '/nonexistent/ca.crt'\n";
        let e = error(&format!("host = 'a'\n[link]\nplaintext = true\n{files}"));
        assert!(e.starts_with("r.toml: link.plaintext: "), "{e}");
        let e = error(&format!("host = 'a'\n{files}"));
        assert!(
            e.starts_with("r.toml: link.tls.cert: /nonexistent/a.crt: No such file"),
            "{e}"
        );
    }
}
