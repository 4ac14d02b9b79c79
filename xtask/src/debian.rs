//! Debian's packages: what is installed, where it comes from, and getting what is not there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;

/// One suite of one archive, as apt is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub uri: String,
    pub suite: String,
    pub signed_by: Option<String>,
}

/// Every enabled binary source that apt reads.
pub fn sources() -> Vec<Source> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(folder) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(folder.flatten().map(|entry| entry.path()));
    }
    let mut all = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|e| e.to_str()) {
            Some("list") => all.extend(one_line_sources(&text)),
            Some("sources") => all.extend(deb822_sources(&text)),
            _ => {}
        }
    }
    all
}

/// `deb [signed-by=…] URI SUITE components`
fn one_line_sources(text: &str) -> Vec<Source> {
    let mut found = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb ") else {
            continue;
        };
        let (options, rest) = match rest.trim().strip_prefix('[').and_then(|r| r.split_once(']')) {
            Some((options, rest)) => (options, rest),
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else {
            continue;
        };
        let signed_by = options
            .split_whitespace()
            .find_map(|o| o.strip_prefix("signed-by="))
            .map(str::to_string);
        found.push(Source {
            uri: uri.into(),
            suite: suite.into(),
            signed_by,
        });
    }
    found
}

/// Stanzas of `Key: value` lines, empty lines between them.
fn deb822_sources(text: &str) -> Vec<Source> {
    let text: String = text
        .lines()
        .filter(|l| !l.starts_with('#'))
        .map(|l| format!("{l}\n"))
        .collect();
    let mut found = Vec::new();
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            let mut pairs = stanza.lines().filter_map(|l| l.split_once(':'));
            pairs
                .find(|(key, _)| key.trim().eq_ignore_ascii_case(name))
                .map(|(_, value)| value.trim().to_string())
        };
        let enabled = field("Enabled").is_none_or(|value| value != "no");
        if !enabled || field("Types").is_none_or(|types| !types.split_whitespace().any(|t| t == "deb")) {
            continue;
        }
        let (uris, suites) = (field("URIs").unwrap_or_default(), field("Suites").unwrap_or_default());
        for uri in uris.split_whitespace() {
            for suite in suites.split_whitespace() {
                found.push(Source {
                    uri: uri.into(),
                    suite: suite.into(),
                    signed_by: field("Signed-By"),
                });
            }
        }
    }
    found
}

/// Debian's name of the release, `bookworm` say; nothing on other systems.
pub fn codename() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let field = |name: &str| {
        let value = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='))?;
        Some(value.trim_matches('"').to_string())
    };
    (field("ID")? == "debian").then(|| field("VERSION_CODENAME"))?
}

/// The version of an installed package.
pub fn installed(package: &str) -> Option<String> {
    let query =
        run::output(Command::new("dpkg-query").args(["-W", "-f", "${db:Status-Status} ${Version}", package])).ok()?;
    query
        .strip_prefix("installed ")
        .map(|version| version.trim().to_string())
}

/// Installed, and not older than `least` (any version if that is empty).
pub fn has(package: &str, least: &str) -> bool {
    installed(package).is_some_and(|version| least.is_empty() || at_least(&version, least))
}

fn at_least(version: &str, least: &str) -> bool {
    run::succeeds(Command::new("dpkg").args(["--compare-versions", version, "ge", least]))
}

/// apt, which reads its lists anew at most once a run, and only when something is to be fetched.
#[derive(Default)]
pub struct Apt {
    updated: bool,
}

impl Apt {
    pub fn refresh(&mut self) -> Result<()> {
        if !self.updated {
            // A foreign source that cannot be reached must not stop us: what we need will be found missing by name.
            if let Err(error) = run::run(apt_get().args(["update", "-q"])) {
                println!("    {error}; going on with the lists that are there");
            }
            self.updated = true;
        }
        Ok(())
    }

    pub fn install(&mut self, packages: &[&str], release: Option<&str>) -> Result<()> {
        if packages.is_empty() {
            return Ok(());
        }
        self.refresh()?;
        let mut command = apt_get();
        command.args(["install", "-y", "-q", "--no-install-recommends"]);
        if let Some(release) = release {
            command.args(["-t", release]);
        }
        run::run(command.args(packages))
    }

    /// Fetches a package's file into `folder` without installing it.
    pub fn download(&mut self, package: &str, folder: &Path) -> Result<()> {
        run::run(apt_get().args(["download", "-q", package]).current_dir(folder))
    }

    /// The first package that `meta` stands for.
    pub fn depends(&mut self, meta: &str) -> Result<String> {
        let text = run::output(Command::new("apt-cache").args(["depends", "--no-recommends", meta]))?;
        let first = text.lines().find_map(|line| line.trim().strip_prefix("Depends:"));
        Ok(first
            .with_context(|| format!("{meta} depends on nothing"))?
            .trim()
            .to_string())
    }
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    // Another apt at work (unattended upgrades) is waited for. The sandbox user could not write into root's cache folder.
    command.args(["-o", "DPkg::Lock::Timeout=300", "-o", "APT::Sandbox::User=root"]);
    command
}

/// Writes a source for `suite` beside those that are there, with the archive and key of the one for `like`.
pub fn add_source(file: &str, why: &str, archive: &Source, suite: &str) -> Result<()> {
    let key = archive
        .signed_by
        .as_deref()
        .unwrap_or("/usr/share/keyrings/debian-archive-keyring.gpg");
    let text = format!(
        "# Written by `cargo xtask setup` of Umbra: {why}\nTypes: deb\nURIs: {}\nSuites: {suite}\nComponents: main\nSigned-By: {key}\n",
        archive.uri
    );
    let path = Path::new("/etc/apt/sources.list.d").join(file);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The archive that the release itself comes from, or Debian's own where apt is configured in a way that we can't read.
pub fn archive_of(sources: &[Source], codename: &str) -> Source {
    sources
        .iter()
        .find(|source| source.suite == codename)
        .cloned()
        .unwrap_or_else(|| Source {
            uri: "http://deb.debian.org/debian".into(),
            suite: codename.into(),
            signed_by: None,
        })
}

pub fn require_apt() -> Result<()> {
    if !run::succeeds(Command::new("apt-get").arg("--version")) {
        bail!(
            "there is no apt-get here: setup knows Debian 12 and newer. Elsewhere install by hand what `cargo xtask setup --print` lists"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_formats() {
        let list = "# deb http://no/ no main\ndeb http://a/debian bookworm main contrib # c\ndeb [arch=amd64 signed-by=/k] http://b x y\n\
                    deb-src http://a/debian bookworm main\ndeb\n";
        let found = one_line_sources(list);
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[0].uri.as_str(), found[0].suite.as_str()),
            ("http://a/debian", "bookworm")
        );
        assert_eq!(found[1].signed_by.as_deref(), Some("/k"));

        let deb822 = "Types: deb deb-src\n# note\nURIs: http://a/debian\nSuites: bookworm bookworm-updates\nSigned-By: /k\n\n\
                      Types: deb\nEnabled: no\nURIs: http://n\nSuites: n\n\nTypes: deb-src\nURIs: http://s\nSuites: s\n";
        let found = deb822_sources(deb822);
        assert_eq!(
            found.iter().map(|s| s.suite.as_str()).collect::<Vec<_>>(),
            ["bookworm", "bookworm-updates"]
        );
        assert_eq!(archive_of(&found, "bookworm").signed_by.as_deref(), Some("/k"));
        assert_eq!(archive_of(&[], "trixie").uri, "http://deb.debian.org/debian");
    }
}
