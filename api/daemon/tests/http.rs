//! Server and client over a real socket.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use umbra_api::problem::Problem;
use umbra_daemon::client::{Client, ClientError};
use umbra_daemon::http::{self, Limits, Method, Reply, Request, status};
use umbra_daemon::stop;

async fn handler(r: Request) -> Reply {
    let parts = r.segments();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    match (&r.method, parts.as_slice()) {
        (&Method::GET, ["echo", name]) => http::json(status::OK, &(name, r.query("q"))),
        (&Method::POST, ["sum"]) => http::outcome(status::OK, r.json::<Vec<i64>>().map(|v| v.iter().sum::<i64>())),
        (&Method::GET, ["slow"]) => {
            tokio::time::sleep(Duration::from_secs(60)).await;
            http::json(status::OK, &())
        }
        _ => http::problem(&Problem::not_found(r.path.clone())),
    }
}

async fn start() -> (String, stop::Stopper, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let (stopper, stop) = stop::pair();
    let limits = Limits {
        body_bytes: 100,
        timeout: Duration::from_secs(5),
    };
    (
        base,
        stopper,
        tokio::spawn(http::serve(listener, limits, stop, handler)),
    )
}

#[tokio::test]
async fn answers_and_errors_reach_the_client_whole() {
    let (base, stopper, server) = start().await;
    let c = Client::new(&base, Duration::from_secs(5)).unwrap();
    assert_eq!(
        c.get::<(String, String)>("/echo/a%20b?q=x+y").await.unwrap(),
        ("a b".into(), "x y".into())
    );
    assert_eq!(c.post::<i64>("/sum", &[1, 2, 3]).await.unwrap(), 6);
    let e = c.post::<i64>("/sum", &["one"]).await.unwrap_err();
    assert_eq!(e.problem().unwrap().status, 400);
    assert!(e.to_string().contains("[0]"), "{e}");
    let e = c.post::<i64>("/sum", &vec![1; 100]).await.unwrap_err();
    assert_eq!(e.problem().unwrap().code, "too_large");
    let e = c.get::<()>("/nowhere").await.unwrap_err();
    assert_eq!(e.problem().unwrap(), &Problem::not_found("/nowhere"));
    stopper.stop();
    server.await.unwrap();
    let e = c.get::<()>("/echo/x").await.unwrap_err();
    assert!(matches!(e, ClientError::Unreachable { .. }), "{e}");
}

#[tokio::test]
async fn a_silent_peer_times_out_and_garbage_is_refused() {
    let (base, _stopper, _server) = start().await;
    let c = Client::new(&base, Duration::from_millis(50)).unwrap();
    assert!(matches!(c.get::<()>("/slow").await, Err(ClientError::Timeout { .. })));
    let mut s = TcpStream::connect(base.trim_start_matches("http://")).await.unwrap();
    s.write_all(b"\x16\x03\x01 not http\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    s.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert!(matches!(
        Client::new("ftp://x", Duration::from_secs(1)),
        Err(ClientError::Address { .. })
    ));
}
