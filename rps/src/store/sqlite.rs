//! The store in one SQLite file. WAL, so that readers never wait; `synchronous=FULL`, so that a commit survives a power
//! cut: an order that was sent is always known again.
//!
//! Schema versions: 1 the first one; 2 which slots a copy of our own disturbed.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, params};
use serde::Serialize;
use serde::de::DeserializeOwned;
use umbra_api::view::{DecisionView, LifecycleEvent};
use umbra_api::{DecisionId, UnixMs};

use super::{Filter, Loaded, Store, StoreError, Write};
use crate::ingest::{SeriesKey, SlotRow};
use crate::series::Usage;

/// Each entry lifts the schema by one version.
const MIGRATIONS: [&str; 2] = [
    "
    CREATE TABLE vms (vm TEXT PRIMARY KEY, state TEXT NOT NULL) STRICT;
    CREATE TABLE orders (
        id TEXT PRIMARY KEY, vm TEXT NOT NULL, epoch INTEGER NOT NULL, t INTEGER NOT NULL,
        pending INTEGER NOT NULL, record TEXT NOT NULL
    ) STRICT;
    CREATE INDEX orders_by_vm ON orders (vm, epoch);
    CREATE INDEX orders_pending ON orders (pending) WHERE pending = 1;
    CREATE TABLE events (id INTEGER PRIMARY KEY, t INTEGER NOT NULL, vm TEXT NOT NULL, event TEXT NOT NULL) STRICT;
    CREATE INDEX events_by_vm ON events (vm, t);
    CREATE INDEX events_by_t ON events (t);
    CREATE TABLE decisions (id INTEGER PRIMARY KEY, t INTEGER NOT NULL, vm TEXT NOT NULL, decision TEXT NOT NULL) STRICT;
    CREATE INDEX decisions_by_vm ON decisions (vm, id);
    CREATE INDEX decisions_by_t ON decisions (t);
    CREATE TABLE slots (
        start INTEGER NOT NULL, series TEXT NOT NULL,
        cpu_cores REAL NOT NULL, wait_ms_per_s REAL NOT NULL, rss_bytes REAL NOT NULL,
        net_bytes_per_s REAL NOT NULL, disk_bytes_per_s REAL NOT NULL,
        PRIMARY KEY (start, series)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
",
    "ALTER TABLE slots ADD COLUMN disturbed INTEGER NOT NULL DEFAULT 0",
];

/// `umbR`, so that another program's database is not taken for ours.
const APPLICATION_ID: i64 = 0x756d_6252;

const SCHEMA: i64 = MIGRATIONS.len() as i64;

#[derive(Debug)]
pub struct SqliteStore {
    file: PathBuf,
    db: Connection,
    /// Held while this process may write; the kernel lets go of it however the process ends.
    _lock: Option<File>,
}

impl SqliteStore {
    /// Opens the file, or makes it, and lifts an older schema. One process at a time may have it open for writing.
    pub fn open(file: &Path) -> Result<Self, StoreError> {
        let lock = lock(file)?;
        let db = Connection::open(file).map_err(|e| named(file, e))?;
        let mut store = Self {
            file: file.to_owned(),
            db,
            _lock: Some(lock),
        };
        store.set_up().map_err(|e| named(file, e))?;
        store.migrate()?;
        Ok(store)
    }

    /// A second connection that only reads, beside the one that writes.
    pub fn open_reader(file: &Path) -> Result<Self, StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let db = Connection::open_with_flags(file, flags).map_err(|e| named(file, e))?;
        db.busy_timeout(std::time::Duration::from_secs(5))
            .map_err(|e| named(file, e))?;
        Ok(Self {
            file: file.to_owned(),
            db,
            _lock: None,
        })
    }

    fn set_up(&self) -> rusqlite::Result<()> {
        self.db.busy_timeout(std::time::Duration::from_secs(2))?;
        self.db
            .pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        self.db.pragma_update(None, "synchronous", "FULL")?;
        self.db.pragma_update(None, "foreign_keys", "ON")
    }

    fn migrate(&mut self) -> Result<(), StoreError> {
        let file = self.file.clone();
        let sql = |e| named(&file, e);
        // Immediate: a second process must not find the schema half lifted.
        let tx = self
            .db
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .map_err(sql)?;
        let number = |name: &str| tx.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        let (found, owner) = (
            number("user_version").map_err(sql)?,
            number("application_id").map_err(sql)?,
        );
        let tables: i64 = tx
            .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
            .map_err(sql)?;
        if tables > 0 && owner != APPLICATION_ID {
            let reason = "its tables are another program's".to_owned();
            return Err(StoreError::NotAStore { file, reason });
        }
        if found > SCHEMA {
            return Err(StoreError::Newer {
                file,
                found,
                known: SCHEMA,
            });
        }
        for step in MIGRATIONS.iter().skip(usize::try_from(found).unwrap_or(0)) {
            tx.execute_batch(step).map_err(sql)?;
        }
        tx.pragma_update(None, "user_version", SCHEMA).map_err(sql)?;
        tx.pragma_update(None, "application_id", APPLICATION_ID).map_err(sql)?;
        tx.commit().map_err(sql)
    }

    fn sql<T>(&self, result: rusqlite::Result<T>) -> Result<T, StoreError> {
        result.map_err(|e| named(&self.file, e))
    }

    fn decode<T: DeserializeOwned>(&self, what: &'static str, text: &str) -> Result<T, StoreError> {
        serde_json::from_str(text).map_err(|e| StoreError::Row {
            file: self.file.clone(),
            what,
            reason: e.to_string(),
        })
    }

    /// One JSON column, a row a value.
    fn texts(&self, sql: &str, args: impl rusqlite::Params) -> Result<Vec<String>, StoreError> {
        let read = || {
            let mut statement = self.db.prepare_cached(sql)?;
            let rows = statement.query_map(args, |row| row.get::<_, String>(0))?;
            rows.collect::<rusqlite::Result<Vec<String>>>()
        };
        self.sql(read())
    }

    fn all<T: DeserializeOwned>(
        &self,
        what: &'static str,
        sql: &str,
        args: impl rusqlite::Params,
    ) -> Result<Vec<T>, StoreError> {
        self.texts(sql, args)?
            .iter()
            .map(|text| self.decode(what, text))
            .collect()
    }
}

