//! A probe each millisecond (or so): how long is a guest silent, to the millisecond?

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::net::Netns;
use super::sys;
use super::vm::UDP_ECHO;

/// Send time and, once it is back, arrival time of each probe.
type Probes = Arc<Mutex<Vec<(Instant, Option<Instant>)>>>;

pub struct UdpProber {
    stop: Arc<AtomicBool>,
    probes: Probes,
    threads: Vec<JoinHandle<()>>,
}

impl UdpProber {
    pub fn start(ns: &Netns, to: Ipv4Addr, every: Duration) -> io::Result<Self> {
        let to = SocketAddrV4::new(to, UDP_ECHO);
        let socket = sys::in_netns(ns.fd(), || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect(to)?;
            Ok(socket)
        })?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let (stop, probes) = (Arc::new(AtomicBool::new(false)), Probes::default());
        let (send_socket, send_stop, sent) = (socket.try_clone()?, stop.clone(), probes.clone());
        let (receive_stop, received) = (stop.clone(), probes.clone());
        let threads = vec![
            std::thread::Builder::new()
                .name("probe-send".into())
                .spawn(move || send(&send_socket, every, &send_stop, &sent))?,
            std::thread::Builder::new()
                .name("probe-back".into())
                .spawn(move || receive(&socket, &receive_stop, &received))?,
        ];
        Ok(Self { stop, probes, threads })
    }

    /// Stops, and tells what was seen.
    pub fn finish(mut self) -> Silence {
        self.end();
        let probes = std::mem::take(&mut *self.probes.lock().unwrap_or_else(|p| p.into_inner()));
        silence(&probes)
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for t in self.threads.drain(..) {
            let _ = t.join();
        }
    }
}

impl Drop for UdpProber {
    fn drop(&mut self) {
        self.end();
    }
}

fn send(socket: &UdpSocket, every: Duration, stop: &AtomicBool, probes: &Mutex<Vec<(Instant, Option<Instant>)>>) {
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let number = {
            let mut probes = probes.lock().unwrap_or_else(|p| p.into_inner());
            probes.push((Instant::now(), None));
            probes.len() as u64 - 1
        };
        // A probe that cannot be sent is a lost one.
        let _ = socket.send(&number.to_le_bytes());
        next = (next + every).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn receive(socket: &UdpSocket, stop: &AtomicBool, probes: &Mutex<Vec<(Instant, Option<Instant>)>>) {
    let mut buffer = [0u8; 64];
    while !stop.load(Ordering::Relaxed) {
        let Ok(8) = socket.recv(&mut buffer) else { continue };
        let at = Instant::now();
        let number = buffer.first_chunk().map(|b| u64::from_le_bytes(*b)).unwrap_or(u64::MAX);
        let mut probes = probes.lock().unwrap_or_else(|p| p.into_inner());
        if let Some(probe) = usize::try_from(number).ok().and_then(|n| probes.get_mut(n)) {
            probe.1.get_or_insert(at);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Silence {
    pub sent: usize,
    pub lost: usize,
    /// From the first to the last probe of the longest row that was lost.
    pub longest_lost_ms: f64,
    /// Longest time between two answers.
    pub longest_gap_ms: f64,
}

fn silence(probes: &[(Instant, Option<Instant>)]) -> Silence {
    // What was sent last may still be under way when the prober stops.
    let answered = probes.iter().rposition(|p| p.1.is_some()).map_or(0, |i| i + 1);
    let probes = probes.get(..answered).unwrap_or_default();
    let mut longest = Duration::ZERO;
    let mut row: Option<Instant> = None;
    for (sent, back) in probes {
        if back.is_some() {
            row = None;
        } else {
            longest = longest.max(*sent - *row.get_or_insert(*sent));
        }
    }
    let mut back: Vec<Instant> = probes.iter().filter_map(|p| p.1).collect();
    back.sort_unstable();
    let gap = back.windows(2).map(|w| w[1] - w[0]).max().unwrap_or_default();
    Silence {
        sent: probes.len(),
        lost: probes.iter().filter(|p| p.1.is_none()).count(),
        longest_lost_ms: longest.as_secs_f64() * 1e3,
        longest_gap_ms: gap.as_secs_f64() * 1e3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_counted_from_the_probes() {
        let t = Instant::now();
        let at = |n: u64| t + Duration::from_millis(n);
        let mut probes: Vec<_> = (0..20).map(|n| (at(n), Some(at(n + 1)))).collect();
        for p in &mut probes[5..10] {
            p.1 = None;
        }
        probes.push((at(20), None));
        let s = silence(&probes);
        assert_eq!((s.sent, s.lost, s.longest_lost_ms, s.longest_gap_ms), (20, 5, 4.0, 6.0));
        assert_eq!(silence(&[]), Silence::default());
    }
}
