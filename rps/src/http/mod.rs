//! The HTTP API. Domain errors become problems here and nowhere else; `openapi.json` describes what the table below
//! serves, and a test holds the two together.

use std::sync::Arc;

use umbra_api::problem::Problem;
use umbra_api::recover::RecoverRequest;
use umbra_api::sample::SampleBatch;
use umbra_api::view::{ModeRequest, ShadowRequest};
use umbra_api::{UnixMs, VmId};
use umbra_daemon::http::{Method, Reply, Request, StatusCode, json, outcome, problem, reply, status};
use umbra_daemon::metrics;

use crate::ingest::IngestError;
use crate::lifecycle::Illegal;
use crate::orchestrator::Denied;
use crate::service::{RequestError, Service};
use crate::store::Filter;

/// The API's description, OpenAPI 3.1.
pub const OPENAPI: &str = include_str!("../../openapi.json");

/// Events or decisions in one answer.
const LIMIT: usize = 100;
const LIMIT_MAX: usize = 10_000;

type Answer = Result<Reply, Problem>;

/// What a route is given: the service, the request, and the path's parameter if it has one.
type Handler = fn(&Arc<Service>, &Request, &str) -> Answer;

/// Method, path with at most one parameter, what answers.
const ROUTES: [(Method, &str, Handler); 17] = [
    (Method::POST, "/v1/samples", samples),
    (Method::GET, "/v1/status", |s, _, _| ok(&s.status())),
    (Method::GET, "/v1/hosts", |s, _, _| ok(&s.hosts())),
    (Method::GET, "/v1/vms", |s, _, _| ok(&s.vms())),
    (Method::GET, "/v1/vms/{vm}", |s, _, vm| ok(&s.vm(s.find(vm)?)?)),
    (Method::GET, "/v1/vms/{vm}/explain", |s, _, vm| {
        ok(&s.explain(s.find(vm)?)?)
    }),
    (Method::POST, "/v1/vms/{vm}/shadow", shadow),
    (Method::POST, "/v1/vms/{vm}/recover", recover),
    (Method::GET, "/v1/vms/{vm}/adoptable", |s, r, vm| {
        ok(&s.adoptable(s.find(vm)?, r.query("target"))?)
    }),
    (
        Method::GET,
        "/v1/decisions",
        |s, r, _| ok(&s.decisions(&filter(s, r)?)?),
    ),
    (Method::GET, "/v1/events", |s, r, _| ok(&s.events(&filter(s, r)?)?)),
    (Method::GET, "/v1/mode", |s, _, _| ok(&ModeRequest { mode: s.mode() })),
    (Method::PUT, "/v1/mode", mode),
    (Method::GET, "/v1/openapi.json", |_, _, _| {
        Ok(reply(status::OK, "application/json", OPENAPI))
    }),
    (Method::GET, "/metrics", |s, _, _| {
        Ok(metrics::reply(&s.metrics.registry))
    }),
    (Method::GET, "/healthz", |_, _, _| {
        Ok(reply(status::OK, "text/plain", "ok\n"))
    }),
    (Method::GET, "/readyz", ready),
];

/// Answers one request. Work that may wait for a lock or the disk is kept off the threads that serve.
pub async fn answer(service: Arc<Service>, request: Request) -> Reply {
    let work = move || route(&service, &request);
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(reply)) => reply,
        Ok(Err(p)) => problem(&p),
        Err(e) => problem(&Problem::new(
            500,
            "internal",
            "The request could not be answered",
            e.to_string(),
        )),
    }
}

fn route(service: &Arc<Service>, request: &Request) -> Answer {
    let parts = request.segments();
    let mut allowed = Vec::new();
    for (method, path, handler) in &ROUTES {
        let Some(parameter) = matches(path, &parts) else {
            continue;
        };
        if *method == request.method {
            return handler(service, request, parameter);
        }
        allowed.push(method.as_str());
    }
    if allowed.is_empty() {
        return Err(Problem::not_found(format!("{} is not served", request.path)));
    }
    let detail = format!(
        "{} takes {}, not {}",
        request.path,
        allowed.join(" and "),
        request.method
    );
    Err(Problem::new(405, "method_not_allowed", "Method not allowed", detail))
}

/// The path's parameter, or "" if it has none; `None` if the path is another one.
fn matches<'a>(path: &str, parts: &'a [String]) -> Option<&'a str> {
    let wanted = path.split('/').filter(|s| !s.is_empty());
    if wanted.clone().count() != parts.len() {
        return None;
    }
    let mut parameter = "";
    for (want, have) in wanted.zip(parts) {
        match want.starts_with('{') {
            true => parameter = have,
            false if want != have => return None,
            false => {}
        }
    }
    Some(parameter)
}

fn ok<T: serde::Serialize>(value: &T) -> Answer {
    Ok(json(status::OK, value))
}

fn samples(service: &Arc<Service>, request: &Request, _: &str) -> Answer {
    let batch: SampleBatch = request.json()?;
    service.take_samples(&batch)?;
    Ok(outcome(StatusCode::OK, Ok::<_, Problem>(serde_json::json!({}))))
}

/// Answers with the VM as it is then: its stage says that the request was taken.
fn shadow(service: &Arc<Service>, request: &Request, vm: &str) -> Answer {
    let vm: VmId = service.find(vm)?;
    let wish: ShadowRequest = request.json()?;
    service.request(vm, &wish)?;
    Ok(json(status::ACCEPTED, &service.vm(vm)?.summary))
}

