//! A QMP client for whoever watches from outside: the tests' own second socket of each QEMU.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::copies::wall_us;

/// Longest line that is taken from QEMU.
const LINE_MAX: u64 = 4 << 20;

/// An event, at the time that QEMU gave it.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    pub name: String,
    pub at_us: i64,
    pub data: Value,
}

#[derive(Default)]
struct Seen {
    events: Vec<Event>,
    replies: Vec<Value>,
    /// When the connection ended, by the wall clock: QEMU is gone.
    closed: Option<i64>,
}

struct Shared {
    seen: Mutex<Seen>,
    news: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(|p| p.into_inner())
    }
}

pub struct Qmp {
    stream: UnixStream,
    shared: Arc<Shared>,
    next: Mutex<u64>,
}

impl Qmp {
    /// Connects, and retries until QEMU listens.
    pub fn connect(path: &Path, within: Duration) -> Result<Self> {
        let deadline = Instant::now() + within;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(s) => break s,
                Err(e) if Instant::now() > deadline => {
                    return Err(e).with_context(|| format!("QMP {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_write_timeout(Some(within))?;
        let shared = Arc::new(Shared {
            seen: Mutex::default(),
            news: Condvar::new(),
        });
        let reader = BufReader::new(stream.try_clone()?);
        let to = shared.clone();
        std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || read_all(reader, &to))?;
        let qmp = Self {
            stream,
            shared,
            next: Mutex::new(0),
        };
        qmp.execute("qmp_capabilities", json!({}), within)
            .with_context(|| format!("QMP {}", path.display()))?;
        Ok(qmp)
    }

    pub fn execute(&self, command: &str, arguments: Value, within: Duration) -> Result<Value> {
        let id = {
            let mut next = self.next.lock().unwrap_or_else(|p| p.into_inner());
            *next += 1;
            *next
        };
        let line = json!({"execute": command, "arguments": arguments, "id": id}).to_string() + "\n";
        (&self.stream)
            .write_all(line.as_bytes())
            .with_context(|| format!("sending {command}"))?;
        let deadline = Instant::now() + within;
        let mut seen = self.shared.lock();
        loop {
            if let Some(i) = seen.replies.iter().position(|r| r["id"] == id) {
                let reply = seen.replies.swap_remove(i);
                if let Some(error) = reply.get("error") {
                    bail!(
                        "{command}: {}",
                        error["desc"].as_str().unwrap_or("an error without words")
                    );
                }
                return Ok(reply["return"].clone());
            }
            if seen.closed.is_some() {
                bail!("{command}: QEMU closed the connection");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{command}: no answer within {within:?}");
            }
            seen = self
                .shared
                .news
                .wait_timeout(seen, left)
                .unwrap_or_else(|p| p.into_inner())
                .0;
        }
    }

    /// `running`, `paused`, `postmigrate`, …
    pub fn status(&self) -> Result<String> {
        let status = self.execute("query-status", json!({}), Duration::from_secs(5))?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    pub fn events(&self) -> Vec<Event> {
        self.shared.lock().events.clone()
    }

    pub fn closed(&self) -> Option<i64> {
        self.shared.lock().closed
    }

    /// The first event of this name that QEMU gave at or after `since_us`.
    pub fn wait(&self, name: &str, since_us: i64, within: Duration) -> Result<Event> {
        let deadline = Instant::now() + within;
        let mut seen = self.shared.lock();
        loop {
            if let Some(e) = seen.events.iter().find(|e| e.name == name && e.at_us >= since_us) {
                return Ok(e.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || seen.closed.is_some() {
                bail!("no {name} within {within:?}");
            }
            seen = self
                .shared
                .news
                .wait_timeout(seen, left)
                .unwrap_or_else(|p| p.into_inner())
                .0;
        }
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

fn read_all(mut reader: BufReader<UnixStream>, shared: &Shared) {
    loop {
        let mut line = String::new();
        let n = reader.by_ref().take(LINE_MAX).read_line(&mut line);
        let mut seen = shared.lock();
        match n {
            Ok(n) if n > 0 => {
                if let Ok(message) = serde_json::from_str(&line) {
                    take(&mut seen, message);
                }
            }
            _ => seen.closed = Some(wall_us()),
        }
        shared.news.notify_all();
        if seen.closed.is_some() {
            return;
        }
    }
}

fn take(seen: &mut Seen, message: Value) {
    if let Some(name) = message["event"].as_str() {
        let time = &message["timestamp"];
        let at_us = time["seconds"].as_i64().unwrap_or(0) * 1_000_000 + time["microseconds"].as_i64().unwrap_or(0);
        seen.events.push(Event {
            name: name.to_owned(),
            at_us,
            data: message["data"].clone(),
        });
    } else if message.get("id").is_some() {
        seen.replies.push(message);
    }
}
