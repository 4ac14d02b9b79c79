//! Umbra's own daemons: where their binaries are, their configurations, and starting them on a host.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use umbra_api::VmId;
use umbra_api::order::{Order, OrderKind};
use umbra_api::problem::Problem;
use umbra_api::replica::{Phase, ReplicaStatus};
use umbra_api::{Epoch, OrderId};

use super::host::Host;
use super::process::{Process, wait_for};

pub const RPS: u16 = 7400;
pub const AGENT: u16 = 7401;
pub const LINK: u16 = 7402;
pub const REPLICATOR: u16 = 7403;
/// From start to the first answer.
const UP: Duration = Duration::from_secs(20);
/// For an operator's command, with all that it asks for.
const OPERATOR: Duration = Duration::from_secs(60);

/// Cargo's target folder: where this very program was built.
pub fn target_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("finding this program's own path")?;
    let profile = exe
        .ancestors()
        .find(|p| p.file_name().is_some_and(|n| n == "debug" || n == "release"));
    profile
        .and_then(Path::parent)
        .map(Path::to_owned)
        .with_context(|| format!("{} is not in a cargo target folder", exe.display()))
}

/// The release binaries.
#[derive(Clone)]
pub struct Binaries {
    dir: PathBuf,
    pub settings: Settings,
}

/// What a test has otherwise in its replicators' configuration.
#[derive(Clone, Default, Debug)]
pub struct Settings {
    /// They do what [`fault_file`] says.
    pub faults: bool,
    pub silence_ms: Option<u64>,
    /// What each copy may cost, QEMU and replicator.
    pub cpu_pct: Option<f64>,
    /// Images that are set aside for disks, by the path of the primary's.
    pub disks: BTreeMap<PathBuf, PathBuf>,
    /// In which time the scrub looks at what waits in swap.
    pub scrub_swap_s: Option<u64>,
}

/// Where a replicator looks for a fault that a test orders.
pub fn fault_file(host: &Host) -> PathBuf {
    host.file("fault")
}

/// Everything that runs on a machine with Umbra.
pub const ALL: [&str; 4] = ["umbra", "umbra-agent", "umbra-replicator", "umbra-rps"];

