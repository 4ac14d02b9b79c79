//! The stream of a real QEMU: held, paced, parsed, batched, applied, synthesized anew, and loaded by a second QEMU that
//! runs on from there.

use std::error::Error;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use umbra_api::wire::setup::StreamSetup;
use umbra_replicator::encode::{self, Decoder, Encoder};
use umbra_replicator::pacing::{Action, Pacer, Settings};
use umbra_replicator::qmp::{Client, Mark};
use umbra_replicator::ram::{RamFile, ShadowRam};
use umbra_replicator::stream::{Event, Limits, Parser, Section, StreamError, return_path};
use umbra_replicator::synth::Synth;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const QEMU: &str = "qemu-system-x86_64";
const MIB: u64 = 64;
const PAGES: usize = (MIB << 20 >> 12) as usize;
const LONG: Duration = Duration::from_secs(60);

/// A QEMU that ends with the test.
struct Vm {
    child: Child,
    qmp: Client,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vm {
    fn start(dir: &Path, name: &str, args: &[String]) -> Result<Self> {
        let socket = dir.join(format!("{name}.qmp"));
        let child = Command::new(QEMU)
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-accel",
                "tcg",
                "-m",
                &MIB.to_string(),
            ])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .args(args)
            .stdin(Stdio::null())
            .spawn()?;
        let started = Instant::now();
        let mut child = Some(child);
        loop {
            match Client::connect(&socket, LONG) {
                Ok(qmp) => {
                    let child = child.take().ok_or("started twice")?;
                    let vm = Self { child, qmp };
                    vm.capabilities(&["events"])?;
                    return Ok(vm);
                }
                // The socket is there a little after the process: nothing tells when.
                Err(e) => {
                    if let Some(c) = &mut child
                        && let Some(status) = c.try_wait()?
                    {
                        return Err(format!("{name} ended with {status}: {e}").into());
                    }
                    if started.elapsed() > LONG {
                        let _ = child.take().map(|mut c| c.kill());
                        return Err(e.into());
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    fn capabilities(&self, on: &[&str]) -> Result<Value> {
        let list: Vec<_> = on.iter().map(|c| json!({"capability": c, "state": true})).collect();
        Ok(self
            .qmp
            .execute("migrate-set-capabilities", json!({ "capabilities": list }))?)
    }

    /// Hands QEMU one end of a socket pair under this name.
    fn socket(&self, name: &str) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.qmp
            .execute_with_fd("getfd", json!({ "fdname": name }), theirs.as_fd())?;
        ours.set_read_timeout(Some(LONG))?;
        Ok(ours)
    }

    fn wait_migration(&self, since: Mark, want: &str) -> Result<()> {
        let got = self.qmp.wait(since, LONG, |e| {
            let status = e.status().filter(|_| e.name == "MIGRATION")?;
            ["completed", "failed", "cancelled", want]
                .contains(&status)
                .then(|| status.to_owned())
        })?;
        if got == want {
            Ok(())
        } else {
            Err(format!("migration is {got}, not {want}").into())
        }
    }

    fn status(&self) -> Result<String> {
        let v = self.qmp.execute("query-status", Value::Null)?;
        Ok(v["status"].as_str().ok_or("no status")?.to_owned())
    }

    fn dirty_syncs(&self) -> Result<u64> {
        let v = self.qmp.execute("query-migrate", Value::Null)?;
        Ok(v["ram"]["dirty-sync-count"].as_u64().unwrap_or(0))
    }

    /// Guest memory as QEMU itself writes it out.
    fn memory(&self, to: &Path) -> Result<Vec<u8>> {
        self.qmp
            .execute_for("pmemsave", json!({"val": 0, "size": MIB << 20, "filename": to}), LONG)?;
        Ok(std::fs::read(to)?)
    }
}

/// What both replicators hold, in one process.
#[derive(Default)]
struct Ends {
    setup: Option<StreamSetup>,
    ram: Option<ShadowRam>,
    encoder: Option<Encoder>,
    decoder: Option<Decoder>,
    covered: Vec<bool>,
    pings: Vec<u32>,
    /// Pages since the last section ended.
    pages: Vec<(u16, u64)>,
    sections: Vec<Ended>,
    device: Vec<u8>,
    complete: bool,
    batches: u64,
}

impl Ends {
    fn take(&mut self, e: Event<'_>, file: &Path) -> Result<()> {
        match e {
            Event::Setup(s) => {
                let file = RamFile::open_or_create(file, MIB << 20)?;
                self.ram = Some(ShadowRam::new(s, vec![("pc.ram".into(), file)])?);
                self.setup = Some(s.clone());
                let mut encoder = Encoder::new(encode::Settings {
                    level_min: 1,
                    level_rounds: 1,
                    level_max: 3,
                    delta_cache_bytes: 16 << 20,
                })?;
                encoder.setup(s);
                (self.encoder, self.decoder) = (Some(encoder), Some(Decoder::new()?));
                self.covered = vec![false; PAGES];
            }
            Event::Ping(n) => self.pings.push(n),
            Event::Page { block, page, data } => self.page(block, page, Some(data))?,
            Event::Zero { block, page } => self.page(block, page, None)?,
            Event::Section(s) => {
                self.flush()?;
                self.sections.push((std::mem::take(&mut self.pages), s));
            }
            Event::Device(piece) => self.device.extend_from_slice(piece),
            Event::Complete { device_bytes } => {
                assert_eq!(device_bytes, self.device.len() as u64);
                self.complete = true;
            }
        }
        Ok(())
    }

    fn page(&mut self, block: u16, page: u64, data: Option<&[u8; 4096]>) -> Result<()> {
        let setup = self.setup.as_ref().ok_or("a page before the setup")?;
        if setup.block("pc.ram") == Some(block) {
            self.covered[page as usize] = true;
        }
        self.pages.push((block, page));
        self.feed_link(|e, out| e.page(block, page, data, out))
    }

    fn flush(&mut self) -> Result<()> {
        self.feed_link(|e, out| e.flush(out))
    }

    fn feed_link(
        &mut self,
        f: impl FnOnce(&mut Encoder, &mut dyn FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<()>,
    ) -> Result<()> {
        let (Some(encoder), Some(decoder), Some(ram)) = (&mut self.encoder, &mut self.decoder, &mut self.ram) else {
            return Err("no setup yet".into());
        };
        let batches = &mut self.batches;
        Ok(f(encoder, &mut |payload: &[u8]| {
            *batches += 1;
            decoder.apply(payload, ram).map(drop).map_err(std::io::Error::other)
        })?)
    }
}

/// The end of a section, and its pages.
type Ended = (Vec<(u16, u64)>, Section);

/// A source in one thread: reads, paces, answers.
struct Source {
    socket: UnixStream,
    parser: Parser,
    ends: Ends,
    file: PathBuf,
    /// All of the stream, to be parsed again.
    bytes: Vec<u8>,
    buf: Vec<u8>,
}

impl Source {
    /// Reads once; gives back the sections that ended, and the pages before their ends.
    fn read(&mut self) -> Result<Vec<Ended>> {
        let n = self.socket.read(&mut self.buf)?;
        if n == 0 {
            return Err("the primary closed its migration".into());
        }
        self.bytes.extend_from_slice(&self.buf[..n]);
        let (ends, file) = (&mut self.ends, &self.file);
        self.parser
            .push(&self.buf[..n], &mut |e: Event<'_>| ends.take(e, file))?;
        for n in self.ends.pings.drain(..) {
            self.socket.write_all(&return_path::pong(n))?;
        }
        Ok(std::mem::take(&mut self.ends.sections))
    }

    /// Bytes received, and those that wait.
    fn mark(&self) -> Result<u64> {
        let mut waiting = 0i32;
        // SAFETY: FIONREAD writes one int to the address, which is that of a live local variable.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::FIONREAD, &mut waiting) } {
            0 => Ok(self.bytes.len() as u64 + waiting as u64),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }
}

fn present() -> Option<String> {
    let out = Command::new(QEMU).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    Some(text.split_whitespace().nth(3)?.to_owned())
}

#[test]
fn a_held_stream_is_rebuilt_and_a_second_qemu_runs_on() {
    let Some(version) = present() else {
        println!("SKIPPED: {QEMU} is not installed");
        return;
    };
    let (major, minor) = version.split_once('.').map_or((0, 0), |(a, b)| {
        (
            a.parse().unwrap_or(0),
            b.split('.').next().and_then(|b| b.parse().ok()).unwrap_or(0),
        )
    });
    if (major, minor) < (8, 1) {
        println!("SKIPPED: {QEMU} {version} cannot hold a migration (8.1 can)");
        return;
    }
    let dir = tempfile::Builder::new()
        .prefix("umbra-stream-")
        .tempdir_in("/dev/shm")
        .unwrap();
    run(dir.path()).unwrap();
}

fn run(dir: &Path) -> Result<()> {
    let ram = dir.join("ram");
    let primary = Vm::start(dir, "primary", &["-M".into(), "q35".into()])?;
    let mut source = hold(&primary, &ram)?;
    two_rounds(&primary, &mut source)?;

    // The shadow starts while the primary is held, as it maps the file that the seed made.
    let object = format!(
        "memory-backend-file,id=pc.ram,size={MIB}M,mem-path={},share=on",
        ram.display()
    );
    let args = [
        "-object",
        &object,
        "-M",
        "q35,memory-backend=pc.ram",
        "-incoming",
        "defer",
        "-S",
    ]
    .map(String::from);
    let shadow = Vm::start(dir, "shadow", &args)?;
    shadow.capabilities(&["x-ignore-shared"])?;
    let loaded = shadow.qmp.mark();
    let mut feed = shadow.socket("in0")?;
    shadow.qmp.execute("migrate-incoming", json!({"uri": "fd:in0"}))?;
    let mut synth = Synth::new(source.ends.setup.as_ref().ok_or("no setup")?)?;
    feed.write_all(&synth.preamble(source.ends.ram.as_ref().ok_or("no RAM")?))?;

    let stopped = primary.qmp.mark();
    switch(&mut source)?;
    feed.write_all(&synth.finish(source.ends.ram.as_ref().ok_or("no RAM")?))?;
    feed.write_all(&source.ends.device)?;
    shadow.wait_migration(loaded, "completed")?;
    source.socket.write_all(&return_path::shut(0))?;
    primary.wait_migration(stopped, "completed")?;
    // QEMU says 'completed' before its run state follows.
    let late = Instant::now() + Duration::from_secs(30);
    while primary.status()? == "finish-migrate" && Instant::now() < late {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(primary.status()?, "postmigrate");
    assert_eq!(shadow.status()?, "paused");

    assert!(source.ends.covered.iter().all(|c| *c), "pages that never came");
    same_memory(&primary.memory(&dir.join("a"))?, &std::fs::read(&ram)?);
    same_memory(&primary.memory(&dir.join("b"))?, &shadow.memory(&dir.join("c"))?);
    shadow.qmp.execute("cont", Value::Null)?;
    assert_eq!(shadow.status()?, "running");
    again(&source);
    Ok(())
}

/// Starts a migration that will not end by itself.
fn hold(primary: &Vm, ram: &Path) -> Result<Source> {
    primary.capabilities(&["return-path", "switchover-ack"])?;
    let parameters = json!({"max-bandwidth": 4u64 << 30, "avail-switchover-bandwidth": 4 << 20, "downtime-limit": 100});
    primary.qmp.execute("migrate-set-parameters", parameters)?;
    let socket = primary.socket("mig0")?;
    primary.qmp.execute("migrate", json!({"uri": "fd:mig0"}))?;
    Ok(Source {
        socket,
        parser: Parser::new(Limits::default()),
        ends: Ends::default(),
        file: ram.to_owned(),
        bytes: Vec::new(),
        buf: vec![0; 1 << 20],
    })
}

/// The seed, and a round after a rest.
fn two_rounds(primary: &Vm, source: &mut Source) -> Result<()> {
    let rest = Duration::from_millis(50);
    let mut pacer = Pacer::new(Settings::default(), Instant::now());
    let (mut rounds, mut set_up) = (0, false);
    while rounds < 2 {
        let sections = source.read()?;
        if let Some(setup) = source.ends.setup.as_ref().filter(|_| !set_up) {
            pacer.setup(setup);
            set_up = true;
        }
        if pacer.is_seeding() {
            let count = primary.dirty_syncs()?;
            pacer.synced(count, source.mark()?);
        }
        for (pages, s) in sections {
            pages.iter().for_each(|(block, page)| pacer.page(*block, *page));
            match pacer.section(s, Instant::now()) {
                Action::KeepReading | Action::NotConverging(_) | Action::Rest(_) => {}
                Action::RoundDone(round) => {
                    assert_eq!(round.number, rounds);
                    assert!(round.number > 0 || round.pages >= PAGES as u64, "{round:?}");
                    rounds += 1;
                    // This is the pause that pacing is about.
                    std::thread::sleep(pacer.pause(rest).unwrap_or_default());
                    pacer.woke(source.mark()?, Instant::now());
                }
                Action::RamDone(r) => return Err(format!("the hold ended by itself: {r:?}").into()),
            }
        }
    }
    Ok(())
}

/// Ack first, then read to the end of the device state.
fn switch(source: &mut Source) -> Result<()> {
    source.socket.write_all(&return_path::switchover_ack())?;
    let mut ended = 0;
    while !source.ends.complete {
        ended += source.read()?.iter().filter(|(_, s)| s.end).count();
    }
    assert_eq!(ended, 1);
    assert!(source.parser.is_complete());
    assert_eq!(source.parser.position(), source.bytes.len() as u64);
    Ok(())
}

/// Equal but for the hole below 1 MiB, where devices and firmware lie over RAM.
fn same_memory(a: &[u8], b: &[u8]) {
    assert_eq!(a.len(), b.len());
    let hole = 0xa0..0x100;
    let pages = a.as_chunks::<4096>().0.iter().zip(b.as_chunks::<4096>().0).enumerate();
    let other: Vec<_> = pages
        .filter(|(n, (a, b))| !hole.contains(n) && a != b)
        .map(|(n, _)| n)
        .collect();
    assert!(other.is_empty(), "pages that differ: {other:x?}");
}

/// The same real stream whole, and in small pieces of odd sizes.
fn again(source: &Source) {
    let digest = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let mut p = Parser::new(Limits::default());
        let (mut sum, mut events) = (0u64, 0u64);
        let mut add = |n: u64| sum = sum.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ n;
        for piece in pieces {
            p.push(piece, &mut |e: Event<'_>| {
                match e {
                    Event::Page { block, page, data } => {
                        add(u64::from(block) << 48 | page);
                        data.as_chunks::<8>().0.iter().for_each(|w| add(u64::from_ne_bytes(*w)));
                    }
                    Event::Zero { block, page } => add(u64::from(block) << 48 | page | 1 << 63),
                    Event::Section(s) => add(s.at),
                    Event::Device(piece) => piece.iter().for_each(|b| add((*b).into())),
                    Event::Complete { device_bytes } => add(device_bytes),
                    Event::Setup(_) | Event::Ping(_) => {}
                }
                events += u64::from(!matches!(e, Event::Device(_)));
                Ok::<_, StreamError>(())
            })
            .unwrap();
        }
        assert!(p.is_complete());
        (sum, events)
    };
    let whole = digest(&mut std::iter::once(&source.bytes[..]));
    assert_eq!(digest(&mut source.bytes.chunks(1)), whole);
    assert_eq!(digest(&mut source.bytes.chunks(4099)), whole);
    println!(
        "{} bytes of stream, {} events, {} batches",
        source.bytes.len(),
        whole.1,
        source.ends.batches
    );
}
