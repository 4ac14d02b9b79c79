//! The way out for one VM: asks its hosts for facts, plans, and has it done. Where the VM runs then the RPS notes at
//! once; the rest of the lifecycle follows from what the replicators tell afterwards.

use std::sync::Arc;

use tokio::runtime::Handle;
use umbra_api::adopt::Adoptable;
use umbra_api::order::{Order, OrderKind};
use umbra_api::recover::{HostFacts, Missing, Plan, RecoverRequest, Step, Way, Wishes, plan};
use umbra_api::view::Mode;
use umbra_api::{Epoch, HostId, OrderId, VmId};

use super::{RequestError, Service, lock, wall_clock};
use crate::orchestrator::orders::Answer;
use crate::orchestrator::{Denied, Input};

impl Service {
    /// Blocking: it asks the replicators, each within the configured time.
    pub fn recover(self: &Arc<Self>, vm: VmId, wish: &RecoverRequest, dry_run: bool) -> Result<Plan, RequestError> {
        let (mode, believed, hosts) = {
            let engine = lock(&self.engine);
            let state = engine.core.states().get(&vm);
            let hosts: Vec<(HostId, String)> = engine
                .core
                .fleet()
                .iter()
                .map(|(h, r)| (h.clone(), r.link.clone()))
                .collect();
            (engine.core.mode(), state.map(|s| (s.host.clone(), s.stage)), hosts)
        };
        if mode == Mode::Observe && !dry_run {
            return Err(Denied::Observing.into());
        }
        let (mut facts, missing) = Handle::current().block_on(self.all_facts(vm, &hosts));
        // A host that has nothing to do with the VM is not worth a line.
        if facts.len() > 2 {
            facts
                .retain(|f| f.source.is_some() || f.target.is_some() || !f.qemus.is_empty() || !f.leftovers.is_empty());
        }
        let wishes = Wishes {
            dead: wish.dead.clone(),
            discard_shadow: wish.discard_shadow,
        };
        let mut plan = plan(vm, &facts, &missing, &wishes);
        let runs = facts.iter().find(|f| f.runs()).map(|f| (f.host.clone(), f.epoch));
        let astray = runs.filter(|(host, _)| believed.as_ref().is_some_and(|(b, _)| b != host));
        if let Some((believed, stage)) = &believed {
            plan.found.push(format!("the RPS: {stage} on {believed}"));
        }
        if let Some((host, _)) = &astray {
            plan.by_hand
                .push(format!("with --yes the RPS takes {host} for the VM's host"));
        }
        if dry_run {
            return Ok(plan);
        }
        if let Some((host, epoch)) = astray {
            self.step(Input::Found { vm, host, epoch })
                .map_err(|()| RequestError::Store)?;
        }
        self.carry_out(&mut plan, &hosts)?;
        Ok(plan)
    }

    /// Of all hosts at once: those that are down cost the time of one.
    async fn all_facts(&self, vm: VmId, hosts: &[(HostId, String)]) -> (Vec<HostFacts>, Vec<Missing>) {
        let mut asked = tokio::task::JoinSet::new();
        for (host, _) in hosts {
            let (replicators, host) = (self.replicators.clone(), host.clone());
            asked.spawn(async move {
                let told = replicators.facts(&host, vm).await;
                told.map_err(|why| Missing {
                    host: host.to_string(),
                    why,
                })
            });
        }
        let (mut facts, mut missing) = (Vec::new(), Vec::new());
        for told in asked.join_all().await {
            match told {
                Ok(f) => facts.push(f),
                Err(m) => missing.push(m),
            }
        }
        facts.sort_by(|a, b| a.host.cmp(&b.host));
        missing.sort_by(|a, b| a.host.cmp(&b.host));
        (facts, missing)
    }

    /// What stands in the way of a shadow, on the VM's host and on `target` if one is given. Blocking.
    pub fn adoptable(&self, vm: VmId, target: Option<&str>) -> Result<Adoptable, RequestError> {
        let engine = lock(&self.engine);
        let host = engine.core.states().get(&vm).map(|s| s.host.clone());
        let host = host.ok_or(Denied::NoSuchVm(vm))?;
        let member = |name: &str| {
            let mut fleet = engine.core.fleet().iter();
            fleet
                .find(|(h, _)| h.as_str() == name)
                .map(|(h, r)| (h.clone(), r.link.clone()))
        };
        let target = target
            .map(|name| member(name).ok_or_else(|| RequestError::Target(name.to_owned())))
            .transpose()?;
        drop(engine);
        let report = Handle::current().block_on(self.replicators.adoptable(&host, vm, target.as_ref()));
        report.map_err(|words| RequestError::Asking { host, words })
    }

    fn carry_out(self: &Arc<Self>, plan: &mut Plan, hosts: &[(HostId, String)]) -> Result<(), RequestError> {
        if plan.steps.is_empty() {
            return Ok(());
        }
        // In the store before an order under it leaves the house.
        let mut engine = lock(&self.engine);
        let (epoch, out) = engine.core.take_epoch(plan.vm, plan.epoch);
        self.finish(&mut engine, out).map_err(|()| RequestError::Store)?;
        drop(engine);
        plan.epoch = epoch;
        for step in &plan.steps {
            let order = Order {
                id: OrderId(uuid::Uuid::new_v4()),
                vm: plan.vm,
                epoch,
                kind: with_link(&step.order, hosts),
            };
            tracing::warn!(vm = %plan.vm, host = %step.host, at = %wall_clock().0, "recovery: {}", step.does);
            match Handle::current().block_on(self.replicators.order(&step.host, &order)) {
                Answer::Accepted => {
                    plan.done.push(step.does.clone());
                    self.runs_now(plan.vm, step, epoch)?;
                }
                Answer::Refused(refusal) => {
                    return Err(RequestError::Step {
                        host: step.host.clone(),
                        words: refusal.to_string(),
                        done: plan.done.len(),
                    });
                }
                Answer::Unknown(words) => {
                    return Err(RequestError::Step {
                        host: step.host.clone(),
                        words,
                        done: plan.done.len(),
                    });
                }
            }
        }
        self.hurry.notify_waiters();
        Ok(())
    }

    /// A copy was started where the RPS does not have the VM. What a silent host told last speaks against it, maybe for ever:
    /// the RPS takes note at once.
    fn runs_now(self: &Arc<Self>, vm: VmId, step: &Step, epoch: Epoch) -> Result<(), RequestError> {
        let starts = matches!(
            step.order,
            OrderKind::Recover {
                way: Way::TakeBack | Way::RunShadow,
                ..
            }
        );
        let believed = lock(&self.engine).core.states().get(&vm).map(|s| s.host.clone());
        if !starts || believed.is_none_or(|host| host == step.host) {
            return Ok(());
        }
        let host = step.host.clone();
        self.step(Input::Found { vm, host, epoch })
            .map(|_| ())
            .map_err(|()| RequestError::Store)
    }
}

/// Where a host that is declared dead will be told of it.
fn with_link(kind: &OrderKind, hosts: &[(HostId, String)]) -> OrderKind {
    match kind {
        OrderKind::Recover { way, dead, .. } => OrderKind::Recover {
            way: *way,
            dead: dead.clone(),
            link: dead
                .as_ref()
                .and_then(|d| hosts.iter().find(|(h, _)| h == d))
                .map(|(_, link)| link.clone()),
        },
        other => other.clone(),
    }
}
