//! QEMU's own migration of the same guest: into sockets that count and forget.
//!
//! A migration without a return path asks its destination nothing, so nobody has to load it; multifd's channels neither. What a held
//! multifd migration would send in rounds no QEMU can be made to do here, so that is [`Multifd`]: its channels' zstd streams and
//! packet headers, fed with the very pages of our rounds. For a first copy it is measured beside the real one.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};
use zstd::stream::raw::{Encoder as ZstdStream, InBuffer, Operation, OutBuffer};

use crate::bench::cpu;
use crate::lab::process::wait_for;
use crate::lab::qmp::Qmp;

use super::guest::Guest;

const QMP: Duration = Duration::from_secs(10);
const MIGRATE: Duration = Duration::from_secs(120);

/// What travelled, and the CPU seconds of who sent it.
#[derive(Clone, Copy, Default, Debug)]
pub struct Cost {
    pub bytes: u64,
    pub cpu_s: f64,
}

/// Takes connections, and all their bytes.
struct Sink {
    bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    path: std::path::PathBuf,
}

impl Sink {
    fn new(path: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
        let (bytes, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (sum, end) = (bytes.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut readers = Vec::new();
            for mut connection in listener.incoming().flatten() {
                if end.load(Ordering::Acquire) {
                    break;
                }
                let sum = sum.clone();
                readers.push(std::thread::spawn(move || {
                    let mut room = vec![0; 1 << 18];
                    while let Ok(n @ 1..) = connection.read(&mut room) {
                        sum.fetch_add(n as u64, Ordering::Relaxed);
                    }
                }));
            }
            for r in readers {
                let _ = r.join();
            }
        });
        Ok(Self {
            bytes,
            stop,
            thread: Some(thread),
            path: path.to_owned(),
        })
    }

    /// All bytes, once every connection has ended.
    fn finish(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Release);
        // Wakes the accepting thread.
        drop(std::os::unix::net::UnixStream::connect(&self.path));
        let thread = self.thread.take().context("a sink ends once")?;
        thread.join().map_err(|_| anyhow!("the sink's thread panicked"))?;
        std::fs::remove_file(&self.path)?;
        Ok(self.bytes.load(Ordering::Relaxed))
    }
}

pub fn capabilities(qmp: &Qmp, on: &[&str], off: &[&str]) -> Result<()> {
    let one = |state: bool| move |name: &&str| json!({"capability": name, "state": state});
    let all: Vec<Value> = on.iter().map(one(true)).chain(off.iter().map(one(false))).collect();
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": all }), QMP)?;
    Ok(())
}

/// A whole migration of the stopped guest, which can run on afterwards.
pub fn migrate(guest: &Guest, socket: &Path, multifd: bool) -> Result<Cost> {
    let qmp = &guest.qmp;
    let names = ["multifd"];
    match multifd {
        true => capabilities(qmp, &names, &[])?,
        false => capabilities(qmp, &[], &names)?,
    }
    let compression = if multifd { "zstd" } else { "none" };
    let parameters = json!({"max-bandwidth": 4u64 << 30, "multifd-compression": compression});
    qmp.execute("migrate-set-parameters", parameters, QMP)?;
    let sink = Sink::new(socket)?;
    let before = cpu::of_process(guest.process.pid())?;
    let uri = format!("unix:{}", socket.display());
    qmp.execute("migrate", json!({ "uri": uri }), QMP)?;
    wait_for("QEMU's own migration", MIGRATE, || {
        let info = qmp.execute("query-migrate", json!({}), QMP)?;
        match info["status"].as_str() {
            Some("completed") => Ok(Some(())),
            Some("failed" | "cancelled") => Err(anyhow!("it failed: {info}")),
            _ => Ok(None),
        }
    })?;
    let cpu_s = cpu::of_process(guest.process.pid())? - before;
    capabilities(qmp, &[], &names)?;
    Ok(Cost {
        bytes: sink.finish()?,
        cpu_s,
    })
}

/// Pages that a packet has room for, and bytes of its header: fixed fields and an offset for each of them (QEMU 10, migration/multifd.h).
const PACKET_PAGES: usize = 128;
const PACKET_LEN: u64 = 320 + 8 * PACKET_PAGES as u64;
const CHANNELS: usize = 2;

/// What multifd with zstd's level 1 sends for pages.
pub struct Multifd {
    channels: Vec<ZstdStream<'static>>,
    channel: usize,
    pages: usize,
    room: Vec<u8>,
    pub bytes: u64,
}

impl Multifd {
    pub fn new() -> Result<Self> {
        let channels = (0..CHANNELS).map(|_| ZstdStream::new(1));
        Ok(Self {
            channels: channels.collect::<std::io::Result<_>>()?,
            channel: 0,
            pages: 0,
            room: vec![0; 1 << 18],
            bytes: 0,
        })
    }

    /// Zero pages are an offset in the header only.
    pub fn page(&mut self, data: Option<&[u8; 4096]>) -> Result<()> {
        let channel = self.channels.get_mut(self.channel).context("no channel")?;
        if let Some(data) = data {
            let mut input = InBuffer::around(data);
            while input.pos() < data.len() {
                let mut out = OutBuffer::around(&mut self.room[..]);
                channel.run(&mut input, &mut out)?;
                self.bytes += out.pos() as u64;
            }
        }
        self.pages += 1;
        match self.pages {
            PACKET_PAGES => self.flush(),
            _ => Ok(()),
        }
    }

    /// The end of a packet: it is full, or all memory was looked through.
    pub fn flush(&mut self) -> Result<()> {
        if self.pages == 0 {
            return Ok(());
        }
        let channel = self.channels.get_mut(self.channel).context("no channel")?;
        loop {
            let mut out = OutBuffer::around(&mut self.room[..]);
            let left = channel.flush(&mut out)?;
            self.bytes += out.pos() as u64;
            if left == 0 {
                break;
            }
        }
        self.bytes += PACKET_LEN;
        self.pages = 0;
        self.channel = (self.channel + 1) % CHANNELS;
        Ok(())
    }
}

/// Stops and continues, and says so if QEMU would not.
pub fn run(guest: &Guest, on: bool) -> Result<()> {
    let command = if on { "cont" } else { "stop" };
    guest.qmp.execute(command, json!({}), QMP)?;
    // What is printed meanwhile is seen at once.
    std::io::stdout().flush()?;
    Ok(())
}
