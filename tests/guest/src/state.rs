//! What the guest's threads tell each other: counters, and what may be changed while it runs.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::burn::{Burner, Rewrite, Work};
use crate::sys;

/// A disk with a journal.
pub struct Disk {
    pub name: String,
    /// The last record that fdatasync has confirmed.
    pub acknowledged: AtomicU64,
}

pub struct State {
    /// Ticks since boot.
    pub counter: AtomicU64,
    pub errors: AtomicU64,
    pub dirty_pages: AtomicU64,
    pub pattern_pages: AtomicU64,
    pub scrubbed_pages: AtomicU64,
    pub dirty_pages_per_s: AtomicU64,
    pub burner: Burner,
    pub work: Work,
    pub rewrite: Rewrite,
    pub disks: Vec<Disk>,
    pub disk_records_per_s: AtomicU64,
}

impl State {
    pub fn new(burner: Burner, work: Work, dirty_pages_per_s: u64, disks: &[String], records_per_s: u64) -> Self {
        State {
            counter: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            dirty_pages: AtomicU64::new(0),
            pattern_pages: AtomicU64::new(0),
            scrubbed_pages: AtomicU64::new(0),
            dirty_pages_per_s: AtomicU64::new(dirty_pages_per_s),
            burner,
            work,
            rewrite: Rewrite::default(),
            disks: disks.iter().map(|name| disk(name)).collect(),
            disk_records_per_s: AtomicU64::new(records_per_s),
        }
    }

    pub fn console_line(&self) -> String {
        format!(
            "C {} err={} t={} dirty={}",
            self.counter.load(Relaxed),
            self.errors.load(Relaxed),
            sys::uptime().as_millis(),
            self.dirty_pages.load(Relaxed)
        )
    }

    pub fn json(&self) -> String {
        let disk = |d: &Disk| format!(r#""{}":{}"#, d.name, d.acknowledged.load(Relaxed));
        let disks: Vec<_> = self.disks.iter().map(disk).collect();
        format!(
            r#"{{"counter":{},"errors":{},"dirty_pages":{},"pattern_pages":{},"scrubbed_pages":{},"uptime_ms":{},"burn":{:.4},"disks":{{{}}}}}"#,
            self.counter.load(Relaxed),
            self.errors.load(Relaxed),
            self.dirty_pages.load(Relaxed),
            self.pattern_pages.load(Relaxed),
            self.scrubbed_pages.load(Relaxed),
            sys::uptime().as_millis(),
            self.burner.share(),
            disks.join(","),
        )
    }
}

fn disk(name: &str) -> Disk {
    Disk {
        name: name.to_owned(),
        acknowledged: AtomicU64::new(0),
    }
}
