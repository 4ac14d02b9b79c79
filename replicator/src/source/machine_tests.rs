//! The source's machine, input by input.

use super::*;

const E: Epoch = Epoch(7);

fn standby() -> Machine {
    let mut m = Machine::new();
    assert!(m.apply(Input::Seeded).is_empty());
    m
}

fn run(m: &mut Machine, inputs: &[Input]) -> Vec<Action> {
    inputs.iter().flat_map(|i| m.apply(i.clone())).collect()
}

#[test]
fn the_straight_way_gives_up_on_disk_before_qemu_and_commits_last() {
    let mut m = standby();
    let way = [
        Input::Switchover { epoch: E },
        Input::Written,
        Input::Streamed,
        Input::Written,
        Input::Prepared { epoch: E },
        Input::Completed,
        Input::Running { epoch: E },
    ];
    assert_eq!(
        run(&mut m, &way),
        [
            Action::Write(Durable::Preparing { epoch: E }),
            Action::Stop { epoch: E },
            Action::Write(Durable::Relinquished { epoch: E }),
            Action::Shut,
            Action::Commit { epoch: E },
            Action::Write(Durable::HandedOver { epoch: E }),
        ]
    );
    assert_eq!(m.phase(), Phase::Relinquished);
}

#[test]
fn before_the_relinquishment_every_fault_lets_the_primary_run_on() {
    let faults = [
        Input::LinkLost("cut".into()),
        Input::Refused(Refusal::new(RefusalCode::Local, "disk full")),
        Input::TimedOut,
        Input::MigrationFailed("failed".into()),
        Input::Aborted { epoch: E },
    ];
    for before in 0..=4 {
        for fault in &faults {
            let mut m = standby();
            let way = [
                Input::Switchover { epoch: E },
                Input::Written,
                Input::Streamed,
                Input::Written,
            ];
            run(&mut m, &way[..before]);
            let actions = m.apply(fault.clone());
            assert!(
                actions.contains(&Action::Abandon),
                "{fault:?} after {before}: {actions:?}"
            );
            assert!(!actions.contains(&Action::Shut));
            assert_eq!(m.phase(), Phase::Released);
        }
    }
}

#[test]
fn a_copy_that_breaks_off_is_begun_anew_until_it_is_released() {
    let breaks = [
        Input::LinkLost("cut".into()),
        Input::MigrationFailed("failed".into()),
        Input::Cancelled("cancelled".into()),
        Input::Damaged("page 7".into()),
    ];
    for fault in breaks {
        let mut m = Machine::new();
        assert!(
            m.apply(fault.clone()).contains(&Action::Write(Durable::Released)),
            "{fault:?}: never begun"
        );
        assert_eq!(m.phase(), Phase::Released);
        for seeded in [false, true] {
            let mut m = Machine::new();
            m.apply(Input::Begun);
            if seeded {
                m.apply(Input::Seeded);
            }
            assert_eq!(m.apply(fault.clone()), [Action::Abandon, Action::HangUp], "{fault:?}");
            assert_eq!(m.phase(), Phase::Seeding);
            assert_eq!(m.apply(Input::LinkLost("still".into())), [], "{fault:?}");
            assert_eq!(m.apply(Input::Switchover { epoch: E }), [], "{fault:?}");
            assert_eq!(m.apply(Input::Again), [Action::Begin]);
            assert_eq!(
                m.apply(Input::LinkLost("again".into())),
                [Action::Abandon, Action::HangUp]
            );
            // Its own migration has not ended yet: later. One of somebody else: never.
            assert_eq!(m.apply(Input::Again), [Action::Begin]);
            let mut theirs = m.clone();
            let ours = Input::MigrationFailed("it is cancelling".into());
            assert_eq!(m.apply(ours), [Action::Abandon, Action::HangUp]);
            assert!(!m.is_over());
            theirs.apply(Input::Interfered("a migration was started".into()));
            assert!(theirs.is_over());
            let mut other = m.clone();
            assert_eq!(m.apply(Input::Release), [Action::Write(Durable::Released)]);
            assert_eq!((m.phase(), m.is_over()), (Phase::Released, true));
            other.apply(Input::PrimaryGone);
            assert_eq!((other.phase(), other.is_over()), (Phase::Failed, true));
        }
    }
}

#[test]
fn after_the_commit_only_a_durable_abort_brings_the_primary_back() {
    let mut m = standby();
    run(
        &mut m,
        &[
            Input::Switchover { epoch: E },
            Input::Written,
            Input::Streamed,
            Input::Prepared { epoch: E },
        ],
    );
    assert_eq!(m.apply(Input::Written), [Action::Shut]);
    m.apply(Input::Completed);
    assert_eq!(m.apply(Input::LinkLost("cut".into())), [Action::Resolve { epoch: E }]);
    assert_eq!(m.apply(Input::Aborted { epoch: Epoch(3) }), []);
    assert_eq!(m.apply(Input::Prepared { epoch: E }), [Action::Commit { epoch: E }]);
    let taking_back = Durable::TakingBack { epoch: E };
    assert_eq!(
        m.apply(Input::Aborted { epoch: E }),
        [Action::Write(taking_back)],
        "the primary is stopped still"
    );
    assert_eq!(m.apply(Input::Written), [Action::TakeBack]);
    assert_eq!(m.apply(Input::TakenBack), [Action::Write(Durable::Released)]);
    assert_eq!(m.phase(), Phase::Released);
    assert_eq!(Machine::resume(taking_back, true, false).1, [Action::TakeBack]);
    assert_eq!(
        Machine::resume(taking_back, false, false).1,
        [Action::Write(Durable::Released)]
    );
}

