//! The pure core: a primary's command line and the facts about it become the spec of its shadow.
//!
//! The order of arguments is kept, because QEMU hands out bus addresses in it. What a shadow's command line got from
//! [`launch`](crate::launch) (its RAM backends, its monitor, `-incoming`, `-S`) is taken off again, so that a former shadow
//! yields the very spec that it was started from.

use std::path::Path;

use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::{Arg, Disk, Nic, RamBlock, ShadowSpec};

use super::facts::{Facts, Storage};
use super::options::{Opts, Pair};
use super::rules::{DISKS, OBJECTS_CARRIED, Rule, TERMINAL, device_refusal, rule};
use super::{ability, chardev, cpu, disk, netdev};
use crate::launch::QMP_ID;
use crate::launch::command::is_plain_name;
use crate::qmp::Version;

/// A spec, and what the operator should know about it.
#[derive(Clone, PartialEq, Debug)]
pub struct Derived {
    pub spec: ShadowSpec,
    pub warnings: Vec<String>,
}

pub fn derive(args: &[String], facts: &Facts) -> Result<Derived, Refusal> {
    if facts.version < Version::OLDEST {
        let why = format!(
            "QEMU {}: {} or newer is needed, which can hold a migration",
            facts.version,
            Version::OLDEST
        );
        return Err(Refusal::new(RefusalCode::QemuTooOld, why));
    }
    let (derived, refusals) = all(args, facts);
    match (derived, refusals.into_iter().next()) {
        (Some(derived), None) => Ok(derived),
        (_, refusal) => Err(refusal.unwrap_or_else(|| unsupported("the command line"))),
    }
}

/// The same with every refusal: QEMU's own first, then in the command line's order. With any of them there is no spec.
pub fn all(args: &[String], facts: &Facts) -> (Option<Derived>, Vec<Refusal>) {
    let Some((program, args)) = args.split_first() else {
        return (None, vec![unsupported("an empty command line")]);
    };
    let (mut refusals, warnings) = ability::check(args, facts);
    let mut walk = Walk::new(args, facts);
    walk.warnings = warnings;
    walk.run();
    let (derived, others) = walk.finish(program);
    refusals.extend(others);
    (derived.filter(|_| refusals.is_empty()), refusals)
}

pub(super) fn unsupported(why: impl Into<String>) -> Refusal {
    Refusal::new(RefusalCode::Unsupported, why)
}

/// State of one pass over the arguments.
pub(super) struct Walk<'a> {
    pub(super) args: &'a [String],
    pub(super) facts: &'a Facts,
    pub(super) out: Vec<Arg>,
    pub(super) nics: Vec<Nic>,
    pub(super) disks: Vec<Disk>,
    files: Vec<String>,
    pub(super) warnings: Vec<String>,
    refusals: Vec<Refusal>,
    host_cpu: bool,
    /// Options of all `-machine`s together.
    machine: Vec<Pair>,
    /// Backends that `-numa` and memory devices name.
    memdevs: Vec<String>,
    device_ids: Vec<String>,
    nodefaults: bool,
    nographic: bool,
    pub(super) net_options: bool,
    /// How many of each console option there were: names of their files.
    pub(super) serials: usize,
    pub(super) parallels: usize,
    pub(super) monitors: usize,
    pub(super) qmps: usize,
    mons: usize,
}

impl<'a> Walk<'a> {
    fn new(args: &'a [String], facts: &'a Facts) -> Self {
        Self {
            args,
            facts,
            out: Vec::new(),
            nics: Vec::new(),
            disks: Vec::new(),
            files: Vec::new(),
            warnings: Vec::new(),
            refusals: Vec::new(),
            host_cpu: false,
            machine: Vec::new(),
            memdevs: Vec::new(),
            device_ids: Vec::new(),
            nodefaults: false,
            nographic: false,
            net_options: false,
            serials: 0,
            parallels: 0,
            monitors: 0,
            qmps: 0,
            mons: 0,
        }
    }

