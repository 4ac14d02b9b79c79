//! A shadow's command line out of its spec: pure. The spec comes from a peer, so its names are checked before they become
//! paths on this host.

use std::path::Path;

use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::{Arg, ShadowSpec};

use super::{QMP_ID, ShadowRecord};

/// Longest path that a unix socket can be bound to, the kernel's `sun_path` without its end.
const SOCKET_PATH_MAX: usize = 107;

/// Names of the files that the command line wants made in the run directory.
pub fn run_files(spec: &ShadowSpec) -> Vec<&str> {
    spec.args
        .iter()
        .filter_map(|a| match a {
            Arg::RunFile { file, .. } => Some(file.as_str()),
            Arg::Plain(_) | Arg::Netdev { .. } | Arg::Disk { .. } => None,
        })
        .collect()
}

/// How many queues the NIC's tap needs.
pub fn queues(spec: &ShadowSpec, nic: usize) -> u32 {
    netdev(spec, nic)
        .and_then(|o| option(&o, "queues"))
        .and_then(|q| q.parse().ok())
        .unwrap_or(1)
}

/// Whether the NIC is served by the host's vhost-net.
pub fn vhost(spec: &ShadowSpec, nic: usize) -> bool {
    netdev(spec, nic).is_some_and(|o| {
        ["vhost", "vhostforce"]
            .iter()
            .any(|k| option(&o, k).is_some_and(|v| v == "on"))
    })
}

fn netdev(spec: &ShadowSpec, index: usize) -> Option<String> {
    spec.args.iter().find_map(|a| match a {
        Arg::Netdev { nic, prefix, suffix } if *nic == index => Some(format!("{prefix}X{suffix}")),
        _ => None,
    })
}

fn option(text: &str, key: &str) -> Option<String> {
    crate::adopt::options::Opts::parse(text, Some("type")).ok()?.get(key)
}

/// Refuses names that would leave their directory, and counts that do not fit together.
pub fn check(spec: &ShadowSpec) -> Result<(), Refusal> {
    let bad = |what: String| {
        Err(Refusal::new(
            RefusalCode::BadOrder,
            format!("the shadow's spec is malformed: {what}"),
        ))
    };
    if !spec.binary.starts_with("qemu-") && spec.binary != "kvm" || spec.binary.contains('/') {
        return bad(format!("{:?} is no name of a QEMU", spec.binary));
    }
    let names = run_files(spec)
        .into_iter()
        .chain(spec.ram.iter().map(|r| r.name.as_str()));
    for name in names {
        if !is_plain_name(name) {
            return bad(format!("{name:?} is no name of a file or RAM block"));
        }
    }
    let files = run_files(spec);
    if let Some(twice) = files.iter().enumerate().find(|(n, f)| files[..*n].contains(f)) {
        return bad(format!("{} is there twice", twice.1));
    }
    if spec.ram.is_empty() || spec.ram.iter().any(|r| r.bytes == 0) {
        return bad("a VM without RAM".into());
    }
    let gaps = |n: usize| {
        spec.args
            .iter()
            .filter(|a| matches!(a, Arg::Disk { disk, .. } if *disk == n))
            .count()
    };
    if let Some(n) = (0..spec.disks.len()).find(|n| gaps(*n) != 1) {
        return bad(format!("disk {n} is there {} times", gaps(n)));
    }
    for arg in &spec.args {
        match arg {
            Arg::Netdev { nic, .. } if *nic >= spec.nics.len() => return bad(format!("there is no NIC {nic}")),
            Arg::Disk { disk, .. } if *disk >= spec.disks.len() => return bad(format!("there is no disk {disk}")),
            Arg::Plain(text) if text.contains('\0') => return bad("an argument with a zero byte".into()),
            _ => {}
        }
    }
    Ok(())
}

/// Letters, digits and a few signs: neither a path nor something that an option string reads as its own.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 64
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

/// Sockets and option strings bound the paths of a run directory.
pub fn check_dir(dir: &Path, spec: &ShadowSpec) -> Result<(), Refusal> {
    let local = |what: String| Err(Refusal::new(RefusalCode::Local, what));
    if dir.to_string_lossy().contains([',', ' ']) {
        return local(format!(
            "run_dir {} holds a comma or a space, which QEMU's options do not take",
            dir.display()
        ));
    }
    let longest = run_files(spec)
        .into_iter()
        .chain([super::QMP_SOCKET])
        .map(|f| dir.join(f));
    match longest.map(|p| p.as_os_str().len()).max() {
        Some(len) if len > SOCKET_PATH_MAX => local(format!(
            "run_dir {} is too long: a socket in it would have {len} bytes, at most {SOCKET_PATH_MAX} are possible",
            dir.display()
        )),
        _ => Ok(()),
    }
}

