//! What one VM (or a host's own work) used, slot by slot.
//!
//! Samples come with intervals of their own, so an interval is spread over the slots it covers, and a slot's value is the
//! mean of what covered it: two agents, a double report or a stepped clock can blur a slot but never inflate it.
//! The newest slots stay *open* for late samples; older ones are *closed*, packed, and kept in a ring.
//!
//! ```text
//!   keep_slots closed, packed │ late_slots + 1 open │ (future: refused by ingest)
//! ```
//! A slot that was covered less than half is a gap. A slot in which Umbra itself copied a VM on the host is *disturbed*:
//! it is kept and shown, and no forecast learns from it.

use std::collections::{BTreeSet, VecDeque};

use umbra_api::UnixMs;

/// Demand and use in one slot, as rates.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Usage {
    /// Running and waiting to run: what the VM would use if it were alone.
    pub cpu_cores: f64,
    /// Run-queue wait in ms per second, all threads together.
    pub wait_ms_per_s: f64,
    pub rss_bytes: f64,
    pub net_bytes_per_s: f64,
    pub disk_bytes_per_s: f64,
}

const FIELDS: usize = 5;

impl Usage {
    fn to_array(self) -> [f64; FIELDS] {
        [
            self.cpu_cores,
            self.wait_ms_per_s,
            self.rss_bytes,
            self.net_bytes_per_s,
            self.disk_bytes_per_s,
        ]
    }

    fn from_array([cpu_cores, wait_ms_per_s, rss_bytes, net_bytes_per_s, disk_bytes_per_s]: [f64; FIELDS]) -> Self {
        Self {
            cpu_cores,
            wait_ms_per_s,
            rss_bytes,
            net_bytes_per_s,
            disk_bytes_per_s,
        }
    }
}

/// How long slots are, how many are kept and for how many a late sample is still merged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    pub slot_ms: u64,
    pub keep_slots: usize,
    pub late_slots: usize,
}

impl Shape {
    /// The slot that contains `t`.
    pub fn slot_of(&self, t: UnixMs) -> i64 {
        t.0.div_euclid(self.len())
    }

    /// The first moment of a slot.
    pub fn start_of(&self, slot: i64) -> UnixMs {
        UnixMs(slot.saturating_mul(self.len()))
    }

    fn len(&self) -> i64 {
        i64::try_from(self.slot_ms).unwrap_or(i64::MAX).max(1)
    }
}

/// What became of a sample.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Added {
    pub merged_ms: u64,
    /// Of slots that were closed already.
    pub too_late_ms: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Open {
    covered_ms: f64,
    /// Rate × covered time.
    sum: [f64; FIELDS],
}

impl Open {
    fn mean(&self, slot_ms: u64) -> Option<Usage> {
        let enough = self.covered_ms > 0.0 && self.covered_ms * 2.0 >= slot_ms as f64;
        enough.then(|| Usage::from_array(self.sum.map(|s| s / self.covered_ms)))
    }
}

/// A closed slot; NaN first is a gap.
type Packed = [f32; FIELDS];

const GAP: Packed = [f32::NAN; FIELDS];

fn unpack(packed: &Packed) -> Option<Usage> {
    (!packed[0].is_nan()).then(|| Usage::from_array(packed.map(f64::from)))
}

#[derive(Clone, Debug)]
pub struct Series {
    shape: Shape,
    closed: VecDeque<Packed>,
    open: VecDeque<Open>,
    /// Index of the oldest open slot; the closed ones end right before it.
    first_open: i64,
    /// Of those that are kept.
    disturbed: BTreeSet<i64>,
}

impl Series {
    pub fn new(shape: Shape) -> Self {
        Self {
            shape,
            closed: VecDeque::new(),
            open: VecDeque::new(),
            first_open: 0,
            disturbed: BTreeSet::new(),
        }
    }

    /// What is measured in this slot is not demand. Copies are told of in any order: one may end while another one, which
    /// began earlier, goes on.
    pub fn disturb(&mut self, slot: i64) {
        self.disturbed.insert(slot);
        let kept = self
            .shape
            .keep_slots
            .saturating_add(self.shape.late_slots)
            .saturating_add(1);
        let first = self.first_slot();
        while self.disturbed.len() > kept || self.disturbed.first().is_some_and(|s| *s < first) {
            self.disturbed.pop_first();
        }
    }

    /// The newest slot before `before` that was measured and tells of demand.
    pub fn newest_undisturbed(&self, before: i64) -> Option<i64> {
        let mut newest = self.newest_before(before)?;
        while self.is_disturbed(newest) {
            newest = self.newest_before(newest)?;
        }
        Some(newest)
    }

    /// At most `n` slots that end with `last`, as [`Series::window`] has them; disturbed ones are gaps.
    pub fn demand(&self, last: i64, n: usize) -> Vec<Option<Usage>> {
        let mut window = self.window(last, n);
        let end = last.min(self.next_slot() - 1);
        for (back, usage) in (0i64..).zip(window.iter_mut().rev()) {
            if self.is_disturbed(end - back) {
                *usage = None;
            }
        }
        window
    }

