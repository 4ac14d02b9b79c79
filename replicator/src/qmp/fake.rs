//! A monitor that knows what a version of QEMU knows, and refuses the rest as QEMU does.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::client::{Client, DEFAULT_TIMEOUT};

/// What is known of a version: of 8.1 by the documents, of the others by asking them.
#[derive(Clone, Copy, Debug)]
pub struct Fake {
    pub version: (u32, u32, u32),
    pub capabilities: &'static [&'static str],
    /// On from before: somebody else's.
    pub on: &'static [&'static str],
    pub parameters: &'static [&'static str],
    pub tls_creds: &'static str,
    pub kvm: bool,
}

const CAPABILITIES: [&str; 20] = [
    "xbzrle",
    "rdma-pin-all",
    "auto-converge",
    "zero-blocks",
    "events",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "dirty-bitmaps",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
    "switchover-ack",
    "dirty-limit",
];

const WITH_COMPRESSION: [&str; 22] = {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t] = CAPABILITIES;
    [
        a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, "compress", "block",
    ]
};

const PARAMETERS: [&str; 7] = [
    "max-bandwidth",
    "downtime-limit",
    "tls-creds",
    "throttle-trigger-threshold",
    "cpu-throttle-initial",
    "cpu-throttle-increment",
    "max-cpu-throttle",
];

const WITH_BANDWIDTH: [&str; 8] = {
    let [a, b, c, d, e, f, g] = PARAMETERS;
    [a, b, c, d, e, f, g, "avail-switchover-bandwidth"]
};

pub const V8_1: Fake = Fake {
    version: (8, 1, 5),
    capabilities: &WITH_COMPRESSION,
    on: &[],
    parameters: &PARAMETERS,
    tls_creds: "",
    kvm: true,
};

pub const V8_2: Fake = Fake {
    version: (8, 2, 2),
    parameters: &WITH_BANDWIDTH,
    ..V8_1
};

pub const V10_0: Fake = Fake {
    version: (10, 0, 2),
    capabilities: &CAPABILITIES,
    ..V8_2
};

/// The commands that came, in their order.
pub type Heard = Arc<Mutex<Vec<(String, Value)>>>;

impl Fake {
    /// Plays it, for one client.
    pub fn play(self) -> (tempfile::TempDir, Client, Heard) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let heard = Heard::default();
        let noted = heard.clone();
        std::thread::spawn(move || self.serve(&listener, &noted));
        let client = Client::connect(&path, DEFAULT_TIMEOUT).unwrap();
        (dir, client, heard)
    }

    fn serve(self, listener: &UnixListener, heard: &Heard) {
        let (mut stream, _) = listener.accept().unwrap();
        let (major, minor, micro) = self.version;
        let version = json!({"major": major, "minor": minor, "micro": micro});
        let greeting = json!({"QMP": {"version": {"qemu": version}}});
        stream.write_all(format!("{greeting}\n").as_bytes()).unwrap();
        for line in BufReader::new(stream.try_clone().unwrap())
            .lines()
            .map_while(Result::ok)
        {
            let command: Value = serde_json::from_str(&line).unwrap();
            let (name, arguments) = (command["execute"].as_str().unwrap_or_default(), &command["arguments"]);
            heard.lock().unwrap().push((name.to_owned(), arguments.clone()));
            let mut answer = match self.answer(name, arguments) {
                Ok(value) => json!({ "return": value }),
                Err(desc) => json!({"error": {"class": "GenericError", "desc": desc}}),
            };
            answer["id"] = command["id"].clone();
            if stream.write_all(format!("{answer}\n").as_bytes()).is_err() {
                return;
            }
        }
    }

    fn answer(&self, command: &str, arguments: &Value) -> Result<Value, String> {
        match command {
            "query-migrate-capabilities" => {
                let one = |c: &&str| json!({"capability": c, "state": self.on.contains(c)});
                Ok(self.capabilities.iter().map(one).collect())
            }
            "migrate-set-capabilities" => {
                let all = arguments["capabilities"].as_array().cloned().unwrap_or_default();
                let strange = all
                    .iter()
                    .filter_map(|c| c["capability"].as_str())
                    .find(|c| !self.capabilities.contains(c));
                strange.map_or(Ok(json!({})), |c| {
                    Err(format!("Parameter 'capability' does not accept value '{c}'"))
                })
            }
            "query-migrate-parameters" => {
                let value = |p: &&str| match *p {
                    "tls-creds" => ((*p).to_owned(), json!(self.tls_creds)),
                    _ => ((*p).to_owned(), json!(0)),
                };
                Ok(Value::Object(self.parameters.iter().map(value).collect()))
            }
            "migrate-set-parameters" => {
                let mut all = arguments.as_object().into_iter().flat_map(|a| a.keys());
                let strange = all.find(|p| !self.parameters.contains(&p.as_str()));
                strange.map_or(Ok(json!({})), |p| Err(format!("Parameter '{p}' is unexpected")))
            }
            "query-kvm" => Ok(json!({"enabled": self.kvm, "present": true})),
            "qmp_capabilities" | "getfd" | "migrate" => Ok(json!({})),
            other => Err(format!("The command {other} has not been found")),
        }
    }
}
