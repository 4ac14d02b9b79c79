//! How long a process ran and how long it waited for a CPU, by the scheduler's own books.

use std::collections::HashMap;
use std::io;

/// Sums over all threads since the first look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ran {
    pub run_ns: u64,
    pub wait_ns: u64,
}

/// Reads `/proc/PID/task/*/schedstat` and keeps the sums growing when threads end.
#[derive(Default)]
pub struct Reader {
    last: HashMap<i32, Ran>,
    sum: Ran,
    seen: bool,
}

impl Reader {
    /// The sums until now. An error when the process is gone.
    pub fn read(&mut self, pid: i32) -> io::Result<Ran> {
        let mut now = HashMap::new();
        for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let entry = entry?;
            let tid = entry.file_name().to_str().and_then(|s| s.parse::<i32>().ok());
            let text = std::fs::read_to_string(entry.path().join("schedstat"));
            if let (Some(tid), Some(ran)) = (tid, text.ok().as_deref().and_then(parse)) {
                now.insert(tid, ran);
            }
        }
        if now.is_empty() {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.advance(now);
        Ok(self.sum)
    }

    fn advance(&mut self, now: HashMap<i32, Ran>) {
        for (tid, ran) in &now {
            // A thread that appears later counts from zero; what there was at the first look does not count.
            let before = self
                .last
                .get(tid)
                .copied()
                .unwrap_or(if self.seen { Ran::default() } else { *ran });
            self.sum.run_ns += ran.run_ns.saturating_sub(before.run_ns);
            self.sum.wait_ns += ran.wait_ns.saturating_sub(before.wait_ns);
        }
        self.last = now;
        self.seen = true;
    }
}

/// `run_ns wait_ns timeslices`
fn parse(text: &str) -> Option<Ran> {
    let mut fields = text.split_ascii_whitespace().map(str::parse);
    Some(Ran {
        run_ns: fields.next()?.ok()?,
        wait_ns: fields.next()?.ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(run_ns: u64, wait_ns: u64) -> Ran {
        Ran { run_ns, wait_ns }
    }

    #[test]
    fn threads_come_and_go() {
        let mut r = Reader::default();
        r.advance([(1, ran(100, 10)), (2, ran(50, 5))].into());
        assert_eq!(r.sum, ran(0, 0), "what was before the first look does not count");
        r.advance([(1, ran(110, 11)), (3, ran(7, 7))].into());
        assert_eq!(r.sum, ran(17, 8));
        r.advance([(3, ran(8, 9))].into());
        assert_eq!(r.sum, ran(18, 10));
    }

    #[test]
    fn own_times_are_read() {
        let mut r = Reader::default();
        r.read(std::process::id() as i32).unwrap();
        assert!(r.read(-5).is_err());
        assert_eq!(parse("12 34 5\n"), Some(ran(12, 34)));
        assert_eq!(parse("x"), None);
    }
}
