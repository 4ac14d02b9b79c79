//! What [`derive`](super::derive) must know beside the command line: asked over QMP and read from /proc, once, before.

use std::fs;
use std::io;
use std::path::PathBuf;

use serde_json::{Value, json};
use umbra_api::order::{Refusal, RefusalCode};

use super::ability::Ability;
use crate::proc::{self, QemuProcess};
use crate::qmp::{Client, QmpError, Version};
use crate::tap;

/// Where the VM's disks are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// On this host: writable disks are copied to images of the target's.
    #[default]
    Private,
    /// On storage that both hosts reach under the same paths. The images' locks pass from QEMU to QEMU at the switchover.
    Shared,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Facts {
    pub version: Version,
    pub ability: Ability,
    /// Versioned: `pc-q35-10.0`.
    pub machine: String,
    /// Id of the RAM backend that the machine makes if it is given none; empty if it makes none.
    pub default_ram_id: String,
    pub memdevs: Vec<Memdev>,
    /// Ids of the devices that are plugged in now.
    pub devices: Vec<String>,
    pub taps: Vec<Tap>,
    /// What the disks in use have inserted.
    pub disks: Vec<BlockNode>,
    pub cwd: PathBuf,
    pub storage: Storage,
}

/// A memory backend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Memdev {
    pub id: String,
    pub bytes: u64,
    /// Its RAM block is called by the backend's path instead of its id.
    pub by_path: bool,
}

/// What a disk of the VM's has inserted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockNode {
    /// Name of the node at the top; QEMU's own (`#block123`) if it was given none.
    pub node: String,
    /// Id of the `-drive`, or else the path of the device.
    pub device: String,
    pub driver: String,
    /// As it was given.
    pub file: String,
    /// As the guest sees it.
    pub bytes: u64,
    pub read_only: bool,
}

/// A tap that the QEMU holds open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tap {
    pub fd: u32,
    pub name: String,
    pub bridge: Option<String>,
}

impl Facts {
    pub fn gather(process: &QemuProcess, qmp: &Client, storage: Storage) -> Result<Self, Refusal> {
        let kind = text(qmp, "/machine", "type")?;
        let machine = kind.strip_suffix("-machine").unwrap_or(&kind).to_owned();
        Ok(Self {
            version: qmp.version(),
            ability: Ability::ask(qmp)?,
            default_ram_id: default_ram_id(qmp, &machine)?,
            machine,
            memdevs: memdevs(qmp)?,
            devices: children(qmp, "/machine/peripheral")?,
            taps: taps(process.id.pid).map_err(|e| {
                Refusal::new(
                    RefusalCode::Local,
                    format!("the taps of process {}: {e}", process.id.pid),
                )
            })?,
            disks: disks(qmp)?,
            cwd: process.cwd.clone(),
            storage,
        })
    }
}

fn text(qmp: &Client, path: &str, property: &str) -> Result<String, QmpError> {
    let value = qmp.execute("qom-get", json!({"path": path, "property": property}))?;
    value.as_str().map(str::to_owned).ok_or(QmpError::Answer {
        command: "qom-get".into(),
        what: "a string",
    })
}

fn list(qmp: &Client, command: &str, args: Value) -> Result<Vec<Value>, QmpError> {
    match qmp.execute(command, args)? {
        Value::Array(items) => Ok(items),
        _ => Err(QmpError::Answer {
            command: command.into(),
            what: "a list",
        }),
    }
}

fn default_ram_id(qmp: &Client, machine: &str) -> Result<String, QmpError> {
    let machines = list(qmp, "query-machines", Value::Null)?;
    let this = machines
        .iter()
        .find(|m| m.get("name").and_then(Value::as_str) == Some(machine));
    let id = this.and_then(|m| m.get("default-ram-id")).and_then(Value::as_str);
    Ok(id.unwrap_or_default().to_owned())
}

fn memdevs(qmp: &Client) -> Result<Vec<Memdev>, QmpError> {
    let incomplete = |what| QmpError::Answer {
        command: "query-memdev".into(),
        what,
    };
    let mut out = Vec::new();
    for item in list(qmp, "query-memdev", Value::Null)? {
        let id = item.get("id").and_then(Value::as_str).ok_or(incomplete("an id"))?;
        let bytes = item.get("size").and_then(Value::as_u64).ok_or(incomplete("a size"))?;
        let property = json!({"path": format!("/objects/{id}"), "property": "x-use-canonical-path-for-ramblock-id"});
        let by_path = qmp.execute("qom-get", property)?.as_bool().unwrap_or(false);
        out.push(Memdev {
            id: id.to_owned(),
            bytes,
            by_path,
        });
    }
    Ok(out)
}

fn children(qmp: &Client, path: &str) -> Result<Vec<String>, QmpError> {
    let entries = list(qmp, "qom-list", json!({ "path": path }))?;
    let child = |e: &Value| {
        let is = e
            .get("type")
            .and_then(Value::as_str)
            .is_some_and(|t| t.starts_with("child<"));
        if is {
            e.get("name").and_then(Value::as_str).map(str::to_owned)
        } else {
            None
        }
    };
    Ok(entries.iter().filter_map(child).collect())
}

fn disks(qmp: &Client) -> Result<Vec<BlockNode>, QmpError> {
    let devices = list(qmp, "query-block", Value::Null)?;
    devices
        .iter()
        .filter(|d| d.get("inserted").is_some())
        .map(block_node)
        .collect()
}

fn block_node(device: &Value) -> Result<BlockNode, QmpError> {
    let incomplete = |what| QmpError::Answer {
        command: "query-block".into(),
        what,
    };
    let inserted = &device["inserted"];
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let name = match text(&device["device"]) {
        id if id.is_empty() => text(&device["qdev"]),
        id => id,
    };
    Ok(BlockNode {
        node: inserted["node-name"]
            .as_str()
            .ok_or(incomplete("a node's name"))?
            .to_owned(),
        device: name,
        driver: inserted["drv"].as_str().ok_or(incomplete("a driver"))?.to_owned(),
        file: text(&inserted["file"]),
        bytes: inserted["image"]["virtual-size"].as_u64().ok_or(incomplete("a size"))?,
        read_only: inserted["ro"].as_bool().unwrap_or(true),
    })
}

/// The taps behind a process's descriptors, with the bridges of its own network namespace.
fn taps(pid: i32) -> io::Result<Vec<Tap>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let entry = entry?;
        let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // A descriptor may be closed while the directory is read.
        let Ok(info) = fs::read_to_string(entry.path()) else {
            continue;
        };
        found.extend(interface(&info).map(|name| (fd, name.to_owned())));
    }
    found.sort_unstable();
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let with_bridges = move || {
        found
            .into_iter()
            .map(|(fd, name)| {
                Ok(Tap {
                    fd,
                    bridge: tap::bridge_of(&name)?,
                    name,
                })
            })
            .collect()
    };
    if proc::shares_netns(pid)? {
        with_bridges()
    } else {
        tap::in_netns_of(pid, with_bridges)
    }
}

fn interface(fdinfo: &str) -> Option<&str> {
    fdinfo
        .lines()
        .find_map(|l| l.strip_prefix("iff:"))
        .map(str::trim)
        .filter(|n| !n.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_are_told_by_their_descriptors() {
        assert_eq!(
            interface("pos:\t12\nflags:\t0104002\nmnt_id:\t26\niff:\tvnet0\n"),
            Some("vnet0")
        );
        assert_eq!(interface("pos:\t0\niff:\t\n"), None);
        assert_eq!(interface("pos:\t0\n"), None);
    }
}
