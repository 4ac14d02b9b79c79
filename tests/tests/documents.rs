//! The documents against the code: links lead somewhere, example configurations pass their daemons' `--check`, command lines are
//! understood, and the tests that invariants name are there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use umbra_tests::lab::daemons::Binaries;

const DOCUMENTS: [&str; 7] = [
    "README.md",
    "ARCHITECTURE.md",
    "SPECIFICATION.md",
    "FAULTS.md",
    "VERSIONS.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

/// The fenced blocks of one language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let fence = format!("\n```{language}\n");
    let starts = text.match_indices(&fence).map(|(at, _)| at + fence.len());
    starts
        .filter_map(|at| text[at..].split("```").next())
        .map(str::to_owned)
        .collect()
}

/// The commands of all shell blocks, without their comments.
fn commands(text: &str) -> Vec<Vec<String>> {
    let lines = blocks(text, "sh").join("\n");
    let words = lines
        .lines()
        .map(|l| l.split(" #").next().unwrap_or_default().split_whitespace());
    words
        .map(|w| w.map(str::to_owned).collect())
        .filter(|w: &Vec<String>| !w.is_empty())
        .collect()
}

fn words(o: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&o.stdout),
        String::from_utf8_lossy(&o.stderr)
    )
}

#[test]
fn links_lead_somewhere() {
    for file in DOCUMENTS {
        let text = read(file);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("https://") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { file } else { path };
            assert!(root().join(target).exists(), "{file}: {link} does not exist");
            let heading = |l: &str| {
                l.starts_with('#') && l.trim_start_matches('#').trim().to_lowercase().replace(' ', "-") == anchor
            };
            assert!(
                anchor.is_empty() || read(target).lines().any(heading),
                "{file}: no heading for {link}"
            );
        }
    }
}

#[test]
fn example_configurations_pass_their_own_check() {
    let binaries = Binaries::find(&["umbra", "umbra-agent", "umbra-replicator", "umbra-rps"]).unwrap();
    let dir = std::env::temp_dir().join(format!("umbra-documents-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    // The certificates that the documents' own commands make.
    let tls = dir.join("tls");
    for arguments in [&["init"][..], &["issue", "kvm-a"]] {
        let mut words: Vec<&str> = arguments.to_vec();
        let path = tls.display().to_string();
        words.insert(1, &path);
        let out = Command::new(binaries.path("umbra"))
            .arg("pki")
            .args(words)
            .output()
            .unwrap();
        assert!(out.status.success(), "{arguments:?}: {}", self::words(&out));
    }
    let mut seen = BTreeSet::new();
    for block in blocks(&read("README.md"), "toml") {
        // The first line is '# umbra-agent.toml'.
        let name = block
            .lines()
            .next()
            .and_then(|l| l.strip_prefix("# "))
            .expect("a block without a file name");
        let daemon = name.strip_suffix(".toml").expect("no .toml");
        let file = dir.join(name);
        std::fs::write(&file, block.replace("/etc/umbra/tls", &tls.display().to_string())).unwrap();
        let out = Command::new(binaries.path(daemon))
            .arg("--config")
            .arg(&file)
            .arg("--check")
            .output()
            .unwrap();
        assert!(out.status.success(), "{name}: {}", words(&out));
        seen.insert(daemon.to_owned());
    }
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(seen.len(), 3, "{seen:?}");
}

#[test]
fn command_lines_are_understood() {
    let umbra = Binaries::find(&["umbra"]).unwrap().path("umbra");
    let dir = std::env::temp_dir().join(format!("umbra-commands-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let mut tried = 0;
    for command in DOCUMENTS.iter().flat_map(|f| commands(&read(f))) {
        match command.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            // These ask nobody.
            ["umbra", "pki", arguments @ ..] => {
                let run = Command::new(&umbra)
                    .arg("pki")
                    .args(arguments)
                    .current_dir(&dir)
                    .output();
                let out = run.unwrap();
                assert!(out.status.success(), "{command:?}: {}", words(&out));
                tried += 1;
            }
            ["umbra", arguments @ ..] => {
                // Nobody listens there: 5 says that the command line was fine.
                let nowhere = |a: &&str| match a.starts_with("http://") {
                    true => "http://127.0.0.1:1".to_owned(),
                    false => (*a).to_owned(),
                };
                let out = Command::new(&umbra)
                    .args(arguments.iter().map(nowhere))
                    .env("UMBRA_RPS", "http://127.0.0.1:1")
                    .output()
                    .unwrap();
                assert_eq!(out.status.code(), Some(5), "{command:?}: {}", words(&out));
                tried += 1;
            }
            ["cargo", "xtask", name, ..] => {
                // One file a command.
                assert!(
                    root().join(format!("xtask/src/{name}.rs")).exists(),
                    "{command:?}: there is no such command"
                );
            }
            _ => {}
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(tried >= 10, "only {tried} commands were found");
}

#[test]
fn the_crash_matrix_is_the_one_that_is_played() {
    let (text, table) = (read("FAULTS.md"), umbra_tests::matrix::markdown());
    assert!(
        text.contains(&table),
        "FAULTS.md lacks the table that `cargo xtask faults` prints:\n{table}"
    );
}

/// `| `name` | what holds | `file.rs`: `test`, `test`; `file.rs`: … |`
#[test]
fn invariants_name_tests_that_exist() {
    let text = read("ARCHITECTURE.md");
    let section = text
        .split("\n## Invariants\n")
        .nth(1)
        .and_then(|s| s.split("\n## ").next())
        .unwrap();
    let mut tests = 0;
    for row in section.lines().filter(|l| l.starts_with("| `")) {
        let checks = row.split('|').nth(3).expect("three columns");
        let mut source = None;
        for span in checks.split('`').skip(1).step_by(2) {
            if span.ends_with(".rs") {
                source = Some((span, read(span)));
                continue;
            }
            let (file, code) = source.as_ref().expect("a test's file comes first");
            assert!(
                code.contains(&format!("fn {span}(")),
                "{row}: {file} has no test {span}"
            );
            tests += 1;
        }
        assert!(source.is_some(), "{row}: no test");
    }
    assert!(tests >= 10, "only {tests} tests are named");
}
