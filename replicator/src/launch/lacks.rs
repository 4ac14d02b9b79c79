//! All that this host lacks for a shadow, asked without starting one: the same checks as at the start, and not only the first.

use std::path::Path;
use std::process::Command;

use umbra_api::VmId;
use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::ShadowSpec;

use super::{LaunchConfig, ShadowRecord, checks, command, disks};
use crate::resume::held;

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
    for (n, nic) in spec.nics.iter().enumerate() {
        note(checks::bridge(n, nic, cfg).map(|_| ()));
    }
    note(
        super::make_dir(&cfg.ram_dir)
            .and_then(|()| checks::memory(spec, &cfg.ram_dir, held::bytes_of(&cfg.ram_dir, vm))),
    );
    let record = ShadowRecord::plan(spec, cfg, vm, 0);
    note(disks::check(&record.disks, cfg));
    found
}

/// QEMU's own list: a machine type that it lacks would only show when the shadow starts.
fn machine(binary: &Path, spec: &ShadowSpec) -> Result<(), Refusal> {
    if has_machine(&output(binary, &["-machine", "help"])?, &spec.machine) {
        return Ok(());
    }
    let version = output(binary, &["--version"])?;
    let detail = format!(
        "no machine type {} in {} ({}); install the primary's QEMU or a newer one here, or start the VM with an older machine type",
        spec.machine,
        binary.display(),
        version.lines().next().unwrap_or_default()
    );
    Err(Refusal::new(RefusalCode::TargetLacks, detail))
}

/// What a program says. One that fails (a library that is missing) has said nothing that counts.
fn output(binary: &Path, args: &[&str]) -> Result<String, Refusal> {
    let failed = |e: &dyn std::fmt::Display| {
        let what = format!("{} {}: {e}", binary.display(), args.join(" "));
        Refusal::new(RefusalCode::Local, what)
    };
    let out = Command::new(binary).args(args).output().map_err(|e| failed(&e))?;
    if !out.status.success() {
        return Err(failed(&format!(
            "{}: {}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        )));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn has_machine(help: &str, wanted: &str) -> bool {
    help.lines().any(|l| l.split_ascii_whitespace().next() == Some(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_is_told_in_its_words() {
        assert_eq!(output(Path::new("/bin/sh"), &["-c", "echo a"]).unwrap(), "a\n");
        let refusal = output(Path::new("/bin/sh"), &["-c", "echo no libfoo >&2; exit 127"]).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::Local);
        assert!(refusal.detail.ends_with("exit status: 127: no libfoo"), "{refusal}");
    }

    #[test]
    fn machine_types_are_found_by_their_whole_name() {
        let help = "Supported machines are:\npc                   Standard PC (alias of pc-i440fx-10.0)\npc-q35-10.0          Standard PC\n";
        assert!(has_machine(help, "pc-q35-10.0"));
        assert!(!has_machine(help, "pc-q35-10"));
        assert!(!has_machine(help, "pc-q35-10.1"));
    }
}
