//! The comparison of the disks with their images: when it goes on, and what it has found.

use std::collections::BTreeMap;
use std::sync::Arc;

use umbra_api::replica::DiskProgress;
use umbra_api::wire::control::{Disk, Message};

use super::Session;
use crate::source::control::{Control, Target};
use crate::source::machine::{Input, State};
use crate::source::scrub::{Looked, News, Reader, Scrub, Way};

/// Found since the protection began, or its replicator was restarted.
#[derive(Clone, Copy, Default)]
struct Counts {
    compared_bytes: u64,
    differing: u64,
    mended: u64,
}

/// The scrub of a session, if one is at work.
#[derive(Default)]
pub(super) struct Scrubs {
    scrub: Option<Scrub>,
    /// The target's session, the mirrors' number, and the disks of this pass.
    session: u64,
    token: u64,
    disks: Vec<Disk>,
    /// By the primary's image.
    counts: BTreeMap<String, Counts>,
}

impl Scrubs {
    pub(super) fn opened(&mut self, session: u64, token: u64, disks: Vec<Disk>) {
        (self.session, self.token, self.disks) = (session, token, disks);
    }

    pub(super) fn heard(&self, looked: Looked) {
        if let Some(scrub) = &self.scrub {
            scrub.heard(looked);
        }
    }

    fn count(&mut self, disk: usize, change: impl FnOnce(&mut Counts)) {
        if let Some(disk) = self.disks.get(disk) {
            change(self.counts.entry(disk.path.clone()).or_default());
        }
    }

    pub(super) fn count_in(&self, disks: &mut [DiskProgress]) {
        for disk in disks {
            let counts = self.counts.get(&disk.path).copied().unwrap_or_default();
            disk.scrubbed_bytes = counts.compared_bytes;
            disk.differing_ranges = counts.differing;
            disk.mended_ranges = counts.mended;
        }
    }
}

impl Session {
    /// In standby the disks are compared, all the time and slowly.
    pub(super) fn scrub_disks(&mut self) {
        let wanted = self.machine.state == State::Standby && self.scrub.scrub.is_none() && !self.scrub.disks.is_empty();
        let Some(qmp) = self.qmp.clone().filter(|_| wanted) else {
            return;
        };
        let (link, host, times, session) = (
            self.plan.link.clone(),
            self.plan.peer.clone(),
            self.times(),
            self.scrub.session,
        );
        let core = self.core.clone();
        let connect = move |disk| {
            let to = Target {
                link: &link,
                host: &host,
                security: core.security(),
            };
            Control::attach_disk(&to, times, session, disk)
        };
        let run_dir = &self.core.config.run_dir;
        let source = Reader {
            qmp,
            disks: self.scrub.disks.clone(),
            token: self.scrub.token,
            socket: run_dir.join(format!("scrub-{}.sock", self.plan.process.pid)),
            leave: Arc::default(),
        };
        let way = Way {
            source,
            core: self.core.clone(),
            pace: self.pump.clone(),
            silence: self.times().silence,
            connect: Box::new(connect),
        };
        match Scrub::start(way, self.sender.clone()) {
            Ok(scrub) => self.scrub.scrub = Some(scrub),
            Err(e) => tracing::warn!(vm = %self.plan.vm, "the disks are not compared: no thread: {e}"),
        }
    }

    /// Before the mirrors are needed for something else. `false`: they can't be gone on with as they are.
    pub(super) fn leave_scrub(&mut self) -> bool {
        self.scrub.scrub.take().is_none_or(Scrub::stop)
    }

    pub(super) fn scrub_says(&mut self, news: News) {
        match news {
            News::Ask { part, sums } if self.machine.state == State::Standby => {
                let (disk, from) = (part.disk, part.from);
                if let Some(lost) = self.say(&Message::DiskSums { disk, from, sums }) {
                    self.input(lost);
                }
            }
            News::Ask { .. } => {}
            News::Compared { disk, bytes } => self.scrub.count(disk, |c| c.compared_bytes += bytes),
            News::Differs { disk, from } => {
                self.scrub.count(disk, |c| c.differing += 1);
                let path = self.scrub.disks.get(disk).map(|d| d.path.as_str());
                tracing::error!(vm = %self.plan.vm, disk = path, from, "scrub: a range of the image is not what the disk has");
            }
            News::Mended { disk, from } => {
                self.scrub.count(disk, |c| c.mended += 1);
                tracing::info!(vm = %self.plan.vm, disk, from, "scrub: the range is written anew");
            }
            News::Unsettled(why) if self.is_copying() => self.input(Input::LinkLost(why)),
            News::Unsettled(_) => {}
        }
    }
}
