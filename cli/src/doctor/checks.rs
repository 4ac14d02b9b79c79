//! What the facts mean. A check is a function of all facts; a new one goes into [`all`].

use super::Verdict::{Fail, Warn};
use super::{Check, Facts};
use crate::render::words::bytes;

/// The oldest QEMU that can be held in a migration.
const QEMU_OLDEST: (u32, u32) = (8, 1);

pub fn all(f: &Facts) -> Vec<Check> {
    vec![qemu(f), kvm(f), kernel(f), ram_dir(f), swap(f), cgroups(f)]
}

fn qemu(f: &Facts) -> Check {
    let Some(line) = &f.qemu else {
        let remedy = "Install it, 8.1 or newer, on each host that is to run shadows";
        return Check::bad("QEMU", Fail, "no qemu-system-x86_64 on the PATH", remedy);
    };
    match version(line) {
        Some(v) if v >= QEMU_OLDEST => Check::ok("QEMU", line),
        Some((major, minor)) => {
            let found = format!("version {major}.{minor} can't be held in a migration");
            Check::bad(
                "QEMU",
                Fail,
                found,
                "8.1 or newer is needed; Debian 12 has it in its backports",
            )
        }
        None => Check::bad(
            "QEMU",
            Warn,
            format!("its version is not understood: {line}"),
            "8.1 or newer is needed",
        ),
    }
}

