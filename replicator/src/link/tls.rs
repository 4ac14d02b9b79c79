//! TLS 1.3 with certificates on both sides: who may speak on the link, and who is who.
//!
//! A certificate stands for a host: its subject alternative name (DNS, or an address where the host is called by one) is the
//! host's name in the RPS. The side that connects knows whom it wants and lets rustls compare; the side that accepts takes
//! every certificate of its CA and compares once the peer has said on whose behalf it speaks ([`Identity::is`]).
//! Sessions are not resumed: connections are few and long, and each proves its identity anew.
//!
//! ring and not aws-lc below rustls: it needs nothing but a C compiler.

use std::fmt::Display;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig,
    ServerConnection,
};
use serde::Deserialize;
use umbra_api::HostId;
use umbra_api::wire::{Purpose, encode_preamble};

use super::frames::{LinkError, io_error};

pub(super) const PEER_IN_TLS: &str = "the peer speaks TLS, this side is configured as plaintext";
const PEER_IN_CLEAR: &str = "the peer is configured as plaintext, this side speaks TLS";

/// A fatal 'protocol version': all that a TLS side can say to one that speaks in clear.
const ALERT: [u8; 7] = [0x15, 3, 3, 0, 2, 2, 70];
/// How long, and how many bytes of it, a peer that was refused is listened to so that it can read why.
const DISMISS_TIME: Duration = Duration::from_millis(500);
const DISMISS_BYTES: usize = 1 << 20;

/// `[link.tls]`: PEM files.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// This host's certificate, and those between it and the CA.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Whose certificates are taken from peers.
    pub ca: PathBuf,
}

/// What is wrong with one of the files.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}: {reason}", .file.display())]
pub struct FileError {
    /// `cert`, `key` or `ca`.
    pub key: &'static str,
    pub file: PathBuf,
    pub reason: String,
}

/// How connections are protected.
#[derive(Clone, Debug)]
pub enum Security {
    Plaintext,
    Tls(Arc<Tls>),
}

/// Certificates, ready for use.
#[derive(Debug)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Tls {
    /// Reads the files of host `host`.
    pub fn load(files: &Files, host: &HostId) -> Result<Self, FileError> {
        let (cert, key, ca) = (
            about("cert", &files.cert),
            about("key", &files.key),
            about("ca", &files.ca),
        );
        let chain = certificates(&files.cert).map_err(&cert)?;
        let secret = PrivateKeyDer::from_pem_slice(&read(&files.key).map_err(&key)?)
            .map_err(|e| key(format!("no private key in PEM: {e}")))?;
        let mut roots = RootCertStore::empty();
        for root in certificates(&files.ca).map_err(&ca)? {
            roots
                .add(root)
                .map_err(|e| ca(format!("a certificate in it can't be used: {e}")))?;
        }
        let own = chain.first().cloned().ok_or_else(|| cert("no certificate".into()))?;
        Identity::Certificate(own.clone()).is(host).map_err(&cert)?;

        let provider = Arc::new(provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots.clone()), provider.clone())
            .build()
            .map_err(|e| ca(e.to_string()))?;
        let between = chain.get(1..).unwrap_or_default();
        // Not so an expired one: a replicator whose certificate has run out must still look after its VMs.
        if let Err(rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        )) = verifier.verify_client_cert(&own, between, UnixTime::now())
        {
            return Err(cert(format!("it was not issued by the CA in {}", files.ca.display())));
        }
        let versions = &[&rustls::version::TLS13];
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(|e| key(e.to_string()))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain.clone(), secret.clone_key())
            .map_err(|e| key(format!("not the key of {}: {e}", files.cert.display())))?;
        client.resumption = Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(|e| key(e.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, secret)
            .map_err(|e| key(format!("not the key of {}: {e}", files.cert.display())))?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    /// Opens TLS towards `host`, which must prove that it is that host.
    pub(super) fn connect(
        &self,
        tcp: &mut TcpStream,
        host: &HostId,
        deadline: Instant,
        peer: &str,
    ) -> Result<Connection, LinkError> {
        let refused = |reason: String| LinkError::Tls {
            peer: peer.to_owned(),
            reason,
        };
        let name = ServerName::try_from(host.as_str().to_owned())
            .map_err(|e| refused(format!("host name {host} can't stand in a certificate: {e}")))?;
        let conn = ClientConnection::new(self.client.clone(), name).map_err(|e| refused(words(&e)))?;
        let mut conn = Connection::from(conn);
        handshake(&mut conn, tcp, deadline, peer)?;
        Ok(conn)
    }

    /// Takes TLS from whoever has a certificate of the CA.
    pub(super) fn accept(
        &self,
        tcp: &mut TcpStream,
        deadline: Instant,
        peer: &str,
    ) -> Result<(Connection, Identity), LinkError> {
        let refused = |reason: String| LinkError::Tls {
            peer: peer.to_owned(),
            reason,
        };
        if !is_record(first_byte(tcp, deadline, peer)?) {
            dismiss(tcp, &ALERT);
            return Err(refused(PEER_IN_CLEAR.into()));
        }
        let conn = ServerConnection::new(self.server.clone()).map_err(|e| refused(words(&e)))?;
        let mut conn = Connection::from(conn);
        handshake(&mut conn, tcp, deadline, peer)?;
        let own = conn.peer_certificates().and_then(<[_]>::first);
        let own = own.ok_or_else(|| refused("the peer has no certificate".into()))?;
        let identity = Identity::Certificate(own.clone().into_owned());
        Ok((conn, identity))
    }
}

