//! What becomes of each option of a QEMU command line: a table. An option that is not in it is refused, because
//! nobody knows whether it belongs to the VM or to its host.

/// What to do with an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// Part of the VM: the shadow has it too.
    Carry,
    /// The same, with a value behind it.
    CarryValue,
    /// Of this host, or of how the primary was started.
    Drop,
    DropValue,
    /// With the reason and, behind a semicolon, what to do about it.
    Refuse(&'static str),
    /// The value names a file that the target must have.
    File,
    /// Looked at by a function of its own.
    Special,
}

/// Reason of a thing that only makes sense on a terminal or desktop.
pub const TERMINAL: &str = "its other end, a terminal or a desktop, stays on this host; use -display none, and files or unix \
                            sockets (server=on,wait=off) for consoles";

/// A disk whose option leaves to QEMU what it is.
pub const DISKS: &str = "what it is is left to QEMU; write it as -drive file=…,format=…: then it can be copied";

use Rule::{Carry, CarryValue, Drop, DropValue, File, Refuse, Special};

/// Sorted by nothing but meaning; a few dozen comparisons a VM are no cost.
const RULES: &[(&str, Rule)] = &[
    ("accel", CarryValue),
    ("action", CarryValue),
    ("append", CarryValue),
    ("boot", CarryValue),
    ("compat", CarryValue),
    ("cpu", Special),
    ("echr", CarryValue),
    ("global", CarryValue),
    ("icount", CarryValue),
    ("k", CarryValue),
    ("m", CarryValue),
    ("mon", Special),
    ("msg", CarryValue),
    ("name", CarryValue),
    ("numa", Special),
    ("overcommit", CarryValue),
    ("rtc", CarryValue),
    ("runas", CarryValue),
    ("sandbox", CarryValue),
    ("seed", CarryValue),
    ("set", CarryValue),
    ("smp", CarryValue),
    ("uuid", CarryValue),
    ("vga", CarryValue),
    ("watchdog-action", CarryValue),
    ("enable-kvm", Carry),
    ("no-acpi", Carry),
    ("no-fd-bootchk", Carry),
    ("no-hpet", Carry),
    ("no-reboot", Carry),
    ("no-shutdown", Carry),
    ("no-user-config", Carry),
    ("nodefaults", Special),
    ("only-migratable", Carry),
    ("usb", Carry),
    ("win2k-hack", Carry),
    ("S", Drop),
    ("daemonize", Drop),
    ("enable-sync-profile", Drop),
    ("jitdump", Drop),
    ("mem-prealloc", Drop),
    ("one-insn-per-tb", Drop),
    ("perfmap", Drop),
    ("s", Drop),
    ("singlestep", Drop),
    ("D", DropValue),
    ("d", DropValue),
    ("dfilter", DropValue),
    ("gdb", DropValue),
    ("incoming", DropValue),
    ("loadvm", DropValue),
    ("mem-path", DropValue),
    ("pidfile", DropValue),
    ("trace", DropValue),
    ("L", File),
    ("dtb", File),
    ("initrd", File),
    ("kernel", File),
    ("shim", File),
    ("acpitable", Special),
    ("audiodev", Special),
    ("bios", Special),
    ("blockdev", Special),
    ("cdrom", Special),
    ("chardev", Special),
    ("debugcon", Special),
    ("device", Special),
    ("display", Special),
    ("drive", Special),
    ("fw_cfg", Special),
    ("M", Special),
    ("machine", Special),
    ("monitor", Special),
    ("net", Special),
    ("netdev", Special),
    ("nic", Special),
    ("nographic", Special),
    ("object", Special),
    ("option-rom", Special),
    ("parallel", Special),
    ("qmp", Special),
    ("qmp-pretty", Special),
    ("run-with", Special),
    ("serial", Special),
    ("smbios", Special),
    ("usbdevice", Special),
    ("vnc", Special),
    (
        "add-fd",
        Refuse("an inherited descriptor can't be handed to another host; name the file instead"),
    ),
    ("audio", Refuse("sound goes to this host; use -audiodev none")),
    (
        "chroot",
        Refuse("the shadow's paths would be other ones; start QEMU without it"),
    ),
    ("curses", Refuse(TERMINAL)),
    ("fda", Refuse(DISKS)),
    ("fdb", Refuse(DISKS)),
    (
        "fsdev",
        Refuse("a shared directory lives on this host and blocks migration; share it over the network, as by NFS"),
    ),
    ("full-screen", Refuse(TERMINAL)),
    ("hda", Refuse(DISKS)),
    ("hdb", Refuse(DISKS)),
    ("hdc", Refuse(DISKS)),
    ("hdd", Refuse(DISKS)),
    (
        "iscsi",
        Refuse("not tried; let the host attach the disk, and set storage = \"shared\" if both do"),
    ),
    ("mtdblock", Refuse(DISKS)),
    ("pflash", Refuse(DISKS)),
    (
        "plugin",
        Refuse("a TCG plugin's state is not migrated; start the VM without it"),
    ),
    (
        "preconfig",
        Refuse(
            "the machine was configured over QMP, so its command line does not describe it; put it on the command line",
        ),
    ),
    (
        "readconfig",
        Refuse("part of the VM is described in a file; put it on the command line"),
    ),
    ("sd", Refuse(DISKS)),
    (
        "snapshot",
        Refuse("the disk's changes live in a temporary file of this host; use an overlay image of its own"),
    ),
    ("spice", Refuse("not tried; use -vnc")),
    (
        "tpmdev",
        Refuse("the TPM's state lives in another process of this host; start the VM without a TPM"),
    ),
    (
        "virtfs",
        Refuse("a shared directory lives on this host and blocks migration; share it over the network, as by NFS"),
    ),
];

