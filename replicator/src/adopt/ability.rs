//! What the QEMU at hand can, asked of itself: versions differ, and distributions move changes between them. VERSIONS.md has the
//! table.

use serde_json::{Map, Value};
use umbra_api::order::Refusal;

use super::derive::unsupported;
use super::facts::Facts;
use super::options::Opts;
use crate::qmp::{Client, QmpError, Version};

/// A copy is held open with these.
pub const NEEDED: [&str; 3] = ["events", "return-path", "switchover-ack"];

/// The first whose emulator keeps track of the guest's writes while a migration runs: QEMU's commit 03bfc2188f.
const TCG_KEEPS_TRACK: Version = Version {
    major: 9,
    minor: 0,
    micro: 0,
};

/// Properties without which the stream has no ends of sections, or does not begin as one does that can be understood.
const STREAM: [&str; 2] = ["send-section-footer", "send-configuration"];

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ability {
    /// Capabilities that a migration can have, and whether it has them now.
    pub capabilities: Vec<(String, bool)>,
    /// It can be told how fast the last pass is, instead of going by what it measured.
    pub told_bandwidth: bool,
    /// The guest's code is emulated. Asked only where that matters.
    pub emulates: bool,
    /// What QEMU encrypts its migrations with.
    pub tls_creds: Option<String>,
}

impl Ability {
    pub fn ask(qmp: &Client) -> Result<Self, QmpError> {
        let parameters = parameters(qmp)?;
        let tls = parameters.get("tls-creds").and_then(Value::as_str);
        Ok(Self {
            capabilities: capabilities(qmp)?,
            told_bandwidth: told_bandwidth(&parameters),
            emulates: qmp.version() < TCG_KEEPS_TRACK && !has_kvm(qmp)?,
            tls_creds: tls.filter(|t| !t.is_empty()).map(str::to_owned),
        })
    }

    fn lacks(&self, name: &str) -> bool {
        !self.capabilities.iter().any(|(c, _)| c == name)
    }
}

/// All capabilities of this QEMU, and which are on.
pub fn capabilities(qmp: &Client) -> Result<Vec<(String, bool)>, QmpError> {
    let answer = qmp.execute("query-migrate-capabilities", Value::Null)?;
    let all = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    let one = |c: &Value| Some((c["capability"].as_str()?.to_owned(), c["state"].as_bool()?));
    Ok(all.iter().filter_map(one).collect())
}

/// Those of `wanted` that this QEMU does not know.
pub fn missing(qmp: &Client, wanted: &[&str]) -> Result<Vec<String>, QmpError> {
    let known = capabilities(qmp)?;
    let missing = wanted.iter().filter(|w| !known.iter().any(|(c, _)| c == *w));
    Ok(missing.map(|w| (*w).to_owned()).collect())
}

pub fn parameters(qmp: &Client) -> Result<Map<String, Value>, QmpError> {
    match qmp.execute("query-migrate-parameters", Value::Null)? {
        Value::Object(map) => Ok(map),
        _ => Err(QmpError::Answer {
            command: "query-migrate-parameters".into(),
            what: "parameters",
        }),
    }
}

/// Whether `migrate-set-parameters` takes `avail-switchover-bandwidth`: QEMU lists each parameter that it has.
pub fn told_bandwidth(parameters: &Map<String, Value>) -> bool {
    parameters.contains_key("avail-switchover-bandwidth")
}

fn has_kvm(qmp: &Client) -> Result<bool, QmpError> {
    let answer = qmp.execute("query-kvm", Value::Null)?;
    answer["enabled"].as_bool().ok_or(QmpError::Answer {
        command: "query-kvm".into(),
        what: "whether it is enabled",
    })
}

fn is_on(value: &str) -> bool {
    matches!(value, "on" | "yes" | "true" | "y")
}

/// What stands in the way, and what the operator should know.
pub(super) fn check(args: &[String], facts: &Facts) -> (Vec<Refusal>, Vec<String>) {
    let (ability, version) = (&facts.ability, facts.version);
    let mut refusals = Vec::new();
    let mut refuse = |why: String| refusals.push(unsupported(format!("QEMU {version}: {why}")));
    let lacking: Vec<&str> = NEEDED.into_iter().filter(|n| ability.lacks(n)).collect();
    if !lacking.is_empty() {
        refuse(format!(
            "its migrations have no {}, which a copy is held open with; start the VM with a QEMU that has it",
            lacking.join(", ")
        ));
    }
    if ability.emulates {
        refuse(format!(
            "without KVM it loses track of what the guest writes while a migration runs, and the copy would be damaged; \
             start the VM with -accel kvm, or with QEMU {TCG_KEEPS_TRACK} or newer"
        ));
    }
    if let Some(creds) = &ability.tls_creds {
        refuse(format!(
            "its migrations are encrypted by {creds}, also the one to Umbra, which encrypts by itself; set the migration \
             parameter tls-creds to nothing"
        ));
    }
    if let Some(how) = unmarked(args, &facts.machine) {
        refuse(format!(
            "{how} leaves out of a migration's stream what tells where its parts end; start the VM without it"
        ));
    }
    let mut warnings = Vec::new();
    if !ability.told_bandwidth {
        warnings.push(format!(
            "QEMU {version} can't be told how fast a switchover's last pass is, as 8.2 can, and guesses: the guest may stand \
             still for longer"
        ));
    }
    (refusals, warnings)
}

/// What has the stream lack its marks: a property, or a machine type of before 2.4, which sets them.
fn unmarked(args: &[String], machine: &str) -> Option<String> {
    let off = |name: &&str| global(args, name).is_some_and(|v| !is_on(&v));
    if let Some(name) = STREAM.into_iter().find(|n| off(n)) {
        return Some(format!("migration.{name}=off"));
    }
    let machines = values(args, &["M", "machine"]).filter_map(|v| Opts::parse(v, Some("type")).ok());
    let last = machines.filter_map(|o| o.get("suppress-vmdesc")).last();
    if last.is_some_and(|v| is_on(&v)) {
        return Some("suppress-vmdesc=on".into());
    }
    let (_, version) = machine.strip_prefix("pc-")?.split_once('-')?;
    let (major, minor) = version.split_once('.')?;
    let old = (major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?) < (2, 4);
    old.then(|| format!("the machine type {machine}"))
}

/// The value that the command line gives a property of all migrations.
fn global(args: &[String], property: &str) -> Option<String> {
    let value = |text: &String| match text.strip_prefix("migration.") {
        Some(short) => {
            let (key, value) = short.split_once('=')?;
            (key == property).then(|| value.to_owned())
        }
        None => {
            let opts = Opts::parse(text, None).ok()?;
            let same = opts.get("driver")? == "migration" && opts.get("property")? == property;
            opts.get("value").filter(|_| same)
        }
    };
    values(args, &["global"]).filter_map(value).last()
}

fn values<'a>(args: &'a [String], options: &'a [&str]) -> impl Iterator<Item = &'a String> {
    let named = |a: &String| options.contains(&a.trim_start_matches('-')) && a.starts_with('-');
    args.windows(2).filter(move |w| named(&w[0])).map(|w| &w[1])
}

#[cfg(test)]
#[path = "ability_tests.rs"]
mod tests;