impl Store for SqliteStore {
    fn commit(&mut self, writes: &[Write]) -> Result<(), StoreError> {
        let mut work = || {
            let tx = self.db.transaction()?;
            writes.iter().try_for_each(|w| write(&tx, w))?;
            tx.commit()
        };
        if writes.is_empty() {
            return Ok(());
        }
        work().map_err(|e| named(&self.file, e))
    }

    fn load(&self) -> Result<Loaded, StoreError> {
        let orders = "SELECT o.record FROM orders o LEFT JOIN vms v ON v.vm = o.vm
            WHERE o.pending = 1 OR o.epoch >= coalesce(json_extract(v.state, '$.protection'), 0)
            ORDER BY o.t, o.rowid";
        let mode = self.texts("SELECT value FROM settings WHERE key = 'mode'", [])?;
        let last: i64 = self.sql(
            self.db
                .query_row("SELECT coalesce(max(id), 0) FROM decisions", [], |r| r.get(0)),
        )?;
        Ok(Loaded {
            states: self.all("a VM's state", "SELECT state FROM vms ORDER BY vm", [])?,
            orders: self.all("an order", orders, [])?,
            mode: mode.first().map(|text| self.decode("the mode", text)).transpose()?,
            last_decision: DecisionId(u64::try_from(last).unwrap_or(0)),
        })
    }

    fn slots(&self, since: UnixMs) -> Result<Vec<SlotRow>, StoreError> {
        let sql =
            "SELECT series, start, cpu_cores, wait_ms_per_s, rss_bytes, net_bytes_per_s, disk_bytes_per_s, disturbed
            FROM slots WHERE start >= ?1 ORDER BY start, series";
        let read = || {
            let mut statement = self.db.prepare_cached(sql)?;
            let rows = statement.query_map([since.0], |row| {
                let usage = Usage {
                    cpu_cores: row.get(2)?,
                    wait_ms_per_s: row.get(3)?,
                    rss_bytes: row.get(4)?,
                    net_bytes_per_s: row.get(5)?,
                    disk_bytes_per_s: row.get(6)?,
                };
                Ok((row.get::<_, String>(0)?, UnixMs(row.get(1)?), usage, row.get(7)?))
            })?;
            rows.collect::<rusqlite::Result<Vec<_>>>()
        };
        let rows = self.sql(read())?;
        let row = |(key, start, usage, disturbed): (String, UnixMs, Usage, bool)| {
            let key: SeriesKey = key
                .parse()
                .map_err(|e: crate::ingest::SeriesKeyError| StoreError::Row {
                    file: self.file.clone(),
                    what: "a slot",
                    reason: e.to_string(),
                })?;
            Ok(SlotRow {
                key,
                start,
                usage,
                disturbed,
            })
        };
        rows.into_iter().map(row).collect()
    }

    fn events(&self, filter: &Filter) -> Result<Vec<LifecycleEvent>, StoreError> {
        let sql = "SELECT event FROM events WHERE (?1 IS NULL OR vm = ?1) AND t >= ?2 ORDER BY id DESC LIMIT ?3";
        let mut newest: Vec<LifecycleEvent> = self.all("an event", sql, filter_params(filter))?;
        newest.reverse();
        Ok(newest)
    }

