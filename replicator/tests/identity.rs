//! The door of the link, with an engine behind it: who may say what in whose name. No QEMU is needed, since all of it is
//! decided before one is started.

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use umbra_api::order::{Order, OrderKind, Refusal, RefusalCode};
use umbra_api::wire::Purpose;
use umbra_api::wire::control::{Message, ShadowSpec};
use umbra_api::{Epoch, HostId, OrderId, VmId};
use umbra_daemon::config;
use umbra_replicator::config::Config;
use umbra_replicator::engine::Engine;
use umbra_replicator::link::tls::{Files, Tls};
use umbra_replicator::link::{Link, LinkError, Security, connect};
use umbra_replicator::target;

const LONG: Duration = Duration::from_secs(20);
const VM: VmId = VmId(uuid::Uuid::from_u128(7));

struct Site {
    dir: tempfile::TempDir,
    ca: CertifiedIssuer<'static, KeyPair>,
    addr: String,
    engine: Arc<Engine>,
}

impl Site {
    /// Host b, which has admitted a shadow of `VM` from host a.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(dir.path().join("ca.crt"), ca.pem()).unwrap();
        let files = issue(&ca, dir.path(), "b");
        let text = format!(
            "host = 'b'\nstate_dir = '{d}/state'\nrun_dir = '{d}/run'\nram_dir = '{d}/ram'\ncgroup = ''\n\
             [link.tls]\ncert = '{}'\nkey = '{}'\nca = '{}'\n",
            files.cert.display(),
            files.key.display(),
            files.ca.display(),
            d = dir.path().display(),
        );
        let config: Config = config::parse(Path::new("b.toml"), &text).unwrap();
        let security = config.security().unwrap();
        let engine = Engine::start(config, security).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        target::listener::listen(engine.clone(), listener).unwrap();
        let admit = Order {
            id: OrderId(uuid::Uuid::from_u128(1)),
            vm: VM,
            epoch: Epoch(3),
            kind: OrderKind::Admit { source: host("a") },
        };
        engine.order(&admit).unwrap();
        Self { dir, ca, addr, engine }
    }

    fn as_host(&self, name: &str) -> Security {
        let files = issue(&self.ca, self.dir.path(), name);
        Security::Tls(Arc::new(Tls::load(&files, &host(name)).unwrap()))
    }

    fn open(&self, from: &str, purpose: Purpose) -> Link {
        let link = connect(&self.addr, &host("b"), purpose, &self.as_host(from), LONG).unwrap();
        link.set_timeouts(Some(LONG), Some(LONG)).unwrap();
        link
    }

    /// Host `from` opens a connection with this, and hears that.
    fn say(&self, from: &str, message: &Message) -> Message {
        let mut link = self.open(from, Purpose::Control);
        link.writer.send_message(message).unwrap();
        link.reader.next_message().unwrap()
    }
}

fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

fn issue(ca: &CertifiedIssuer<'static, KeyPair>, dir: &Path, name: &str) -> Files {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    let files = Files {
        cert: dir.join(format!("{name}.crt")),
        key: dir.join(format!("{name}.key")),
        ca: dir.join("ca.crt"),
    };
    std::fs::write(&files.cert, params.signed_by(&key, ca).unwrap().pem()).unwrap();
    std::fs::write(&files.key, key.serialize_pem()).unwrap();
    files
}

fn hello(as_host: &str, epoch: u64) -> Message {
    Message::Hello {
        vm: VM,
        name: "web".into(),
        epoch: Epoch(epoch),
        port: None,
        resume: None,
        host: host(as_host),
        spec: Box::new(ShadowSpec {
            qemu_version: (10, 0, 2),
            binary: "qemu-that-nobody-has".into(),
            machine: "pc-q35-10.0".into(),
            args: Vec::new(),
            ram: Vec::new(),
            nics: Vec::new(),
            disks: Vec::new(),
            host_cpu: None,
            files: Vec::new(),
        }),
    }
}

