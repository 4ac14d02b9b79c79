//! Private disks: which options name an image that the guest writes, and what takes its place on the target.
//!
//! ```text
//!  -drive    file=/srv/a.qcow2,if=none,id=d0            the path is in the option itself
//!  -blockdev {"driver":"qcow2","node-name":"f","file":{"driver":"file","filename":"/srv/a.qcow2"}}      … or nested in it
//!  -blockdev {"driver":"file","node-name":"s","filename":"/srv/a.qcow2"}                       … or in a node of its own,
//!  -blockdev {"driver":"qcow2","node-name":"f","file":"s"}                                     which the format's names
//! ```
//! UEFI's variables (`if=pflash`, or a node that `-machine pflash1=` names) are such a disk: small, and written by the firmware.
//! In each of them the path becomes a gap that the target fills with its own image. That image is flat: an image with a
//! backing file is copied whole, so the shadow needs no chain.

use serde_json::Value;
use umbra_api::order::Refusal;
use umbra_api::wire::control::{Arg, Disk, DiskFormat};

use super::derive::{Walk, parse, unsupported};
use super::facts::BlockNode;
use super::options::{Opts, Pair};

/// Stands for the path while an option is written down again; no path on a sane host has it.
const GAP: &str = "@umbra-image@";

/// Makes a writable disk's option one of the shadow's.
pub(super) fn private(walk: &mut Walk<'_>, option: &str, arg: &str, value: &str) -> Result<(), Refusal> {
    let shown = format!("{arg} {value}");
    if option == "drive" {
        return drive(walk, arg, value).map_err(|why| refused(&shown, &why));
    }
    blockdev(walk, arg, value).map_err(|why| refused(&shown, &why))
}

fn refused(shown: &str, why: &str) -> Refusal {
    unsupported(format!(
        "the disk {shown}: {why}; if both hosts reach it under the same path, set storage = \"shared\""
    ))
}

/// Every writable disk of QEMU's must have been found on its command line.
pub(super) fn check_all(walk: &Walk<'_>) -> Result<(), Refusal> {
    let known = |n: &BlockNode| walk.disks.iter().any(|d| d.node == n.node) || n.driver.starts_with("null-");
    match walk.facts.disks.iter().find(|n| !n.read_only && !known(n)) {
        Some(n) => Err(unsupported(format!(
            "the disk {} of {}: it is writable and not on the command line",
            n.file, n.device
        ))),
        None => Ok(()),
    }
}

fn drive(walk: &mut Walk<'_>, arg: &str, value: &str) -> Result<(), String> {
    let mut opts = parse(value, "driver").map_err(|r| r.detail)?;
    let bus = opts.get("if").unwrap_or_default();
    if matches!(bus.as_str(), "sd" | "mtd" | "floppy") {
        return Err(format!("a private disk of kind if={bus} was not tried"));
    }
    if opts.is_on("snapshot") {
        return Err("its changes live in a temporary file of this host".into());
    }
    plain(&opts)?;
    let format = opts.get("format").or_else(|| opts.get("driver"));
    format_of(format.as_deref().unwrap_or("raw"))?;
    let key = ["file", "file.filename"].into_iter().find(|k| opts.get(k).is_some());
    let key = key.ok_or("it names no file")?;
    let path = opts.get(key).unwrap_or_default();
    local(&path, opts.get("file.driver").as_deref())?;
    let by_id = opts.get("id");
    let is = |n: &&BlockNode| match &by_id {
        Some(id) => n.device == *id,
        None => n.file == path,
    };
    let node = walk.facts.disks.iter().find(is).ok_or("QEMU does not list it")?;
    let disk = disk(node, &walk.facts.cwd.join(&path).display().to_string())?;
    if format.is_none() {
        // Or the target's QEMU would guess it from what the guest wrote.
        opts.set("format", disk.format.name());
    }
    gap(&mut opts, key);
    push(walk, arg, &opts, disk)
}

