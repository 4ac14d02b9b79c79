//! A small RPS for the tests: umbra-daemon's own HTTP server on a free port, two hosts, two VMs, and every request kept.

use std::net::SocketAddr;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use umbra_api::lifecycle::Stage;
use umbra_api::order::Tier;
use umbra_api::problem::Problem;
use umbra_api::view::*;
use umbra_api::{DecisionId, Epoch, UnixMs, VmId};
use umbra_daemon::http::{self, Limits, Reply, Request, status};
use umbra_daemon::stop::{self, Stopper};

const NOW: UnixMs = UnixMs(1_764_062_000_000);

/// Serves until it is dropped.
pub struct FakeRps {
    pub url: String,
    seen: Arc<Mutex<Vec<String>>>,
    runtime: Option<tokio::runtime::Runtime>,
    _stopper: Stopper,
}

impl FakeRps {
    pub fn start() -> Self {
        Self::with(answer)
    }

    pub fn with(handler: fn(&Request) -> Reply) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind(("127.0.0.1", 0)))
            .unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let (stopper, stop) = stop::pair();
        runtime.spawn(http::serve(listener, Limits::default(), stop, move |r: Request| {
            let query: Vec<String> = r.query.iter().map(|(k, v)| format!("{k}={v}")).collect();
            let body = String::from_utf8_lossy(&r.body);
            log.lock().unwrap().push(
                format!("{} {} {} {body}", r.method, r.path, query.join("&"))
                    .trim_end()
                    .to_owned(),
            );
            std::future::ready(handler(&r))
        }));
        Self {
            url: format!("http://{address}"),
            seen,
            runtime: Some(runtime),
            _stopper: stopper,
        }
    }

    /// The requests so far: `METHOD PATH QUERY BODY`.
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    pub fn umbra(&self, args: &[&str]) -> Run {
        umbra(&self.url, args)
    }
}

impl Drop for FakeRps {
    fn drop(&mut self) {
        if let Some(r) = self.runtime.take() {
            r.shutdown_background();
        }
    }
}

/// What a run of the binary gave.
pub struct Run {
    pub code: i32,
    pub out: String,
    pub err: String,
}

pub fn umbra(url: &str, args: &[&str]) -> Run {
    let output = Command::new(env!("CARGO_BIN_EXE_umbra"))
        .args(args)
        .env("UMBRA_RPS", url)
        .env("TZ", "UTC")
        .output()
        .unwrap();
    Run::of(&output)
}

impl Run {
    pub fn of(o: &Output) -> Self {
        let text = |b: &[u8]| String::from_utf8(b.to_vec()).unwrap();
        Self {
            code: o.status.code().unwrap(),
            out: text(&o.stdout),
            err: text(&o.stderr),
        }
    }
}

pub const WEB: &str = "00000001-0000-0000-0000-000000000001";
pub const NEIGHBOUR: &str = "00000002-0000-0000-0000-000000000002";