/// The whole command line, without the program.
pub fn build(spec: &ShadowSpec, record: &ShadowRecord) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    for (block, (_, path)) in spec.ram.iter().zip(&record.ram) {
        args.extend(["-object".into(), ram_object(&block.name, block.bytes, path)]);
    }
    for arg in &spec.args {
        args.push(match arg {
            Arg::Plain(text) => text.clone(),
            Arg::Netdev { nic, prefix, suffix } => {
                let tap = record.taps.get(*nic).map(String::as_str).unwrap_or_default();
                format!("{prefix}{tap}{suffix}")
            }
            Arg::Disk { disk, prefix, suffix } => {
                let path = record.disks.get(*disk).map(|d| d.path.display().to_string());
                format!("{prefix}{}{suffix}", path.unwrap_or_default())
            }
            Arg::RunFile { prefix, file, suffix } => format!("{prefix}{}{suffix}", record.dir.join(file).display()),
        });
    }
    let socket = record.qmp_path.display();
    args.extend([
        "-chardev".into(),
        format!("socket,id={QMP_ID},path={socket},server=on,wait=off"),
    ]);
    args.extend(["-mon".into(), format!("chardev={QMP_ID},mode=control")]);
    args.extend(["-incoming", "defer", "-S"].map(str::to_owned));
    args
}

/// `share=on` and a named file are what makes QEMU skip the block under x-ignore-shared. The block's name in the stream is
/// the id as long as the canonical path is off, which old machine types do not default to.
fn ram_object(name: &str, bytes: u64, path: &Path) -> String {
    let path = path.display();
    format!(
        "memory-backend-file,id={name},size={bytes},mem-path={path},share=on,x-use-canonical-path-for-ramblock-id=off"
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use umbra_api::VmId;
    use umbra_api::wire::control::{Nic, RamBlock};

    use super::*;

    fn spec() -> ShadowSpec {
        ShadowSpec {
            host_cpu: None,
            qemu_version: (10, 0, 2),
            binary: "qemu-system-x86_64".into(),
            machine: "pc-q35-10.0".into(),
            args: vec![
                Arg::Plain("-machine".into()),
                Arg::Plain("pc-q35-10.0,memory-backend=pc.ram".into()),
                Arg::Plain("-netdev".into()),
                Arg::Netdev {
                    nic: 0,
                    prefix: "tap,ifname=".into(),
                    suffix: ",id=n0,script=no,downscript=no,vhost=on,queues=4".into(),
                },
                Arg::Plain("-serial".into()),
                Arg::RunFile {
                    prefix: "file:".into(),
                    file: "serial0.log".into(),
                    suffix: String::new(),
                },
            ],
            ram: vec![RamBlock {
                name: "pc.ram".into(),
                bytes: 1 << 28,
            }],
            nics: vec![Nic {
                bridge: Some("br0".into()),
                tap: "t0".into(),
            }],
            files: vec![],
            disks: vec![],
        }
    }

    fn record() -> ShadowRecord {
        ShadowRecord {
            vm: VmId(uuid::Uuid::from_u128(1)),
            session: 1,
            process: None,
            dir: "/run/u/1".into(),
            qmp_path: "/run/u/1/umbra.qmp".into(),
            log: "/run/u/1/qemu.log".into(),
            ram: vec![("pc.ram".into(), "/dev/shm/u/1.ram".into())],
            taps: vec!["um1n0".into()],
            run_files: vec![],
            cgroup: None,
            memory_cgroup: None,
            disks: vec![],
            storage: None,
            token: 0,
        }
    }

    #[test]
    fn the_line_has_the_targets_own_files() {
        check(&spec()).unwrap();
        let line = build(&spec(), &record()).join(" ");
        assert_eq!(
            line,
            "-object memory-backend-file,id=pc.ram,size=268435456,mem-path=/dev/shm/u/1.ram,share=on,\
             x-use-canonical-path-for-ramblock-id=off -machine pc-q35-10.0,memory-backend=pc.ram \
             -netdev tap,ifname=um1n0,id=n0,script=no,downscript=no,vhost=on,queues=4 -serial file:/run/u/1/serial0.log \
             -chardev socket,id=umbra-qmp,path=/run/u/1/umbra.qmp,server=on,wait=off \
             -mon chardev=umbra-qmp,mode=control -incoming defer -S"
        );
        assert_eq!(queues(&spec(), 0), 4);
        assert!(vhost(&spec(), 0) && !vhost(&spec(), 1));
    }

    #[test]
    fn names_from_the_peer_stay_in_their_directory() {
        let with = |change: fn(&mut ShadowSpec)| {
            let mut s = spec();
            change(&mut s);
            check(&s).unwrap_err().detail
        };
        let run_file = |file: &str| Arg::RunFile {
            prefix: String::new(),
            file: file.into(),
            suffix: String::new(),
        };
        assert!(with(|s| s.binary = "/bin/sh".into()).contains("/bin/sh"));
        assert!(with(|s| s.binary = "qemu-/../sh".into()).contains("sh"));
        assert!(with(|s| s.ram[0].name = "../x".into()).contains("../x"));
        assert!(with(|s| s.ram.clear()).contains("without RAM"));
        assert!(with(|s| s.nics.clear()).contains("NIC 0"));
        let mut s = spec();
        s.args.push(run_file("../../etc/passwd"));
        assert!(check(&s).is_err());
        s.args.pop();
        s.args.push(run_file("serial0.log"));
        assert!(check(&s).unwrap_err().detail.contains("twice"));
        assert!(
            check_dir(&PathBuf::from("/run/").join("x".repeat(100)), &spec())
                .unwrap_err()
                .detail
                .contains("107")
        );
        assert!(check_dir("/run/a,b".as_ref(), &spec()).is_err());
    }
}
