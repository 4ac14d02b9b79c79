//! What a guest's QEMU is made of, where a test wants something other than a plain q35.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::host::Host;

/// What holds the primary's RAM; a shadow's is a file whatever this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ram {
    /// `-m` and nothing else.
    Anonymous,
    Memfd,
    /// On a tmpfs.
    File {
        share: bool,
    },
    /// A memfd of huge pages of 2 MiB, which the machine must have free.
    HugePages,
}

#[derive(Clone, Debug)]
pub struct Hardware {
    /// `-M`, options included.
    pub machine: &'static str,
    /// `-accel`; what suits a Linux here if `None`.
    pub accel: Option<&'static str>,
    pub ram: Ram,
    /// On the same bridge, each with a tap of its own. The guest speaks on the first.
    pub nics: u8,
    /// Boots by UEFI, from two flash chips: code that is only read, variables that are written.
    pub uefi: bool,
}

impl Default for Hardware {
    fn default() -> Self {
        Self {
            machine: "q35",
            accel: None,
            ram: Ram::Anonymous,
            nics: 1,
            uefi: false,
        }
    }
}

/// `tcg` unless the environment knows better: a `/dev/kvm` that emulates every instruction can't be told from a real one.
fn accel() -> String {
    std::env::var("UMBRA_ACCEL").unwrap_or_else(|_| "tcg".into())
}

/// The rate of this machine's TSC, which TCG hands on to its guests.
fn tsc_khz() -> u64 {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz = text
        .lines()
        .find_map(|l| l.strip_prefix("cpu MHz")?.split_once(':')?.1.trim().parse::<f64>().ok());
    (mhz.unwrap_or(2000.0) * 1e3) as u64
}

/// As Debian's package `ovmf` has it.
fn ovmf(part: &str) -> PathBuf {
    Path::new("/usr/share/OVMF").join(format!("OVMF_{part}_4M.fd"))
}

/// The file of a primary whose RAM is one.
pub fn ram_file(host: &Host, vm: &str) -> Result<PathBuf> {
    let dir = host.ram_folder()?.join("primaries");
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    Ok(dir.join(vm))
}

/// The variables' chip of a primary.
pub fn variables(host: &Host, vm: &str) -> PathBuf {
    host.file(&format!("{vm}.vars"))
}

impl Hardware {
    /// Why this can't be had on this machine, if so.
    pub fn missing(&self) -> Option<String> {
        let firmware = [ovmf("CODE"), ovmf("VARS")];
        let lacking = firmware.iter().find(|f| self.uefi && !f.is_file())?;
        Some(format!("{} is missing: cargo xtask setup", lacking.display()))
    }

    /// What Linux must be told of this machine. On a microvm only the PIT is there to measure the TSC with; under TCG on a busy
    /// core that fails often, and Linux then waits for ever for ticks that a PIT without a PIC does not give.
    pub fn kernel_words(&self) -> String {
        match self.machine.starts_with("microvm") {
            true => format!(" tsc_early_khz={}", tsc_khz()),
            false => String::new(),
        }
    }

    /// QEMU's options but for NICs; files that they name are made.
    pub fn arguments(&self, host: &Host, vm: &str, mib: u32) -> Result<Vec<String>> {
        let mut args = Vec::new();
        let mut add = |option: &str, value: String| args.extend([option.to_owned(), value]);
        let backend = match self.ram {
            Ram::Anonymous => None,
            Ram::Memfd => Some("memory-backend-memfd".to_owned()),
            Ram::HugePages => Some("memory-backend-memfd,hugetlb=on,hugetlbsize=2M".to_owned()),
            Ram::File { share } => {
                let share = if share { "on" } else { "off" };
                let path = ram_file(host, vm)?;
                Some(format!("memory-backend-file,mem-path={},share={share}", path.display()))
            }
        };
        match backend {
            None => add("-M", self.machine.to_owned()),
            Some(backend) => {
                add("-object", format!("{backend},id=ram0,size={mib}M"));
                add("-M", format!("{},memory-backend=ram0", self.machine));
            }
        }
        add("-accel", self.accel.map_or_else(accel, str::to_owned));
        add("-m", mib.to_string());
        if self.uefi {
            let (code, own) = (ovmf("CODE"), variables(host, vm));
            std::fs::copy(ovmf("VARS"), &own).with_context(|| format!("copying to {}", own.display()))?;
            let code = format!("if=pflash,format=raw,readonly=on,file={}", code.display());
            add("-drive", code);
            add("-drive", format!("if=pflash,format=raw,file={}", own.display()));
        }
        Ok(args)
    }
}

/// Huge pages that were set aside for a test; dropping it restores what the machine had.
pub struct HugePages {
    before: u64,
}

const HUGE: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// Room for so many MiB more, in pages of 2 MiB; an error if the machine does not give it.
    pub fn reserve(mib: u32) -> Result<Self> {
        let before = Self::count()?;
        let wanted = before + u64::from(mib.div_ceil(2));
        let reserved = Self { before };
        std::fs::write(HUGE, wanted.to_string()).context(HUGE)?;
        match Self::count()? {
            n if n >= wanted => Ok(reserved),
            n => anyhow::bail!("{HUGE}: {n} pages instead of {wanted}"),
        }
    }

    fn count() -> Result<u64> {
        let text = std::fs::read_to_string(HUGE).context(HUGE)?;
        text.trim().parse().with_context(|| format!("{HUGE}: {text:?}"))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(HUGE, self.before.to_string());
    }
}
