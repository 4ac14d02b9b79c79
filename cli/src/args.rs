//! What may stand on the command line, and where clap turns it into types: host names, URLs and durations are checked
//! here, so that a mistyped one is a usage error (exit code 2) and nothing was asked of anybody.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use umbra_api::HostId;
use umbra_api::view::Mode;

const EXIT_CODES: &str = "\
Exit codes:
  0  done, or accepted by the RPS
  1  it failed
  2  the command line is wrong, or a VM's name fits several VMs
  3  no such VM, or nothing is known of it yet
  4  refused: the present state of VM, hosts or mode does not allow it
  5  the RPS cannot be reached, or does not answer in time

With --json, standard output is the API's answer as it came, one document.
An error is a problem document (RFC 9457) on standard error; its status is 0
where no HTTP answer stands behind it.
Colours appear on a terminal only, and never if NO_COLOR is set.";

/// See what Umbra measures, forecasts and decides, and steer the shadows of your VMs.
#[derive(Parser, Debug)]
#[command(name = "umbra", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Args {
    /// Where the RPS listens
    #[arg(
        long,
        global = true,
        env = "UMBRA_RPS",
        value_name = "URL",
        default_value = "http://127.0.0.1:7400"
    )]
    #[arg(value_parser = base_url)]
    pub rps: String,

    /// Print the API's JSON as it is
    #[arg(long, global = true)]
    pub json: bool,

    /// Longest wait for an answer
    #[arg(long, global = true, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub timeout: Duration,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// The RPS and its hosts at a glance
    Status,
    /// The VMs
    #[command(subcommand)]
    Vm(VmCommand),
    /// Why Umbra does with a VM what it does, in plain words
    Explain {
        /// UUID or unique name
        vm: String,
    },
    /// Make, use and end a VM's warm shadow by hand
    #[command(subcommand)]
    Shadow(ShadowCommand),
    /// Show whether Umbra acts on its decisions, or change it
    Mode {
        /// Leave it out to see the present one
        mode: Option<ModeArg>,
    },
    /// What happened to the VMs: each step of each lifecycle
    Events {
        /// Of this VM only: UUID or unique name
        #[arg(long)]
        vm: Option<String>,
        /// Not older than this: a time (2026-11-25T09:30:00Z) or an age (15m, '2h 30m')
        #[arg(long, value_parser = since)]
        since: Option<Since>,
        /// At most so many, the newest
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        limit: u32,
    },
    /// What was decided and why, doing nothing included
    Decisions {
        /// Of this VM only: UUID or unique name
        #[arg(long)]
        vm: Option<String>,
        /// At most so many, the newest
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        limit: u32,
    },
    /// Tell whether a VM can be shadowed, and what stands in the way, before anything starts
    Adopt(Adopt),
    /// Find the way out of a state that a VM does not leave by itself: shows what would be done, and what it costs
    Recover(Recover),
    /// Certificates for the replicators' link, where you have no CA of your own. Asks no RPS
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Check whether this host has what Umbra needs, and say what to do where it has not. Asks no RPS
    Doctor {
        /// The replicator's ram_dir
        #[arg(long, value_name = "DIR", default_value = "/dev/shm/umbra")]
        ram_dir: PathBuf,
    },
}

#[derive(clap::Args, Debug)]
pub struct Adopt {
    /// UUID or unique name
    pub vm: String,
    /// Only look, which is all that this command does so far
    #[arg(long)]
    pub check: bool,
    /// Ask this host too, whether it could hold the shadow
    #[arg(long)]
    pub host: Option<HostId>,
    /// Ask the replicator of the VM's host instead of the RPS
    #[arg(long, value_name = "URL", value_parser = base_url)]
    pub replicator: Option<String>,
    /// With --replicator and --host: where the host's link listens
    #[arg(long, value_name = "ADDRESS:PORT", requires = "replicator", requires = "host")]
    pub link: Option<String>,
}

#[derive(clap::Args, Debug)]
pub struct Recover {
    /// UUID or unique name
    pub vm: String,
    /// Do it; without it the steps are only shown
    #[arg(long)]
    pub yes: bool,
    /// Only show the steps, even with --yes
    #[arg(long)]
    pub dry_run: bool,
    /// This host is lost for ever or switched off: what it had counts as gone. Is the host alive after all, two copies run until
    /// its replicator is reached again and ends its own
    #[arg(long, value_name = "HOST")]
    pub host_is_dead: Vec<HostId>,
    /// End a shadow of unknown age rather than run it
    #[arg(long)]
    pub discard_shadow: bool,
    #[command(flatten)]
    pub at: At,
}

#[derive(clap::Args, Debug)]
pub struct At {
    /// Ask replicators instead of the RPS, which may be gone; once for each host of the VM
    #[arg(long = "replicator", value_name = "URL", value_parser = base_url)]
    pub replicators: Vec<String>,
}

#[derive(Subcommand, Debug)]
pub enum PkiCommand {
    /// Make a CA: ca.crt for all hosts, and ca.key, which stays where it is
    Init {
        /// Folder; it is made if need be
        dir: PathBuf,
    },
    /// Make HOST.crt and HOST.key
    Issue {
        /// Folder of the CA
        dir: PathBuf,
        /// The host's name, as the RPS knows it
        host: HostId,
        /// How long it is valid
        #[arg(long, default_value_t = 397, value_parser = clap::value_parser!(i64).range(1..=3650))]
        days: i64,
    },
}

