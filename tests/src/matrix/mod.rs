//! The crash matrix: what breaks, at which step of a protection, and what must come of it. This file is the data; [`play`] plays a
//! case on real QEMUs, `cargo xtask faults` prints the table, and FAULTS.md has it too.
//!
//! Read a row as: if this breaks at that step, the VM then …

pub mod play;

use std::fmt::Write;

/// What breaks. A column.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// `kill -9`, and started again, as a service manager does.
    Source,
    Target,
    /// `kill -9` of the QEMU that the VM was in.
    Primary,
    /// The same of the one that it is to go to, or went to.
    Shadow,
    /// Each connection is reset, and the next ones for a moment.
    Cut,
    /// Nothing arrives, for longer than the link's patience, and nobody is told.
    Stall,
    /// The file system of the shadow's disks has no byte left.
    Full,
    /// Nobody gives any more orders.
    Rps,
}

pub const FAULTS: [Fault; 8] = [
    Fault::Source,
    Fault::Target,
    Fault::Primary,
    Fault::Shadow,
    Fault::Cut,
    Fault::Stall,
    Fault::Full,
    Fault::Rps,
];

impl Fault {
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source replicator",
            Self::Target => "target replicator",
            Self::Primary => "primary QEMU",
            Self::Shadow => "shadow QEMU",
            Self::Cut => "link cut",
            Self::Stall => "link stalled",
            Self::Full => "disk full",
            Self::Rps => "RPS gone",
        }
    }
}

/// What must come of it, without anybody's help but the restart of what was killed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The VM runs on where it was.
    Stays,
    /// It runs on the other host.
    Moves,
    /// One of the two: which of two messages was faster decides, and both are right.
    Either,
    /// It was killed with its QEMU, and no other copy runs in its place. Its disks have what it was told to be on them.
    Dies,
    /// Not played: like the rows around it.
    Same,
}

impl Outcome {
    pub fn name(self) -> &'static str {
        match self {
            Self::Stays => "stays",
            Self::Moves => "moves",
            Self::Either => "either",
            Self::Dies => "dies",
            Self::Same => "·",
        }
    }
}

/// When. `Step` is a place of the replicator's `faults` module.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Point {
    /// While the first copy is under way.
    Seeding,
    Standby,
    Step(&'static str),
    /// The switchover is over.
    After,
    /// After a switchover, in standby for the way back.
    Reverse,
}

impl Point {
    pub fn name(self) -> &'static str {
        match self {
            Self::Seeding => "seeding",
            Self::Standby => "standby",
            Self::Step(place) => place,
            Self::After => "after the switchover",
            Self::Reverse => "reverse standby",
        }
    }
}

pub struct Row {
    pub point: Point,
    /// In the order of [`FAULTS`].
    pub outcomes: [Outcome; 8],
}

const fn row(point: Point, outcomes: [Outcome; 8]) -> Row {
    Row { point, outcomes }
}

use Outcome::{Dies as D, Either as E, Moves as M, Same as N, Stays as S};

/// In the order of the protocol: the shadow takes over from SHUT on ('shut'), before it the primary runs on.
#[rustfmt::skip]
pub const MATRIX: [Row; 26] = [
    //                                                    source target primary shadow cut stall full rps
    row(Point::Seeding,                                   [S,     S,     D,      S,     S,  N,    S,   N]),
    row(Point::Standby,                                   [S,     S,     N,      S,     S,  S,    S,   S]),
    row(Point::Step("source before write.preparing"),     [S,     S,     N,      N,     N,  N,    N,   M]),
    row(Point::Step("source after write.preparing"),      [S,     S,     N,      S,     S,  N,    N,   N]),
    row(Point::Step("source after stop"),                 [S,     S,     N,      S,     S,  S,    E,   M]),
    row(Point::Step("source before disks"),               [S,     S,     D,      S,     S,  N,    N,   N]),
    row(Point::Step("source before go_on"),               [S,     S,     N,      N,     S,  N,    N,   N]),
    row(Point::Step("source after disks"),                [S,     S,     N,      S,     S,  N,    N,   N]),
    row(Point::Step("target before write.prepared"),      [S,     S,     M,      S,     S,  N,    N,   N]),
    row(Point::Step("target after write.prepared"),       [S,     S,     N,      S,     S,  S,    N,   N]),
    row(Point::Step("source before write.relinquished"),  [S,     S,     M,      S,     S,  N,    N,   N]),
    row(Point::Step("source after write.relinquished"),   [S,     S,     M,      S,     S,  N,    N,   N]),
    row(Point::Step("target before say_prepared"),        [S,     S,     M,      S,     S,  N,    N,   N]),
    row(Point::Step("target after say_prepared"),         [E,     E,     N,      E,     E,  N,    N,   N]),
    row(Point::Step("source before shut"),                [S,     M,     M,      S,     M,  M,    N,   M]),
    row(Point::Step("source after shut"),                 [M,     M,     M,      S,     M,  N,    N,   N]),
    row(Point::Step("source before commit"),              [M,     M,     M,      S,     M,  M,    N,   N]),
    row(Point::Step("source after commit"),               [M,     M,     N,      N,     M,  N,    N,   N]),
    row(Point::Step("target before resume"),              [M,     M,     M,      S,     M,  M,    N,   N]),
    row(Point::Step("target after resume"),               [M,     M,     M,      D,     M,  N,    N,   N]),
    row(Point::Step("target after say_running"),          [M,     M,     N,      N,     N,  N,    N,   N]),
    row(Point::Step("target after write.running"),        [M,     M,     N,      N,     M,  N,    N,   N]),
    row(Point::Step("source before write.handed_over"),   [M,     M,     M,      D,     M,  N,    N,   N]),
    row(Point::Step("source after write.handed_over"),    [M,     M,     N,      N,     M,  N,    N,   M]),
    row(Point::After,                                     [M,     M,     M,      D,     M,  M,    M,   M]),
    row(Point::Reverse,                                   [S,     S,     D,      S,     S,  N,    N,   N]),
];

#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub fault: Fault,
    pub point: Point,
    pub outcome: Outcome,
}

/// The cases of one fault that are played.
pub fn cases(fault: Fault) -> Vec<Case> {
    let outcome = |row: &Row| FAULTS.iter().zip(row.outcomes).find(|(f, _)| **f == fault).map(|f| f.1);
    let played = MATRIX.iter().filter_map(|row| {
        Some(Case {
            fault,
            point: row.point,
            outcome: outcome(row)?,
        })
    });
    played.filter(|c| c.outcome != Outcome::Same).collect()
}

/// As documents have it.
pub fn markdown() -> String {
    let mut out = String::from("| when |");
    let mut rule = String::from("|---|");
    for fault in FAULTS {
        let _ = write!(out, " {} |", fault.name());
        rule += "---|";
    }
    let _ = write!(out, "\n{rule}\n");
    for row in &MATRIX {
        let _ = write!(out, "| {} |", row.point.name());
        for outcome in row.outcomes {
            let _ = write!(out, " {} |", outcome.name());
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_is_there_once_and_each_fault_is_played_somewhere() {
        for row in &MATRIX {
            assert_eq!(
                MATRIX.iter().filter(|r| r.point == row.point).count(),
                1,
                "{:?}",
                row.point
            );
            assert!(
                row.outcomes.iter().any(|o| *o != Outcome::Same),
                "{:?} is never played",
                row.point
            );
        }
        for fault in FAULTS {
            assert!(cases(fault).len() >= 4, "{fault:?}");
        }
        assert_eq!(markdown().lines().count(), MATRIX.len() + 2);
    }
}