    fn decisions(&self, filter: &Filter) -> Result<Vec<DecisionView>, StoreError> {
        let sql = "SELECT decision FROM decisions WHERE (?1 IS NULL OR vm = ?1) AND t >= ?2 ORDER BY id DESC LIMIT ?3";
        self.all("a decision", sql, filter_params(filter))
    }

    fn prune(&mut self, slots: UnixMs, history: UnixMs) -> Result<usize, StoreError> {
        let mut work = || {
            let tx = self.db.transaction()?;
            let mut gone = tx.execute("DELETE FROM slots WHERE start < ?1", [slots.0])?;
            gone += tx.execute("DELETE FROM events WHERE t < ?1", [history.0])?;
            // The last id must stay, or ids would begin anew.
            let decisions = "DELETE FROM decisions WHERE t < ?1 AND id < (SELECT max(id) FROM decisions)";
            gone += tx.execute(decisions, [history.0])?;
            let orders = "DELETE FROM orders WHERE t < ?1 AND pending = 0
                AND epoch < coalesce((SELECT json_extract(state, '$.protection') FROM vms v WHERE v.vm = orders.vm), 0)";
            gone += tx.execute(orders, [history.0])?;
            tx.commit()?;
            Ok(gone)
        };
        work().map_err(|e| named(&self.file, e))
    }
}

fn filter_params(f: &Filter) -> impl rusqlite::Params {
    let limit = i64::try_from(f.limit).unwrap_or(i64::MAX);
    (f.vm.map(|v| v.to_string()), f.since.map_or(i64::MIN, |t| t.0), limit)
}

fn write(tx: &Transaction<'_>, write: &Write) -> rusqlite::Result<()> {
    match write {
        Write::Vm(state) => {
            let sql =
                "INSERT INTO vms (vm, state) VALUES (?1, ?2) ON CONFLICT (vm) DO UPDATE SET state = excluded.state";
            tx.prepare_cached(sql)?
                .execute(params![state.vm.to_string(), json(state)?])?;
        }
        Write::Order(record) => {
            let sql = "INSERT INTO orders (id, vm, epoch, t, pending, record) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                ON CONFLICT (id) DO UPDATE SET pending = excluded.pending, record = excluded.record";
            let (o, epoch) = (&record.order, i64::try_from(record.order.epoch.0).unwrap_or(i64::MAX));
            let pending = i64::from(record.pending());
            let row = params![
                o.id.to_string(),
                o.vm.to_string(),
                epoch,
                record.t.0,
                pending,
                json(record)?
            ];
            tx.prepare_cached(sql)?.execute(row)?;
        }
        Write::Event(event) => {
            let sql = "INSERT INTO events (t, vm, event) VALUES (?1, ?2, ?3)";
            tx.prepare_cached(sql)?
                .execute(params![event.t.0, event.vm.to_string(), json(event)?])?;
        }
        Write::Decision(d) => {
            let sql = "INSERT INTO decisions (id, t, vm, decision) VALUES (?1, ?2, ?3, ?4)";
            let id = i64::try_from(d.id.0).unwrap_or(i64::MAX);
            tx.prepare_cached(sql)?
                .execute(params![id, d.t.0, d.vm.to_string(), json(d)?])?;
        }
        Write::Slots(rows) => {
            let sql = "INSERT OR REPLACE INTO slots VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
            let mut statement = tx.prepare_cached(sql)?;
            for row in rows {
                let u = row.usage;
                let figures = (
                    u.cpu_cores,
                    u.wait_ms_per_s,
                    u.rss_bytes,
                    u.net_bytes_per_s,
                    u.disk_bytes_per_s,
                );
                let (a, b, c, d, e) = figures;
                statement.execute(params![row.start.0, row.key.to_string(), a, b, c, d, e, row.disturbed])?;
            }
        }
        Write::Mode(mode) => {
            let sql = "INSERT OR REPLACE INTO settings (key, value) VALUES ('mode', ?1)";
            tx.prepare_cached(sql)?.execute([json(mode)?])?;
        }
    }
    Ok(())
}

fn json(value: &impl Serialize) -> rusqlite::Result<String> {
    serde_json::to_string(value).map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))
}

/// Two processes that give orders from one store would disagree: the second one is turned away. A lock file of its own,
/// since SQLite's locks are held during transactions only.
fn lock(file: &Path) -> Result<File, StoreError> {
    let mut name = file.as_os_str().to_owned();
    name.push(".lock");
    let io = |source| StoreError::Io {
        file: file.to_owned(),
        source,
    };
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&name)
        .map_err(io)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked { file: file.to_owned() }),
        Err(TryLockError::Error(source)) => Err(io(source)),
    }
}

/// The file's name with the error, and the common troubles in plain words.
fn named(file: &Path, source: rusqlite::Error) -> StoreError {
    let file = file.to_owned();
    match source.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Locked { file },
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => StoreError::NotAStore {
            file,
            reason: source.to_string(),
        },
        _ => StoreError::Sql { file, source },
    }
}
