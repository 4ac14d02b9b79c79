//! All that this host lacks for a shadow, asked without starting one: the same checks as at the start, and not only the first.

use std::path::Path;
use std::process::Command;

use umbra_api::VmId;
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::ShadowSpec;

use super::{LaunchConfig, ShadowRecord, checks, command, disks};

/// Each lack is a refusal that names it.
pub fn lacks(spec: &ShadowSpec, cfg: &LaunchConfig, vm: VmId) -> Vec<Refusal> {
    let mut found = Vec::new();
    let mut note = |result: Result<(), Refusal>| found.extend(result.err());
    note(command::check(spec));
    match checks::binary(spec, cfg) {
        Ok(binary) => note(machine(&binary, spec)),
        Err(refusal) => note(Err(refusal)),
    }
    note(checks::cpu(spec));
    note(checks::files(spec));
    note(checks::vhost(spec));
    for n in 0..spec.nics.len() {
        note(checks::bridge_of(spec, n, cfg).map(|_| ()));
    }
    note(super::make_dir(&cfg.ram_dir).and_then(|()| checks::memory(spec, &cfg.ram_dir)));
    let record = ShadowRecord::plan(spec, cfg, vm, 0);
    note(disks::check(&record.disks, cfg));
    found
}

/// QEMU's own list: a machine type that it lacks would only show when the shadow starts.
fn machine(binary: &Path, spec: &ShadowSpec) -> Result<(), Refusal> {
    let local = |e: String| Refusal::new(RefusalCode::Local, format!("{} -machine help: {e}", binary.display()));
    let out = Command::new(binary)
        .args(["-machine", "help"])
        .output()
        .map_err(|e| local(e.to_string()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    match has_machine(&text, &spec.machine) {
        true => Ok(()),
        false => {
            let version = Command::new(binary)
                .arg("--version")
                .output()
                .map_err(|e| local(e.to_string()))?;
            let version = String::from_utf8_lossy(&version.stdout)
                .lines()
                .next()
                .unwrap_or_default()
                .to_owned();
            let detail = format!(
                "no machine type {} in {} ({version}); install the primary's QEMU or a newer one here, or start the VM with an older machine type",
                spec.machine,
                binary.display()
            );
            Err(Refusal::new(RefusalCode::TargetLacks, detail))
        }
    }
}

fn has_machine(help: &str, wanted: &str) -> bool {
    help.lines().any(|l| l.split_ascii_whitespace().next() == Some(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_types_are_found_by_their_whole_name() {
        let help = "Supported machines are:\npc                   Standard PC (alias of pc-i440fx-10.0)\npc-q35-10.0          Standard PC\n";
        assert!(has_machine(help, "pc-q35-10.0"));
        assert!(!has_machine(help, "pc-q35-10"));
        assert!(!has_machine(help, "pc-q35-10.1"));
    }
}