impl Binaries {
    /// An error names the first one that is missing.
    pub fn find(names: &[&str]) -> Result<Self> {
        let dir = target_dir()?.join("release");
        for name in names {
            if !dir.join(name).is_file() {
                bail!("{} is missing: cargo xtask build", dir.join(name).display());
            }
        }
        let settings = Settings::default();
        Ok(Self { dir, settings })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Writes the configuration and starts the daemon with it.
    fn start(&self, host: &Host, name: &str, config: &str) -> Result<Process> {
        let file = host.file(&format!("{name}.toml"));
        std::fs::write(&file, config).with_context(|| format!("writing {}", file.display()))?;
        let mut cmd = Command::new(self.path(name));
        cmd.arg("--config")
            .arg(&file)
            .env("RUST_LOG", std::env::var("UMBRA_LOG").unwrap_or_else(|_| "info".into()));
        host.spawn(name, cmd)
    }

    /// Runs the operator's command in a host's place, and gives its exit code and what it said.
    pub fn umbra(&self, host: &Host, arguments: &[&str]) -> Result<(i32, String)> {
        let log = host.file("umbra.log");
        let before = std::fs::read(&log).map_or(0, |l| l.len());
        let mut command = Command::new(self.path("umbra"));
        command.args(arguments).args(["--timeout", "30"]);
        let status = host.spawn("umbra", command)?.wait(OPERATOR)?;
        let said = std::fs::read(&log)?;
        let said = String::from_utf8_lossy(said.get(before..).unwrap_or_default()).into_owned();
        println!("umbra {}\n{said}", arguments.join(" "));
        Ok((status.code().context("it was killed")?, said))
    }

    pub fn start_agent(&self, host: &Host, rps: &Host) -> Result<Process> {
        let mut agent = self.start(host, "umbra-agent", &agent_toml(host, rps))?;
        wait_healthy(host, AGENT, &mut agent)?;
        Ok(agent)
    }

    pub fn start_replicator(&self, host: &Host) -> Result<Process> {
        let tls = self.certify(host)?;
        let mut replicator = self.start(host, "umbra-replicator", &replicator_toml(host, &self.settings, &tls)?)?;
        wait_healthy(host, REPLICATOR, &mut replicator)?;
        Ok(replicator)
    }

    /// The host's certificate, of a CA that all hosts of the lab have in common, as a table of its configuration.
    fn certify(&self, host: &Host) -> Result<String> {
        let dir = host.common("pki");
        let file = |name: &str| dir.join(name);
        let (ca, cert, key) = (
            file("ca.crt"),
            file(&format!("{}.crt", host.name)),
            file(&format!("{}.key", host.name)),
        );
        let made = |file: &Path, arguments: &[&str]| -> Result<()> {
            if file.exists() {
                return Ok(());
            }
            let (verb, rest) = arguments.split_at(1);
            let out = Command::new(self.path("umbra"))
                .arg("pki")
                .args(verb)
                .arg(&dir)
                .args(rest)
                .output()
                .context("umbra pki")?;
            if !out.status.success() {
                bail!("umbra pki {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
            }
            Ok(())
        };
        made(&ca, &["init"])?;
        made(&cert, &["issue", &host.name])?;
        Ok(format!(
            "\n[link.tls]\ncert = \"{}\"\nkey = \"{}\"\nca = \"{}\"\n",
            cert.display(),
            key.display(),
            ca.display()
        ))
    }

    /// `tables` goes into the configuration as it is: `[policy]`, `[contention]`.
    pub fn start_rps(&self, host: &Host, hosts: &[Host], tables: &str) -> Result<Process> {
        let mut rps = self.start(host, "umbra-rps", &rps_toml(host, hosts, tables)?)?;
        wait_healthy(host, RPS, &mut rps)?;
        Ok(rps)
    }
}

fn wait_healthy(host: &Host, port: u16, process: &mut Process) -> Result<()> {
    let name = process.name.clone();
    wait_for(&format!("{name} to answer on port {port}"), UP, || {
        process.check()?;
        let healthy = host.get((host.ip, port), "/healthz").is_ok_and(|r| r.status == 200);
        Ok(healthy.then_some(()))
    })
}

fn agent_toml(host: &Host, rps: &Host) -> String {
    let cpus = host.cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    format!(
        "host = \"{}\"\nlisten = \"{}:{AGENT}\"\ncpus = \"{cpus}\"\nscope = \"netns\"\ninterval_ms = 1000\n\n\
         [rps]\nurl = \"http://{}:{RPS}\"\n",
        host.name, host.ip, rps.ip
    )
}

fn replicator_toml(host: &Host, settings: &Settings, tables: &str) -> Result<String> {
    let mut more = String::new();
    if settings.faults {
        more += &format!("test_faults = \"{}\"\n", fault_file(host).display());
    }
    if let Some(ms) = settings.silence_ms {
        more += &format!("link.silence_ms = {ms}\n");
    }
    if let Some(pct) = settings.cpu_pct {
        more += &format!("pacing.qemu_cpu_pct = {pct:?}\npacing.own_cpu_pct = {pct:?}\n");
    }
    for (disk, image) in &settings.disks {
        more += &format!("disks.\"{}\" = \"{}\"\n", disk.display(), image.display());
    }
    if let Some(s) = settings.scrub_swap_s {
        more += &format!("tiers.scrub_swap_s = {s}\n");
    }
    Ok(format!(
        "host = \"{}\"\nlisten = \"{ip}:{REPLICATOR}\"\nlink_listen = \"{ip}:{LINK}\"\nstate_dir = \"{}\"\nrun_dir = \"{}\"\n\
         ram_dir = \"{}\"\nscope = \"netns\"\ncgroup = \"{}\"\ndisk_dir = \"{}\"\n{more}{tables}",
        host.name,
        host.folder("state")?.display(),
        host.folder("run")?.display(),
        host.ram_folder()?.display(),
        host.cpu_group()?,
        host.folder("disks")?.display(),
        ip = host.ip,
    ))
}

fn rps_toml(host: &Host, hosts: &[Host], tables: &str) -> Result<String> {
    let mut text = format!(
        "listen = \"{}:{RPS}\"\nstore = \"{}\"\nmode = \"act\"\nslot_ms = 1000\n",
        host.ip,
        host.folder("state")?.join("rps.db").display(),
    );
    text += tables;
    for h in hosts {
        text += &format!(
            "\n[[hosts]]\nname = \"{}\"\nreplicator = \"http://{ip}:{REPLICATOR}\"\nlink = \"{ip}:{LINK}\"\n",
            h.name,
            ip = h.ip
        );
    }
    Ok(text)
}

/// A replicator, spoken to as the RPS does.
#[derive(Clone)]
pub struct Replicator<'a> {
    pub host: &'a Host,
}

impl Replicator<'_> {
    fn at(&self) -> (Ipv4Addr, u16) {
        (self.host.ip, REPLICATOR)
    }

    /// The address of its link.
    pub fn link(&self) -> String {
        format!("{}:{LINK}", self.host.ip)
    }

    /// Sends an order; the inner error is the replicator's refusal.
    pub fn order(&self, vm: VmId, epoch: Epoch, kind: OrderKind) -> Result<Result<(), Problem>> {
        let order = Order {
            id: OrderId(uuid::Uuid::new_v4()),
            vm,
            epoch,
            kind,
        };
        self.send(&order)
    }

    pub fn send(&self, order: &Order) -> Result<Result<(), Problem>> {
        let reply = self
            .host
            .post(self.at(), "/v1/orders", &serde_json::to_string(order)?)?;
        match reply.status {
            200..300 => Ok(Ok(())),
            400..600 => Ok(Err(reply.json()?)),
            other => bail!("an order was answered with HTTP {other}: {}", reply.text()),
        }
    }

    pub fn replicas(&self) -> Result<Vec<ReplicaStatus>> {
        self.host.get(self.at(), "/v1/replicas")?.ok()?.json()
    }

    pub fn replica(&self, vm: VmId) -> Result<Option<ReplicaStatus>> {
        Ok(self.replicas()?.into_iter().find(|r| r.vm == vm))
    }

    /// Waits for a phase. Ends early, with the replicator's own reason, if the replica failed or was released instead.
    pub fn wait_phase(&self, vm: VmId, phase: Phase, within: Duration) -> Result<ReplicaStatus> {
        let what = format!("{phase:?} on {}", self.host.name);
        wait_for(&what, within, || {
            let Some(r) = self.replica(vm)? else { return Ok(None) };
            let ended = matches!(r.phase, Phase::Failed | Phase::Released) && r.phase != phase;
            match &r.error {
                _ if r.phase == phase => Ok(Some(r)),
                Some(e) if ended => bail!("it is {:?} instead: {e}", r.phase),
                _ => Ok(None),
            }
        })
    }
}
