//! How a session begins: a new protection, or one that goes on after a restart of the replicator.

use std::time::Instant;

use umbra_api::order::{Refusal, RefusalCode};
use umbra_api::wire::control::{Message, ShadowSpec};

use super::Session;
use crate::faults::Side;
use crate::limits::Limits;
use crate::source::control::Control;
use crate::source::governor::Costs;
use crate::source::machine::{Durable, Input, Machine};
use crate::source::migration::{Migration, Primary, ask_primary};
use crate::source::mirror::{self, Mirrors, Way};
use crate::source::park;
use crate::source::pump::Pump;
use crate::urgent;

impl Session {
    pub(super) fn begin(&mut self, spec: ShadowSpec) {
        match self.open(spec) {
            Ok(()) => {
                self.core.faults.after(Side::Source, "open");
                self.input(Input::Begun);
            }
            Err(refusal) => {
                tracing::warn!(vm = %self.plan.vm, "protection ends before it began: {refusal}");
                self.input(Input::Failed(refusal));
            }
        }
    }

    /// Hello, ram connection, mirrors, migration, in the order in which they can still be refused at no cost for the guest.
    pub(super) fn open(&mut self, spec: ShadowSpec) -> Result<(), Refusal> {
        let (plan, disks, files) = (&self.plan, spec.disks.clone(), spec.ram.clone());
        let qmp = self
            .qmp
            .clone()
            .ok_or_else(|| Refusal::new(RefusalCode::QmpUnavailable, "no QMP connection"))?;
        let waiting = park::waiting(&qmp, disks.len(), &self.mirrors_on_record());
        let hello = Message::Hello {
            resume: waiting,
            vm: plan.vm,
            name: plan.name.clone(),
            epoch: plan.epoch,
            host: self.core.config.host.clone(),
            port: self.core.config.link_listen.map(|a| a.port()),
            spec: Box::new(spec),
        };
        let (link, session, resumed) = Control::hello(&self.target(), self.times(), &hello)?;
        self.control = Some(Control::listen(
            link,
            self.times(),
            self.generation,
            self.sender.clone(),
        )?);
        let mut ram = Control::attach(&self.target(), self.times(), session)?;
        let known = self.what_is_held(&mut ram, &files)?;
        let resumed = waiting.filter(|_| resumed);
        let token = resumed.unwrap_or(session);
        self.scrub.opened(session, token, disks.clone());
        if resumed.is_none() {
            self.make_way(&qmp, token, &disks)?;
        }
        let plan = &self.plan;
        self.pump.limit.set(Limits {
            bandwidth_mbit: plan.pacing.bandwidth_mbit,
        });
        let way = Way {
            dir: &self.core.config.run_dir,
            qemu: plan.process,
            core: &self.core,
            pace: &self.pump,
            token,
            travelled: self.again.travelled(),
            resumed: resumed.is_some(),
            connect: &|disk| Control::attach_disk(&self.target(), self.times(), session, disk),
        };
        let mirrors = Mirrors::start(&qmp, &disks, &way, &self.sender)?;
        let pause = !mirrors.is_empty();
        self.mirrors = Some(mirrors);
        let throttle = self.pressure.may_throttle();
        let (migration, socket) = Migration::start(&qmp, self.plan.process, &self.sender, pause, throttle)?;
        let costs = Costs {
            qemu: plan.process.pid,
            threads: migration.own_threads(plan.process),
        };
        let answered_ms = migration.answered_ms;
        self.migration = Some(migration);
        self.note_migration(answered_ms);
        let pump = Pump {
            socket,
            ram: ram.writer,
            known,
            encoding: self.core.config.link.encoding(),
            pacing: plan.pacing,
            costs,
            core: self.core.clone(),
            shared: self.pump.clone(),
            events: self.sender.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("pump".into())
            .spawn(move || pump.run())
            .map_err(|e| Refusal::new(RefusalCode::Local, format!("no thread for the pages: {e}")))?;
        self.again.pumps(thread);
        self.started = Instant::now();
        Ok(())
    }

    /// After a restart: what the disk says, checked against the primary.
    pub(super) fn recover(&mut self, durable: Durable) {
        urgent::calm(self.plan.process, &self.core.config.cgroup);
        let primary = ask_primary(self.plan.process, self.qmp.as_ref());
        let primary = primary.unwrap_or_else(|e| match durable {
            // Whether a copy can go on is looked at before its next pass.
            Durable::Protecting => {
                tracing::warn!(vm = %self.plan.vm, "the primary does not answer: {e}");
                Primary::Runs
            }
            _ => {
                tracing::warn!(vm = %self.plan.vm, "the primary does not answer ({e}): taken for stopped, the target decides");
                Primary::Stopped
            }
        });
        let (machine, actions) = Machine::resume(durable, primary == Primary::Stopped, primary == Primary::Gone);
        self.machine = machine;
        self.perform(actions);
        // Behind what lets the guest run on: what is left of mirrors is in nobody's way.
        match (durable, self.qmp.as_ref()) {
            (Durable::HandedOver { .. }, _) | (_, None) => {}
            // Of a guest that runs: one that is stopped may have been at its disks' end.
            (Durable::Protecting, Some(_)) if primary == Primary::Runs => self.core.parked.note(self.plan.vm),
            (_, Some(qmp)) => mirror::sweep(qmp, &self.mirrors_on_record()),
        }
        self.publish();
    }
}
