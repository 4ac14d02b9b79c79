//! The client against a monitor that is played here, line by line.

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::thread::JoinHandle;

use serde_json::json;

use super::*;

const GREETING: &[u8] = b"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}}}}\r\n";

pub(crate) struct Peer {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Peer {
    fn greet(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        let mut peer = Self {
            lines: BufReader::new(stream.try_clone().unwrap()),
            stream,
        };
        peer.stream.write_all(GREETING).unwrap();
        let (command, id) = peer.command();
        assert_eq!(command["execute"], "qmp_capabilities");
        peer.say(json!({"return": {}, "id": id}));
        peer
    }

    pub(crate) fn command(&mut self) -> (Value, u64) {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        let command: Value = serde_json::from_str(&line).unwrap();
        let id = command["id"].as_u64().unwrap();
        (command, id)
    }

    pub(crate) fn say(&mut self, value: Value) {
        self.stream.write_all(format!("{value}\r\n").as_bytes()).unwrap();
    }

    fn event(&mut self, name: &str, n: u64) {
        self.say(json!({"event": name, "data": {"n": n}, "timestamp": {"seconds": 5, "microseconds": n}}));
    }
}

pub(crate) fn played(play: impl FnOnce(Peer) + Send + 'static) -> (tempfile::TempDir, Client, JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let peer = std::thread::spawn(move || play(Peer::greet(&listener)));
    let client = Client::connect(&path, DEFAULT_TIMEOUT).unwrap();
    (dir, client, peer)
}

#[test]
fn answers_find_their_command_and_errors_keep_qemus_words() {
    let (_dir, client, peer) = played(|mut peer| {
        let (first, id) = peer.command();
        assert_eq!(first["arguments"]["x"], 1);
        peer.say(json!({"return": "stale", "id": id + 77}));
        peer.event("STOP", 1);
        peer.say(json!({"return": {"ok": true}, "id": id}));
        let (_, id) = peer.command();
        peer.say(json!({"error": {"class": "GenericError", "desc": "not today"}, "id": id}));
    });
    assert_eq!(
        client.version(),
        Version {
            major: 10,
            minor: 0,
            micro: 2
        }
    );
    assert_eq!(client.execute("first", json!({"x": 1})).unwrap(), json!({"ok": true}));
    let error = client.execute("second", Value::Null).unwrap_err();
    assert!(
        matches!(&error, QmpError::Qemu { desc, .. } if desc == "not today"),
        "{error}"
    );
    assert!(error.to_string().contains("second: not today"));
    peer.join().unwrap();
}

#[test]
fn events_since_a_mark_are_found_before_and_after_the_wait_begins() {
    let (go, went) = mpsc::channel::<()>();
    let (_dir, client, peer) = played(move |mut peer| {
        peer.event("STOP", 1);
        let (_, id) = peer.command();
        peer.event("STOP", 2);
        peer.say(json!({"return": {}, "id": id}));
        went.recv().unwrap();
        peer.event("RESUME", 3);
        let _ = went.recv();
    });
    let start = Mark(0);
    let n = |e: &Event| e.data["n"].as_u64();
    let is = |name: &'static str| move |e: &Event| (e.name == name).then(|| (n(e), e.unix_us));
    assert_eq!(
        client.wait(start, DEFAULT_TIMEOUT, is("STOP")).unwrap(),
        (Some(1), 5_000_001)
    );
    let mark = client.mark();
    client.execute("x", Value::Null).unwrap();
    assert_eq!(client.wait(mark, DEFAULT_TIMEOUT, is("STOP")).unwrap().0, Some(2));
    let late = client.mark();
    let error = client.wait(late, Duration::from_millis(20), is("STOP")).unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }));
    go.send(()).unwrap();
    assert_eq!(client.wait(late, DEFAULT_TIMEOUT, is("RESUME")).unwrap().0, Some(3));
    drop(go);
    peer.join().unwrap();
}

#[test]
fn a_closed_connection_wakes_everyone() {
    let (_dir, client, peer) = played(|mut peer| {
        peer.command();
    });
    let (tell, told) = mpsc::channel();
    client.on_closed(move || tell.send(()).unwrap());
    let waiter = client.clone();
    let mark = client.mark();
    let waiting = std::thread::spawn(move || waiter.wait(mark, DEFAULT_TIMEOUT, |_| None::<()>));
    assert!(matches!(client.execute("x", Value::Null), Err(QmpError::Closed)));
    assert!(matches!(waiting.join().unwrap(), Err(QmpError::Closed)));
    told.recv().unwrap();
    peer.join().unwrap();
    assert!(client.is_closed());
    assert!(matches!(client.execute("y", Value::Null), Err(QmpError::Closed)));
    let (tell, told) = mpsc::channel();
    client.on_closed(move || tell.send(()).unwrap());
    told.recv().unwrap();
}

#[test]
fn nonsense_from_the_peer_ends_the_connection() {
    let (_dir, client, peer) = played(|mut peer| {
        peer.command();
        peer.stream.write_all(b"\x00\xff nonsense\n").unwrap();
        let mut rest = String::new();
        // The client lets go of the socket only when it is dropped; until then it answers nothing but Closed.
        let _ = peer.lines.read_line(&mut rest);
    });
    assert!(matches!(client.execute("x", Value::Null), Err(QmpError::Closed)));
    drop(client);
    peer.join().unwrap();
}

#[test]
fn an_unanswered_command_times_out_and_its_late_answer_harms_nobody() {
    let (_dir, client, peer) = played(|mut peer| {
        let (_, slow) = peer.command();
        let (_, id) = peer.command();
        peer.say(json!({"return": "late", "id": slow}));
        peer.say(json!({"return": "mine", "id": id}));
    });
    let error = client
        .execute_for("slow", Value::Null, Duration::from_millis(20))
        .unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }));
    assert_eq!(client.execute("next", Value::Null).unwrap(), json!("mine"));
    peer.join().unwrap();
}

#[test]
fn a_missing_socket_and_a_silent_one_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let missing = Client::connect(&path, DEFAULT_TIMEOUT).unwrap_err();
    assert!(matches!(missing, QmpError::Unavailable { .. }), "{missing}");
    let _listener = UnixListener::bind(&path).unwrap();
    let silent = Client::connect(&path, Duration::from_millis(30)).unwrap_err();
    assert!(matches!(silent, QmpError::Busy { .. }), "{silent}");
    let refusal: umbra_api::order::Refusal = silent.into();
    assert_eq!(refusal.code, umbra_api::order::RefusalCode::QmpUnavailable);
}

#[test]
fn a_descriptor_goes_along() {
    let (_dir, client, peer) = played(|peer| {
        let mut space = nix::cmsg_space!(std::os::fd::RawFd);
        let mut bytes = [0; 256];
        let mut io = [io::IoSliceMut::new(&mut bytes)];
        let message = nix::sys::socket::recvmsg::<()>(
            peer.stream.as_raw_fd(),
            &mut io,
            Some(&mut space),
            nix::sys::socket::MsgFlags::empty(),
        )
        .unwrap();
        let fds = message.cmsgs().unwrap().count();
        let command: Value = serde_json::from_slice(message.iovs().next().unwrap()).unwrap();
        let mut peer = peer;
        peer.say(json!({"return": fds, "id": command["id"]}));
    });
    let file = tempfile::tempfile().unwrap();
    assert_eq!(
        client
            .execute_with_fd("getfd", json!({"fdname": "f"}), file.as_fd())
            .unwrap(),
        json!(1)
    );
    peer.join().unwrap();
}
