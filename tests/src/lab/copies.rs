//! All QEMUs of one VM, on whichever hosts: which of them ran when, and how long the one that ran waited for a CPU.
//!
//! A thread looks each 100 ms. It speaks to each QEMU by the second `-qmp` socket of its command line, which a shadow has
//! too, as its command line is derived from the primary's.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde_json::json;
use umbra_api::VmId;

use super::host::Host;
use super::qmp::Qmp;
use super::sched::Reader;
use super::{sys, vm};

const LOOK: Duration = Duration::from_millis(100);
/// New copies are searched for in one of so many looks: /proc is long, and a shadow waits for seconds before it can run.
const SEARCH_EVERY: u32 = 5;

/// One look at one copy.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Look {
    pub at: Instant,
    pub pid: i32,
    /// It was `running` then.
    pub running: bool,
    /// Since the last look at this copy.
    pub run_ns: u64,
    pub wait_ns: u64,
}

/// STOP or RESUME of one copy.
#[derive(Clone, PartialEq, Debug)]
pub struct Turn {
    pub pid: i32,
    pub host: String,
    pub event: String,
    pub at_us: i64,
}

#[derive(Default)]
struct Book {
    looks: Vec<Look>,
    turns: Vec<Turn>,
    /// More than one copy was running in the same look.
    doubles: Vec<String>,
    /// When a process had ended, by the wall clock.
    ends: BTreeMap<i32, i64>,
    /// From when on each copy's events are heard, by the wall clock.
    since: BTreeMap<i32, i64>,
    /// Hosts of the copies that ran in the last look.
    running: Vec<String>,
    /// An operator has made room on a disk that was full, and lets those go on that QEMU stopped for it.
    room: bool,
}

pub struct Copies {
    stop: Arc<AtomicBool>,
    search: Arc<AtomicBool>,
    book: Arc<Mutex<Book>>,
    thread: Option<JoinHandle<()>>,
}

