//! From what the operator typed to a VM: a UUID, or a name that only one VM has.

use umbra_api::VmId;
use umbra_api::view::VmSummary;

use crate::error::Error;

/// As many names are offered for a mistyped one.
const OFFERS: usize = 3;

/// The one VM with this UUID or name.
pub fn find<'a>(wanted: &str, vms: &'a [VmSummary]) -> Result<&'a VmSummary, Error> {
    if let Ok(id) = wanted.parse::<VmId>()
        && let Some(vm) = vms.iter().find(|v| v.vm == id)
    {
        return Ok(vm);
    }
    let named: Vec<&VmSummary> = vms.iter().filter(|v| v.name == wanted).collect();
    match named.as_slice() {
        [one] => Ok(one),
        [] => Err(Error::NoSuchVm {
            name: wanted.to_owned(),
            near: near(wanted, vms),
            known: vms.len(),
        }),
        many => Err(Error::Ambiguous {
            name: wanted.to_owned(),
            count: many.len(),
            ids: many.iter().map(|v| format!("{} on {}", v.vm, v.host)).collect(),
        }),
    }
}

/// Names that a slip of the fingers away, best first. Case is forgiven, since names differ by it rarely.
fn near(wanted: &str, vms: &[VmSummary]) -> Vec<String> {
    let lower = wanted.to_lowercase();
    let allowed = (lower.chars().count() / 3).max(1);
    let mut scored: Vec<(usize, &str)> = vms
        .iter()
        .map(|v| (distance(&lower, &v.name.to_lowercase(), allowed), v.name.as_str()))
        .filter(|(d, _)| *d <= allowed)
        .collect();
    scored.sort_unstable();
    scored.dedup();
    scored
        .into_iter()
        .take(OFFERS)
        .map(|(_, name)| name.to_owned())
        .collect()
}

/// Insertions, deletions, replacements and swaps of neighbours; a name that begins with what was typed counts as near.
fn distance(typed: &str, name: &str, allowed: usize) -> usize {
    if typed.chars().count() >= 3 && name.starts_with(typed) {
        return allowed.min(1);
    }
    strsim::osa_distance(typed, name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample::summary;

    fn three() -> Vec<VmSummary> {
        vec![summary(1, "web"), summary(2, "db-primary"), summary(3, "neighbour")]
    }

    #[test]
    fn by_name_and_by_uuid() {
        let vms = three();
        assert_eq!(find("web", &vms).unwrap().vm, vms[0].vm);
        assert_eq!(find(&vms[1].vm.to_string(), &vms).unwrap().name, "db-primary");
    }

    #[test]
    fn slips_are_answered_with_the_name_that_was_meant() {
        for (typed, meant) in [
            ("wbe", "web"),
            ("WEB", "web"),
            ("neighbor", "neighbour"),
            ("db-prim", "db-primary"),
        ] {
            match find(typed, &three()) {
                Err(Error::NoSuchVm { near, .. }) => assert_eq!(near, [meant], "{typed}"),
                other => panic!("{typed}: {other:?}"),
            }
        }
        assert!(matches!(find("mail", &three()), Err(Error::NoSuchVm { near, .. }) if near.is_empty()));
    }

    #[test]
    fn a_name_that_two_vms_have_is_not_guessed() {
        let vms = vec![summary(1, "web"), summary(2, "web")];
        let e = find("web", &vms).unwrap_err();
        assert_eq!(e.exit_code(), 2);
        assert!(e.to_string().contains(&vms[1].vm.to_string()));
        assert_eq!(find(&vms[1].vm.to_string(), &vms).unwrap().vm, vms[1].vm);
    }
}