/// AES-128 first: on bulk data it costs a fifth less than AES-256, and is as much out of reach.
fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
            ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..ring::default_provider()
    }
}

fn about<'a>(key: &'static str, file: &'a Path) -> impl Fn(String) -> FileError + 'a {
    move |reason| FileError {
        key,
        file: file.to_owned(),
        reason,
    }
}

fn read(file: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(file).map_err(|e| e.to_string())
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read(file)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match all {
        Ok(all) if all.is_empty() => Err("no certificate in PEM".into()),
        Ok(all) => Ok(all),
        Err(e) => Err(format!("not PEM: {e}")),
    }
}

/// Whom a connection was accepted from.
#[derive(Clone, Debug)]
pub enum Identity {
    /// In clear: whoever it says to be.
    Unproven,
    Certificate(CertificateDer<'static>),
}

impl Identity {
    /// Whether the peer is `host`; if not, both names.
    pub fn is(&self, host: &HostId) -> Result<(), String> {
        let Self::Certificate(der) = self else { return Ok(()) };
        let unreadable = |e: &dyn Display| format!("the certificate can't be read: {e}");
        let cert = webpki::EndEntityCert::try_from(der).map_err(|e| unreadable(&e))?;
        let name = ServerName::try_from(host.as_str())
            .map_err(|e| format!("host name {host} can't stand in a certificate: {e}"))?;
        cert.verify_is_valid_for_subject_name(&name).map_err(|_| {
            let names: Vec<&str> = cert.valid_dns_names().collect();
            match names.is_empty() {
                true => format!("the certificate names no host, expected is {host} as subject alternative name"),
                false => format!("the certificate is for {}, expected is {host}", names.join(", ")),
            }
        })
    }
}

/// First byte of a TLS record: its type. Neither a preamble nor a frame begins with one of these.
pub(super) fn is_record(byte: u8) -> bool {
    (0x14..=0x17).contains(&byte)
}

/// A TLS peer came to a side that is configured as plaintext: it gets a preamble, which says what this side is.
pub(super) fn refuse_tls(tcp: &mut TcpStream, deadline: Instant, peer: &str) -> Result<(), LinkError> {
    if !is_record(first_byte(tcp, deadline, peer)?) {
        return Ok(());
    }
    dismiss(tcp, &encode_preamble(Purpose::Control));
    Err(LinkError::Tls {
        peer: peer.to_owned(),
        reason: PEER_IN_TLS.into(),
    })
}

/// What is left until `deadline`, as a time-out of the socket.
pub(super) fn limit(tcp: &TcpStream, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    tcp.set_read_timeout(Some(left))?;
    tcp.set_write_timeout(Some(left))
}

fn is_timeout(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// The byte that the peer's stream begins with, which stays in the socket.
fn first_byte(tcp: &TcpStream, deadline: Instant, peer: &str) -> Result<u8, LinkError> {
    let mut byte = [0];
    let peeked = limit(tcp, deadline).and_then(|()| tcp.peek(&mut byte));
    match peeked {
        Ok(0) => Err(LinkError::Closed { peer: peer.to_owned() }),
        Ok(_) => Ok(byte[0]),
        Err(e) if is_timeout(&e) => Err(LinkError::TimedOut { peer: peer.to_owned() }),
        Err(e) => Err(io_error(peer, e)),
    }
}

/// Says `last`, and waits a moment for the peer's end: a socket that is closed over unread bytes resets the connection,
/// and the peer would not read why.
fn dismiss(tcp: &mut TcpStream, last: &[u8]) {
    let deadline = Instant::now() + DISMISS_TIME;
    // Whatever fails here: the peer is refused all the same.
    let told = limit(tcp, deadline)
        .and_then(|()| tcp.write_all(last))
        .and_then(|()| tcp.shutdown(Shutdown::Write));
    let (mut bin, mut seen) = ([0; 4096], 0);
    while told.is_ok() && seen < DISMISS_BYTES && limit(tcp, deadline).is_ok() {
        match tcp.read(&mut bin) {
            Ok(n) if n > 0 => seen += n,
            _ => return,
        }
    }
}

/// Bounded as a whole: a peer that trickles bytes gets no more time than one that says nothing.
fn handshake(conn: &mut Connection, tcp: &mut TcpStream, deadline: Instant, peer: &str) -> Result<(), LinkError> {
    let mut heard = false;
    loop {
        while conn.wants_write() {
            limit(tcp, deadline)
                .and_then(|()| conn.write_tls(tcp))
                .map_err(|e| broken(e, heard, peer))?;
        }
        if !conn.is_handshaking() {
            return Ok(());
        }
        if !heard && !is_record(first_byte(tcp, deadline, peer).map_err(|e| silent(e, peer))?) {
            return Err(LinkError::Tls {
                peer: peer.to_owned(),
                reason: PEER_IN_CLEAR.into(),
            });
        }
        heard = true;
        match limit(tcp, deadline).and_then(|()| conn.read_tls(tcp)) {
            Ok(0) => return Err(LinkError::Cut { peer: peer.to_owned() }),
            Ok(_) => {}
            Err(e) => return Err(broken(e, heard, peer)),
        }
        if let Err(e) = conn.process_new_packets() {
            let mut alert = Vec::new();
            while conn.wants_write() && conn.write_tls(&mut alert).is_ok() {}
            dismiss(tcp, &alert);
            return Err(LinkError::Tls {
                peer: peer.to_owned(),
                reason: words(&e),
            });
        }
    }
}

fn broken(e: io::Error, heard: bool, peer: &str) -> LinkError {
    let peer = peer.to_owned();
    match is_timeout(&e) {
        true if heard => LinkError::Tls {
            peer,
            reason: "the handshake did not end in time".into(),
        },
        true => LinkError::TimedOut { peer },
        false => LinkError::Io { peer, source: e },
    }
}

/// A peer that ends the connection instead of answering a greeting in TLS.
fn silent(e: LinkError, peer: &str) -> LinkError {
    match e {
        LinkError::Closed { .. } => LinkError::Tls {
            peer: peer.to_owned(),
            reason: "the peer closed the connection without an answer: is it an umbra-replicator?".into(),
        },
        other => other,
    }
}

/// rustls' errors, those that an operator will meet in plainer words.
pub(super) fn words(e: &rustls::Error) -> String {
    use rustls::Error::{AlertReceived, InvalidCertificate};
    match e {
        AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
            "refused by the peer: it does not know the CA of this side's certificate".into()
        }
        AlertReceived(AlertDescription::CertificateExpired) => {
            "refused by the peer: this side's certificate has expired".into()
        }
        AlertReceived(AlertDescription::BadCertificate) => {
            "refused by the peer: this side's certificate is not for the host that was expected, or damaged".into()
        }
        AlertReceived(alert) => format!("refused by the peer: {alert:?}"),
        // The second: of another CA that has the same name.
        InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "the peer's certificate is not of the CA in link.tls.ca".into()
        }
        InvalidCertificate(CertificateError::NotValidForNameContext { expected, presented }) => format!(
            "the peer's certificate is for {}, expected is {}",
            presented.join(", ").replace("DnsName(", "").replace([')', '"'], ""),
            expected.to_str()
        ),
        InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            format!("the peer's certificate has expired ({e})")
        }
        other => other.to_string(),
    }
}
