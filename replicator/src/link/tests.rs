//! Real sockets on loopback, with certificates that are made here.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use umbra_api::Epoch;
use umbra_api::wire::WireError;
use umbra_api::wire::control::Message;
use umbra_api::wire::frame::Kind;

use super::tls::{Files, Tls};
use super::*;

/// Far above what anything here takes.
const LONG: Duration = Duration::from_secs(20);

fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: tempfile::TempDir,
}

impl Ca {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.crt"), issuer.pem()).unwrap();
        Self { issuer, dir }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Certificate and key of a host, on disk.
    fn issue(&self, name: &str, expired: bool) -> Files {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        if expired {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let files = Files {
            cert: self.file(&format!("{name}.crt")),
            key: self.file(&format!("{name}.key")),
            ca: self.file("ca.crt"),
        };
        std::fs::write(&files.cert, cert.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        files
    }

    fn tls(&self, name: &str) -> Security {
        load(&self.issue(name, false), name)
    }
}

fn load(files: &Files, name: &str) -> Security {
    Security::Tls(Arc::new(Tls::load(files, &host(name)).unwrap()))
}

type Served = JoinHandle<Result<(Purpose, Identity), LinkError>>;

/// A listener that serves one connection: says what it got, echoes messages until the peer ends.
fn echo(security: Security) -> (SocketAddr, Served) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let serve = move || {
        let (stream, _) = listener.accept().unwrap();
        let (purpose, mut link) = accept(stream, &security, LONG)?;
        link.set_timeouts(Some(LONG), Some(LONG))?;
        loop {
            match link.reader.next_message() {
                Ok(message) => link.writer.send_message(&message)?,
                Err(LinkError::Closed { .. }) => return Ok((purpose, link.identity)),
                Err(e) => return Err(e),
            }
        }
    };
    (addr, std::thread::spawn(serve))
}

/// Connects, says something and returns what came back.
fn talk(addr: SocketAddr, to: &str, security: &Security) -> Result<Message, LinkError> {
    let mut link = connect(&addr.to_string(), &host(to), Purpose::Control, security, LONG)?;
    link.set_timeouts(Some(LONG), Some(LONG))?;
    link.writer.send_message(&Message::Ping { n: 7 })?;
    link.reader.next_message()
}

fn text(e: &LinkError) -> String {
    crate::chain(e)
}

/// What both sides say of a connection that must fail.
fn both(server: Security, to: &str, client: &Security) -> (String, String) {
    let (addr, served) = echo(server);
    let ours = talk(addr, to, client).unwrap_err();
    let theirs = served.join().unwrap().map(|(p, _)| p).unwrap_err();
    (text(&ours), text(&theirs))
}

#[test]
fn messages_cross_both_ways_in_clear_and_in_tls() {
    let ca = Ca::new("ours");
    let pairs = [(Security::Plaintext, Security::Plaintext), (ca.tls("a"), ca.tls("b"))];
    for (client, server) in pairs {
        let (addr, served) = echo(server);
        let mut link = connect(&addr.to_string(), &host("b"), Purpose::Ram, &client, LONG).unwrap();
        link.set_timeouts(Some(LONG), Some(LONG)).unwrap();
        for n in 0..100 {
            let message = Message::Commit { epoch: Epoch(n) };
            link.writer.send_message(&message).unwrap();
            assert_eq!(link.reader.next_message().unwrap(), message);
        }
        link.writer.send(Kind::StreamEnd, &[]).unwrap();
        let e = served.join().unwrap().unwrap_err();
        assert!(
            matches!(
                e,
                LinkError::NotControl {
                    kind: Kind::StreamEnd,
                    ..
                }
            ),
            "{e}"
        );
        link.closer().unwrap().close();
        link.closer().unwrap().close();
    }
}

#[test]
fn a_host_is_who_its_certificate_says() {
    let ca = Ca::new("ours");
    let (addr, served) = echo(ca.tls("b"));
    talk(addr, "b", &ca.tls("a")).unwrap();
    let (purpose, identity) = served.join().unwrap().unwrap();
    assert_eq!(purpose, Purpose::Control);
    identity.is(&host("a")).unwrap();
    identity.is(&host("A")).unwrap();
    assert_eq!(
        identity.is(&host("c")).unwrap_err(),
        "the certificate is for a, expected is c"
    );
    Identity::Unproven.is(&host("c")).unwrap();
}

#[test]
fn large_frames_cross_while_the_other_direction_is_waited_for() {
    let ca = Ca::new("ours");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let server = ca.tls("b");
    let payload: Vec<u8> = (0..2_000_000u32).map(|i| (i % 251) as u8).collect();
    let want = payload.clone();
    let served = std::thread::spawn(move || {
        let (_, mut link) = accept(listener.accept().unwrap().0, &server, LONG).unwrap();
        for _ in 0..20 {
            let (kind, got) = link.reader.next().unwrap();
            assert!(kind == Kind::Pages && got == want);
        }
        link.writer.send_message(&Message::Pong { n: 1 }).unwrap();
    });
    let Link {
        mut reader, mut writer, ..
    } = connect(&addr, &host("b"), Purpose::Ram, &ca.tls("a"), LONG).unwrap();
    let waiting = std::thread::spawn(move || reader.next_message().unwrap());
    for _ in 0..20 {
        writer.send(Kind::Pages, &payload).unwrap();
    }
    assert_eq!(waiting.join().unwrap(), Message::Pong { n: 1 });
    served.join().unwrap();
}

#[test]
fn another_ca_is_refused_and_both_sides_say_so() {
    let ours = Ca::new("ours");
    // The second one has the same name, and is another one all the same.
    for other in [Ca::new("theirs"), Ca::new("ours")] {
        let (client, server) = both(ours.tls("b"), "b", &other.tls("a"));
        assert!(client.contains("not of the CA in link.tls.ca"), "{client}");
        assert!(server.contains("does not know the CA of this side's"), "{server}");
        let files = Files {
            ca: ours.file("ca.crt"),
            ..other.issue("a", false)
        };
        let e = Tls::load(&files, &host("a")).unwrap_err();
        assert!(e.key == "cert" && e.reason.contains("not issued by the CA"), "{e}");
    }
}

#[test]
fn an_expired_certificate_is_refused_and_both_sides_say_so() {
    let ca = Ca::new("ours");
    let old = load(&ca.issue("b", true), "b");
    let (client, server) = both(old.clone(), "b", &ca.tls("a"));
    assert!(client.contains("the peer's certificate has expired"), "{client}");
    assert!(server.contains("this side's certificate has expired"), "{server}");
    // The other way round.
    let (client, server) = both(ca.tls("a"), "a", &old);
    assert!(client.contains("this side's certificate has expired"), "{client}");
    assert!(server.contains("the peer's certificate has expired"), "{server}");
}

#[test]
fn another_hosts_certificate_is_refused_with_both_names() {
    let ca = Ca::new("ours");
    let (client, server) = both(ca.tls("c"), "b", &ca.tls("a"));
    assert!(
        client.contains("the peer's certificate is for c, expected is b"),
        "{client}"
    );
    assert!(server.contains("not for the host that was expected"), "{server}");
}

#[test]
fn clear_and_tls_do_not_meet_and_both_sides_say_why() {
    let ca = Ca::new("ours");
    let (client, server) = both(ca.tls("b"), "b", &Security::Plaintext);
    assert!(
        client.contains("the peer speaks TLS, this side is configured as plaintext"),
        "{client}"
    );
    assert!(
        server.contains("the peer is configured as plaintext, this side speaks TLS"),
        "{server}"
    );
    let (client, server) = both(Security::Plaintext, "b", &ca.tls("a"));
    assert!(
        client.contains("the peer is configured as plaintext, this side speaks TLS"),
        "{client}"
    );
    assert!(
        server.contains("the peer speaks TLS, this side is configured as plaintext"),
        "{server}"
    );
}

/// Forwards a number of bytes towards the server, everything back, then cuts.
fn cut_after(bytes: usize, server: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut from, _) = listener.accept().unwrap();
        let mut to = TcpStream::connect(server).unwrap();
        let (mut back_from, mut back_to) = (to.try_clone().unwrap(), from.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
        let _ = std::io::copy(&mut Read::by_ref(&mut from).take(bytes as u64), &mut to);
        for s in [from, to] {
            let _ = s.shutdown(std::net::Shutdown::Both);
        }
    });
    addr
}