fn answer(r: &Request) -> Reply {
    let segments = r.segments();
    let path: Vec<&str> = segments.iter().map(String::as_str).collect();
    match (r.method.as_str(), path.as_slice()) {
        ("GET", ["v1", "status"]) => http::json(status::OK, &the_status()),
        ("GET", ["v1", "vms"]) => http::json(status::OK, &[summary(WEB, "web"), summary(NEIGHBOUR, "neighbour")]),
        ("GET", ["v1", "vms", WEB]) => http::json(status::OK, &the_vm()),
        ("GET", ["v1", "vms", WEB, "explain"]) => http::json(status::OK, &the_decision()),
        ("GET", ["v1", "vms", NEIGHBOUR, "explain"]) => {
            http::problem(&Problem::not_found("nothing has been decided about neighbour yet"))
        }
        ("GET", ["v1", "decisions"]) => http::json(status::OK, &[the_decision()]),
        ("GET", ["v1", "events"]) => http::json(status::OK, &[the_event()]),
        ("GET", ["v1", "mode"]) => http::json(status::OK, &ModeRequest { mode: Mode::Observe }),
        ("PUT", ["v1", "mode"]) => http::outcome(status::OK, r.json::<ModeRequest>()),
        ("POST", ["v1", "vms", WEB, "shadow"]) => match r.json::<ShadowRequest>() {
            Ok(ShadowRequest::Failback) => http::problem(&Problem::new(
                409,
                "wrong_stage",
                "Not in this stage",
                "web runs at home already: there is nothing to fail back",
            )),
            Ok(ShadowRequest::Create { host: Some(h) }) if h.as_str() == "full" => http::problem(&Problem::new(
                422,
                "target_lacks",
                "The target lacks something",
                "full has no RAM left",
            )),
            other => http::outcome(status::ACCEPTED, other),
        },
        _ => http::problem(&Problem::not_found(format!("{} is not known here", r.path))),
    }
}

fn summary(id: &str, name: &str) -> VmSummary {
    VmSummary {
        vm: vm_id(id),
        name: name.into(),
        host: "a".parse().unwrap(),
        home: "a".parse().unwrap(),
        stage: Stage::Standby,
        cpu_demand: 0.42,
        wait_ms_per_s: 3.6,
        cps: 0.91,
        threshold: 0.6,
        shadow: Some("b".parse().unwrap()),
        protect: true,
    }
}

fn vm_id(id: &str) -> VmId {
    id.parse().unwrap()
}

fn the_status() -> StatusView {
    let host = |name: &str| HostView {
        host: name.parse().unwrap(),
        cpus: 1.0,
        cpu_demand: 0.74,
        cpu_predicted_p50: 0.9,
        cpu_predicted_p90: 1.31,
        mem_total_bytes: 8 << 30,
        mem_available_bytes: 5 << 30,
        contention_probability: 0.83,
        vms: 1,
        shadows: 1,
        last_sample: Some(NOW),
        replicator_up: true,
    };
    StatusView {
        version: "0.1.0".into(),
        mode: Mode::Act,
        now: NOW,
        started: NOW.plus_ms(-60_000),
        slot_ms: 2000,
        hosts: vec![host("a"), host("b")],
        vms: 2,
        shadows: 1,
    }
}

fn the_vm() -> VmView {
    VmView {
        summary: summary(WEB, "web"),
        epoch: Epoch(2),
        tier: Some(Tier::Standby),
        vcpus: 1,
        rss_bytes: 210 << 20,
        guest_bytes: 256 << 20,
        model: "ets".into(),
        scores: vec![],
        history: vec![],
        forecast: None,
        progress: None,
        shadow_memory: None,
        disks: vec![],
        last_switchover: None,
        last_error: None,
        events: vec![the_event()],
    }
}

fn the_event() -> LifecycleEvent {
    LifecycleEvent {
        t: NOW,
        vm: vm_id(WEB),
        from: Stage::Seeding,
        to: Stage::Standby,
        reason: "the first copy is complete".into(),
        decision: Some(DecisionId(42)),
    }
}

fn the_decision() -> DecisionView {
    DecisionView {
        id: DecisionId(42),
        t: NOW,
        vm: vm_id(WEB),
        mode: Mode::Act,
        stage: Stage::Unprotected,
        action: "provision".into(),
        because: "contention is expected in 18 s and a copy takes 4.2 s".into(),
        inputs: DecisionInputs {
            cps: 0.91,
            threshold: 0.6,
            ..DecisionInputs::default()
        },
        hosts: vec![
            HostVerdict {
                host: "b".parse().unwrap(),
                chosen: true,
                reason: "0.85 cores stay free".into(),
            },
            HostVerdict {
                host: "c".parse().unwrap(),
                chosen: false,
                reason: "under maintenance".into(),
            },
        ],
    }
}
