//! The replicators' HTTP side: `POST /v1/orders`, `GET /v1/replicas`.

use std::collections::BTreeMap;
use std::time::Duration;

use umbra_api::adopt::Adoptable;
use umbra_api::order::{Order, Refusal, RefusalCode};
use umbra_api::problem::Problem;
use umbra_api::recover::HostFacts;
use umbra_api::replica::ReplicaStatus;
use umbra_api::{HostId, VmId};
use umbra_daemon::client::{Client, ClientError};

use super::orders::Answer;

/// One client a host. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Replicators {
    clients: BTreeMap<HostId, Client>,
}

impl Replicators {
    /// `hosts` are names and `http://address:port`.
    pub fn new<'a>(
        hosts: impl IntoIterator<Item = (&'a HostId, &'a str)>,
        timeout: Duration,
    ) -> Result<Self, ClientError> {
        let clients = hosts
            .into_iter()
            .map(|(host, base)| Ok((host.clone(), Client::new(base, timeout)?)));
        Ok(Self {
            clients: clients.collect::<Result<_, ClientError>>()?,
        })
    }

    pub async fn order(&self, to: &HostId, order: &Order) -> Answer {
        let Some(client) = self.clients.get(to) else {
            return Answer::Unknown(format!("{to} is not configured"));
        };
        match client.post::<serde_json::Value>("/v1/orders", order).await {
            Ok(_) => Answer::Accepted,
            Err(e) => answer_of(&e),
        }
    }

    pub async fn facts(&self, host: &HostId, vm: VmId) -> Result<HostFacts, String> {
        let client = self
            .clients
            .get(host)
            .ok_or_else(|| format!("{host} is not configured"))?;
        client
            .get(&format!("/v1/vms/{vm}/facts"))
            .await
            .map_err(|e| e.to_string())
    }

    /// `target`: its name and the address of its link.
    pub async fn adoptable(
        &self,
        host: &HostId,
        vm: VmId,
        target: Option<&(HostId, String)>,
    ) -> Result<Adoptable, String> {
        let client = self
            .clients
            .get(host)
            .ok_or_else(|| format!("{host} is not configured"))?;
        let query = target.map_or_else(String::new, |(t, link)| format!("?target={t}&link={link}"));
        let path = format!("/v1/vms/{vm}/adoptable{query}");
        client.get(&path).await.map_err(|e| e.to_string())
    }

    pub async fn replicas(&self, host: &HostId) -> Result<Vec<ReplicaStatus>, String> {
        let client = self
            .clients
            .get(host)
            .ok_or_else(|| format!("{host} is not configured"))?;
        client.get("/v1/replicas").await.map_err(|e| e.to_string())
    }
}

/// An order that may have been carried out is not refused: only the replicator's own words count as that.
fn answer_of(e: &ClientError) -> Answer {
    match e {
        // An answer came, and it was a success: only its body makes no sense.
        ClientError::Answer { .. } => Answer::Accepted,
        ClientError::Refused { problem, .. } => match refusal_of(problem) {
            Some(refusal) => Answer::Refused(refusal),
            None => Answer::Unknown(problem.to_string()),
        },
        _ => Answer::Unknown(e.to_string()),
    }
}

/// A refusal by its stable code; an unknown code is one if the status blames the order.
fn refusal_of(p: &Problem) -> Option<Refusal> {
    let code = serde_json::from_value::<RefusalCode>(p.code.clone().into()).ok();
    let blames_us = (400..500).contains(&p.status);
    let code = code.or_else(|| blames_us.then_some(RefusalCode::BadOrder))?;
    Some(Refusal::new(code, p.detail.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_known_by_their_code_and_the_rest_is_unknown() {
        let p = Problem::from(Refusal::new(RefusalCode::StaleEpoch, "seen 9"));
        assert_eq!(refusal_of(&p), Some(Refusal::new(RefusalCode::StaleEpoch, "seen 9")));
        let p = Problem::bad_request("no such field");
        assert_eq!(
            refusal_of(&p),
            Some(Refusal::new(RefusalCode::BadOrder, "no such field"))
        );
        let p = Problem::new(503, "timeout", "Took too long", "30 s");
        assert_eq!(refusal_of(&p), None);
        let gone = ClientError::Unreachable {
            url: "u".into(),
            reason: "reset".into(),
        };
        assert!(matches!(answer_of(&gone), Answer::Unknown(_)));
    }
}
