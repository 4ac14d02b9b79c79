//! The HTTP API on a real socket: what it takes, what it refuses and in which words.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use common::daemon::{batch, now, vm_sample};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use umbra_api::view::{HostView, Mode, ModeRequest, StatusView, VmSummary, VmView};
use umbra_api::{UnixMs, VmId};
use umbra_daemon::client::{Client, ClientError};
use umbra_daemon::stop::{self, Stopper};
use umbra_rps::config::Config;
use umbra_rps::service::{self, Service};

const INTERVAL_MS: u64 = 200;

fn id(n: u128) -> VmId {
    VmId(uuid::Uuid::from_u128(n))
}

struct Rps {
    client: Client,
    addr: SocketAddr,
    stopper: Stopper,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

/// An RPS whose only configured host's replicator is down.
async fn start(dir: &Path) -> Rps {
    let text = format!(
        "store = '{}'\nslot_ms = {INTERVAL_MS}\n[[hosts]]\nname = 'b'\nreplicator = 'http://127.0.0.1:1'\n\
         link = '127.0.0.1:2'\n",
        dir.join("rps.db").display()
    );
    let config: Config = umbra_daemon::config::parse(Path::new("rps.toml"), &text).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (stopper, stop) = stop::pair();
    let service = Service::open(config).unwrap();
    let task = tokio::spawn(service::run(service, listener, stop));
    let client = Client::new(&format!("http://{addr}"), Duration::from_secs(20)).unwrap();
    Rps {
        client,
        addr,
        stopper,
        task,
    }
}

impl Rps {
    async fn get(&self, path: &str) -> Value {
        self.client.get(path).await.unwrap()
    }

    /// The problem's status, code and detail.
    async fn refused(&self, path: &str) -> (u16, String, String) {
        problem(self.client.get::<Value>(path).await)
    }

    async fn post_refused(&self, path: &str, body: Value) -> (u16, String, String) {
        problem(self.client.post::<Value>(path, &body).await)
    }

    /// Agents on A push until the VMs are in the outlook.
    async fn push_until_seen(&self, names: &[(u128, &str)]) {
        let start = now();
        for seq in 0.. {
            let t = now();
            let vms = names
                .iter()
                .map(|(n, name)| vm_sample(id(*n), name, false, 0.2, 0.0, INTERVAL_MS))
                .collect();
            let b = batch("a", start, seq, t, INTERVAL_MS, vms);
            self.client.post::<Value>("/v1/samples", &b).await.unwrap();
            // The same again counts once.
            self.client.post::<Value>("/v1/samples", &b).await.unwrap();
            let seen: Vec<VmSummary> = self.client.get("/v1/vms").await.unwrap();
            if seen.len() == names.len() {
                return;
            }
            assert!(seq < 300, "the VMs never came into the outlook");
            tokio::time::sleep(Duration::from_millis(INTERVAL_MS)).await;
        }
    }