fn blockdev(walk: &mut Walk<'_>, arg: &str, value: &str) -> Result<(), String> {
    let mut opts = parse(value, "driver").map_err(|r| r.detail)?;
    plain(&opts)?;
    let (driver, name) = (
        opts.get("driver").unwrap_or_default(),
        opts.get("node-name").unwrap_or_default(),
    );
    let protocol = matches!(driver.as_str(), "file" | "host_device");
    if !protocol {
        format_of(&driver)?;
    }
    // The format's node names its storage: that one has the path.
    if !protocol && let Some(storage) = opts.get("file") {
        if nodes(walk)
            .iter()
            .any(|o| o.get("node-name").as_deref() == Some(storage.as_str()))
        {
            walk.pair(arg, value);
            return Ok(());
        }
        return Err(format!("its storage {storage} is no -blockdev"));
    }
    let key = if protocol { "filename" } else { "file.filename" };
    let path = opts.get(key).ok_or("it names no file")?;
    let kind = if protocol {
        driver
    } else {
        opts.get("file.driver").unwrap_or_default()
    };
    local(&path, Some(kind.as_str()))?;
    let above = nodes(walk)
        .into_iter()
        .find(|o| protocol && o.get("file").as_deref() == Some(name.as_str()));
    let top = above.and_then(|o| o.get("node-name")).unwrap_or(name);
    let node = walk.facts.disks.iter().find(|n| n.node == top);
    let node = node.ok_or("no device of the VM uses it directly, and a chain of nodes was not tried")?;
    let disk = disk(node, &walk.facts.cwd.join(&path).display().to_string())?;
    if kind == "host_device" {
        set(&mut opts, if protocol { "driver" } else { "file.driver" }, "file");
    }
    gap(&mut opts, key);
    push(walk, arg, &opts, disk)
}

fn nodes(walk: &Walk<'_>) -> Vec<Opts> {
    let pairs = walk.args.iter().zip(walk.args.iter().skip(1));
    pairs
        .filter(|(option, _)| matches!(option.as_str(), "-blockdev" | "--blockdev"))
        .filter_map(|(_, value)| parse(value, "driver").ok())
        .collect()
}

/// What would tie the image to others, or to a key.
fn plain(opts: &Opts) -> Result<(), String> {
    for pair in opts.clone().into_pairs() {
        let none = pair.value.as_deref().is_none_or(str::is_empty);
        match pair.key.split('.').next().unwrap_or_default() {
            "backing" if !none => return Err("a backing chain that the command line spells out was not tried".into()),
            "encrypt" => return Err("encrypted images were not tried".into()),
            _ => {}
        }
    }
    Ok(())
}

fn format_of(driver: &str) -> Result<DiskFormat, String> {
    match driver {
        "raw" | "file" | "host_device" => Ok(DiskFormat::Raw),
        "qcow2" => Ok(DiskFormat::Qcow2),
        other => Err(format!("{other} was not tried, only raw and qcow2 images are copied")),
    }
}

fn local(path: &str, driver: Option<&str>) -> Result<(), String> {
    let remote = path.split('/').next().unwrap_or_default().contains(':');
    match driver {
        None | Some("file" | "host_device") if !remote && !path.is_empty() => Ok(()),
        _ => Err("only files and host devices are copied".into()),
    }
}

fn disk(node: &BlockNode, path: &str) -> Result<Disk, String> {
    if node.bytes == 0 {
        return Err("it is empty".into());
    }
    Ok(Disk {
        node: node.node.clone(),
        device: node.device.clone(),
        path: path.to_owned(),
        format: format_of(&node.driver)?,
        bytes: node.bytes,
    })
}

fn gap(opts: &mut Opts, key: &str) {
    set(opts, key, GAP);
}

/// Also a member of a nested object.
fn set(opts: &mut Opts, key: &str, value: &str) {
    match (opts, key.split_once('.')) {
        (Opts::Json(map), Some((outer, inner))) => {
            if let Some(Value::Object(nested)) = map.get_mut(outer) {
                nested.insert(inner.to_owned(), Value::String(value.to_owned()));
            }
        }
        (Opts::Pairs(pairs), _) if !pairs.iter().any(|p| p.key == key) => pairs.push(Pair::new(key, value)),
        (opts, _) => opts.set(key, value),
    }
}

fn push(walk: &mut Walk<'_>, arg: &str, opts: &Opts, disk: Disk) -> Result<(), String> {
    if walk.disks.iter().any(|d| d.node == disk.node) {
        return Err("its node is there twice".into());
    }
    let text = opts.render();
    let (prefix, suffix) = text.split_once(GAP).ok_or("its path is not where it is looked for")?;
    walk.plain(arg);
    walk.out.push(Arg::Disk {
        disk: walk.disks.len(),
        prefix: prefix.to_owned(),
        suffix: suffix.to_owned(),
    });
    walk.disks.push(disk);
    Ok(())
}
