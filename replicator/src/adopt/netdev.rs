//! Networks: `-netdev`, `-nic` and `-net`. A tap becomes the target's own; everything else is refused.

use umbra_api::order::Refusal;
use umbra_api::wire::control::{Arg, Nic};

use super::derive::{Walk, parse, unsupported};
use super::facts::{Facts, Tap};
use super::options::{Opts, Pair};

/// Why user-mode networking can't be shadowed.
pub const USER_MODE: &str = "user-mode networking lives in QEMU's process, and its connections would break; use a tap";

/// What a tap has of its host: where it comes from and who sets it up.
const HOSTS_OWN: &[&str] = &[
    "type",
    "fd",
    "fds",
    "vhostfd",
    "vhostfds",
    "ifname",
    "script",
    "downscript",
    "br",
    "helper",
];

pub(super) fn network(walk: &mut Walk, option: &str, arg: &str, value: &str) -> Result<(), Refusal> {
    walk.net_options = true;
    let mut opts = parse(value, "type")?;
    let kind = opts.get("type").unwrap_or_default();
    match kind.as_str() {
        "tap" | "bridge" => {}
        "none" | "nic" if option != "netdev" => {
            walk.pair(arg, value);
            return Ok(());
        }
        "user" => return Err(unsupported(format!("{arg} {value}: {USER_MODE}"))),
        "vhost-user" | "vhost-vdpa" => {
            return Err(unsupported(format!(
                "{arg} {value}: its state lives outside QEMU; use a tap"
            )));
        }
        _ => {
            return Err(unsupported(format!(
                "{arg} {value}: only taps were tried; use a tap on a bridge"
            )));
        }
    }
    let index = walk.nics.len();
    let queues = fd_count(&opts);
    let nic = nic(walk, &kind, &opts);
    HOSTS_OWN.iter().for_each(|key| drop(opts.remove(key)));
    if let Some(queues) = queues {
        opts.set("queues", &queues.to_string());
    }
    walk.nics.push(nic);
    walk.plain(arg);
    let rest: String = opts
        .into_pairs()
        .iter()
        .map(|p: &Pair| format!(",{}", p.render()))
        .collect();
    let suffix = format!(",script=no,downscript=no{rest}");
    walk.out.push(Arg::Netdev {
        nic: index,
        prefix: "tap,ifname=".into(),
        suffix,
    });
    Ok(())
}

/// Inherited queues are counted by their descriptors.
fn fd_count(opts: &Opts) -> Option<usize> {
    opts.get("fds").map(|fds| fds.split(':').count())
}

fn nic(walk: &Walk, kind: &str, opts: &Opts) -> Nic {
    let tap = find(walk.facts, &walk.nics, opts);
    let name = opts
        .get("ifname")
        .or_else(|| tap.map(|t| t.name.clone()))
        .unwrap_or_default();
    let bridge = tap.and_then(|t| t.bridge.clone()).or_else(|| {
        // QEMU's bridge helper puts the tap there, by default into br0.
        let by_helper = kind == "bridge" || opts.get("helper").is_some();
        by_helper.then(|| opts.get("br").unwrap_or_else(|| "br0".into()))
    });
    Nic { bridge, tap: name }
}

/// The open tap that a netdev means: by name, by descriptor, or else the first one that no netdev before it had.
fn find<'a>(facts: &'a Facts, taken: &[Nic], opts: &Opts) -> Option<&'a Tap> {
    if let Some(name) = opts.get("ifname") {
        return facts.taps.iter().find(|t| t.name == name);
    }
    if let Some(fds) = opts.get("fd").or_else(|| opts.get("fds")) {
        let fd: u32 = fds.split(':').next()?.parse().ok()?;
        return facts.taps.iter().find(|t| t.fd == fd);
    }
    facts.taps.iter().find(|t| !taken.iter().any(|n| n.tap == t.name))
}