#[test]
fn tls_that_is_cut_anywhere_is_never_a_clean_end() {
    let ca = Ca::new("ours");
    let (client, server) = (ca.tls("a"), ca.tls("b"));
    for bytes in [0, 1, 5, 100, 400, 900, 1500, 1600, 2000] {
        let (addr, served) = echo(server.clone());
        let addr = cut_after(bytes, addr);
        let link = connect(&addr.to_string(), &host("b"), Purpose::Control, &client, LONG);
        let sent = link.and_then(|mut link| {
            link.set_timeouts(Some(LONG), Some(LONG))?;
            loop {
                link.writer.send_message(&Message::Ping { n: 7 })?;
                link.reader.next_message()?;
            }
        });
        let e: Result<(), _> = sent;
        assert!(e.is_err());
        match served.join().unwrap() {
            // Nothing at all came.
            Err(LinkError::Closed { .. }) if bytes == 0 => {}
            Err(LinkError::Closed { .. }) | Ok(_) => panic!("a cut after {bytes} bytes was taken for an end"),
            Err(_) => {}
        }
    }
}

#[test]
fn a_stranger_that_trickles_has_one_time_limit_for_all() {
    let ca = Ca::new("ours");
    for security in [Security::Plaintext, ca.tls("b")] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stranger = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let first: &[u8] = match security {
            Security::Plaintext => b"UMBRALNK",
            Security::Tls(_) => &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3],
        };
        // A byte well within the limit, again and again, until the other side has enough of it.
        let trickle = std::thread::spawn(move || {
            for byte in first.iter().chain(std::iter::repeat(&0)) {
                if stranger.write_all(&[*byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(60));
            }
        });
        let stream = listener.accept().unwrap().0;
        let e = accept(stream, &security, Duration::from_millis(200)).unwrap_err();
        let said = text(&e);
        assert!(said.contains("in time"), "{said}");
        trickle.join().unwrap();
    }
}

