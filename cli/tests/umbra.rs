//! The real binary against a small RPS: every command, its JSON, and every exit code.

mod common;

use std::process::{Command, Stdio};

use common::{FakeRps, NEIGHBOUR, Run, WEB, umbra};
use umbra_api::problem::Problem;
use umbra_daemon::http::{Reply, Request, reply, status};

fn ok(r: Run) -> String {
    assert_eq!((r.code, r.err.as_str()), (0, ""), "{}", r.out);
    r.out
}

/// What people read: it fits the narrowest terminal in use, and what is piped has no colours.
fn readable(r: Run) -> String {
    let r = Run {
        out: ok(r),
        code: 0,
        err: String::new(),
    };
    assert!(
        r.out.lines().all(|l| l.chars().count() <= 80),
        "wider than 80 columns:\n{}",
        r.out
    );
    assert!(!r.out.contains('\x1b'), "colours in a pipe:\n{}", r.out);
    r.out
}

#[test]
fn every_command_reads_well_in_80_columns() {
    let rps = FakeRps::start();
    let shows = |args: &[&str], what: &[&str]| {
        let out = readable(rps.umbra(args));
        what.iter()
            .for_each(|w| assert!(out.contains(w), "{args:?}: no {w:?} in\n{out}"));
    };
    shows(
        &["status"],
        &["umbra-rps 0.1.0", "acts on its decisions", "HOST", "83 %"],
    );
    shows(&["vm", "list"], &["web", "neighbour", "standby"]);
    shows(
        &["vm", "show", "web"],
        &[WEB, "tier 0 (standby)", "the first copy is complete"],
    );
    shows(
        &["explain", "web"],
        &["web: make a warm shadow on b", "91 %", "rejected  under maintenance"],
    );
    shows(&["events"], &["web", "seeding", "standby"]);
    shows(&["decisions"], &["42", "make a shadow"]);
    shows(&["mode"], &["observe: "]);
    shows(&["mode", "act"], &["act: "]);
    shows(&["shadow", "create", "web"], &["Accepted", "the planner chooses"]);
    shows(&["shadow", "create", "web", "--host", "b"], &["made on b"]);
    shows(&["shadow", "switchover", WEB], &["will switch over"]);
    shows(&["shadow", "release", "web"], &["web runs on"]);
}

#[test]
fn json_is_the_answer_as_it_came() {
    let rps = FakeRps::start();
    for (args, key) in [
        (vec!["status"], "/hosts/0/host"),
        (vec!["vm", "list"], "/0/name"),
        (vec!["vm", "show", "web"], "/epoch"),
        (vec!["explain", "web"], "/inputs/cps"),
        (vec!["events"], "/0/to"),
        (vec!["decisions"], "/0/because"),
        (vec!["mode"], "/mode"),
        (vec!["mode", "act"], "/mode"),
        (vec!["shadow", "switchover", "web"], "/action"),
    ] {
        let r = rps.umbra(&[args.as_slice(), &["--json"]].concat());
        assert_eq!((r.code, r.err.as_str()), (0, ""), "{args:?}");
        let document: serde_json::Value = serde_json::from_str(&r.out).expect("one document");
        assert!(document.pointer(key).is_some(), "{args:?}: no {key} in {document}");
    }
}