/// `QEMU emulator version 10.0.2 (Debian …)`
fn version(line: &str) -> Option<(u32, u32)> {
    let mut words = line.split_whitespace().skip_while(|w| *w != "version");
    let mut parts = words.nth(1)?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn kvm(f: &Facts) -> Check {
    match f.kvm {
        true => Check::ok("KVM", "/dev/kvm is there"),
        false => {
            let remedy = "Load kvm_intel or kvm_amd, or switch virtualization on in the firmware";
            Check::bad("KVM", Warn, "no /dev/kvm: guests run under emulation at best", remedy)
        }
    }
}

fn kernel(f: &Facts) -> Check {
    match f.btf {
        true => Check::ok("kernel", "it tells its types (BTF), which the agent needs"),
        false => {
            let remedy = "Run a kernel with CONFIG_DEBUG_INFO_BTF, as distributions ship them";
            Check::bad(
                "kernel",
                Fail,
                "no /sys/kernel/btf/vmlinux: the agent can't measure",
                remedy,
            )
        }
    }
}

fn ram_dir(f: &Facts) -> Check {
    let dir = f.ram_dir.display();
    let remedy = "Set ram_dir to a folder on a tmpfs or hugetlbfs";
    let (kind, options) = match &f.ram_fs {
        Some((kind, options)) if kind == "tmpfs" || kind == "hugetlbfs" => (kind, options),
        Some((kind, _)) => {
            return Check::bad(
                "ram_dir",
                Fail,
                format!("{dir} is on {kind}, which is not memory"),
                remedy,
            );
        }
        None => return Check::bad("ram_dir", Fail, format!("{dir} is on no mounted file system"), remedy),
    };
    let room = format!(
        "{dir} is on {kind}, {} of {} free",
        bytes(f.ram_free_bytes),
        bytes(f.ram_size_bytes)
    );
    let huge = kind == "hugetlbfs" || options.split(',').any(|o| o.starts_with("huge=") && o != "huge=never");
    if huge {
        let remedy = "Use a tmpfs of ordinary pages where shadows are to be shrunk";
        return Check::bad(
            "ram_dir",
            Warn,
            format!("{room}; huge pages are never swapped, so tier 0 saves no RAM"),
            remedy,
        );
    }
    if f.ram_free_bytes * 10 < f.ram_size_bytes {
        let remedy = "Mount it larger (mount -o remount,size=…), or clear it";
        return Check::bad("ram_dir", Warn, room, remedy);
    }
    Check::ok("ram_dir", room)
}

fn swap(f: &Facts) -> Check {
    if f.swap_bytes == 0 {
        let remedy = "Make a swap file (mkswap, swapon) or zram, as large as the shadows that this host is to keep";
        return Check::bad(
            "swap",
            Warn,
            "none: a waiting shadow keeps all of its RAM, tier 0 saves CPU only",
            remedy,
        );
    }
    let zswap = if f.zswap { ", compressed by zswap first" } else { "" };
    let found = format!("{} of {} free{zswap}", bytes(f.swap_free_bytes), bytes(f.swap_bytes));
    match f.swap_free_bytes * 10 < f.swap_bytes {
        true => Check::bad(
            "swap",
            Warn,
            format!("{found}: shadows are not shrunk further"),
            "Add swap",
        ),
        false => Check::ok("swap", found),
    }
}

fn cgroups(f: &Facts) -> Check {
    let missing: Vec<_> = ["cpu", "memory"]
        .into_iter()
        .filter(|c| !f.controllers.iter().any(|has| has == c))
        .collect();
    if missing.is_empty() {
        return Check::ok("cgroups", "controllers cpu and memory are there");
    }
    Check::bad(
        "cgroups",
        Warn,
        format!(
            "no controller {}: shadows are not bounded by their tier",
            missing.join(", ")
        ),
        "Mount cgroup2 at /sys/fs/cgroup, and see that the kernel's command line does not disable it",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, fit, rows};

    fn good() -> Facts {
        Facts {
            qemu: Some("QEMU emulator version 10.0.2 (Debian 1:10.0.2)".into()),
            kvm: true,
            btf: true,
            ram_dir: "/dev/shm/umbra".into(),
            ram_fs: Some(("tmpfs".into(), "rw,size=24684100k".into())),
            ram_size_bytes: 24 << 30,
            ram_free_bytes: 20 << 30,
            memory_bytes: 24 << 30,
            swap_bytes: 8 << 30,
            swap_free_bytes: 8 << 30,
            zswap: true,
            controllers: vec!["cpu".into(), "memory".into()],
        }
    }

    fn found(f: &Facts, name: &str) -> (Verdict, String) {
        let checks = all(f);
        let row = rows(&checks).into_iter().find(|(n, _)| *n == name).unwrap();
        let verdict = checks.iter().find(|c| c.name == name).unwrap().verdict;
        (verdict, row.1)
    }

    #[test]
    fn a_host_that_has_all_is_told_so() {
        let checks = all(&good());
        assert!(checks.iter().all(|c| c.verdict == Verdict::Ok), "{checks:?}");
        assert!(fit(&checks) && rows(&checks).iter().all(|(_, text)| text.starts_with("ok: ")));
    }

    #[test]
    fn each_lack_has_its_remedy() {
        let bare = Facts {
            ram_dir: "/srv".into(),
            ram_fs: Some(("ext4".into(), "rw".into())),
            ..Facts::default()
        };
        let checks = all(&bare);
        assert!(!fit(&checks));
        assert!(
            checks.iter().all(|c| c.verdict != Verdict::Ok && c.remedy.is_some()),
            "{checks:?}"
        );
        let (verdict, text) = found(&bare, "swap");
        assert!(
            verdict == Warn && text.contains("mkswap") && text.contains("tier 0"),
            "{text}"
        );
        let old = Facts {
            qemu: Some("QEMU emulator version 7.2.9".into()),
            ..good()
        };
        assert_eq!(found(&old, "QEMU").0, Fail);
        let huge = Facts {
            ram_fs: Some(("hugetlbfs".into(), "rw,pagesize=2M".into())),
            ..good()
        };
        assert!(found(&huge, "ram_dir").1.contains("never swapped"));
        let full = Facts {
            swap_free_bytes: 1 << 20,
            ..good()
        };
        assert_eq!(found(&full, "swap").0, Warn);
    }

    #[test]
    fn versions_are_read_as_qemu_prints_them() {
        assert_eq!(version("QEMU emulator version 8.1.0"), Some((8, 1)));
        assert_eq!(version("QEMU emulator version eleven"), None);
        assert_eq!(version(""), None);
    }
}