    fn run(&mut self) {
        let mut args = self.args.iter();
        while let Some(arg) = args.next() {
            if let Err(refusal) = self.option(arg, &mut args) {
                self.refusals.push(refusal);
                // What follows an option that is refused may be its value.
                while args.as_slice().first().is_some_and(|next| !next.starts_with('-')) {
                    args.next();
                }
            }
        }
    }

    fn option(&mut self, arg: &str, args: &mut std::slice::Iter<'_, String>) -> Result<(), Refusal> {
        let Some(option) = arg.strip_prefix('-').map(|o| o.strip_prefix('-').unwrap_or(o)) else {
            return Err(unsupported(format!("the disk {arg}: {DISKS}")));
        };
        let rule = rule(option).ok_or_else(|| {
            unsupported(format!(
                "the option {arg}: it is not known whether it belongs to the VM or to its host; start the VM without it"
            ))
        })?;
        let flag =
            matches!(rule, Rule::Carry | Rule::Drop | Rule::Refuse(_)) || matches!(option, "nodefaults" | "nographic");
        let value = match (flag, args.next_if_value(flag)) {
            (false, None) => return Err(unsupported(format!("the option {arg} without a value"))),
            (_, value) => value.unwrap_or_default(),
        };
        match rule {
            Rule::Carry => self.plain(arg),
            Rule::CarryValue => self.pair(arg, value),
            Rule::Drop | Rule::DropValue => {}
            Rule::Refuse(why) => return Err(unsupported(format!("the option {arg}: {why}"))),
            Rule::File => {
                let path = self.file(value);
                self.pair(arg, &path);
            }
            Rule::Special => self.special(option, arg, value)?,
        }
        Ok(())
    }

    fn special(&mut self, option: &str, arg: &str, value: &str) -> Result<(), Refusal> {
        match option {
            "M" | "machine" => self.machine(value),
            "nodefaults" => {
                self.nodefaults = true;
                self.plain(arg);
                Ok(())
            }
            "nographic" => {
                self.nographic = true;
                self.pair("-display", "none");
                Ok(())
            }
            "cpu" => self.cpu(arg, value),
            "numa" => self.numa(arg, value),
            "object" => self.object(arg, value),
            "device" => self.device(arg, value),
            "drive" | "blockdev" | "cdrom" => self.disk(option, arg, value),
            "netdev" | "nic" | "net" => netdev::network(self, option, arg, value),
            "chardev" => chardev::chardev(self, arg, value),
            "mon" => {
                if parse(value, "chardev")?.get("chardev").as_deref() != Some(QMP_ID) {
                    self.mons += 1;
                    self.pair(arg, value);
                }
                Ok(())
            }
            "serial" | "parallel" | "monitor" | "qmp" | "qmp-pretty" | "debugcon" => {
                chardev::console(self, option, arg, value)
            }
            "vnc" => self.vnc(arg, value),
            "display" => self.carry_only(arg, value, &["none"], TERMINAL),
            "usbdevice" => self.carry_only(
                arg,
                value,
                &["tablet", "mouse", "keyboard", "wacom-tablet"],
                "it is of this host",
            ),
            "audiodev" => self.carry_only(arg, value, &["none"], "sound goes to this host; use -audiodev none"),
            "run-with" => {
                if parse(value, "")?.get("chroot").is_some() {
                    return Err(unsupported(format!(
                        "{arg} {value}: the shadow's paths would be other ones"
                    )));
                }
                self.pair(arg, value);
                Ok(())
            }
            // QEMU looks for these beside its own data first, unless they are paths.
            "bios" | "option-rom" => {
                self.file_if_path(value);
                self.pair(arg, value);
                Ok(())
            }
            _ => self.files_within(option, arg, value),
        }
    }

    fn finish(mut self, program: &str) -> (Option<Derived>, Vec<Refusal>) {
        let mut refusals = std::mem::take(&mut self.refusals);
        // An option that was refused is named already: what it would have brought is no finding of its own.
        let whole = refusals.is_empty();
        refusals.extend(self.check_consoles().err());
        if whole {
            refusals.extend(self.check_hotplug().err());
            if self.facts.storage == Storage::Private {
                refusals.extend(disk::check_all(&self).err());
            }
        }
        match self.ram() {
            Ok(ram) if refusals.is_empty() => (Some(self.derived(program, ram)), refusals),
            Ok(_) => (None, refusals),
            Err(refusal) => {
                refusals.extend(whole.then_some(refusal));
                (None, refusals)
            }
        }
    }