#[derive(Subcommand, Debug)]
pub enum VmCommand {
    /// All VMs, a line each
    List,
    /// One VM: demand, forecast, shadow, last switchover
    Show {
        /// UUID or unique name
        vm: String,
    },
}

#[derive(Subcommand, Debug)]
pub enum ShadowCommand {
    /// Make a warm shadow now
    Create {
        /// UUID or unique name
        vm: String,
        /// On this host; without it the planner chooses
        #[arg(long)]
        host: Option<HostId>,
    },
    /// Switch over to the shadow
    Switchover {
        /// UUID or unique name
        vm: String,
    },
    /// Move the VM back to the host that it came from
    Failback {
        /// UUID or unique name
        vm: String,
    },
    /// End the shadow; the VM runs on where it is
    Release {
        /// UUID or unique name
        vm: String,
    },
    /// Have the replicator forget a former shadow that is the VM now: it runs on, and is yours to manage. Prints how it runs
    Handover {
        /// UUID or unique name
        vm: String,
        /// The replicator of the host where it runs
        #[arg(long, value_name = "URL", value_parser = base_url)]
        replicator: String,
    },
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum ModeArg {
    /// Decide and record, and do nothing
    Observe,
    /// Decide and do
    Act,
}

impl From<ModeArg> for Mode {
    fn from(m: ModeArg) -> Self {
        match m {
            ModeArg::Observe => Self::Observe,
            ModeArg::Act => Self::Act,
        }
    }
}

/// The start of a span of time: a point, or an age that becomes one when the command runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Since {
    At(i64),
    AgoMs(i64),
}

impl Since {
    pub fn resolve(self, now: umbra_api::UnixMs) -> umbra_api::UnixMs {
        match self {
            Self::At(ms) => umbra_api::UnixMs(ms),
            Self::AgoMs(ms) => now.plus_ms(-ms),
        }
    }
}

fn since(s: &str) -> Result<Since, String> {
    if let Ok(t) = s.parse::<jiff::Timestamp>() {
        return Ok(Since::At(t.as_millisecond()));
    }
    let age: jiff::SignedDuration = s
        .parse()
        .map_err(|_| "neither a time like 2026-11-25T09:30:00Z nor an age like 15m or '2h 30m'".to_owned())?;
    match i64::try_from(age.as_millis()) {
        Ok(ms) if ms >= 0 => Ok(Since::AgoMs(ms)),
        _ => Err("an age may not be negative".to_owned()),
    }
}

fn seconds(s: &str) -> Result<Duration, String> {
    let n: f64 = s.parse().map_err(|_| "expected a number of seconds".to_owned())?;
    if !(0.001..=86_400.0).contains(&n) {
        return Err("expected 0.001 to 86400 seconds".to_owned());
    }
    Ok(Duration::from_secs_f64(n))
}

/// `http://host[:port][/prefix]`, without the slash at the end. The RPS speaks plain HTTP so far, so an `https` URL is
/// refused here and not tried in clear.
fn base_url(s: &str) -> Result<String, String> {
    let uri: hyper::Uri = s.parse().map_err(|e| format!("{e}"))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => return Err("https is not spoken yet, only http".to_owned()),
        _ => return Err("expected a URL that starts with http://".to_owned()),
    }
    if uri.host().is_none_or(str::is_empty) || uri.query().is_some() {
        return Err("expected http://HOST[:PORT]".to_owned());
    }
    Ok(s.trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_tree_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn help_tells_every_exit_code() {
        let help = Args::command().render_long_help().to_string();
        for code in [
            "0  done",
            "1  it failed",
            "2  the command",
            "3  no such",
            "4  refused",
            "5  the RPS",
        ] {
            assert!(help.contains(code), "{code} is not in\n{help}");
        }
        assert!(EXIT_CODES.lines().all(|l| l.len() <= 80));
    }

    #[test]
    fn urls_are_checked_before_use() {
        assert_eq!(base_url("http://rps:7400/").unwrap(), "http://rps:7400");
        assert!(base_url("https://rps").unwrap_err().contains("https"));
        assert!(base_url("rps:7400").is_err());
        assert!(base_url("http://").is_err());
        assert!(base_url("http://rps/?x=1").is_err());
    }

    #[test]
    fn spans_are_ages_or_times() {
        assert_eq!(since("15m").unwrap(), Since::AgoMs(900_000));
        assert_eq!(since("2h 30m").unwrap(), Since::AgoMs(9_000_000));
        assert_eq!(since("1970-01-01T00:00:01Z").unwrap(), Since::At(1000));
        assert!(since("yesterday").is_err());
        assert!(since("-5m").is_err());
        assert_eq!(
            Since::AgoMs(400).resolve(umbra_api::UnixMs(1000)),
            umbra_api::UnixMs(600)
        );
    }

    #[test]
    fn time_outs_are_bounded() {
        assert_eq!(seconds("2.5").unwrap(), Duration::from_millis(2500));
        for bad in ["0", "-1", "NaN", "inf", "1e9", "soon"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
