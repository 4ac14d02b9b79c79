//! The host's CPU, for VMs that see it (`-cpu host`): such a guest can only run on where the CPU is the very same.

use std::collections::BTreeSet;

use umbra_api::wire::control::HostCpu;

/// Flags that a host's kernel or firmware adds, and that no guest sees.
const HOSTS_OWN: [&str; 6] = [
    "aperfmperf",
    "constant_tsc",
    "nonstop_tsc",
    "cpuid",
    "rep_good",
    "tsc_known_freq",
];

/// This host's, of its first core. `None` if /proc does not say.
pub fn this() -> Option<HostCpu> {
    parse(&std::fs::read_to_string("/proc/cpuinfo").ok()?)
}

fn parse(cpuinfo: &str) -> Option<HostCpu> {
    let field = |name: &str| {
        let line = cpuinfo
            .lines()
            .find(|l| l.split(':').next().is_some_and(|k| k.trim() == name))?;
        line.split_once(':').map(|(_, v)| v.trim().to_owned())
    };
    let flags: BTreeSet<&str> = BTreeSet::new();
    let text = field("flags")?;
    let flags: BTreeSet<&str> = flags
        .into_iter()
        .chain(text.split_ascii_whitespace())
        .filter(|f| !HOSTS_OWN.contains(f))
        .collect();
    Some(HostCpu {
        vendor: field("vendor_id")?,
        family: field("cpu family")?,
        model: field("model")?,
        name: field("model name").unwrap_or_default(),
        flags: flags.into_iter().collect::<Vec<_>>().join(" "),
    })
}

/// How another CPU differs from this one, in words; `None` if a guest can't tell them apart.
pub fn difference(theirs: &HostCpu, here: &HostCpu) -> Option<String> {
    let kind = |c: &HostCpu| format!("{} (family {}, model {})", c.name, c.family, c.model);
    if (&theirs.vendor, &theirs.family, &theirs.model) != (&here.vendor, &here.family, &here.model) {
        return Some(format!("there it is {}, here {}", kind(theirs), kind(here)));
    }
    let set = |c: &HostCpu| c.flags.split(' ').map(str::to_owned).collect::<BTreeSet<_>>();
    let (t, h) = (set(theirs), set(here));
    let words = |s: Vec<&String>| s.iter().map(|f| f.as_str()).take(8).collect::<Vec<_>>().join(" ");
    let (lost, new) = (words(t.difference(&h).collect()), words(h.difference(&t).collect()));
    match (lost.as_str(), new.as_str()) {
        ("", "") => None,
        (lost, "") => Some(format!("the same model, but here without {lost}")),
        ("", new) => Some(format!("the same model, but only here with {new}")),
        (lost, new) => Some(format!("the same model, but here without {lost}, and with {new}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Xeon\nflags\t\t: fpu vme constant_tsc avx2\n\nprocessor\t: 1\n";

    #[test]
    fn cpus_are_the_same_or_their_difference_is_named() {
        let a = parse(INFO).unwrap();
        assert_eq!((a.model.as_str(), a.flags.as_str()), ("85", "avx2 fpu vme"));
        assert_eq!(difference(&a, &a), None);
        let b = parse(&INFO.replace("avx2", "avx512f")).unwrap();
        let words = difference(&a, &b).unwrap();
        assert!(
            words.contains("without avx2") && words.contains("with avx512f"),
            "{words}"
        );
        let c = parse(&INFO.replace(": 85", ": 106")).unwrap();
        assert!(difference(&a, &c).unwrap().contains("model 106"));
        assert_eq!(parse("processor: 0\n"), None);
    }
}
