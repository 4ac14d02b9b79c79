//! Compares images of a shadow's disks with sums of the source's, through the daemon that writes them.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use umbra_api::wire::control::Message;
use umbra_api::wire::disk::{RANGE_BYTES, RANGES_MAX, sums};

use super::session::Reply;
use crate::launch::ShadowRecord;
use crate::launch::disks::{export, socket};
use crate::nbd;

const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Some neighbouring ranges of a disk, as the source has them.
pub struct Ask {
    pub disk: usize,
    pub from: u64,
    pub sums: Vec<u64>,
    pub reply: Reply,
}

/// A thread that compares, until it is dropped.
pub struct Comparer(Sender<Ask>);

impl Comparer {
    /// `None` if there is nothing to compare.
    pub fn start(record: &ShadowRecord) -> Option<Self> {
        if record.disks.is_empty() {
            return None;
        }
        let (tell, told) = channel::<Ask>();
        let record = record.clone();
        let run = move || {
            for ask in told {
                let found = compare(&record, &ask);
                let (bytes, differing) = found.unwrap_or_else(|e| {
                    tracing::warn!(vm = %record.vm, disk = ask.disk, "scrub: the image can't be read: {e}");
                    (0, Vec::new())
                });
                let (disk, from) = (ask.disk, ask.from);
                ask.reply.send(&Message::DiskLooked {
                    disk,
                    from,
                    bytes,
                    differing,
                });
            }
        };
        let thread = std::thread::Builder::new().name("disk-compare".into()).spawn(run);
        thread.map(|_| Self(tell)).ok()
    }

    pub fn look(&self, ask: Ask) {
        // The thread ends with this.
        let _ = self.0.send(ask);
    }
}

/// Bytes that were compared, and where ranges differ.
fn compare(record: &ShadowRecord, ask: &Ask) -> io::Result<(u64, Vec<u64>)> {
    let size = record.disks.get(ask.disk).map_or(0, |i| i.bytes);
    let bytes = size.saturating_sub(ask.from).min(ask.sums.len() as u64 * RANGE_BYTES);
    if ask.sums.len() > RANGES_MAX || !ask.from.is_multiple_of(RANGE_BYTES) || bytes == 0 {
        return Err(io::Error::other(format!(
            "{} sums from {} on make no sense for a disk of {size} bytes",
            ask.sums.len(),
            ask.from
        )));
    }
    let mut image = nbd::Client::connect(&socket(&record.dir), &export(ask.disk), READ_TIMEOUT)?;
    let mut data = vec![0; bytes as usize];
    image.read(ask.from, &mut data)?;
    let found = sums(&data);
    let ranges = (ask.from..).step_by(RANGE_BYTES as usize).zip(&ask.sums).zip(&found);
    Ok((
        bytes,
        ranges
            .filter(|((_, want), have)| want != have)
            .map(|((at, _), _)| at)
            .collect(),
    ))
}
