//! The target's machine, input by input.

use super::*;

const E: Epoch = Epoch(7);

fn at(inputs: &[Input]) -> (Machine, Vec<Action>) {
    let mut m = Machine::new(Epoch(6));
    let actions = inputs.iter().flat_map(|i| m.apply(i.clone())).collect();
    (m, actions)
}

fn prepared() -> Machine {
    at(&[
        Input::Seeded,
        Input::Prepare { epoch: E },
        Input::Streamed,
        Input::Written,
        Input::Loaded,
    ])
    .0
}

#[test]
fn the_straight_way_writes_before_it_speaks_or_runs() {
    let way = [
        Input::Seeded,
        Input::Prepare { epoch: E },
        Input::Streamed,
        Input::Loaded,
        Input::Written,
        Input::Commit { epoch: E },
        Input::Resumed,
    ];
    let (m, actions) = at(&way);
    assert_eq!(
        actions,
        [
            Action::Write(Durable::Prepared { epoch: E }),
            Action::SayPrepared { epoch: E },
            Action::Resume,
            Action::SayRunning { epoch: E },
            Action::Write(Durable::Running { epoch: E }),
        ]
    );
    assert_eq!(m.phase(), Phase::Active);
}

#[test]
fn a_lost_link_discards_an_undecided_shadow_and_never_a_prepared_one() {
    let way = [Input::Seeded, Input::Prepare { epoch: E }];
    for n in 0..=way.len() {
        let (mut m, _) = at(&way[..n]);
        let a = m.apply(Input::LinkLost("cut".into()));
        assert_eq!(a, [Action::Write(Durable::Held), Action::Hold], "after {n}");
        assert_eq!(m.phase(), Phase::Released);
        // What was held for this protection is not held against a later word.
        let a = m.apply(Input::Resolve { epoch: E });
        assert!(a.contains(&Action::Write(Durable::Aborted { epoch: E })), "after {n}");
    }
    for goodbye in ["released", "the VM's QEMU has exited"] {
        let (mut m, _) = at(&way[..1]);
        let a = m.apply(Input::Goodbye(goodbye.into()));
        assert_eq!(a, [Action::Write(Durable::Discarded), Action::Discard], "{goodbye}");
    }
    let mut m = prepared();
    assert_eq!(m.apply(Input::LinkLost("cut".into())), []);
    assert_eq!(m.apply(Input::Resolve { epoch: E }), [Action::SayPrepared { epoch: E }]);
    assert_eq!(m.phase(), Phase::Prepared);
}

#[test]
fn an_abort_is_durable_before_it_is_said_and_final() {
    let mut m = prepared();
    assert_eq!(
        m.apply(Input::Abort { epoch: E }),
        [Action::Write(Durable::Aborted { epoch: E })]
    );
    assert_eq!(m.apply(Input::Commit { epoch: E }), []);
    assert_eq!(
        m.apply(Input::Written),
        [Action::Discard, Action::SayAborted { epoch: E }]
    );
    assert_eq!(m.apply(Input::Commit { epoch: E }), [Action::SayAborted { epoch: E }]);
}

#[test]
fn a_vm_that_ran_and_died_is_never_aborted() {
    let mut m = prepared();
    m.apply(Input::Commit { epoch: E });
    m.apply(Input::Resumed);
    assert_eq!(
        m.apply(Input::ShadowGone),
        [Action::Write(Durable::Exited { epoch: E }), Action::Discard]
    );
    let (restarted, _) = Machine::resume(Durable::Exited { epoch: E }, Epoch(6), Shadow::Gone);
    let (found, actions) = Machine::resume(Durable::Running { epoch: E }, Epoch(6), Shadow::Gone);
    assert_eq!(actions, [Action::Write(Durable::Exited { epoch: E }), Action::Discard]);
    for mut m in [m, restarted, found] {
        for asked in [
            Input::Resolve { epoch: E },
            Input::Commit { epoch: E },
            Input::Abort { epoch: E },
        ] {
            assert_eq!(m.apply(asked), [Action::SayRunning { epoch: E }]);
        }
        assert_eq!(m.phase(), Phase::Released);
        // An operator gives the VM to the other side: on disk before it is said.
        let fence = Epoch(9);
        let fenced = Input::Fence {
            epoch: fence,
            dead: false,
        };
        assert_eq!(m.apply(fenced), [Action::Write(Durable::Aborted { epoch: fence })]);
        let said = [Action::Discard, Action::SayAborted { epoch: fence }];
        assert_eq!(m.apply(Input::Written), said);
    }
}

