//! The daemon's HTTP: `POST /v1/orders`, `GET /v1/replicas`, `GET /v1/vms/{vm}/facts` and `…/adoptable`, `GET` and `PUT /v1/limits`, `/metrics`, `/healthz`, `/readyz`.

use std::sync::Arc;

use umbra_api::HostId;
use umbra_api::order::Order;
use umbra_api::problem::Problem;
use umbra_daemon::http::{self, Method, Reply, Request, status};
use umbra_daemon::metrics::reply as metrics_reply;

use crate::engine::Engine;
use crate::limits::Limits;
use crate::metrics;

/// Answers one request.
pub async fn answer(engine: Arc<Engine>, request: Request) -> Reply {
    match (&request.method, request.path.as_str()) {
        (&Method::POST, "/v1/orders") => {
            let order: Order = match request.json() {
                Ok(order) => order,
                Err(problem) => return http::problem(&problem),
            };
            let taken = blocking(move || engine.order(&order).map_err(Problem::from)).await;
            http::outcome(status::ACCEPTED, taken.and_then(|r| r))
        }
        (&Method::GET, "/v1/replicas") => http::outcome(status::OK, blocking(move || engine.replicas()).await),
        (&Method::GET, path) if path.starts_with("/v1/vms/") => vm(engine, &request).await,
        (&Method::GET, "/v1/limits") => http::outcome(status::OK, Ok(engine.limits())),
        (&Method::PUT, "/v1/limits") => match request.json::<Limits>() {
            Ok(Limits {
                bandwidth_mbit: Some(0),
            }) => http::problem(&Problem::bad_request("0 is no bandwidth; null is no limit")),
            Ok(limits) => {
                engine.set_limits(limits);
                http::outcome(status::OK, Ok(engine.limits()))
            }
            Err(problem) => http::problem(&problem),
        },
        (&Method::GET, "/metrics") => match blocking(move || metrics::registry(&engine.replicas())).await {
            Ok(registry) => metrics_reply(&registry),
            Err(problem) => http::problem(&problem),
        },
        (&Method::GET, "/healthz" | "/readyz") => http::reply(status::OK, "text/plain", "ok\n"),
        _ => http::problem(&Problem::not_found(format!("{} {}", request.method, request.path))),
    }
}

/// `GET /v1/vms/{uuid or name}/facts`, and `GET /v1/vms/{uuid or name}/adoptable?target=HOST&link=ADDRESS:PORT`
async fn vm(engine: Arc<Engine>, request: &Request) -> Reply {
    let parts = request.segments();
    match parts.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, _, word, "facts"] => {
            let word = word.to_owned();
            let facts = blocking(move || {
                engine
                    .find(&word)
                    .and_then(|vm| engine.facts(vm))
                    .map_err(Problem::from)
            });
            http::outcome(status::OK, facts.await.and_then(|r| r))
        }
        [_, _, word, "adoptable"] => {
            let (word, target) = (word.to_owned(), target(request));
            let report = blocking(move || {
                let target = target?;
                let vm = engine.find(&word)?;
                let target = target.as_ref().map(|(host, link)| (host, link.as_str()));
                Ok::<_, Problem>(engine.adoptable(vm, target))
            });
            http::outcome(status::OK, report.await.and_then(|r| r))
        }
        _ => http::problem(&Problem::not_found(format!("{} is not served", request.path))),
    }
}

/// The host that is to be asked too, if one is.
fn target(request: &Request) -> Result<Option<(HostId, String)>, Problem> {
    match (request.query("target"), request.query("link")) {
        (None, None) => Ok(None),
        (Some(host), Some(link)) => match host.parse() {
            Ok(host) => Ok(Some((host, link.to_owned()))),
            Err(e) => Err(Problem::bad_request(format!("query: target: {e}"))),
        },
        _ => Err(Problem::bad_request("query: target and link go together")),
    }
}

/// The engine asks QEMU and the disk: not on an async thread.
async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    tokio::task::spawn_blocking(f)
        .await
        .map_err(|e| Problem::new(500, "internal", "Internal error", e.to_string()))
}