    async fn stop(self) {
        self.stopper.stop();
        self.task.await.unwrap().unwrap();
    }
}

fn problem(r: Result<Value, ClientError>) -> (u16, String, String) {
    match r {
        Err(ClientError::Refused { problem: p, .. }) => (p.status, p.code, p.detail),
        other => panic!("a problem was expected: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_api_shows() {
    let dir = tempfile::tempdir().unwrap();
    let rps = start(dir.path()).await;
    rps.push_until_seen(&[(1, "web"), (2, "db")]).await;
    let status: StatusView = rps.client.get("/v1/status").await.unwrap();
    assert_eq!(
        (status.mode, status.vms, status.shadows, status.slot_ms),
        (Mode::Act, 2, 0, INTERVAL_MS)
    );
    let hosts: Vec<HostView> = rps.client.get("/v1/hosts").await.unwrap();
    let names: Vec<&str> = hosts.iter().map(|h| h.host.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert!(hosts[0].last_sample.is_some() && hosts[0].vms == 2 && !hosts[1].replicator_up);
    let by_name: VmView = rps.client.get("/v1/vms/web").await.unwrap();
    let by_id: VmView = rps.client.get(&format!("/v1/vms/{}", id(1))).await.unwrap();
    assert_eq!(by_name.summary.vm, by_id.summary.vm);
    assert_eq!(
        (by_name.vcpus, by_name.guest_bytes, by_name.summary.protect),
        (1, 256 << 20, true)
    );
    let decision = rps.get("/v1/vms/web/explain").await;
    assert_eq!(decision["action"], "nothing");
    assert!(
        decision["because"].as_str().unwrap().contains("history is too short"),
        "{decision}"
    );
    let decisions = rps.get("/v1/decisions?vm=web&limit=5").await;
    assert_eq!(decisions[0]["vm"], json!(id(1)));
    assert_eq!(rps.get("/v1/events?since=0&limit=10").await, json!([]));
    assert_eq!(rps.get("/v1/openapi.json").await["info"]["title"], "Umbra RPS");
    assert_eq!(rps.client.get_text("/healthz").await.unwrap(), "ok\n");
    assert_eq!(rps.client.get_text("/readyz").await.unwrap(), "ready\n");
    let metrics = rps.client.get_text("/metrics").await.unwrap();
    for name in [
        "umbra_rps_sample_batches_total",
        "umbra_rps_vm_cps",
        "umbra_rps_store_commit_seconds_bucket",
    ] {
        assert!(metrics.contains(name), "{name} is missing:\n{metrics}");
    }
    assert!(metrics.contains("umbra_rps_replicator_up{host=\"b\"} 0"), "{metrics}");
    rps.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let rps = start(dir.path()).await;
    rps.push_until_seen(&[(1, "twin"), (2, "twin"), (3, "web")]).await;
    let refused = async |path: &str, status: u16, code: &str, word: &str| {
        let (s, c, d) = rps.refused(path).await;
        assert_eq!((s, c.as_str()), (status, code), "{path}: {d}");
        assert!(d.contains(word), "{path}: {d}");
    };
    refused("/v2/vms", 404, "not_found", "/v2/vms is not served").await;
    refused("/v1/samples", 405, "method_not_allowed", "takes POST, not GET").await;
    refused("/v1/vms/nobody", 404, "not_found", "no VM is named \"nobody\"").await;
    refused(&format!("/v1/vms/{}", id(77)), 404, "not_found", "no VM 0000").await;
    refused("/v1/vms/twin", 409, "ambiguous_name", "use the UUID").await;
    refused("/v1/events?since=noon", 400, "bad_request", "since: \"noon\"").await;
    refused("/v1/events?limit=0", 400, "bad_request", "limit: \"0\"").await;
    refused("/v1/decisions?wm=web", 400, "bad_request", "wm is not known").await;

    let posted = async |path: &str, body: Value, status: u16, code: &str, word: &str| {
        let (s, c, d) = rps.post_refused(path, body).await;
        assert_eq!((s, c.as_str()), (status, code), "{path}: {d}");
        assert!(d.contains(word), "{path}: {d}");
    };
    let good = serde_json::to_value(batch("a", UnixMs(1), 1, now(), 1000, Vec::new())).unwrap();
    let with = |pointer: &str, v: Value| {
        let mut b = good.clone();
        *b.pointer_mut(pointer).unwrap() = v;
        b
    };
    posted(
        "/v1/samples",
        with("/version", json!(9)),
        400,
        "bad_request",
        "sample version 9",
    )
    .await;
    posted(
        "/v1/samples",
        with("/node/cpus", json!("many")),
        400,
        "bad_request",
        "node.cpus",
    )
    .await;
    posted("/v1/samples", with("/host", json!("a b")), 400, "bad_request", "host").await;
    posted(
        "/v1/samples",
        with("/t", json!(now().0 + 3_600_000)),
        422,
        "bad_time",
        "check its clock",
    )
    .await;
    posted(
        "/v1/samples",
        json!({"version": 1, "more": 2}),
        400,
        "bad_request",
        "more",
    )
    .await;
    posted(
        "/v1/vms/web/shadow",
        json!({"action": "explode"}),
        400,
        "bad_request",
        "explode",
    )
    .await;
    posted(
        "/v1/vms/web/shadow",
        json!({"action": "switchover"}),
        409,
        "wrong_stage",
        "unprotected",
    )
    .await;
    posted(
        "/v1/vms/web/shadow",
        json!({"action": "failback"}),
        409,
        "wrong_stage",
        "unprotected",
    )
    .await;
    posted(
        "/v1/vms/web/shadow",
        json!({"action": "release"}),
        409,
        "wrong_stage",
        "unprotected",
    )
    .await;
    posted(
        "/v1/vms/web/shadow",
        json!({"action": "create"}),
        409,
        "no_target",
        "b: its replicator does not",
    )
    .await;
    posted(
        "/v1/vms/web/shadow",
        json!({"action": "create", "host": "z"}),
        409,
        "no_target",
        "no replicator is",
    )
    .await;
    posted(
        "/v1/vms/nobody/shadow",
        json!({"action": "release"}),
        404,
        "not_found",
        "nobody",
    )
    .await;
    rps.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mode_is_kept_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let rps = start(dir.path()).await;
    let observe = ModeRequest { mode: Mode::Observe };
    let now: ModeRequest = rps.client.put("/v1/mode", &observe).await.unwrap();
    assert_eq!(now, observe);
    let bad = problem(rps.client.put("/v1/mode", &json!({"mode": "sleep"})).await);
    assert_eq!(bad.0, 400);
    rps.push_until_seen(&[(3, "web")]).await;
    let (status, code, _) = rps
        .post_refused("/v1/vms/web/shadow", json!({"action": "release"}))
        .await;
    assert_eq!((status, code.as_str()), (409, "observing"));
    rps.stop().await;
    let rps = start(dir.path()).await;
    assert_eq!(rps.client.get::<ModeRequest>("/v1/mode").await.unwrap(), observe);
    rps.stop().await;
}

/// Bytes as they are, for what no client would send.
fn raw(addr: SocketAddr, bytes: &[u8]) -> String {
    let mut s = TcpStream::connect(addr).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // The server may answer, and close, before it has read everything.
    let _ = s.write_all(bytes);
    let mut text = Vec::new();
    let _ = s.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_and_huge_requests_get_an_answer_and_harm_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let rps = start(dir.path()).await;
    let addr = rps.addr;
    let asked = move |bytes: Vec<u8>| tokio::task::spawn_blocking(move || raw(addr, &bytes));
    let text = asked(
        b"POST /v1/samples HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 9\r\n\r\n{\"version".to_vec(),
    );
    let text = text.await.unwrap();
    assert!(
        text.starts_with("HTTP/1.1 400") && text.contains("application/problem+json"),
        "{text}"
    );
    let mut huge =
        b"POST /v1/samples HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 9000000\r\n\r\n".to_vec();
    huge.resize(huge.len() + 9_000_000, b' ');
    let text = asked(huge).await.unwrap();
    // A peer that closes early may lose the answer on the way; the daemon must live on either way.
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 413"), "{text}");
    let text = asked(b"\x16\x03\x01 no HTTP at all\r\n\r\n".to_vec()).await.unwrap();
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 400"), "{text}");
    assert_eq!(rps.client.get_text("/healthz").await.unwrap(), "ok\n");
    rps.stop().await;
}

/// With its only replicator down the RPS knows nothing, does nothing, and says what to do.
#[tokio::test(flavor = "multi_thread")]
async fn a_way_out_is_asked_for_and_nothing_is_done_blindly() {
    let dir = tempfile::tempdir().unwrap();
    let rps = start(dir.path()).await;
    rps.push_until_seen(&[(1, "web")]).await;
    for dry_run in ["", "?dry_run=true"] {
        let plan: Value = rps
            .client
            .post(&format!("/v1/vms/web/recover{dry_run}"), &json!({}))
            .await
            .unwrap();
        assert_eq!(plan["steps"], json!([]), "{plan}");
        assert!(plan["found"][0].as_str().unwrap().contains("does not answer"), "{plan}");
    }
    let (status, code, _) = rps.post_refused("/v1/vms/web/recover?dry_run=maybe", json!({})).await;
    assert_eq!((status, code.as_str()), (400, "bad_request"));
    let (status, code, _) = rps.post_refused("/v1/vms/web/recover", json!({"ded": []})).await;
    assert_eq!((status, code.as_str()), (400, "bad_request"));
    let (status, _, _) = rps.post_refused("/v1/vms/nobody/recover", json!({})).await;
    assert_eq!(status, 404);
    let (status, _, detail) = rps.refused("/v1/vms/web/adoptable?target=nowhere").await;
    assert!(status == 404 && detail.contains("nowhere"), "{detail}");
    rps.stop().await;
}