#[test]
fn a_primary_that_dies_while_stopped_is_replaced_by_the_prepared_shadow() {
    let mut m = standby();
    run(
        &mut m,
        &[
            Input::Switchover { epoch: E },
            Input::Written,
            Input::Streamed,
            Input::Written,
        ],
    );
    assert_eq!(
        run(&mut m, &[Input::PrimaryGone, Input::MigrationFailed("closed".into())]),
        []
    );
    assert_eq!(m.apply(Input::Prepared { epoch: E }), [Action::Commit { epoch: E }]);

    let mut m = standby();
    run(&mut m, &[Input::Switchover { epoch: E }, Input::Written]);
    assert!(m.apply(Input::PrimaryGone).contains(&Action::Abort { epoch: E }));
    assert_eq!(m.phase(), Phase::Failed);
}

#[test]
fn a_restart_follows_the_disk_and_the_primary() {
    let (mut m, a) = Machine::resume(Durable::Protecting, false, false);
    assert_eq!((m.phase(), a), (Phase::Seeding, vec![]));
    assert_eq!(m.apply(Input::Again), [Action::Begin]);
    for (stopped, gone) in [(true, false), (false, true)] {
        let (m, a) = Machine::resume(Durable::Protecting, stopped, gone);
        assert_eq!((m.is_over(), a), (true, vec![Action::Write(Durable::Released)]));
    }
    let (m, a) = Machine::resume(Durable::Preparing { epoch: E }, false, false);
    assert_eq!(
        a,
        [
            Action::Write(Durable::Aborting { epoch: E }),
            Action::Abort { epoch: E }
        ]
    );
    assert_eq!(m.phase(), Phase::Released);
    let (m, a) = Machine::resume(Durable::Relinquished { epoch: E }, true, false);
    assert_eq!(
        (m.state, a),
        (State::Resolving { epoch: E }, vec![Action::Resolve { epoch: E }])
    );
    let (_, a) = Machine::resume(Durable::Relinquished { epoch: E }, false, false);
    assert!(a.contains(&Action::Abort { epoch: E }));
    // A shadow of unknown age is neither run nor thrown away, until somebody asks for it.
    let (mut m, a) = Machine::resume(Durable::Relinquished { epoch: E }, false, true);
    assert_eq!((m.phase(), a), (Phase::Failed, vec![]));
    assert_eq!(m.apply(Input::Ask), [Action::Resolve { epoch: E }]);
    assert_eq!(m.apply(Input::Prepared { epoch: E }), [Action::Commit { epoch: E }]);
    let (m, a) = Machine::resume(Durable::TakingBack { epoch: E }, true, false);
    assert_eq!((m.phase(), a), (Phase::Switching, vec![Action::TakeBack]));
}

#[test]
fn a_kept_primary_runs_again_only_when_the_other_copy_never_will() {
    let fence = Epoch(9);
    for durable in [Durable::HandedOver { epoch: E }, Durable::Relinquished { epoch: E }] {
        let (mut m, _) = Machine::resume(durable, true, false);
        assert_eq!(m.apply(Input::Aborted { epoch: Epoch(3) }), []);
        let fenced = m.apply(Input::Fenced { epoch: fence });
        assert_eq!(
            fenced,
            [Action::Write(Durable::TakingBack { epoch: fence })],
            "{durable:?}"
        );
        assert_eq!(m.apply(Input::Running { epoch: E }), [], "its word came too late");
        assert_eq!(m.apply(Input::Written), [Action::TakeBack]);
    }
    let (mut m, _) = Machine::resume(Durable::HandedOver { epoch: E }, false, true);
    assert_eq!(m.apply(Input::Fenced { epoch: fence }), [], "there is nothing to run");
}

#[test]
fn a_host_that_was_declared_dead_ends_its_copy_when_it_is_back() {
    let (mut m, _) = Machine::resume(Durable::Relinquished { epoch: E }, true, false);
    let y = Epoch(9);
    let actions = m.apply(Input::Yield { epoch: y });
    assert!(actions.contains(&Action::Write(Durable::Fenced { epoch: y })) && !actions.contains(&Action::Kill));
    assert_eq!(m.apply(Input::Aborted { epoch: E }), []);
    assert_eq!(m.apply(Input::Written), [Action::Kill]);
    let (m, a) = Machine::resume(Durable::Fenced { epoch: y }, false, false);
    assert_eq!((m.phase(), a), (Phase::Released, vec![Action::Kill]));
}

#[test]
fn what_somebody_else_does_to_the_vm_ends_the_copy_with_its_name() {
    let mut m = standby();
    let actions = m.apply(Input::Interfered("somebody stopped it".into()));
    assert!(actions.contains(&Action::Abandon), "{actions:?}");
    assert_eq!(m.error().map(|e| e.code), Some(RefusalCode::Interfered));
}
