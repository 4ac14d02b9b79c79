//! Where the members of the kernel's structs lie, from the BTF that the kernel carries. Rust has no CO-RE yet: the offsets are read at start
//! and handed to the programs as constants, so one object serves every kernel with BTF.

use std::path::Path;

use btf_rs::{Btf, BtfType, Type};
use umbra_agent_ebpf::{Group, offsets};

#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    #[error("{0}")]
    Read(String),
    #[error("struct {name} has no member {member}")]
    NoMember { name: String, member: String },
}

/// Values of the programs' globals, and the groups that this kernel can't serve.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Globals {
    pub values: Vec<(&'static str, u64)>,
    pub missing: Vec<(Group, String)>,
}

pub fn read(vmlinux: &Path) -> Result<Globals, BtfError> {
    let btf = Btf::from_file(vmlinux).map_err(|e| BtfError::Read(format!("{}: {e}", vmlinux.display())))?;
    let mut globals = Globals::default();
    for (group, global, name, member) in offsets::ALL {
        // Called so since Linux 5.14.
        let older = if *member == "__state" { "state" } else { member };
        match offset(&btf, name, member).or_else(|e| offset(&btf, name, older).map_err(|_| e)) {
            Ok(bytes) => globals.values.push((global, bytes)),
            Err(e) => {
                globals.values.push((global, 0));
                globals.missing.push((*group, e.to_string()));
            }
        }
    }
    let notifiers = offset(&btf, "task_struct", "preempt_notifiers.first").unwrap_or(offsets::ABSENT);
    globals.values.push((offsets::TASK_NOTIFIERS, notifiers));
    // The first parameter of a tracepoint's type is its private data.
    let arguments = parameters(&btf, "btf_trace_sched_switch").map_or(0, |n| n.saturating_sub(1));
    globals
        .values
        .push((offsets::SWITCH_HAS_STATE, u64::from(arguments >= 4)));
    Ok(globals)
}

/// Offset in bytes of `member` (`se.sum_exec_runtime`) in struct `name`, through anonymous members too.
fn offset(btf: &Btf, name: &str, member: &str) -> Result<u64, BtfError> {
    let missing = || BtfError::NoMember {
        name: name.to_owned(),
        member: member.to_owned(),
    };
    let types = btf.resolve_types_by_name(name).map_err(|_| missing())?;
    let mut at = types
        .into_iter()
        .find(|t| matches!(t, Type::Struct(_)))
        .ok_or_else(missing)?;
    let mut bits = 0;
    for part in member.split('.') {
        let (offset, inner) = find(btf, &at, part, 0).ok_or_else(missing)?;
        bits += u64::from(offset);
        at = inner;
    }
    match bits % 8 {
        0 => Ok(bits / 8),
        _ => Err(missing()),
    }
}

/// Anonymous structs and unions nest a few levels in the kernel; a bound keeps hostile BTF from recursing for ever.
const DEPTH_MAX: u32 = 16;

fn find(btf: &Btf, within: &Type, wanted: &str, depth: u32) -> Option<(u32, Type)> {
    let (Type::Struct(s) | Type::Union(s)) = within else {
        return None;
    };
    if depth > DEPTH_MAX {
        return None;
    }
    s.members.iter().find_map(|m| {
        let inner = plain(btf, m)?;
        match btf.resolve_name(m).ok()?.as_str() {
            name if name == wanted => Some((m.bit_offset(), inner)),
            "" => find(btf, &inner, wanted, depth + 1).map(|(o, t)| (m.bit_offset() + o, t)),
            _ => None,
        }
    })
}

/// The type that something has, without typedefs and qualifiers.
fn plain(btf: &Btf, of: &dyn BtfType) -> Option<Type> {
    let mut t = btf.resolve_chained_type(of).ok()?;
    for _ in 0..DEPTH_MAX {
        t = match &t {
            Type::Typedef(x) => btf.resolve_chained_type(x).ok()?,
            Type::Const(x) | Type::Volatile(x) => btf.resolve_chained_type(x).ok()?,
            Type::TypeTag(x) => btf.resolve_chained_type(x).ok()?,
            _ => return Some(t),
        };
    }
    None
}

/// How many parameters the function has that typedef `name` points to.
fn parameters(btf: &Btf, name: &str) -> Option<usize> {
    let typedef = btf
        .resolve_types_by_name(name)
        .ok()?
        .into_iter()
        .find(|t| matches!(t, Type::Typedef(_)))?;
    let Type::Ptr(pointer) = plain(btf, typedef.as_btf_type()?)? else {
        return None;
    };
    match plain(btf, &pointer)? {
        Type::FuncProto(f) => Some(f.parameters.len()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_btf_is_an_error() {
        let f = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(read(f.path()), Err(BtfError::Read(_))));
        std::fs::write(f.path(), [0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 255, 255]).unwrap();
        assert!(matches!(read(f.path()), Err(BtfError::Read(_))));
        assert!(
            read(Path::new("/nonexistent"))
                .unwrap_err()
                .to_string()
                .contains("/nonexistent")
        );
    }

    #[test]
    fn this_kernel_has_every_member() {
        let vmlinux = Path::new("/sys/kernel/btf/vmlinux");
        if !vmlinux.exists() {
            eprintln!("SKIPPED: this kernel has no BTF");
            return;
        }
        let g = read(vmlinux).unwrap();
        assert_eq!(g.missing, []);
        assert_eq!(g.values.len(), offsets::ALL.len() + 2);
        let zero = |name: &str| g.values.iter().any(|(n, v)| *n == name && *v == 0);
        assert!(!zero("TASK_TGID") && !zero("SKB_DEV") && !zero("TASK_COMM"));
    }
}
