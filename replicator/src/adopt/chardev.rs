//! Character devices: consoles, monitors and the like. Files and listening unix sockets get a counterpart in the shadow's run
//! directory; what has a live other end on this host is refused.

use umbra_api::order::Refusal;
use umbra_api::wire::control::Arg;

use super::derive::{Walk, parse, unsupported};
use super::options::Pair;
use super::rules::TERMINAL;
use crate::launch::QMP_ID;

const NOT_LISTENING: &str =
    "only a unix socket on which QEMU listens can have a counterpart elsewhere; use server=on,wait=off";

/// `-chardev`.
pub(super) fn chardev(walk: &mut Walk, arg: &str, value: &str) -> Result<(), Refusal> {
    let mut opts = parse(value, "backend")?;
    let id = opts.get("id").unwrap_or_default();
    if id == QMP_ID {
        return Ok(());
    }
    let refuse = |why: &str| Err(unsupported(format!("{arg} {value}: {why}")));
    if opts.remove("logfile").is_some() {
        opts.remove("logappend");
        walk.warnings
            .push(format!("-chardev {id}: its logfile is not kept on the shadow's host"));
    }
    let backend = opts.get("backend").unwrap_or_default();
    let ending = match backend.as_str() {
        "null" | "vc" | "ringbuf" | "msmouse" | "wctablet" | "testdev" | "hub" => {
            walk.pair(arg, &opts.render());
            return Ok(());
        }
        "file" if opts.get("input-path").is_some() => return refuse("its input stays on this host"),
        "file" => "log",
        "socket" => {
            let unix = opts.get("path").is_some() || opts.get("fd").is_some();
            if !unix || !opts.is_on("server") {
                return refuse(NOT_LISTENING);
            }
            // A shadow must not wait for a client before it starts.
            opts.set("wait", "off");
            opts.remove("fd");
            "sock"
        }
        "stdio" | "pty" | "console" => return refuse(TERMINAL),
        "spicevmc" | "spiceport" => return refuse("it needs SPICE, which was not tried"),
        _ => return refuse("its other end stays on this host"),
    };
    opts.remove("path");
    let prefix: Vec<_> = opts.into_pairs().iter().map(Pair::render).collect();
    walk.plain(arg);
    walk.out.push(Arg::RunFile {
        prefix: format!("{},path=", prefix.join(",")),
        file: format!("chr-{}.{ending}", plain(&id)),
        suffix: String::new(),
    });
    Ok(())
}

/// `-serial` and its like, in their older form.
pub(super) fn console(walk: &mut Walk, option: &str, arg: &str, value: &str) -> Result<(), Refusal> {
    let counter = match option {
        "serial" => &mut walk.serials,
        "parallel" => &mut walk.parallels,
        "monitor" => &mut walk.monitors,
        _ => &mut walk.qmps,
    };
    let name = format!("{}{}", option.strip_suffix("-pretty").unwrap_or(option), counter);
    *counter += 1;
    if matches!(value, "none" | "null") || value == "vc" || value.starts_with("vc:") || value.starts_with("chardev:") {
        walk.pair(arg, value);
        return Ok(());
    }
    if value.starts_with("file:") {
        walk.plain(arg);
        walk.out.push(Arg::RunFile {
            prefix: "file:".into(),
            file: format!("{name}.log"),
            suffix: String::new(),
        });
        return Ok(());
    }
    let Some(socket) = value.strip_prefix("unix:") else {
        let terminal = ["stdio", "mon:", "pty", "con:", "/dev/"]
            .iter()
            .any(|p| value.starts_with(p));
        let why = if terminal { TERMINAL } else { NOT_LISTENING };
        return Err(unsupported(format!("{arg} {value}: {why}")));
    };
    let mut opts = parse(socket, "path")?;
    if !opts.is_on("server") {
        return Err(unsupported(format!("{arg} {value}: {NOT_LISTENING}")));
    }
    opts.set("wait", "off");
    opts.remove("path");
    let suffix = opts.into_pairs().iter().map(|p| format!(",{}", p.render())).collect();
    walk.plain(arg);
    walk.out.push(Arg::RunFile {
        prefix: "unix:".into(),
        file: format!("{name}.sock"),
        suffix,
    });
    Ok(())
}

/// An id as part of a file's name. Ids have letters, digits and `-._` only, but a guest's owner chose them.
fn plain(id: &str) -> String {
    id.chars()
        .take(40)
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-._".contains(c) {
                c
            } else {
                '_'
            }
        })
        .collect()
}
