//! What the command line of a running QEMU says about its VM. The line belongs to another process and may hold anything: what
//! is not understood is left out, and nothing here panics.
//!
//! Options that take no value are listed, because all others take the next word, whatever it looks like: in
//! `-append -uuid` there is no uuid. `-readconfig` files are not read.

use uuid::Uuid;

/// Longest name kept, in characters: names end up in labels and logs.
const NAME_MAX: usize = 128;
/// Most taps and sockets kept of one VM.
const LIST_MAX: usize = 64;
const MIB: u64 = 1 << 20;
/// What QEMU gives without `-m`.
const MEMORY_DEFAULT_BYTES: u64 = 128 * MIB;

/// Why a QEMU's `-uuid` does not identify it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoUuid {
    #[error("it has no -uuid")]
    Absent,
    #[error("its -uuid {0:?} is none")]
    Malformed(String),
    #[error("its -uuid is all zeros, which is QEMU's word for none")]
    Nil,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct QemuArgs {
    pub uuid: Result<Uuid, NoUuid>,
    /// Empty without `-name`.
    pub name: String,
    /// `debug-threads=on`: threads have names, so that TCG's vCPUs can be told from the rest.
    pub debug_threads: bool,
    pub accel: Option<String>,
    pub vcpus: u32,
    pub memory_bytes: u64,
    pub incoming: bool,
    /// `ifname`s of tap backends; a tap that the kernel named, or that came as a file descriptor, is not among them.
    pub taps: Vec<String>,
    /// Paths of QMP sockets.
    pub qmp: Vec<String>,
}

impl Default for QemuArgs {
    fn default() -> Self {
        Self {
            uuid: Err(NoUuid::Absent),
            name: String::new(),
            debug_threads: false,
            accel: None,
            vcpus: 1,
            memory_bytes: MEMORY_DEFAULT_BYTES,
            incoming: false,
            taps: Vec::new(),
            qmp: Vec::new(),
        }
    }
}

/// Whether a program of this file name is a QEMU system emulator: Debian's and upstream's names, and Red Hat's.
pub fn is_qemu(file_name: &str) -> bool {
    file_name.starts_with("qemu-system-") || matches!(file_name, "qemu-kvm" | "kvm")
}

/// Options of QEMU that take no value (7.2 to 10).
const FLAGS: &[&str] = &[
    "S",
    "alt-grab",
    "ctrl-grab",
    "curses",
    "daemonize",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-frame",
    "no-hpet",
    "no-kvm",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "nouserconfig",
    "old-param",
    "only-migratable",
    "portrait",
    "preconfig",
    "s",
    "sdl",
    "semihosting",
    "show-cursor",
    "singlestep",
    "snapshot",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "xen-domid-restrict",
];

/// Reads the words after the program's name.
pub fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> QemuArgs {
    let mut args = QemuArgs::default();
    // Chardevs by id, and the monitors in control mode that name one: either may come first.
    let mut sockets: Vec<(String, String)> = Vec::new();
    let mut monitors: Vec<String> = Vec::new();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let Some(option) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            continue;
        };
        if FLAGS.contains(&option) {
            if option == "enable-kvm" {
                args.accel = Some("kvm".to_owned());
            }
            continue;
        }
        let Some(value) = words.next() else { break };
        match option {
            "uuid" => args.uuid = parse_uuid(value),
            "name" => {
                let list = Props::of(value, "guest");
                args.name = list.get("guest").unwrap_or_default().chars().take(NAME_MAX).collect();
                args.debug_threads = list.is_on("debug-threads");
            }
            "smp" => args.vcpus = parse_smp(&Props::of(value, "cpus")),
            "m" => args.memory_bytes = parse_memory(value).unwrap_or(args.memory_bytes),
            "incoming" => args.incoming = true,
            "accel" => args.accel = Props::of(value, "accel").get("accel").map(str::to_owned),
            "machine" | "M" => args.accel = Props::of(value, "type").get("accel").map(str::to_owned).or(args.accel),
            "netdev" | "nic" | "net" => add_tap(&mut args.taps, &Props::of(value, "type")),
            "qmp" | "qmp-pretty" => push(&mut args.qmp, socket_path(value)),
            "chardev" => {
                let list = Props::of(value, "backend");
                if let (Some("socket"), Some(id), Some(path)) = (list.get("backend"), list.get("id"), list.get("path"))
                {
                    sockets.push((id.to_owned(), path.to_owned()));
                }
            }
            "mon" => {
                let list = Props::of(value, "chardev");
                if list.get("mode") == Some("control") {
                    monitors.extend(list.get("chardev").map(str::to_owned));
                }
            }
            _ => {}
        }
    }
    for id in monitors {
        let found = sockets.iter().find(|(i, _)| *i == id);
        push(&mut args.qmp, found.map(|(_, path)| path.clone()));
    }
    args
}

fn push(list: &mut Vec<String>, item: Option<String>) {
    if let Some(item) = item
        && list.len() < LIST_MAX
        && !list.contains(&item)
    {
        list.push(item);
    }
}