/// The rule for an option, given without its dashes.
pub fn rule(option: &str) -> Option<Rule> {
    RULES.iter().find(|(name, _)| *name == option).map(|(_, rule)| *rule)
}

/// Devices that can't be shadowed, by how their driver's name begins.
const DEVICES: &[(&str, &str)] = &[
    (
        "vfio-",
        "it is a piece of this host's hardware; use a virtio device on a bridged tap or an image",
    ),
    (
        "vhost-user-",
        "its state lives in another process of this host; use QEMU's own virtio device",
    ),
    (
        "vhost-scsi",
        "its state lives in this host's kernel; use virtio-scsi with an image",
    ),
    (
        "vhost-vdpa",
        "it is a piece of this host's hardware; use virtio-net on a bridged tap",
    ),
    (
        "vhost-vsock",
        "its connections end on this host; use the network, or a virtio-serial port on a unix socket",
    ),
    (
        "usb-host",
        "it is plugged into this host; reach it over the network, as by USB/IP from inside the guest",
    ),
    ("usb-redir", "its other end stays on this host; start the VM without it"),
    (
        "usb-mtp",
        "a shared directory lives on this host; share it over the network",
    ),
    (
        "ccid-card-passthru",
        "its other end stays on this host; start the VM without it",
    ),
    (
        "virtio-9p",
        "a shared directory lives on this host and blocks migration; share it over the network, as by NFS",
    ),
    (
        "virtio-mem",
        "its RAM comes and goes, which was not tried; give the VM its memory by -m",
    ),
    ("virtio-pmem", "its RAM is a disk; use virtio-blk"),
    ("nvdimm", "its RAM is a disk; use virtio-blk"),
    ("cxl-", "its RAM was not tried; give the VM its memory by -m"),
    (
        "ivshmem",
        "its RAM is shared with other processes of this host; start the VM without it",
    ),
    (
        "scsi-block",
        "it passes commands through to this host's device; use scsi-hd",
    ),
    (
        "scsi-generic",
        "it passes commands through to this host's device; use scsi-hd",
    ),
    (
        "tpm-",
        "the TPM's state lives in another process of this host; start the VM without a TPM",
    ),
    (
        "qxl",
        "it needs SPICE, which was not tried; use -device VGA or virtio-vga with -vnc",
    ),
];

/// Why a device can't be shadowed, `None` if it can.
pub fn device_refusal(driver: &str) -> Option<&'static str> {
    DEVICES
        .iter()
        .find(|(prefix, _)| driver.starts_with(prefix))
        .map(|(_, reason)| *reason)
}

/// Objects that are carried as they are.
pub const OBJECTS_CARRIED: &[&str] = &[
    "authz-list",
    "authz-simple",
    "cryptodev-backend-builtin",
    "iothread",
    "main-loop",
    "rng-builtin",
    "rng-random",
    "throttle-group",
    "tls-cipher-suites",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_option_has_two_rules() {
        for (n, (name, _)) in RULES.iter().enumerate() {
            assert!(
                !RULES[..n].iter().any(|(other, _)| other == name),
                "{name} is there twice"
            );
        }
        assert_eq!(rule("xen-domid"), None);
    }

    #[test]
    fn every_refusal_names_a_remedy() {
        for (name, rule) in RULES {
            if let Refuse(why) = rule {
                assert!(why.contains("; "), "-{name}: {why}");
            }
        }
        for (name, why) in DEVICES {
            assert!(why.contains("; "), "{name}: {why}");
        }
    }

    #[test]
    fn devices_by_their_driver() {
        assert!(device_refusal("vfio-pci").is_some());
        assert!(device_refusal("virtio-9p-pci").is_some());
        assert_eq!(device_refusal("virtio-net-pci"), None);
    }
}