#[test]
fn a_shadow_that_dies_before_it_ran_is_aborted_at_once() {
    let mut m = prepared();
    assert_eq!(m.apply(Input::Commit { epoch: E }), [Action::Resume]);
    // An unanswered `cont` is tried again when the source asks.
    assert_eq!(m.apply(Input::Resolve { epoch: E }), [Action::Resume]);
    assert_eq!(
        m.apply(Input::ShadowGone),
        [Action::Write(Durable::Aborted { epoch: E })]
    );
    assert_eq!(
        m.apply(Input::Written),
        [Action::Discard, Action::SayAborted { epoch: E }]
    );
}

#[test]
fn a_running_vm_is_neither_released_nor_aborted() {
    let mut m = prepared();
    m.apply(Input::Commit { epoch: E });
    m.apply(Input::Resumed);
    assert!(matches!(m.apply(Input::Release).as_slice(), [Action::Refuse(_)]));
    assert_eq!(m.apply(Input::Abort { epoch: E }), [Action::SayRunning { epoch: E }]);
    assert_eq!(
        m.apply(Input::Resolve { epoch: Epoch(3) }),
        [Action::SayAborted { epoch: Epoch(3) }]
    );
    assert_eq!(m.phase(), Phase::Active);
}

#[test]
fn a_fence_ends_a_shadow_and_a_running_vm_only_by_an_operators_word() {
    let f = Epoch(9);
    let fence = |dead| Input::Fence { epoch: f, dead };
    let mut m = prepared();
    assert_eq!(m.apply(fence(false)), [Action::Write(Durable::Aborted { epoch: f })]);
    assert_eq!(m.apply(Input::Commit { epoch: E }), [], "too late");
    assert_eq!(
        m.apply(Input::Written),
        [Action::Discard, Action::SayAborted { epoch: f }]
    );
    assert_eq!(m.apply(fence(false)).last(), Some(&Action::SayAborted { epoch: f }));

    let mut m = prepared();
    m.apply(Input::Commit { epoch: E });
    m.apply(Input::Resumed);
    assert!(matches!(m.apply(fence(false)).as_slice(), [Action::Refuse(_)]));
    let stale = Input::Fence { epoch: E, dead: true };
    assert!(matches!(m.apply(stale).as_slice(), [Action::Refuse(_)]));
    assert_eq!(m.apply(fence(true)), [Action::Write(Durable::Fenced { epoch: f })]);
    assert_eq!(m.apply(Input::Written), [Action::Kill, Action::SayAborted { epoch: f }]);
    let (_, a) = Machine::resume(Durable::Fenced { epoch: f }, Epoch(6), Shadow::Runs);
    assert_eq!(a, [Action::Kill]);
}

#[test]
fn a_stale_or_early_prepare_is_refused() {
    let (mut m, _) = at(&[Input::Seeded]);
    assert!(matches!(
        m.apply(Input::Prepare { epoch: Epoch(6) }).as_slice(),
        [Action::Refuse(_)]
    ));
    let (mut m, _) = at(&[]);
    assert!(matches!(
        m.apply(Input::Prepare { epoch: E }).as_slice(),
        [Action::Refuse(_)]
    ));
}

#[test]
fn a_restart_discards_what_was_undecided_and_believes_qemu_about_the_rest() {
    let resume = |durable, shadow| Machine::resume(durable, Epoch(6), shadow);
    for durable in [Durable::Shadow, Durable::Held] {
        let (_, a) = resume(durable, Shadow::Waits);
        assert_eq!(a, [Action::Write(Durable::Held), Action::Hold]);
    }
    let (m, a) = resume(Durable::Prepared { epoch: E }, Shadow::Loaded);
    assert_eq!((m.phase(), a), (Phase::Prepared, vec![]));
    let (m, a) = resume(Durable::Prepared { epoch: E }, Shadow::Runs);
    assert_eq!(
        (m.phase(), a),
        (Phase::Active, vec![Action::Write(Durable::Running { epoch: E })])
    );
    for shadow in [Shadow::Waits, Shadow::Gone] {
        let (_, a) = resume(Durable::Prepared { epoch: E }, shadow);
        assert!(a.contains(&Action::Write(Durable::Aborted { epoch: E })));
    }
}
