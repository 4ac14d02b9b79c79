//! HTTP/1.1, as much of it as the tests' clients speak: GET and POST with a length, keep-alive, one small thread a connection.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::state::State;

const MAX_HEAD: usize = 8 << 10;
const MAX_BODY: usize = 16 << 10;
const MAX_CONNECTIONS: usize = 64;
const STACK: usize = 128 << 10;
/// A client that went away without a word gives its thread back after this long.
const IDLE: Duration = Duration::from_secs(120);

pub fn serve(listener: &TcpListener, state: &Arc<State>) -> ! {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(50));
            continue;
        };
        if open.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS {
            open.fetch_sub(1, Ordering::SeqCst);
            continue; // dropped: the client sees a closed connection
        }
        let (state, at_end) = (state.clone(), open.clone());
        let thread = std::thread::Builder::new().stack_size(STACK).spawn(move || {
            let _ = talk(stream, &state);
            at_end.fetch_sub(1, Ordering::SeqCst);
        });
        if thread.is_err() {
            open.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn talk(mut stream: TcpStream, state: &State) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IDLE))?;
    let mut buffer = Vec::new();
    loop {
        match next_request(&mut buffer, &mut stream)? {
            Next::Request(request) => {
                let reply = answer(&request, state);
                stream.write_all(&reply.bytes(request.keep_alive))?;
                if !request.keep_alive {
                    return Ok(());
                }
            }
            Next::Bad(reason) => return stream.write_all(&Reply::new(400, reason).bytes(false)),
            Next::Closed => return Ok(()),
        }
    }
}

#[derive(Debug, PartialEq)]
struct Request {
    method: String,
    path: String,
    body: String,
    keep_alive: bool,
}

#[derive(Debug, PartialEq)]
enum Next {
    Request(Request),
    Bad(&'static str),
    Closed,
}

/// Reads until `buffer` holds a whole request, and takes it out of it. What follows it stays for the next call.
fn next_request(buffer: &mut Vec<u8>, stream: &mut impl Read) -> io::Result<Next> {
    let mut chunk = [0; 2048];
    loop {
        if let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(buffer.get(..end).unwrap_or_default()).into_owned();
            let Some((mut request, length)) = parse_head(&head) else {
                return Ok(Next::Bad("not a request\n"));
            };
            if length > MAX_BODY {
                return Ok(Next::Bad("the body is too long\n"));
            }
            let all = end + 4 + length;
            if let Some(body) = buffer.get(end + 4..all) {
                request.body = String::from_utf8_lossy(body).into_owned();
                buffer.drain(..all);
                return Ok(Next::Request(request));
            }
        } else if buffer.len() > MAX_HEAD {
            return Ok(Next::Bad("the head is too long\n"));
        }
        match stream.read(&mut chunk)? {
            0 => return Ok(Next::Closed),
            n => buffer.extend_from_slice(chunk.get(..n).unwrap_or_default()),
        }
    }
}

/// The request without its body, and the body's length.
fn parse_head(head: &str) -> Option<(Request, usize)> {
    let mut lines = head.split("\r\n");
    let mut words = lines.next()?.split(' ');
    let (method, path, version) = (words.next()?, words.next()?, words.next()?);
    if !version.starts_with("HTTP/1.") || words.next().is_some() {
        return None;
    }
    let mut keep_alive = version != "HTTP/1.0";
    let mut length = 0;
    for line in lines {
        let (name, value) = line.split_once(':')?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            length = value.parse().ok()?;
        } else if name.eq_ignore_ascii_case("connection") {
            keep_alive = !value.eq_ignore_ascii_case("close");
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return None; // chunks are not spoken here
        }
    }
    Some((
        Request {
            method: method.into(),
            path: path.into(),
            body: String::new(),
            keep_alive,
        },
        length,
    ))
}

#[derive(Debug, PartialEq)]
struct Reply {
    status: u16,
    body: String,
}

impl Reply {
    fn new(status: u16, body: impl Into<String>) -> Self {
        Reply {
            status,
            body: body.into(),
        }
    }

    fn bytes(&self, keep_alive: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            404 => "Not Found",
            _ => "Method Not Allowed",
        };
        let kind = if self.body.starts_with('{') {
            "application/json"
        } else {
            "text/plain"
        };
        let connection = if keep_alive { "keep-alive" } else { "close" };
        format!(
            "HTTP/1.1 {} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n{}",
            self.status,
            self.body.len(),
            self.body
        )
        .into_bytes()
    }
}

