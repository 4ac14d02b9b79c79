use umbra_api::lifecycle::Stage;
use umbra_api::order::OrderKind;
use umbra_api::view::DecisionInputs;
use umbra_api::{Epoch, HostId};

use super::*;
use crate::ingest::SeriesKey;
use crate::orchestrator::orders::Answer;
use crate::series::Usage;

fn vm(n: u128) -> VmId {
    VmId(uuid::Uuid::from_u128(n))
}

fn host(s: &str) -> HostId {
    s.parse().unwrap()
}

fn event(n: u128, t: i64) -> LifecycleEvent {
    let (from, to) = (Stage::Unprotected, Stage::Provisioning);
    LifecycleEvent {
        t: UnixMs(t),
        vm: vm(n),
        from,
        to,
        reason: format!("at {t}"),
        decision: Some(DecisionId(4)),
    }
}

fn decision(id: u64, n: u128, t: i64) -> DecisionView {
    DecisionView {
        id: DecisionId(id),
        t: UnixMs(t),
        vm: vm(n),
        mode: Mode::Act,
        stage: Stage::Unprotected,
        action: "nothing".into(),
        because: "nothing, because".into(),
        inputs: DecisionInputs::default(),
        hosts: Vec::new(),
    }
}

fn state(n: u128, protection: u64) -> VmState {
    let mut s = VmState::new(vm(n), "web", &host("a"), UnixMs(5));
    s.protection = Epoch(protection);
    s.epoch = Epoch(protection);
    s
}

fn order(n: u128, epoch: u64, answer: Option<Answer>) -> OrderRecord {
    let mut o = OrderRecord::new(vm(n), Epoch(epoch), &host("b"), OrderKind::Switchover, UnixMs(7));
    if let Some(a) = answer {
        o.answer(&a, UnixMs(8));
    }
    o
}

fn all() -> Filter {
    Filter {
        vm: None,
        since: None,
        limit: 100,
    }
}

#[test]
fn everything_survives_a_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rps.db");
    let usage = Usage {
        cpu_cores: 0.5,
        wait_ms_per_s: 7.0,
        rss_bytes: 1e9,
        ..Usage::default()
    };
    let slot = |start| SlotRow {
        key: SeriesKey::Vm(vm(1)),
        start: UnixMs(start),
        usage,
        disturbed: start == 2000,
    };
    let own = SlotRow {
        key: SeriesKey::Host(host("a")),
        start: UnixMs(1000),
        usage,
        disturbed: false,
    };
    {
        let mut s = SqliteStore::open(&file).unwrap();
        let writes = [
            Write::Vm(Box::new(state(1, 3))),
            Write::Order(Box::new(order(1, 2, Some(Answer::Accepted)))),
            Write::Order(Box::new(order(1, 3, Some(Answer::Accepted)))),
            Write::Order(Box::new(order(1, 1, None))),
            Write::Event(event(1, 10)),
            Write::Event(event(2, 20)),
            Write::Decision(Box::new(decision(1, 1, 10))),
            Write::Decision(Box::new(decision(2, 2, 20))),
            Write::Slots(vec![slot(1000), slot(2000), own.clone()]),
            Write::Mode(Mode::Observe),
        ];
        s.commit(&writes).unwrap();
        // A state is replaced, a slot too.
        s.commit(&[Write::Vm(Box::new(state(1, 3))), Write::Slots(vec![slot(2000)])])
            .unwrap();
    }
    let s = SqliteStore::open(&file).unwrap();
    let loaded = s.load().unwrap();
    assert_eq!(loaded.states, [state(1, 3)]);
    let epochs: Vec<u64> = loaded.orders.iter().map(|o| o.order.epoch.0).collect();
    assert_eq!(epochs, [3, 1], "the pending one and those of the present protection");
    assert_eq!(
        (loaded.mode, loaded.last_decision),
        (Some(Mode::Observe), DecisionId(2))
    );
    assert_eq!(s.slots(UnixMs(1000)).unwrap(), [own, slot(1000), slot(2000)]);
    assert_eq!(s.slots(UnixMs(1001)).unwrap(), [slot(2000)]);
    assert_eq!(s.events(&all()).unwrap(), [event(1, 10), event(2, 20)]);
    assert_eq!(
        s.events(&Filter {
            since: Some(UnixMs(11)),
            ..all()
        })
        .unwrap(),
        [event(2, 20)]
    );
    assert_eq!(s.events(&Filter { limit: 1, ..all() }).unwrap(), [event(2, 20)]);
    assert_eq!(
        s.decisions(&Filter {
            vm: Some(vm(1)),
            ..all()
        })
        .unwrap(),
        [decision(1, 1, 10)]
    );
    assert_eq!(s.decisions(&all()).unwrap()[0].id, DecisionId(2));
}

