//! `umbra recover`, `umbra adopt` and `umbra shadow handover`: by the RPS, or straight at the replicators where the RPS is gone.

use umbra_api::adopt::Adoptable;
use umbra_api::order::{Order, OrderKind};
use umbra_api::recover::{HostFacts, Missing, Plan, RecoverRequest, Wishes, plan};
use umbra_api::{OrderId, VmId};
use umbra_daemon::http::Method;

use crate::args::{Adopt, Recover};
use crate::commands::Ask;
use crate::error::Error;
use crate::rps::Rps;

pub async fn recover(ask: &Ask<'_>, wish: &Recover) -> Result<String, Error> {
    let act = wish.yes && !wish.dry_run;
    let plan = match wish.at.replicators.is_empty() {
        true => by_rps(ask, wish, act).await?,
        false => by_hand(ask, wish, act).await?,
    };
    match ask.json {
        true => Ok(serde_json::to_string(&plan).unwrap_or_default()),
        false => Ok(show(&plan, act)),
    }
}

async fn by_rps(ask: &Ask<'_>, wish: &Recover, act: bool) -> Result<Plan, Error> {
    let id = ask.rps.vm_id(&wish.vm).await?;
    let request = RecoverRequest {
        dead: wish.host_is_dead.clone(),
        discard_shadow: wish.discard_shadow,
    };
    let path = format!("/v1/vms/{id}/recover?dry_run={}", !act);
    let text = ask.rps.send(Method::POST, &path, &request).await?;
    ask.rps.view(&text)
}

/// Asks all replicators that were named; one that does not answer is part of the facts.
async fn by_hand(ask: &Ask<'_>, wish: &Recover, act: bool) -> Result<Plan, Error> {
    let clients = wish
        .at
        .replicators
        .iter()
        .map(|url| Rps::new(url, ask.timeout))
        .collect::<Result<Vec<_>, _>>()?;
    let vm = id_of(&clients, &wish.vm).await?;
    let (mut facts, mut missing, mut known) = (Vec::new(), Vec::new(), Vec::new());
    for client in &clients {
        match facts_of(client, &vm.to_string()).await {
            Ok(f) => {
                known.push((f.host.clone(), client));
                facts.push(f);
            }
            Err(Error::Unreachable { cause, .. }) => missing.push(Missing {
                host: client.base().to_owned(),
                why: cause,
            }),
            Err(e) => return Err(e),
        }
    }
    let wishes = Wishes {
        dead: wish.host_is_dead.clone(),
        discard_shadow: wish.discard_shadow,
    };
    let mut plan = plan(vm, &facts, &missing, &wishes);
    if !act {
        return Ok(plan);
    }
    for step in &plan.steps {
        let client = known.iter().find(|(host, _)| *host == step.host).map(|(_, c)| c);
        let Some(client) = client else { continue };
        let sent = order(client, vm, &plan, step.order.clone()).await;
        sent.map_err(|cause| Error::Step {
            step: step.does.clone(),
            cause: Box::new(cause),
            done: plan.done.clone(),
        })?;
        plan.done.push(step.does.clone());
    }
    Ok(plan)
}

async fn order(client: &Rps, vm: VmId, plan: &Plan, kind: OrderKind) -> Result<String, Error> {
    let order = Order {
        id: OrderId(uuid::Uuid::new_v4()),
        vm,
        epoch: plan.epoch,
        kind,
    };
    client.send(Method::POST, "/v1/orders", &order).await
}

async fn facts_of(client: &Rps, vm: &str) -> Result<HostFacts, Error> {
    client.view(&client.get(&format!("/v1/vms/{vm}/facts")).await?)
}