fn parse_uuid(text: &str) -> Result<Uuid, NoUuid> {
    match text.parse::<Uuid>() {
        Ok(u) if u.is_nil() => Err(NoUuid::Nil),
        Ok(u) => Ok(u),
        Err(_) => Err(NoUuid::Malformed(text.chars().take(NAME_MAX).collect())),
    }
}

/// `cpus=`, or without it the product of the topology, as QEMU computes it.
fn parse_smp(list: &Props) -> u32 {
    let number = |key: &str| list.get(key).and_then(|v| v.parse::<u32>().ok()).filter(|n| *n > 0);
    let product = || {
        let levels = [
            "drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads",
        ];
        levels.iter().filter_map(|l| number(l)).fold(1u32, u32::saturating_mul)
    };
    number("cpus").unwrap_or_else(product)
}

fn parse_memory(value: &str) -> Option<u64> {
    Props::of(value, "size")
        .get("size")
        .and_then(|s| parse_size(s, MIB))
        .filter(|b| *b > 0)
}

/// `512`, `1G`, `1.5g`; a number alone counts in `unit`.
fn parse_size(text: &str, unit: u64) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match text.get(digits.len()..)?.to_ascii_lowercase().as_str() {
        "" => unit,
        "b" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        "p" => 1 << 50,
        "e" => 1 << 60,
        _ => return None,
    };
    if let Ok(n) = digits.parse::<u64>() {
        return n.checked_mul(scale);
    }
    let n = digits.parse::<f64>().ok().filter(|n| n.is_finite() && *n >= 0.0)?;
    let bytes = n * scale as f64;
    (bytes < u64::MAX as f64).then_some(bytes as u64)
}

fn add_tap(taps: &mut Vec<String>, list: &Props) {
    // An interface's name has at most 15 bytes.
    if list.get("type") == Some("tap") {
        let name = list
            .get("ifname")
            .filter(|n| !n.is_empty() && n.len() < libc::IFNAMSIZ && !n.contains('/'));
        push(taps, name.map(str::to_owned));
    }
}

/// `unix:/path,server=on` of the short form of a monitor.
fn socket_path(value: &str) -> Option<String> {
    let first = Props::of(value, "address");
    first.get("address")?.strip_prefix("unix:").map(str::to_owned)
}

/// `first,key=value,…` where a comma within a value is doubled; or a JSON object, which newer QEMUs take and libvirt gives.
struct Props(Vec<(String, String)>);

impl Props {
    fn of(text: &str, first_key: &str) -> Self {
        if text.trim_start().starts_with('{') {
            return Self::of_json(text);
        }
        let mut list = Vec::new();
        for (i, part) in split_commas(text).into_iter().enumerate() {
            match part.split_once('=') {
                Some((key, value)) => list.push((key.to_owned(), value.to_owned())),
                None if i == 0 => list.push((first_key.to_owned(), part)),
                // `server`, `nowait`: a flag that is on.
                None => list.push((part, "on".to_owned())),
            }
        }
        Self(list)
    }

    /// Only the scalars at the top and one level down (`addr.path` is then `path`): no option read here lies deeper.
    fn of_json(text: &str) -> Self {
        fn scalar(v: &serde_json::Value) -> Option<String> {
            match v {
                serde_json::Value::String(s) => Some(s.clone()),
                serde_json::Value::Bool(b) => Some(if *b { "on" } else { "off" }.to_owned()),
                serde_json::Value::Number(n) => Some(n.to_string()),
                _ => None,
            }
        }
        let Ok(serde_json::Value::Object(top)) = serde_json::from_str(text) else {
            return Self(Vec::new());
        };
        let mut list = Vec::new();
        for (key, value) in &top {
            match value {
                serde_json::Value::Object(inner) => {
                    list.extend(inner.iter().filter_map(|(k, v)| Some((k.clone(), scalar(v)?))));
                }
                _ => list.extend(scalar(value).map(|v| (key.clone(), v))),
            }
        }
        Self(list)
    }

    /// The last one wins, as in QEMU.
    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    fn is_on(&self, key: &str) -> bool {
        matches!(self.get(key), Some("on" | "yes" | "true" | "y"))
    }
}

fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                parts.last_mut().into_iter().for_each(|p| p.push(','));
            }
            ',' => parts.push(String::new()),
            _ => parts.last_mut().into_iter().for_each(|p| p.push(c)),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UUID: &str = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0";

    fn of(line: &str) -> QemuArgs {
        parse(line.split_whitespace())
    }

    #[test]
    fn a_plain_line() {
        let a = of(&format!(
            "-M q35,accel=kvm -name web,debug-threads=on -uuid {UUID} -smp 2 -m 512 -nodefaults -display none \
             -netdev tap,id=n0,ifname=tap7,script=no -device virtio-net-pci,netdev=n0 -qmp unix:/run/web.qmp,server=on,wait=off"
        ));
        assert_eq!(a.uuid.unwrap().to_string(), UUID);
        assert_eq!((a.name.as_str(), a.debug_threads, a.incoming), ("web", true, false));
        assert_eq!((a.vcpus, a.memory_bytes), (2, 512 * MIB));
        assert_eq!(a.taps, ["tap7"]);
        assert_eq!(a.qmp, ["/run/web.qmp"]);
        assert_eq!(a.accel.as_deref(), Some("kvm"));
    }

    #[test]
    fn a_line_of_libvirt() {
        let words = [
            "-name",
            "guest=my,,vm,debug-threads=on",
            "-S",
            "-machine",
            "pc-q35-7.2,usb=off",
            "-accel",
            "kvm",
            "-m",
            "size=2097152k",
            "-smp",
            "4,sockets=4,cores=1,threads=1",
            "-uuid",
            UUID,
            "-no-user-config",
            "-nodefaults",
            "-chardev",
            "socket,id=charmonitor,fd=32,server=on,wait=off",
            "-mon",
            "chardev=charmonitor,id=monitor,mode=control",
            "-netdev",
            r#"{"type":"tap","fd":"34","vhost":true,"vhostfd":"36","id":"hostnet0"}"#,
            "-incoming",
            "defer",
        ];
        let a = parse(words);
        assert_eq!((a.name.as_str(), a.vcpus, a.memory_bytes), ("my,vm", 4, 2 << 30));
        assert!(a.incoming && a.taps.is_empty() && a.qmp.is_empty() && a.uuid.is_ok());
    }

    #[test]
    fn monitors_and_sockets_come_in_any_order() {
        let a = of(
            "-mon chardev=m,mode=control -mon chardev=h,mode=readline -chardev socket,id=m,path=/q,server -chardev socket,id=h,path=/h",
        );
        assert_eq!(a.qmp, ["/q"]);
        let json = r#"{"id":"m","backend":"socket","path":"/j"}"#;
        assert_eq!(parse(["-chardev", json, "-mon", "m,mode=control"]).qmp, ["/j"]);
    }

    #[test]
    fn topology_and_sizes() {
        assert_eq!(of("-smp sockets=2,cores=3,threads=2").vcpus, 12);
        assert_eq!(of("-smp cpus=3,maxcpus=8").vcpus, 3);
        assert_eq!(of("-smp 0").vcpus, 1);
        assert_eq!(of("-smp sockets=4294967295,cores=4294967295").vcpus, u32::MAX);
        assert_eq!(of("-m 1.5G").memory_bytes, 3 << 29);
        for bad in [
            "-m",
            "-m 0",
            "-m x",
            "-m 99999999999999999999G",
            "-m 1e400",
            "-m -5",
            "-m NaN",
            "-m é",
        ] {
            assert_eq!(of(bad).memory_bytes, MEMORY_DEFAULT_BYTES, "{bad}");
        }
    }

    #[test]
    fn values_are_not_options() {
        assert_eq!(of("-append -uuid -name x").uuid, Err(NoUuid::Absent));
        assert_eq!(of("-append -uuid -name x").name, "x");
        assert!(of(&format!("-S --uuid {UUID}")).uuid.is_ok());
    }

    #[test]
    fn uuids_that_identify_nothing() {
        assert_eq!(of("-uuid").uuid, Err(NoUuid::Absent));
        assert_eq!(of("-uuid 12").uuid, Err(NoUuid::Malformed("12".into())));
        assert_eq!(of("-uuid 00000000-0000-0000-0000-000000000000").uuid, Err(NoUuid::Nil));
    }

    #[test]
    fn hostile_taps_and_names_are_bounded() {
        assert!(of("-netdev tap,ifname=../../etc/passwd").taps.is_empty());
        assert!(
            of("-netdev tap,ifname=a-name-that-is-too-long-for-a-device")
                .taps
                .is_empty()
        );
        let many: String = (0..1000).map(|i| format!("-netdev tap,ifname=t{i} ")).collect();
        assert_eq!(of(&many).taps.len(), LIST_MAX);
        assert_eq!(
            of(&format!("-name {}", "é".repeat(5000))).name.chars().count(),
            NAME_MAX
        );
    }

    #[test]
    fn binaries() {
        assert!(is_qemu("qemu-system-x86_64") && is_qemu("qemu-kvm"));
        assert!(!is_qemu("qemu-img") && !is_qemu("bash") && !is_qemu(""));
    }

    proptest! {
        #[test]
        fn nothing_panics(words in proptest::collection::vec(
            prop_oneof![
                Just("-uuid".to_owned()), Just("-name".to_owned()), Just("-smp".to_owned()), Just("-m".to_owned()),
                Just("-netdev".to_owned()), Just("-chardev".to_owned()), Just("-mon".to_owned()), Just("-qmp".to_owned()),
                "[-,={}\":a-zA-Z0-9é]{0,20}", ".{0,20}",
            ],
            0..20,
        )) {
            let a = parse(words.iter().map(String::as_str));
            prop_assert!(a.vcpus >= 1 && a.memory_bytes > 0);
        }
    }
}