fn answer(request: &Request, state: &State) -> Reply {
    use std::sync::atomic::Ordering::Relaxed;
    match (request.method.as_str(), request.path.as_str()) {
        ("GET", "/") => {
            state.work.run();
            Reply::new(200, format!("ok {}\n", state.counter.load(Relaxed)))
        }
        ("GET", "/memory") => {
            state.rewrite.run();
            Reply::new(200, "written\n")
        }
        ("GET", "/stats") => Reply::new(200, state.json() + "\n"),
        ("POST", "/burn") => match request.body.parse() {
            Ok(schedule) => {
                state.burner.restart(schedule);
                Reply::new(200, "burning\n")
            }
            Err(reason) => Reply::new(400, format!("{reason}\n")),
        },
        ("POST", path @ ("/dirty" | "/disk")) => {
            let rate = match path {
                "/dirty" => &state.dirty_pages_per_s,
                _ => &state.disk_records_per_s,
            };
            match request.body.trim().parse() {
                Ok(n) => {
                    rate.store(n, Relaxed);
                    Reply::new(200, "at that rate\n")
                }
                Err(_) => Reply::new(400, "the body is pages or records per second, a whole number\n"),
            }
        }
        (_, "/" | "/memory" | "/stats" | "/burn" | "/dirty" | "/disk") => {
            Reply::new(405, "GET /, /memory and /stats, POST /burn, /dirty and /disk\n")
        }
        _ => Reply::new(404, "no such page\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::burn::{Burner, Work};
    use crate::schedule::Schedule;

    fn state() -> State {
        State::new(Burner::new(Schedule::idle()), Work::calibrate(1), 0, &[], 50)
    }

    /// A client that sends byte by byte, so that every border inside a request is met.
    struct Dribble<'a>(&'a [u8]);

    impl Read for Dribble<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let n = self.0.len().min(1);
            buffer[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }

    #[test]
    fn reads_requests_one_after_the_other() {
        let mut stream =
            Dribble(b"POST /dirty HTTP/1.1\r\nContent-Length: 3\r\n\r\n500GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
        let mut buffer = Vec::new();
        let Next::Request(first) = next_request(&mut buffer, &mut stream).unwrap() else {
            panic!("no request")
        };
        assert_eq!(
            (first.method.as_str(), first.path.as_str(), first.body.as_str()),
            ("POST", "/dirty", "500")
        );
        assert!(first.keep_alive);
        let Next::Request(second) = next_request(&mut buffer, &mut stream).unwrap() else {
            panic!("no request")
        };
        assert_eq!((second.path.as_str(), second.keep_alive), ("/", false));
        assert_eq!(next_request(&mut buffer, &mut stream).unwrap(), Next::Closed);
    }

    #[test]
    fn refuses_what_is_no_request() {
        let long = "GET / HTTP/1.1\r\nX: ".to_string() + &"y".repeat(2 * MAX_HEAD);
        for bad in [
            "hello\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length: many\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
            "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            &long,
        ] {
            let next = next_request(&mut Vec::new(), &mut bad.as_bytes()).unwrap();
            assert!(matches!(next, Next::Bad(_)), "{bad:.60}: {next:?}");
        }
    }

    #[test]
    fn orders_change_the_state_and_bad_ones_do_not() {
        let state = state();
        let ask = |method: &str, path: &str, body: &str| {
            let request = Request {
                method: method.into(),
                path: path.into(),
                body: body.into(),
                keep_alive: true,
            };
            answer(&request, &state)
        };
        assert_eq!(ask("GET", "/", "").body, "ok 0\n");
        assert_eq!(ask("POST", "/dirty", "750\n").status, 200);
        assert_eq!(state.dirty_pages_per_s.load(std::sync::atomic::Ordering::Relaxed), 750);
        assert_eq!(ask("POST", "/dirty", "-1").status, 400);
        assert_eq!(ask("POST", "/disk", "10").status, 200);
        assert_eq!(state.disk_records_per_s.load(std::sync::atomic::Ordering::Relaxed), 10);
        assert_eq!(ask("GET", "/memory", "").status, 200);
        assert_eq!(ask("POST", "/burn", "0:0.5").status, 200);
        assert_eq!(ask("POST", "/burn", "0:5").status, 400);
        assert_eq!(state.burner.share(), 0.5);
        assert_eq!(ask("PUT", "/burn", "").status, 405);
        assert_eq!(ask("GET", "/nothing", "").status, 404);
        assert!(ask("GET", "/stats", "").body.starts_with("{\"counter\":0,"));
    }
}