impl Copies {
    pub fn watch(hosts: &[Host], id: VmId) -> Result<Self> {
        let (stop, book) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Book::default())));
        let search = Arc::new(AtomicBool::new(true));
        let mut watcher = Watcher {
            hosts: hosts.to_vec(),
            id,
            known: BTreeMap::new(),
            book: book.clone(),
        };
        let (until, wanted) = (stop.clone(), search.clone());
        let thread = std::thread::Builder::new().name("copies".into()).spawn(move || {
            let mut next = Instant::now();
            for n in 0u32.. {
                if until.load(Ordering::Relaxed) {
                    break;
                }
                if wanted.swap(false, Ordering::Relaxed) || n.is_multiple_of(SEARCH_EVERY) {
                    watcher.discover();
                }
                watcher.look();
                next = (next + LOOK).max(Instant::now());
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        })?;
        Ok(Self {
            stop,
            search,
            book,
            thread: Some(thread),
        })
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(|p| p.into_inner())
    }

    pub fn looks(&self) -> Vec<Look> {
        self.book().looks.clone()
    }

    /// Times at which two copies ran: there must be none. Both by what QEMU answered when asked, and by its own STOP
    /// and RESUME events, which miss nothing between two questions.
    pub fn doubles(&self) -> Vec<String> {
        let book = self.book();
        let mut doubles = book.doubles.clone();
        doubles.extend(overlaps(&book.turns, &book.since, &book.ends));
        doubles
    }

    /// Hosts on which a copy ran at the last look, at most a moment ago.
    pub fn running(&self) -> Vec<String> {
        self.book().running.clone()
    }

    /// Whether these processes' events are heard; if not, new ones are searched for at the next look. What one that is not heard yet
    /// did before is not known.
    pub fn hears(&self, pids: &[i32]) -> bool {
        let all = pids.iter().all(|p| self.book().since.contains_key(p));
        if !all {
            self.search.store(true, Ordering::Relaxed);
        }
        all
    }

    /// There is room again on a disk that was full: `cont` for each copy that QEMU stopped for it, as an operator would.
    pub fn made_room(&self) {
        self.book().room = true;
    }

    /// All STOPs and RESUMEs so far, in the order of their times.
    pub fn turns(&self) -> Vec<Turn> {
        let mut turns = self.book().turns.clone();
        turns.sort_by_key(|t| t.at_us);
        turns
    }

    /// Milliseconds that the running copy waited in each second from `start`, which the machine's `seconds` follow.
    pub fn waits_ms(&self, start: Instant, seconds: usize) -> Vec<f64> {
        waits_ms(&self.looks(), start, seconds)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

/// From each STOP to the RESUME of *another* copy that follows it: a switchover, in milliseconds by the QEMUs' own clock.
pub fn switchovers_ms(turns: &[Turn]) -> Vec<f64> {
    let mut found = Vec::new();
    for (i, stop) in turns.iter().enumerate().filter(|(_, t)| t.event == "STOP") {
        let next = turns.iter().skip(i + 1).find(|t| t.event == "RESUME");
        if let Some(resume) = next.filter(|r| r.pid != stop.pid) {
            found.push((resume.at_us - stop.at_us) as f64 / 1e3);
        }
    }
    found
}

/// When two copies ran at once, by their events. A copy whose first event is STOP ran before it, as long as its events were heard; one
/// without events is not judged. `ends`: when a process had ended.
fn overlaps(turns: &[Turn], since: &BTreeMap<i32, i64>, ends: &BTreeMap<i32, i64>) -> Vec<String> {
    let mut turns = turns.to_vec();
    turns.sort_by_key(|t| t.at_us);
    // Pid, from, to.
    let mut runs: Vec<(i32, i64, i64)> = Vec::new();
    for t in &turns {
        let known = runs.iter().any(|r| r.0 == t.pid);
        let open = runs.iter_mut().find(|r| r.0 == t.pid && r.2 == i64::MAX);
        match (t.event.as_str(), open) {
            ("STOP", Some(run)) => run.2 = t.at_us,
            ("STOP", None) if !known => runs.push((t.pid, since.get(&t.pid).copied().unwrap_or(i64::MIN), t.at_us)),
            ("RESUME", None) => runs.push((t.pid, t.at_us, i64::MAX)),
            _ => {}
        }
    }
    for run in runs.iter_mut().filter(|r| r.2 == i64::MAX) {
        run.2 = ends.get(&run.0).copied().unwrap_or(i64::MAX);
    }
    let pairs = runs
        .iter()
        .enumerate()
        .flat_map(|(i, a)| runs.iter().skip(i + 1).map(move |b| (a, b)));
    pairs
        .filter(|(a, b)| a.0 != b.0 && a.1.max(b.1) < a.2.min(b.2))
        .map(|(a, b)| {
            format!(
                "processes {} and {} ran at the same time, by their own events: {a:?} {b:?}",
                a.0, b.0
            )
        })
        .collect()
}

fn waits_ms(looks: &[Look], start: Instant, seconds: usize) -> Vec<f64> {
    let mut sums = vec![0.0; seconds];
    for look in looks.iter().filter(|l| l.running) {
        let Some(second) = look.at.checked_duration_since(start).map(|d| d.as_secs() as usize) else {
            continue;
        };
        if let Some(sum) = sums.get_mut(second) {
            *sum += look.wait_ns as f64 / 1e6;
        }
    }
    sums
}

struct Copy {
    start: u64,
    host: String,
    path: Option<PathBuf>,
    qmp: Option<Qmp>,
    /// When its events began to be heard.
    since: Option<i64>,
    reader: Reader,
    last: super::sched::Ran,
    events: usize,
}

struct Watcher {
    hosts: Vec<Host>,
    id: VmId,
    known: BTreeMap<i32, Copy>,
    book: Arc<Mutex<Book>>,
}

impl Watcher {
    fn look(&mut self) {
        let now = Instant::now();
        let mut running = Vec::new();
        let mut gone = Vec::new();
        for (pid, copy) in &mut self.known {
            if sys::start_time(*pid) != Some(copy.start) {
                gone.push(*pid);
                continue;
            }
            let status = copy.status();
            let runs = status.as_deref() == Some("running");
            if runs {
                running.push(*pid);
            }
            if status.as_deref() == Some("io-error") && self.book.lock().unwrap_or_else(|p| p.into_inner()).room {
                copy.go_on();
            }
            let mut book = self.book.lock().unwrap_or_else(|p| p.into_inner());
            if let Some(since) = copy.since {
                book.since.insert(*pid, since);
            }
            copy.take_turns(*pid, &mut book.turns);
            if let Some(at) = copy.ended() {
                book.ends.insert(*pid, at);
            }
            if let Ok(sum) = copy.reader.read(*pid) {
                let (run_ns, wait_ns) = (sum.run_ns - copy.last.run_ns, sum.wait_ns - copy.last.wait_ns);
                copy.last = sum;
                book.looks.push(Look {
                    at: now,
                    pid: *pid,
                    running: runs,
                    run_ns,
                    wait_ns,
                });
            }
        }
        // A switchover may fall between two questions: only who still runs when asked again counts.
        if running.len() > 1 {
            running.retain(|pid| {
                self.known
                    .get_mut(pid)
                    .and_then(|c| c.status())
                    .is_some_and(|s| s == "running")
            });
        }
        let mut book = self.book.lock().unwrap_or_else(|p| p.into_inner());
        book.running = running
            .iter()
            .filter_map(|pid| Some(self.known.get(pid)?.host.clone()))
            .collect();
        if running.len() > 1 {
            book.doubles
                .push(format!("processes {running:?} were running at the same time"));
        }
        for pid in gone {
            if let Some(mut copy) = self.known.remove(&pid) {
                copy.take_turns(pid, &mut book.turns);
                book.ends.insert(pid, copy.ended().unwrap_or_else(wall_us));
            }
        }
    }

    fn discover(&mut self) {
        for host in &self.hosts {
            for pid in vm::qemus(host, self.id) {
                // It may be gone by now.
                let Some(start) = sys::start_time(pid) else { continue };
                self.known.entry(pid).or_insert_with(|| Copy {
                    start,
                    host: host.name.clone(),
                    path: vm::monitor_of(pid, 1),
                    qmp: None,
                    since: None,
                    reader: Reader::default(),
                    last: super::sched::Ran::default(),
                    events: 0,
                });
            }
        }
    }
}

impl Copy {
    fn status(&mut self) -> Option<String> {
        if self.qmp.is_none() {
            self.qmp = Qmp::connect(self.path.as_deref()?, Duration::from_millis(300)).ok();
            self.since = self.qmp.is_some().then(wall_us);
        }
        self.qmp.as_ref()?.status().ok()
    }

    /// When the kernel had closed its sockets, which it does after the last of its threads: others can hear of its death, and act on
    /// it, before the next look.
    fn ended(&self) -> Option<i64> {
        self.qmp.as_ref()?.closed()
    }

    fn go_on(&self) {
        // If it does not take, QEMU stops it once more, and it is asked again.
        let _ = self
            .qmp
            .as_ref()
            .map(|q| q.execute("cont", json!({}), Duration::from_secs(5)));
    }

    fn take_turns(&mut self, pid: i32, turns: &mut Vec<Turn>) {
        let Some(qmp) = &self.qmp else { return };
        let events = qmp.events();
        for e in events
            .iter()
            .skip(self.events)
            .filter(|e| e.name == "STOP" || e.name == "RESUME")
        {
            turns.push(Turn {
                pid,
                host: self.host.clone(),
                event: e.name.clone(),
                at_us: e.at_us,
            });
        }
        self.events = events.len();
    }
}

/// The wall clock in microseconds, as QEMU stamps its events.
pub fn wall_us() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_micros() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(pid: i32, event: &str, at_us: i64) -> Turn {
        Turn {
            pid,
            host: "a".into(),
            event: event.into(),
            at_us,
        }
    }

    #[test]
    fn a_switchover_is_stop_here_and_resume_there() {
        let turns = [
            turn(1, "STOP", 1_000),
            turn(1, "RESUME", 3_000),
            turn(1, "STOP", 10_000),
            turn(2, "RESUME", 18_500),
        ];
        assert_eq!(switchovers_ms(&turns), vec![8.5]);
    }

    #[test]
    fn two_at_once_are_found_between_two_looks() {
        let heard = BTreeMap::new();
        let good = [
            turn(1, "STOP", 10),
            turn(2, "RESUME", 12),
            turn(2, "STOP", 20),
            turn(1, "RESUME", 25),
        ];
        assert!(overlaps(&good, &heard, &BTreeMap::new()).is_empty());
        let early = [turn(2, "RESUME", 9), turn(1, "STOP", 10)];
        assert_eq!(overlaps(&early, &heard, &BTreeMap::new()).len(), 1);
        let again = [turn(1, "STOP", 10), turn(2, "RESUME", 12), turn(1, "RESUME", 30)];
        assert_eq!(overlaps(&again, &heard, &BTreeMap::new()).len(), 1);
        assert!(
            overlaps(&again, &heard, &[(2, 29)].into()).is_empty(),
            "the second one was gone by then"
        );
        let late = [turn(1, "STOP", 10), turn(2, "STOP", 40)];
        assert_eq!(overlaps(&late, &heard, &BTreeMap::new()).len(), 1);
        assert!(
            overlaps(&late, &[(2, 30)].into(), &BTreeMap::new()).is_empty(),
            "the second one was found only when it ran already"
        );
    }

    #[test]
    fn only_the_running_copy_counts() {
        let t = Instant::now();
        let look = |ms: u64, running, wait_ms: u64| Look {
            at: t + Duration::from_millis(ms),
            pid: 1,
            running,
            run_ns: 0,
            wait_ns: wait_ms * 1_000_000,
        };
        let looks = [
            look(100, true, 30),
            look(900, true, 30),
            look(950, false, 500),
            look(1000, true, 5),
            look(9000, true, 5),
        ];
        assert_eq!(waits_ms(&looks, t, 2), vec![60.0, 5.0]);
    }
}