#[test]
fn files_that_will_not_do_are_named_with_the_reason() {
    let ca = Ca::new("ours");
    let good = ca.issue("a", false);
    let error = |files: &Files| Tls::load(files, &host("a")).unwrap_err();
    let e = Tls::load(&good, &host("b")).unwrap_err();
    assert_eq!(
        (e.key, e.reason.as_str()),
        ("cert", "the certificate is for a, expected is b")
    );
    let other = ca.issue("c", false);
    let e = error(&Files {
        key: other.key.clone(),
        ..good.clone()
    });
    assert!(e.key == "key" && e.to_string().contains("c.key: not the key of"), "{e}");
    let e = error(&Files {
        key: good.cert.clone(),
        ..good.clone()
    });
    assert!(e.key == "key" && e.reason.contains("no private key"), "{e}");
    let e = error(&Files {
        ca: good.key.clone(),
        ..good.clone()
    });
    assert_eq!((e.key, e.reason.as_str()), ("ca", "no certificate in PEM"));
    let torn = ca.file("torn.crt");
    let pem = std::fs::read_to_string(&good.cert).unwrap();
    std::fs::write(&torn, &pem[..pem.len() / 2]).unwrap();
    assert_eq!(error(&Files { cert: torn, ..good }).key, "cert");
}

#[test]
fn a_stranger_and_a_closed_port_are_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let mut stranger = TcpStream::connect(addr).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let e = accept(listener.accept().unwrap().0, &Security::Plaintext, LONG).unwrap_err();
    assert!(
        matches!(
            e,
            LinkError::Wire {
                source: WireError::NotUs(_),
                ..
            }
        ),
        "{e}"
    );
    drop(listener);
    let to = |addr: &str| connect(addr, &host("b"), Purpose::Control, &Security::Plaintext, LONG);
    let e = to(&addr.to_string()).unwrap_err();
    assert!(e.to_string().contains(&addr.to_string()), "{e}");
    assert!(to("no port").is_err());
}
