//! Versions of QEMU, each played by a monitor that knows what that version knows.

use super::super::derive::tests::{able, demo, facts, line};
use super::super::derive::{Derived, all, derive};
use super::*;
use crate::qmp::fake::{Fake, V8_1, V8_2, V10_0};

const MACHINE: &str = "pc-q35-8.1";

fn facts_of(fake: Fake, machine: &str) -> Facts {
    let (_dir, qmp, _) = fake.play();
    Facts {
        version: qmp.version(),
        ability: Ability::ask(&qmp).unwrap(),
        machine: machine.into(),
        ..facts()
    }
}

fn refusal_of(fake: Fake, machine: &str, more: &str) -> Option<String> {
    let mut args = demo();
    args.extend(line(more));
    let (derived, refusals) = all(&args, &facts_of(fake, machine));
    assert_eq!(derived.is_none(), !refusals.is_empty());
    assert!(refusals.len() <= 1, "{refusals:?}");
    refusals.first().map(|r| r.detail.clone())
}

#[test]
fn each_version_is_taken_for_what_it_can() {
    for fake in [V8_1, V8_2, V10_0] {
        let Derived { warnings, .. } = derive(&demo(), &facts_of(fake, MACHINE)).unwrap();
        let guesses = warnings.iter().any(|w| w.contains("8.1.5 can't be told"));
        assert_eq!(guesses, fake.version < (8, 2, 0), "{warnings:?}");
    }
    assert_eq!(facts_of(V10_0, MACHINE).ability.told_bandwidth, able().told_bandwidth);
}

#[test]
fn an_emulated_guest_needs_a_qemu_that_keeps_track_of_it() {
    let emulates = |fake: Fake| refusal_of(Fake { kvm: false, ..fake }, MACHINE, "");
    for old in [V8_1, V8_2] {
        let why = emulates(old).unwrap();
        assert!(
            why.contains("loses track") && why.contains("; start the VM with -accel kvm"),
            "{why}"
        );
    }
    assert_eq!(emulates(V10_0), None);
}

#[test]
fn a_qemu_without_what_holds_a_copy_is_refused() {
    let without = Fake {
        capabilities: &["events", "return-path", "x-ignore-shared"],
        ..V10_0
    };
    let why = refusal_of(without, MACHINE, "").unwrap();
    assert!(
        why.contains("no switchover-ack, which a copy is held open with"),
        "{why}"
    );
    let (_dir, qmp, _) = without.play();
    assert_eq!(
        missing(&qmp, &["events", "late-block-activate"]).unwrap(),
        ["late-block-activate"]
    );
}

#[test]
fn a_migration_that_qemu_encrypts_is_refused() {
    let why = refusal_of(
        Fake {
            tls_creds: "tls0",
            ..V10_0
        },
        MACHINE,
        "",
    )
    .unwrap();
    assert!(why.contains("encrypted by tls0"), "{why}");
}

#[test]
fn a_stream_without_its_marks_is_refused() {
    for (machine, more, named) in [
        ("pc-i440fx-2.3", "", "pc-i440fx-2.3"),
        ("pc-q35-8.1", "-machine suppress-vmdesc=on", "suppress-vmdesc"),
        (
            "pc-q35-8.1",
            "-global migration.send-section-footer=off",
            "send-section-footer",
        ),
        (
            "microvm",
            "-global migration.send-configuration=false",
            "send-configuration",
        ),
    ] {
        let why = refusal_of(V8_2, machine, more).unwrap();
        assert!(why.contains(named), "{why}");
    }
    for machine in ["pc-q35-2.4", "pc-i440fx-2.10", "pc-q35-noble-v2", "microvm"] {
        assert_eq!(
            refusal_of(V8_2, machine, "-machine suppress-vmdesc=off"),
            None,
            "{machine}"
        );
    }
}