    fn derived(mut self, program: &str, ram: Vec<RamBlock>) -> Derived {
        let text = self.machine.iter().map(Pair::render).collect::<Vec<_>>().join(",");
        let comma = if text.is_empty() { "" } else { "," };
        let machine = [
            Arg::Plain("-machine".into()),
            Arg::Plain(format!("{}{comma}{text}", self.facts.machine)),
        ];
        let version = self.facts.version;
        self.files.sort_unstable();
        self.files.dedup();
        Derived {
            spec: ShadowSpec {
                qemu_version: (version.major, version.minor, version.micro),
                binary: program.rsplit('/').next().unwrap_or(program).to_owned(),
                machine: self.facts.machine.clone(),
                args: machine.into_iter().chain(self.out).collect(),
                ram,
                nics: self.nics,
                files: self.files,
                disks: self.disks,
                host_cpu: self.host_cpu.then(cpu::this).flatten(),
            },
            warnings: self.warnings,
        }
    }

    /// Without `-nodefaults` QEMU adds what was not asked for: a user-mode NIC, consoles on the terminal.
    fn check_consoles(&self) -> Result<(), Refusal> {
        if self.nodefaults {
            return Ok(());
        }
        if !self.net_options {
            return Err(unsupported(format!(
                "the default NIC: {}; start the VM with -nodefaults or -nic none",
                netdev::USER_MODE
            )));
        }
        let monitors = self.monitors + self.qmps + self.mons;
        if self.nographic && (self.serials == 0 || monitors == 0) {
            return Err(unsupported(format!("the option -nographic: {TERMINAL}")));
        }
        Ok(())
    }

    /// Devices that came or went since the start are not on the command line.
    fn check_hotplug(&self) -> Result<(), Refusal> {
        if let Some(new) = self.facts.devices.iter().find(|d| !self.device_ids.contains(d)) {
            return Err(unsupported(format!(
                "the device {new}: it was plugged in after the start; restart the VM with it"
            )));
        }
        match self.device_ids.iter().find(|d| !self.facts.devices.contains(d)) {
            Some(gone) => Err(unsupported(format!(
                "the device {gone}: it was unplugged; restart the VM without it"
            ))),
            None => Ok(()),
        }
    }