    pub fn is_disturbed(&self, slot: i64) -> bool {
        self.disturbed.contains(&slot)
    }

    /// Merges a sample: `usage` held during the `interval_ms` that end at `end`.
    pub fn add(&mut self, end: UnixMs, interval_ms: u64, usage: Usage) -> Added {
        let mut added = Added::default();
        let rates = usage.to_array();
        if interval_ms == 0 || !rates.iter().all(|r| r.is_finite() && *r >= 0.0) {
            return added;
        }
        let reach = self.shape.len().saturating_mul(self.shape.keep_slots.max(1) as i64);
        let interval = i64::try_from(interval_ms).unwrap_or(i64::MAX).min(reach);
        let start = end.plus_ms(-interval);
        let (first, last) = (self.shape.slot_of(start), self.shape.slot_of(end.plus_ms(-1)));
        for slot in first..=last {
            // One at a time: an interval longer than the late window must not close its own first slots.
            self.advance_to(slot);
            let from = self.shape.start_of(slot).0.max(start.0);
            let to = self.shape.start_of(slot + 1).0.min(end.0);
            let overlap_ms = u64::try_from(to - from).unwrap_or(0);
            match self.open_mut(slot) {
                Some(open) => {
                    open.covered_ms += overlap_ms as f64;
                    open.sum
                        .iter_mut()
                        .zip(rates)
                        .for_each(|(sum, r)| *sum += r * overlap_ms as f64);
                    added.merged_ms += overlap_ms;
                }
                None => added.too_late_ms += overlap_ms,
            }
        }
        added
    }

    fn open_mut(&mut self, slot: i64) -> Option<&mut Open> {
        let i = usize::try_from(slot.checked_sub(self.first_open)?).ok()?;
        self.open.get_mut(i)
    }

    /// Opens every slot up to `slot`, and closes those that fall out of the late window.
    fn advance_to(&mut self, slot: i64) {
        let window = self.shape.late_slots as i64;
        let next = self.next_slot();
        if self.open.is_empty() || slot.saturating_sub(next) > (self.shape.keep_slots as i64).saturating_add(window) {
            // The first sample ever, or a gap longer than memory: nothing old is worth keeping.
            self.closed.clear();
            self.open.clear();
            self.first_open = slot.saturating_sub(window);
        }
        while self.next_slot() <= slot {
            self.open.push_back(Open::default());
            if self.open.len() > self.shape.late_slots + 1 {
                self.close_oldest();
            }
        }
    }

    fn close_oldest(&mut self) {
        let Some(open) = self.open.pop_front() else { return };
        self.first_open += 1;
        let packed = open
            .mean(self.shape.slot_ms)
            .map_or(GAP, |u| u.to_array().map(|v| v as f32));
        if self.closed.is_empty() && packed[0].is_nan() {
            return;
        }
        self.closed.push_back(packed);
        while self.closed.len() > self.shape.keep_slots {
            self.closed.pop_front();
        }
    }

    fn next_slot(&self) -> i64 {
        self.first_open + self.open.len() as i64
    }

    fn first_slot(&self) -> i64 {
        self.first_open - self.closed.len() as i64
    }

    /// The slot's value, `None` in a gap and outside.
    pub fn get(&self, slot: i64) -> Option<Usage> {
        let i = usize::try_from(slot.checked_sub(self.first_slot())?).ok()?;
        match self.closed.get(i) {
            Some(packed) => unpack(packed),
            None => self.open.get(i - self.closed.len())?.mean(self.shape.slot_ms),
        }
    }

    /// The newest measured slot before `before`.
    pub fn newest_before(&self, before: i64) -> Option<i64> {
        let to = before.min(self.next_slot());
        (self.first_slot()..to).rev().find(|s| self.get(*s).is_some())
    }

    /// At most `n` slots that end with `last`, oldest first, gaps as `None`; starts with a measured one.
    pub fn window(&self, last: i64, n: usize) -> Vec<Option<Usage>> {
        let n = i64::try_from(n).unwrap_or(i64::MAX);
        let first = self.first_slot().max(last.saturating_add(1).saturating_sub(n));
        (first..=last.min(self.next_slot() - 1))
            .map(|s| self.get(s))
            .skip_while(Option::is_none)
            .collect()
    }

    /// Closed slots from `since` on that hold a value.
    pub fn closed_since(&self, since: i64) -> impl Iterator<Item = (i64, Usage)> + '_ {
        let first = self.first_slot();
        let skip = usize::try_from(since.saturating_sub(first)).unwrap_or(0);
        self.closed
            .iter()
            .enumerate()
            .skip(skip)
            .filter_map(move |(i, p)| Some((first + i as i64, unpack(p)?)))
    }
}

#[cfg(test)]
#[path = "series_tests.rs"]
mod tests;