/// A name is looked up where it is known: any of the replicators will do.
async fn id_of(clients: &[Rps], wanted: &str) -> Result<VmId, Error> {
    if let Ok(vm) = wanted.parse() {
        return Ok(vm);
    }
    let mut last = Error::NoSuchVm {
        name: wanted.to_owned(),
        near: Vec::new(),
        known: 1,
    };
    for client in clients {
        match facts_of(client, wanted).await {
            Ok(facts) => return Ok(facts.vm),
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn show(plan: &Plan, act: bool) -> String {
    let mut out = vec!["What was found:".to_owned()];
    out.extend(plan.found.iter().map(|f| format!("  {f}")));
    match (plan.steps.is_empty(), act) {
        (true, _) => out.push("Nothing is to be done by Umbra.".into()),
        (_, false) => out.push("What would be done, with --yes:".into()),
        (_, true) => out.push("Done:".into()),
    }
    for (n, step) in plan.steps.iter().enumerate() {
        out.push(format!("  {}. {} {}", n + 1, step.host, step.does));
        out.extend(step.risk.iter().map(|r| format!("     risk: {r}")));
    }
    if !plan.by_hand.is_empty() {
        out.push("What only you can do or know:".into());
        out.extend(plan.by_hand.iter().map(|b| format!("  - {b}")));
    }
    crate::render::words::clean(&out.join("\n"))
}

/// Something stands in the way: exit code 4, as for a refusal.
pub async fn adopt(ask: &Ask<'_>, wish: &Adopt) -> Result<String, Error> {
    let client;
    let (rps, vm) = match &wish.replicator {
        Some(url) => {
            client = Rps::new(url, ask.timeout)?;
            (&client, wish.vm.clone())
        }
        None => (ask.rps, ask.rps.vm_id(&wish.vm).await?.to_string()),
    };
    let query = match (&wish.host, &wish.link) {
        (Some(host), Some(link)) => format!("?target={host}&link={link}"),
        (Some(host), None) => format!("?target={host}"),
        (None, _) => String::new(),
    };
    let text = rps.get(&format!("/v1/vms/{vm}/adoptable{query}")).await?;
    if ask.json {
        return Ok(text);
    }
    let report: Adoptable = rps.view(&text)?;
    match report.findings.is_empty() {
        true => Ok(report_of(&report)),
        false => Err(Error::NotAdoptable(report_of(&report))),
    }
}

fn report_of(r: &Adoptable) -> String {
    let name = if r.name.is_empty() {
        r.vm.to_string()
    } else {
        r.name.clone()
    };
    let qemu = r.qemu.as_ref().map(|q| format!(", {q}")).unwrap_or_default();
    let asked = match &r.target {
        Some(target) => format!("on {target}"),
        None => "as far as its own host tells; --host asks another one too".to_owned(),
    };
    let mut out = match r.findings.len() {
        0 => vec![format!("{name} on {}{qemu}: can be shadowed {asked}", r.host)],
        n => vec![format!(
            "{name} on {}{qemu}: can't be shadowed, for {n} reason(s)",
            r.host
        )],
    };
    for f in &r.findings {
        out.push(format!("  {}: {}", f.host, f.reason));
        out.extend(f.remedy.iter().map(|m| format!("     remedy: {m}")));
    }
    out.extend(r.warnings.iter().map(|w| format!("  note: {w}")));
    crate::render::words::clean(&out.join("\n"))
}

pub async fn hand_over(ask: &Ask<'_>, vm: &str, replicator: &str) -> Result<String, Error> {
    let client = Rps::new(replicator, ask.timeout)?;
    let facts = facts_of(&client, vm).await?;
    let order = Order {
        id: OrderId(uuid::Uuid::new_v4()),
        vm: facts.vm,
        epoch: facts.epoch.next(),
        kind: OrderKind::HandOver,
    };
    client.send(Method::POST, "/v1/orders", &order).await?;
    if ask.json {
        return Ok(serde_json::to_string(&facts).unwrap_or_default());
    }
    let mut out = vec![format!(
        "{} forgets VM {}, which runs on: it is yours. Remove what follows when it has ended; Umbra will not.",
        facts.host, facts.vm
    )];
    out.extend(facts.belongings.iter().map(|b| format!("  {b}")));
    for q in facts.qemus.iter().filter(|q| q.known) {
        out.push(format!("QEMU process {}:", q.pid));
        out.push(format!(
            "  {}",
            q.args.iter().map(|a| quoted(a)).collect::<Vec<_>>().join(" ")
        ));
    }
    Ok(crate::render::words::clean(&out.join("\n")))
}

/// As a shell reads it.
fn quoted(arg: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,.:/@+%".contains(c);
    match !arg.is_empty() && arg.chars().all(plain) {
        true => arg.to_owned(),
        false => format!("'{}'", arg.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_survive_a_shell() {
        assert_eq!(quoted("-machine"), "-machine");
        assert_eq!(quoted(r#"{"driver":"raw"}"#), r#"'{"driver":"raw"}'"#);
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