/// `?dry_run=true` only shows the plan.
fn recover(service: &Arc<Service>, request: &Request, vm: &str) -> Answer {
    let vm: VmId = service.find(vm)?;
    let wish: RecoverRequest = request.json()?;
    let dry_run = match request.query("dry_run") {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            return Err(Problem::bad_request(format!(
                "query: dry_run: {other:?} is neither true nor false"
            )));
        }
    };
    ok(&service.recover(vm, &wish, dry_run)?)
}

fn mode(service: &Arc<Service>, request: &Request, _: &str) -> Answer {
    let wish: ModeRequest = request.json()?;
    service.set_mode(wish.mode)?;
    ok(&ModeRequest { mode: service.mode() })
}

fn ready(service: &Arc<Service>, _: &Request, _: &str) -> Answer {
    match service.ready() {
        true => Ok(reply(status::OK, "text/plain", "ready\n")),
        false => Err(Problem::new(
            503,
            "not_ready",
            "Not ready",
            "the first outlook is being made",
        )),
    }
}

/// `?vm=&since=&limit=`
fn filter(service: &Arc<Service>, request: &Request) -> Result<Filter, Problem> {
    let known = ["vm", "since", "limit"];
    if let Some((key, _)) = request.query.iter().find(|(k, _)| !known.contains(&k.as_str())) {
        return Err(Problem::bad_request(format!(
            "query: {key} is not known, only {}",
            known.join(", ")
        )));
    }
    let bad =
        |key: &str, value: &str, want: &str| Problem::bad_request(format!("query: {key}: {value:?} is not {want}"));
    let vm = request.query("vm").map(|word| service.find(word)).transpose()?;
    let since = request
        .query("since")
        .map(|s| s.parse().map_err(|_| bad("since", s, "a time in Unix milliseconds")));
    let limit = request.query("limit").map(|s| match s.parse() {
        Ok(n @ 1..=LIMIT_MAX) => Ok(n),
        _ => Err(bad("limit", s, "a number from 1 to 10000")),
    });
    Ok(Filter {
        vm,
        since: since.transpose()?.map(UnixMs),
        limit: limit.transpose()?.unwrap_or(LIMIT),
    })
}

impl From<IngestError> for Problem {
    fn from(e: IngestError) -> Self {
        match e {
            IngestError::Invalid(_) => Self::bad_request(e.to_string()),
            IngestError::Future { .. } | IngestError::TooOld { .. } => {
                Self::new(422, "bad_time", "The samples' time makes no sense here", e.to_string())
            }
            IngestError::TooManyHosts { .. } => Self::new(429, "too_many_hosts", "Too many hosts", e.to_string()),
        }
    }
}

impl From<RequestError> for Problem {
    fn from(e: RequestError) -> Self {
        let detail = e.to_string();
        match e {
            RequestError::Denied(Denied::NoSuchVm(_)) => Self::not_found(detail),
            RequestError::Denied(d) => {
                let code = match d {
                    Denied::Observing => "observing",
                    Denied::Busy => "busy",
                    Denied::TooFast(r) => return Self::new(409, r.code.to_string(), "Not possible now", r.detail),
                    Denied::Redirect { .. } => "redirect_not_ready",
                    Denied::Illegal(Illegal::OwnHost(_)) => "own_host",
                    _ => "wrong_stage",
                };
                Self::new(409, code, "Not possible now", detail)
            }
            RequestError::NoTarget(_) => Self::new(409, "no_target", "No host can hold the shadow", detail),
            RequestError::Target(_) => Self::not_found(detail),
            RequestError::Asking { .. } => Self::new(502, "replicator", "The replicator does not tell", detail),
            RequestError::Step { .. } => Self::new(409, "step", "A step of the recovery was refused", detail),
            RequestError::Store => Self::new(500, "store", "The store failed", detail),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_document_and_the_routes_are_the_same() {
        let document: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        assert_eq!(document["openapi"], "3.1.0");
        let mut described = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys().filter(|k| *k != "parameters") {
                described.insert((method.to_uppercase(), path.clone()));
            }
        }
        let served: BTreeSet<_> = ROUTES
            .iter()
            .map(|(m, p, _)| (m.to_string(), (*p).to_owned()))
            .collect();
        assert_eq!(described, served);
    }

    #[test]
    fn every_reference_in_the_document_leads_somewhere() {
        let document: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        let mut queue = vec![&document];
        let mut references = 0;
        while let Some(v) = queue.pop() {
            if let Some(target) = v.get("$ref").and_then(|r| r.as_str()) {
                references += 1;
                let pointer = target.strip_prefix('#').unwrap();
                assert!(document.pointer(pointer).is_some(), "{target}");
            }
            queue.extend(v.as_object().into_iter().flat_map(|o| o.values()));
            queue.extend(v.as_array().into_iter().flatten());
        }
        assert!(references > 20);
    }

    #[test]
    fn paths_match_with_their_parameter() {
        let parts = |s: &str| {
            s.split('/')
                .filter(|p| !p.is_empty())
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            matches("/v1/vms/{vm}/explain", &parts("/v1/vms/web/explain")),
            Some("web")
        );
        assert_eq!(matches("/v1/vms/{vm}", &parts("/v1/vms/web/explain")), None);
        assert_eq!(matches("/v1/status", &parts("/v1/status/")), Some(""));
        assert_eq!(matches("/v1/hosts", &parts("/v1/vms")), None);
    }
}