fn refusal(message: Message) -> Refusal {
    match message {
        Message::Refused { refusal } => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn nobody_speaks_in_another_hosts_name() {
    let site = Site::new();
    let r = refusal(site.say("c", &hello("a", 3)));
    assert_eq!(r.code, RefusalCode::PeerIdentity);
    assert_eq!(r.detail, "the certificate is for c, expected is a");
    // Under its own name it is another refusal: nothing was admitted from there.
    assert_eq!(refusal(site.say("c", &hello("c", 3))).code, RefusalCode::WrongPhase);
    // The right host comes as far as this machine can: there is no such QEMU.
    let r = refusal(site.say("a", &hello("a", 3)));
    assert!(
        !matches!(r.code, RefusalCode::PeerIdentity | RefusalCode::WrongPhase),
        "{r}"
    );
}

#[test]
fn only_the_vms_own_source_decides_an_epoch() {
    let site = Site::new();
    let resolve = Message::Resolve {
        vm: VM,
        epoch: Epoch(9),
    };
    assert_eq!(refusal(site.say("c", &resolve)).code, RefusalCode::PeerIdentity);
    let order = |id, epoch| Order {
        id: OrderId(uuid::Uuid::from_u128(id)),
        vm: VM,
        epoch: Epoch(epoch),
        kind: OrderKind::Admit { source: host("a") },
    };
    // That changed nothing: an order below that epoch is still taken.
    site.engine.order(&order(2, 4)).unwrap();
    assert_eq!(site.say("a", &resolve), Message::Aborted { epoch: Epoch(9) });
    assert_eq!(
        site.engine.order(&order(3, 5)).unwrap_err().code,
        RefusalCode::StaleEpoch
    );
}

#[test]
fn a_ram_connection_without_a_session_is_closed() {
    let site = Site::new();
    let mut link = site.open("a", Purpose::Ram);
    link.writer.send_message(&Message::Attach { session: 12 }).unwrap();
    let e = link.reader.next_message().unwrap_err();
    assert!(matches!(e, LinkError::Closed { .. }), "{e}");
}

/// Certificates and limits are read anew without a restart; a configuration with an error changes nothing.
#[test]
fn a_renewed_certificate_is_shown_from_the_next_connection_on() {
    let site = Site::new();
    let before = site.as_host("a");
    let mut link = connect(&site.addr, &host("b"), Purpose::Control, &before, LONG).unwrap();
    // The operator moves to another CA: everyone gets new files, in the old places.
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let other = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let d = site.dir.path();
    issue(&other, d, "b");
    let text = format!(
        "host = 'b'\n[link]\nbandwidth_mbit = 80\n[link.tls]\ncert = '{d}/b.crt'\nkey = '{d}/b.key'\nca = '{d}/ca.crt'\n",
        d = d.display()
    );
    let parsed = || config::parse::<Config>(Path::new("b.toml"), &text);
    // Half of it: the certificate is not of the CA yet.
    assert!(parsed().unwrap_err().to_string().contains("not issued by the CA"));
    std::fs::write(d.join("ca.crt"), other.pem()).unwrap();
    site.engine.reload(&parsed().unwrap()).unwrap();
    assert_eq!(site.engine.limits().bandwidth_mbit, Some(80));
    let e = connect(&site.addr, &host("b"), Purpose::Control, &before, LONG).unwrap_err();
    assert!(matches!(e, LinkError::Tls { .. }), "{e}");
    // The old connection goes on.
    link.writer.send_message(&hello("c", 3)).unwrap();
    assert_eq!(
        refusal(link.reader.next_message().unwrap()).code,
        RefusalCode::PeerIdentity
    );
    let after = Security::Tls(Arc::new(Tls::load(&issue(&other, d, "a"), &host("a")).unwrap()));
    connect(&site.addr, &host("b"), Purpose::Control, &after, LONG).unwrap();
}
