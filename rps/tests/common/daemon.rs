//! Samples as agents send them, and replicators that answer over HTTP out of the model in [`super::fake`].

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use tokio::net::TcpListener;
use umbra_api::order::Order;
use umbra_api::problem::Problem;
use umbra_api::sample::{
    BlockSample, CpuSample, HostSample, MemSample, NetSample, SAMPLE_VERSION, SampleBatch, VmSample,
};
use umbra_api::{UnixMs, VmId};
use umbra_daemon::http::{self, Limits, Method, Reply, Request, status};
use umbra_daemon::stop::Stop;

use super::fake::{Hosts, host};

pub fn now() -> UnixMs {
    UnixMs::from_system(SystemTime::now())
}

/// A VM's interval. `wait` is the part of `cores` that it waited for.
pub fn vm_sample(vm: VmId, name: &str, incoming: bool, cores: f64, wait: f64, interval_ms: u64) -> VmSample {
    let ns = |cores: f64| (cores.max(0.0) * interval_ms as f64 * 1e6) as u64;
    VmSample {
        vm,
        name: name.into(),
        pid: 42,
        incoming,
        vcpus: 1,
        cpu: CpuSample {
            vcpu_run_ns: ns(cores - wait),
            vcpu_wait_ns: ns(wait),
            ..CpuSample::default()
        },
        mem: MemSample {
            rss_bytes: 64 << 20,
            guest_bytes: 256 << 20,
        },
        block: BlockSample::default(),
        net: NetSample::default(),
    }
}

/// A one-core host's interval that ends at `t`.
pub fn batch(name: &str, start: UnixMs, seq: u64, t: UnixMs, interval_ms: u64, vms: Vec<VmSample>) -> SampleBatch {
    SampleBatch {
        version: SAMPLE_VERSION,
        host: host(name),
        agent_start: start,
        seq,
        t,
        interval_ms,
        node: HostSample {
            cpus: 1.0,
            mem_total_bytes: 4 << 30,
            mem_available_bytes: 3 << 30,
            ..HostSample::default()
        },
        vms,
    }
}

/// The model's hosts, shared between their servers, their clock and the test.
#[derive(Clone)]
pub struct Replicators(pub Arc<Mutex<Hosts>>);

impl Replicators {
    pub fn lock(&self) -> MutexGuard<'_, Hosts> {
        self.0.lock().unwrap()
    }

    /// Serves one host; its address.
    pub async fn serve(&self, name: &'static str, stop: Stop) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let this = self.clone();
        let handler = move |r: Request| {
            let reply = this.answer(name, &r);
            async move { reply }
        };
        tokio::spawn(http::serve(listener, Limits::default(), stop, handler));
        addr
    }

    fn answer(&self, name: &str, r: &Request) -> Reply {
        let h = host(name);
        match (&r.method, r.path.as_str()) {
            (&Method::GET, "/v1/replicas") => http::outcome(
                status::OK,
                self.lock()
                    .replicas(&h)
                    .map_err(|e| Problem::new(503, "down", "Down", e)),
            ),
            (&Method::POST, "/v1/orders") => {
                let obeyed = r.json::<Order>().and_then(|o| Ok(self.lock().order(&h, &o)?));
                http::outcome(status::ACCEPTED, obeyed)
            }
            _ => http::problem(&Problem::not_found(&r.path)),
        }
    }

    /// The model's clock, in real time.
    pub fn run(&self, every: Duration, mut stop: Stop) {
        let this = self.clone();
        tokio::spawn(async move {
            while tokio::time::timeout(every, stop.asked()).await.is_err() {
                this.lock().tick(now());
            }
        });
    }
}
