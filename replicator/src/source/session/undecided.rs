//! What is asked again until it is answered: how an epoch ended whose target was lost, that a switchover is off, and that the primary
//! goes on.

use std::time::{Duration, Instant};

use serde_json::Value;
use umbra_api::Epoch;
use umbra_api::order::{Announce, Refusal};
use umbra_api::wire::control::Message;

use super::Session;
use crate::qmp;
use crate::source::control::{Control, unreachable};
use crate::source::machine::{Action, Input, State};

const RETRY_EVERY: Duration = Duration::from_millis(500);
/// How long a target that can't be reached is told of an abort. Later it is told by the next 'hello', or by an operator.
const ABORT_FOR: Duration = Duration::from_secs(60);

/// When what is asked next.
#[derive(Default)]
pub(super) struct Retries {
    pub resolve: Option<Instant>,
    pub take_back: Option<Instant>,
    pub abort: Option<Abort>,
}

/// An epoch that the target must still be told to be off.
#[derive(Clone, Copy)]
pub(super) struct Abort {
    epoch: Epoch,
    next: Instant,
    last: Instant,
}

impl Abort {
    pub fn new(epoch: Epoch, now: Instant) -> Self {
        Self {
            epoch,
            next: now + RETRY_EVERY,
            last: now + ABORT_FOR,
        }
    }
}

impl Session {
    /// What is due by time.
    pub(super) fn retry(&mut self, now: Instant) {
        if self.retries.resolve.is_some_and(|t| t <= now) {
            self.retries.resolve = Some(now + RETRY_EVERY);
            self.resolve();
        }
        if self.retries.take_back.is_some_and(|t| t <= now) {
            self.retries.take_back = None;
            self.perform(vec![Action::TakeBack]);
        }
        if let Some(abort) = self.retries.abort.filter(|a| a.next <= now) {
            self.tell_abort(abort, now);
        }
    }

    pub(super) fn take_back(&mut self) -> Option<Input> {
        let Some(qmp) = self.qmp.as_ref() else {
            return Some(Input::PrimaryGone);
        };
        match qmp.execute("cont", Value::Null) {
            Ok(_) => {
                // If the shadow ran, the network looks for the guest's addresses there until it hears of them here.
                if let Err(e) = qmp::announce(qmp, &Announce::default()) {
                    tracing::warn!(vm = %self.plan.vm, "{e}");
                }
                Some(Input::TakenBack)
            }
            Err(_) if self.plan.process.gone_soon() => Some(Input::PrimaryGone),
            Err(e) => {
                tracing::error!(vm = %self.plan.vm, "the primary can't be resumed, trying again: {e}");
                self.retries.take_back = Some(Instant::now() + RETRY_EVERY);
                None
            }
        }
    }

    /// Asks the target how the epoch ended. Its answer's connection becomes the control connection.
    fn resolve(&mut self) {
        let State::Resolving { epoch } = self.machine.state else {
            self.retries.resolve = None;
            return;
        };
        let question = Message::Resolve {
            vm: self.plan.vm,
            epoch,
        };
        match Control::ask(&self.target(), self.times(), &question) {
            Ok((link, answer)) => {
                self.retries.resolve = None;
                self.generation += 1;
                match Control::listen(link, self.times(), self.generation, self.sender.clone()) {
                    Ok(control) => {
                        self.control = Some(control);
                        self.said(answer);
                    }
                    Err(e) => self.input(Input::LinkLost(e.to_string())),
                }
            }
            Err(e) => {
                tracing::warn!(vm = %self.plan.vm, %epoch, "the target can't be asked how the switchover ended: {e}");
                self.set_error(Some(e));
            }
        }
    }

    fn tell_abort(&mut self, abort: Abort, now: Instant) {
        let epoch = abort.epoch;
        match self.ask_abort(epoch) {
            Ok(true) => {
                self.retries.abort = None;
                self.input(Input::Aborted { epoch });
            }
            _ if now >= abort.last => {
                tracing::warn!(vm = %self.plan.vm, %epoch, "the target was not told that the switchover is off");
                self.retries.abort = None;
            }
            _ => {
                let next = now + RETRY_EVERY;
                self.retries.abort = Some(Abort { next, ..abort });
            }
        }
    }

    /// Whether the target has given the epoch up, by itself or because it is told to.
    fn ask_abort(&self, epoch: Epoch) -> Result<bool, Refusal> {
        let vm = self.plan.vm;
        let (mut link, answer) = Control::ask(&self.target(), self.times(), &Message::Resolve { vm, epoch })?;
        if let Message::Aborted { .. } = answer {
            return Ok(true);
        }
        let lost = |e| unreachable(&e);
        link.writer.send_message(&Message::Abort { epoch }).map_err(lost)?;
        let heard = link.reader.next_message().map_err(lost)?;
        Ok(matches!(heard, Message::Aborted { .. }))
    }
}