    /// Decides which backends are the VM's RAM, and gives the machine its own by name.
    fn ram(&mut self) -> Result<Vec<RamBlock>, Refusal> {
        let named = take(&mut self.machine, "memory-backend");
        let main = match named {
            Some(id) => Some(id),
            None if self.facts.memdevs.iter().any(|m| m.id == self.facts.default_ram_id) => {
                Some(self.facts.default_ram_id.clone())
            }
            None => None,
        };
        if let Some(id) = main {
            self.machine.insert(0, Pair::new("memory-backend", &id));
            if !self.memdevs.contains(&id) {
                self.memdevs.push(id);
            }
        }
        let mut ram = Vec::new();
        for memdev in &self.facts.memdevs {
            if !self.memdevs.contains(&memdev.id) {
                return Err(unsupported(format!(
                    "the memory {}: it is neither the machine's nor a DIMM's; start the VM without it",
                    memdev.id
                )));
            }
            if memdev.by_path || !is_plain_name(&memdev.id) {
                return Err(unsupported(format!(
                    "the memory {}: its name in the migration stream is a path; give the backend a plain id and start the VM with a newer machine type",
                    memdev.id
                )));
            }
            ram.push(RamBlock {
                name: memdev.id.clone(),
                bytes: memdev.bytes,
            });
        }
        if let Some(missing) = self.memdevs.iter().find(|id| !ram.iter().any(|r| r.name == **id)) {
            return Err(unsupported(format!("the memory {missing}: QEMU does not list it")));
        }
        // As QEMU keeps its blocks: the largest first.
        ram.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.name.cmp(&b.name)));
        Ok(ram)
    }

    fn machine(&mut self, value: &str) -> Result<(), Refusal> {
        for pair in parse(value, "type")?.into_pairs() {
            if pair.key != "type" {
                take(&mut self.machine, &pair.key);
                self.machine.push(pair);
            }
        }
        Ok(())
    }

    fn cpu(&mut self, arg: &str, value: &str) -> Result<(), Refusal> {
        if parse(value, "model")?.get("model").as_deref() == Some("host") {
            // Whether the target's is the same is asked there.
            self.host_cpu = true;
        }
        self.pair(arg, value);
        Ok(())
    }

    fn numa(&mut self, arg: &str, value: &str) -> Result<(), Refusal> {
        self.memdevs.extend(parse(value, "type")?.get("memdev"));
        self.pair(arg, value);
        Ok(())
    }

    fn object(&mut self, arg: &str, value: &str) -> Result<(), Refusal> {
        let opts = parse(value, "qom-type")?;
        let kind = opts.get("qom-type").unwrap_or_default();
        match kind.as_str() {
            // Made anew over the target's files; which of them are RAM, the machine and the devices say. What they had of this
            // host (paths, nodes, preallocation) goes with them.
            "memory-backend-ram" | "memory-backend-file" | "memory-backend-memfd" | "memory-backend-shm" => Ok(()),
            // Says on which of this host's cores memory is preallocated.
            "thread-context" => Ok(()),
            "secret" => {
                let id = opts.get("id").unwrap_or_default();
                if !self.is_referenced(&id, value) {
                    return Ok(());
                }
                self.files_within("object", arg, value)
            }
            kind if kind.starts_with("tls-creds-") || OBJECTS_CARRIED.contains(&kind) => {
                self.files_within("object", arg, value)
            }
            _ => Err(unsupported(format!(
                "the object {value}: {kind} was not tried; start the VM without it"
            ))),
        }
    }

    /// Whether another argument names this id. libvirt gives every VM a master key that most never use.
    fn is_referenced(&self, id: &str, own: &str) -> bool {
        let names = |text: &String| text != own && parse(text, "").is_ok_and(|o| o.values().iter().any(|v| v == id));
        self.args.iter().any(names)
    }

    fn device(&mut self, arg: &str, value: &str) -> Result<(), Refusal> {
        let opts = parse(value, "driver")?;
        let driver = opts.get("driver").unwrap_or_default();
        if let Some(why) = device_refusal(&driver) {
            return Err(unsupported(format!("the device {driver}: {why}")));
        }
        self.device_ids.extend(opts.get("id"));
        if driver == "pc-dimm" {
            self.memdevs.extend(opts.get("memdev"));
        }
        for key in ["romfile", "file"] {
            if let Some(path) = opts.get(key) {
                self.file_if_path(&path);
            }
        }
        self.pair(arg, value);
        Ok(())
    }

    fn disk(&mut self, option: &str, arg: &str, value: &str) -> Result<(), Refusal> {
        if option == "cdrom" {
            let path = self.file(value);
            self.pair(arg, &path);
            return Ok(());
        }
        let opts = parse(value, "driver")?;
        let read_only =
            opts.is_on("read-only") || opts.is_on("readonly") || opts.get("media").as_deref() == Some("cdrom");
        let driver = opts.get("driver").unwrap_or_default();
        let empty =
            driver.starts_with("null-") || (option == "drive" && opts.get("file").is_none() && driver.is_empty());
        if !read_only && !empty && self.facts.storage == Storage::Private {
            return disk::private(self, option, arg, value);
        }
        self.files_within(option, arg, value)
    }

    fn vnc(&mut self, arg: &str, value: &str) -> Result<(), Refusal> {
        let mut opts = parse(value, "vnc")?;
        let at = opts.get("vnc").unwrap_or_default();
        if at.starts_with("unix:") {
            opts.remove("vnc");
            let rest: String = opts.into_pairs().iter().map(|p| format!(",{}", p.render())).collect();
            self.plain(arg);
            self.out.push(Arg::RunFile {
                prefix: "unix:".into(),
                file: "vnc.sock".into(),
                suffix: rest,
            });
            return Ok(());
        }
        // The display's number may be taken over there.
        if at != "none" && opts.get("to").is_none() {
            opts.set("to", "99");
        }
        self.pair(arg, &opts.render());
        Ok(())
    }

    fn carry_only(&mut self, arg: &str, value: &str, fine: &[&str], why: &str) -> Result<(), Refusal> {
        let kind = parse(value, "kind")?
            .get("kind")
            .or_else(|| parse(value, "").ok()?.get("driver"));
        if !kind.is_some_and(|k| fine.contains(&k.as_str())) {
            return Err(unsupported(format!("{arg} {value}: {why}")));
        }
        self.pair(arg, value);
        Ok(())
    }

    /// Carries an option, its paths made absolute, and asks for the files that they name.
    fn files_within(&mut self, option: &str, arg: &str, value: &str) -> Result<(), Refusal> {
        let opts = parse(value, "")?;
        let Opts::Pairs(mut pairs) = opts else {
            // JSON comes from programs, which write absolute paths.
            for pair in opts.into_pairs().iter().filter(|p| names_file(option, &p.key)) {
                pair.value.as_deref().into_iter().for_each(|v| self.file_if_path(v));
            }
            self.pair(arg, value);
            return Ok(());
        };
        for pair in pairs.iter_mut().filter(|p| names_file(option, &p.key)) {
            if let Some(path) = pair.value.as_deref().filter(|v| is_local_path(v)) {
                pair.value = Some(self.file(path));
            }
        }
        let text = pairs.iter().map(Pair::render).collect::<Vec<_>>().join(",");
        self.pair(arg, &text);
        Ok(())
    }

    /// The target must have this file; returns its absolute path.
    fn file(&mut self, path: &str) -> String {
        let path = self.facts.cwd.join(path).display().to_string();
        self.files.push(path.clone());
        path
    }

    fn file_if_path(&mut self, value: &str) {
        if Path::new(value).is_absolute() {
            self.files.push(value.to_owned());
        }
    }

    pub(super) fn plain(&mut self, arg: &str) {
        self.out.push(Arg::Plain(arg.to_owned()));
    }

    pub(super) fn pair(&mut self, arg: &str, value: &str) {
        self.plain(arg);
        self.plain(value);
    }
}