#[test]
fn old_rows_go_and_ids_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = SqliteStore::open(&dir.path().join("rps.db")).unwrap();
    let usage = Usage::default();
    let slots = (0..10)
        .map(|i| SlotRow {
            key: SeriesKey::Vm(vm(1)),
            start: UnixMs(i),
            disturbed: false,
            usage,
        })
        .collect();
    let mut writes = vec![Write::Slots(slots), Write::Vm(Box::new(state(1, 9)))];
    writes.extend((1..5).map(|i| Write::Decision(Box::new(decision(i, 1, i as i64)))));
    writes.push(Write::Event(event(1, 3)));
    writes.extend([
        Write::Order(Box::new(order(1, 1, None))),
        Write::Order(Box::new(order(1, 2, Some(Answer::Accepted)))),
    ]);
    s.commit(&writes).unwrap();
    s.prune(UnixMs(6), UnixMs(1000)).unwrap();
    assert_eq!(s.slots(UnixMs(0)).unwrap().len(), 4);
    assert!(s.events(&all()).unwrap().is_empty());
    let loaded = s.load().unwrap();
    assert_eq!(loaded.last_decision, DecisionId(4));
    assert_eq!(loaded.orders.len(), 1, "an order that waits for its answer stays");
}

#[test]
fn a_batch_is_committed_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = SqliteStore::open(&dir.path().join("rps.db")).unwrap();
    let twice = [
        Write::Vm(Box::new(state(1, 1))),
        Write::Decision(Box::new(decision(1, 1, 1))),
    ];
    s.commit(&twice).unwrap();
    let bad = [
        Write::Vm(Box::new(state(2, 1))),
        Write::Decision(Box::new(decision(1, 1, 1))),
    ];
    s.commit(&bad).unwrap_err();
    assert_eq!(s.load().unwrap().states.len(), 1);
}

#[test]
fn a_file_that_cannot_be_used_is_named_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let open = |file: &std::path::Path| SqliteStore::open(file).unwrap_err().to_string();

    let garbage = dir.path().join("garbage.db");
    std::fs::write(&garbage, "not a database, but long enough to have a header".repeat(40)).unwrap();
    let e = open(&garbage);
    assert!(e.contains("garbage.db") && e.contains("no umbra-rps store"), "{e}");

    let newer = dir.path().join("newer.db");
    drop(SqliteStore::open(&newer).unwrap());
    rusqlite::Connection::open(&newer)
        .unwrap()
        .pragma_update(None, "user_version", 99)
        .unwrap();
    let e = open(&newer);
    assert!(
        e.contains("newer.db") && e.contains("version 99") && e.contains("knows 2"),
        "{e}"
    );

    let stranger = dir.path().join("stranger.db");
    rusqlite::Connection::open(&stranger)
        .unwrap()
        .execute_batch("CREATE TABLE songs (name TEXT)")
        .unwrap();
    let e = open(&stranger);
    assert!(e.contains("another program's"), "{e}");

    let locked = dir.path().join("locked.db");
    drop(SqliteStore::open(&locked).unwrap());
    let other = rusqlite::Connection::open(&locked).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let e = open(&locked);
    assert!(
        e.contains("locked.db") && e.contains("in use by another process"),
        "{e}"
    );

    drop(other);
    let first = SqliteStore::open(&locked).unwrap();
    let e = open(&locked);
    assert!(e.contains("in use by another process"), "{e}");
    drop(first);
    SqliteStore::open(&locked).unwrap();

    let e = open(&dir.path().join("no/such/dir/rps.db"));
    assert!(e.contains("no/such/dir/rps.db"), "{e}");
}

#[test]
fn slots_of_before_disturbances_were_kept_are_undisturbed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rps.db");
    let row = SlotRow {
        key: SeriesKey::Vm(vm(1)),
        start: UnixMs(1000),
        usage: Usage::default(),
        disturbed: false,
    };
    let mut s = SqliteStore::open(&file).unwrap();
    s.commit(&[Write::Slots(vec![row.clone()])]).unwrap();
    drop(s);
    // As the first version left it.
    rusqlite::Connection::open(&file)
        .unwrap()
        .execute_batch("ALTER TABLE slots DROP COLUMN disturbed; PRAGMA user_version = 1")
        .unwrap();
    assert_eq!(SqliteStore::open(&file).unwrap().slots(UnixMs(0)).unwrap(), [row]);
}

#[test]
fn a_reader_sees_what_was_committed_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rps.db");
    let mut s = SqliteStore::open(&file).unwrap();
    let reader = SqliteStore::open_reader(&file).unwrap();
    s.commit(&[Write::Event(event(1, 10))]).unwrap();
    assert_eq!(reader.events(&all()).unwrap().len(), 1);
}
