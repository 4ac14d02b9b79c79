//! Embeds the kernel programs that `cargo xtask build` made. They are not built from here: every profile and feature set would build
//! `core` anew for them.

use std::path::{Path, PathBuf};
use std::{env, fs};

const OBJECT: &str = "ebpf/umbra-agent.bpf.o";

fn main() {
    println!("cargo:rerun-if-env-changed=UMBRA_EBPF");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let embedded = out.join("umbra-agent.bpf.o");
    if env::var_os("UMBRA_EBPF").is_some_and(|v| v == "skip") {
        // An agent with an empty object says so at its start and ends.
        fs::write(&embedded, b"").expect("OUT_DIR can be written");
        return;
    }
    match target_dirs(&out).find(|d| d.join(OBJECT).is_file()) {
        Some(target) => {
            let object = target.join(OBJECT);
            println!("cargo:rerun-if-changed={}", object.display());
            fs::copy(&object, &embedded).expect("the object can be copied to OUT_DIR");
        }
        None => {
            println!(
                "cargo:error=target/{OBJECT} is missing: run `cargo xtask build`, which builds the kernel programs once \
                 (or set UMBRA_EBPF=skip for an agent that cannot run)"
            );
            std::process::exit(1);
        }
    }
}

/// The folders above OUT_DIR: one of them is the target folder, how far up depends on profile and `--target`.
fn target_dirs(out: &Path) -> impl Iterator<Item = &Path> {
    out.ancestors().skip(1).take(7)
}