pub(super) fn parse(value: &str, implied: &str) -> Result<Opts, Refusal> {
    Opts::parse(value, if implied.is_empty() { None } else { Some(implied) }).map_err(|e| unsupported(e.to_string()))
}

fn take(pairs: &mut Vec<Pair>, key: &str) -> Option<String> {
    let at = pairs.iter().position(|p| p.key == key)?;
    pairs.remove(at).value
}

/// Whether an option's key names a file. Elsewhere the same word means something else: in `-blockdev` `file` is another
/// node's name.
fn names_file(option: &str, key: &str) -> bool {
    let last = key.rsplit('.').next().unwrap_or(key);
    match option {
        "blockdev" => last == "filename",
        "drive" => key == "file" || last == "filename",
        "object" => matches!(key, "file" | "filename" | "dir"),
        "smbios" => matches!(key, "file" | "path"),
        "fw_cfg" | "acpitable" => matches!(key, "file" | "data"),
        _ => false,
    }
}

/// Not a URL or protocol: `nbd://host/x`, `rbd:pool/x`.
fn is_local_path(value: &str) -> bool {
    !value.split('/').next().unwrap_or_default().contains(':')
}

/// `next`, but only if the option takes a value.
trait NextValue<'a> {
    fn next_if_value(&mut self, flag: bool) -> Option<&'a str>;
}

impl<'a> NextValue<'a> for std::slice::Iter<'a, String> {
    fn next_if_value(&mut self, flag: bool) -> Option<&'a str> {
        if flag { None } else { self.next().map(String::as_str) }
    }
}

#[cfg(test)]
#[path = "derive_tests.rs"]
pub(super) mod tests;

#[cfg(test)]
#[path = "derive_disk_tests.rs"]
mod disk_tests;