#[test]
fn names_become_ids_and_options_become_queries() {
    let rps = FakeRps::start();
    ok(rps.umbra(&[
        "events",
        "--vm",
        "web",
        "--since",
        "2025-11-25T09:00:00Z",
        "--limit",
        "7",
        "--json",
    ]));
    ok(rps.umbra(&["decisions", "--vm", WEB, "--json"]));
    ok(rps.umbra(&["shadow", "create", WEB, "--host", "b"]));
    ok(rps.umbra(&["mode", "observe"]));
    assert_eq!(
        rps.seen(),
        [
            "GET /v1/vms".to_owned(),
            format!("GET /v1/events limit=7&vm={WEB}&since=1764061200000"),
            format!("GET /v1/decisions limit=20&vm={WEB}"),
            format!(r#"POST /v1/vms/{WEB}/shadow  {{"action":"create","host":"b"}}"#),
            r#"PUT /v1/mode  {"mode":"observe"}"#.to_owned(),
        ]
    );
}

#[test]
fn a_failure_is_1_with_the_rps_own_words() {
    let rps = FakeRps::start();
    let r = rps.umbra(&["shadow", "create", "web", "--host", "full"]);
    assert_eq!((r.code, r.out.as_str()), (1, ""));
    assert_eq!(r.err, "umbra: The target lacks something: full has no RAM left\n");
}

#[test]
fn a_wrong_command_line_is_2_and_asks_nobody() {
    let rps = FakeRps::start();
    for args in [
        &["statsu"][..],
        &["vm"],
        &["vm", "show"],
        &["mode", "maybe"],
        &["--timeout", "0", "status"],
        &["--rps", "https://x", "status"],
        &["shadow", "create", "web", "--host", "a/b"],
        &["shadow", "release", "web", "--host", "b"],
        &["events", "--since", "lately"],
        &["decisions", "--limit", "0"],
    ] {
        let r = rps.umbra(args);
        assert_eq!((r.code, r.out.as_str()), (2, ""), "{args:?}: {}", r.err);
    }
    assert!(rps.seen().is_empty(), "{:?}", rps.seen());
}

#[test]
fn what_is_not_there_is_3_and_the_near_name_is_offered() {
    let rps = FakeRps::start();
    let r = rps.umbra(&["vm", "show", "wbe"]);
    assert_eq!(
        (r.code, r.err.as_str()),
        (3, "umbra: no VM is called 'wbe'. Did you mean 'web'?\n")
    );
    let r = rps.umbra(&["shadow", "release", "neighbor"]);
    assert_eq!(r.code, 3);
    assert!(r.err.contains("Did you mean 'neighbour'?"), "{}", r.err);
    assert!(rps.seen().iter().all(|s| s.starts_with("GET")), "{:?}", rps.seen());
    let r = rps.umbra(&["explain", NEIGHBOUR]);
    assert_eq!(r.code, 3);
    assert!(
        r.err.contains("nothing has been decided about neighbour yet"),
        "{}",
        r.err
    );
    assert_eq!(
        rps.umbra(&["vm", "show", "00000009-0000-0000-0000-000000000009"]).code,
        3
    );
}

#[test]
fn a_refusal_by_state_is_4() {
    let rps = FakeRps::start();
    let r = rps.umbra(&["shadow", "failback", "web"]);
    assert_eq!((r.code, r.out.as_str()), (4, ""));
    assert_eq!(
        r.err,
        "umbra: Not in this stage: web runs at home already: there is nothing to fail back\n"
    );
    let r = rps.umbra(&["shadow", "failback", "web", "--json"]);
    assert_eq!((r.code, r.out.as_str()), (4, ""));
    assert_eq!(serde_json::from_str::<Problem>(&r.err).unwrap().code, "wrong_stage");
}

#[test]
fn nobody_listening_is_5() {
    // A port that was free a moment ago.
    let url = {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let r = umbra(&url, &["status"]);
    assert_eq!((r.code, r.out.as_str()), (5, ""));
    assert!(
        r.err.contains(&url) && r.err.contains("Connection refused"),
        "{}",
        r.err
    );
    let r = umbra(&url, &["mode", "act", "--json"]);
    assert_eq!(r.code, 5);
    let problem: Problem = serde_json::from_str(&r.err).unwrap();
    assert_eq!((problem.code.as_str(), problem.status), ("rps_unreachable", 0));
    assert!(!problem.detail.contains("may have taken"), "{}", problem.detail);
}

#[test]
fn a_silent_server_is_5_and_what_was_sent_is_called_uncertain() {
    // It accepts connections (the kernel does) and says nothing.
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let r = umbra(&url, &["--timeout", "0.2", "mode", "act"]);
    assert_eq!(r.code, 5);
    assert!(
        r.err.contains("no answer within 0.2 s") && r.err.contains("may have taken"),
        "{}",
        r.err
    );
}

#[test]
fn some_other_server_is_recognized() {
    fn page(_: &Request) -> Reply {
        reply(status::OK, "text/html", "<html>hello</html>")
    }
    fn lost(_: &Request) -> Reply {
        reply(
            umbra_daemon::http::StatusCode::NOT_FOUND,
            "text/html",
            "<html>404</html>",
        )
    }
    for handler in [page as fn(&Request) -> Reply, lost] {
        let r = FakeRps::with(handler).umbra(&["status"]);
        assert_eq!(r.code, 1);
        assert!(r.err.contains("no Umbra RPS"), "{}", r.err);
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let rps = FakeRps::start();
    let mut child = Command::new(env!("CARGO_BIN_EXE_umbra"))
        .args(["--rps", &rps.url, "status"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let r = Run::of(&child.wait_with_output().unwrap());
    assert_eq!((r.code, r.err.as_str()), (0, ""));
}

#[test]
fn help_and_version_need_no_rps() {
    let r = umbra("http://127.0.0.1:1", &["--help"]);
    assert_eq!(r.code, 0);
    assert!(
        r.out.contains("Exit codes:") && r.out.contains("UMBRA_RPS"),
        "{}",
        r.out
    );
    assert_eq!(umbra("http://127.0.0.1:1", &["--version"]).code, 0);
}

const NOBODY: &str = "http://127.0.0.1:1";

/// What it finds depends on the machine; that it answers by itself, readably, does not.
#[test]
fn the_doctor_looks_at_this_host_and_asks_nobody() {
    let run = umbra(NOBODY, &["doctor"]);
    assert!(run.code == 0 || run.code == 1, "{}", run.code);
    for name in ["QEMU", "ram_dir", "swap", "cgroups"] {
        assert!(run.out.contains(name), "no {name} in\n{}", run.out);
    }
    assert!(run.out.lines().all(|l| l.chars().count() <= 80), "{}", run.out);
    let json = umbra(NOBODY, &["doctor", "--json", "--ram-dir", "/proc"]);
    let checks: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    let ram = checks
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["name"] == "ram_dir")
        .unwrap();
    assert_eq!((json.code, ram["verdict"].as_str()), (1, Some("fail")), "{ram}");
    assert!(ram["remedy"].as_str().unwrap().contains("tmpfs"));
}
