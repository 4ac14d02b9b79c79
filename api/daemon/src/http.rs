//! A small HTTP/1.1 server over hyper: whole requests in, whole answers out. Bodies are bounded, connections time out,
//! a stop lets answers that are under way finish.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderMap};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpListener;
use umbra_api::problem::Problem;

use crate::stop::Stop;

pub use hyper::{Method, StatusCode};

/// The status codes by short names.
pub mod status {
    use super::StatusCode;
    pub const OK: StatusCode = StatusCode::OK;
    pub const ACCEPTED: StatusCode = StatusCode::ACCEPTED;
}

pub type Reply = hyper::Response<Full<Bytes>>;

/// A request whose body has arrived.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: Method,
    /// As sent, without the query: `/v1/vms/web`.
    pub path: String,
    /// Decoded pairs, in order.
    pub query: Vec<(String, String)>,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub peer: SocketAddr,
}

impl Request {
    /// The path's parts, percent-decoded: `["v1", "vms", "web"]`.
    pub fn segments(&self) -> Vec<String> {
        self.path
            .split('/')
            .filter(|s| !s.is_empty())
            .map(percent_decode)
            .collect()
    }

    pub fn query(&self, key: &str) -> Option<&str> {
        self.query.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// The body as JSON; the error names the field by its path.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        let mut de = serde_json::Deserializer::from_slice(&self.body);
        let value = serde_path_to_error::deserialize(&mut de).map_err(|e| match e.path().to_string().as_str() {
            "." => Problem::bad_request(format!("body: {}", e.inner())),
            path => Problem::bad_request(format!("body: {path}: {}", e.inner())),
        })?;
        de.end().map_err(|e| Problem::bad_request(format!("body: {e}")))?;
        Ok(value)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub body_bytes: usize,
    /// For the head, and again for the whole request with its answer.
    pub timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 8 << 20,
            timeout: Duration::from_secs(30),
        }
    }
}

/// Serves until `stop`, then finishes what is under way for at most two seconds.
pub async fn serve<H, F>(listener: TcpListener, limits: Limits, mut stop: Stop, handler: H)
where
    H: Fn(Request) -> F + Send + Sync + 'static,
    F: Future<Output = Reply> + Send + 'static,
{
    let handler = Arc::new(handler);
    let graceful = GracefulShutdown::new();
    loop {
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(x) => x,
                Err(e) => {
                    // Out of file descriptors, mostly: others must end before it gets better.
                    tracing::warn!("accept: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = stop.asked() => break,
        };
        let handler = handler.clone();
        let service = service_fn(move |r| answer(r, peer, limits, handler.clone()));
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.timeout)
            .serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(e) = connection.await {
                tracing::debug!(%peer, "connection: {e}");
            }
        });
    }
    if tokio::time::timeout(Duration::from_secs(2), graceful.shutdown())
        .await
        .is_err()
    {
        tracing::debug!("some connections were still open at the stop");
    }
}

async fn answer<H, F>(
    request: hyper::Request<Incoming>,
    peer: SocketAddr,
    limits: Limits,
    handler: Arc<H>,
) -> Result<Reply, Infallible>
where
    H: Fn(Request) -> F,
    F: Future<Output = Reply>,
{
    let work = async {
        match collect(request, peer, limits).await {
            Ok(r) => handler(r).await,
            Err(p) => problem(&p),
        }
    };
    Ok(tokio::time::timeout(limits.timeout, work).await.unwrap_or_else(|_| {
        problem(&Problem::new(
            503,
            "timeout",
            "Took too long",
            format!("{:?}", limits.timeout),
        ))
    }))
}

async fn collect(request: hyper::Request<Incoming>, peer: SocketAddr, limits: Limits) -> Result<Request, Problem> {
    let (head, body) = request.into_parts();
    let body = Limited::new(body, limits.body_bytes).collect().await.map_err(|e| {
        match e.downcast_ref::<LengthLimitError>() {
            Some(_) => Problem::new(
                413,
                "too_large",
                "Body too large",
                format!("at most {} bytes are taken", limits.body_bytes),
            ),
            None => Problem::bad_request(format!("body: {e}")),
        }
    })?;
    let query = head.uri.query().unwrap_or_default();
    Ok(Request {
        method: head.method,
        path: head.uri.path().to_owned(),
        query: query.split('&').filter(|p| !p.is_empty()).map(decode_pair).collect(),
        headers: head.headers,
        body: body.to_bytes(),
        peer,
    })
}

fn decode_pair(pair: &str) -> (String, String) {
    let (k, v) = pair.split_once('=').unwrap_or((pair, ""));
    (percent_decode(k), percent_decode(&v.replace('+', " ")))
}

/// `%41` is `A`; what is no valid escape stays as it is, and what is no UTF-8 becomes the replacement character.
pub fn percent_decode(s: &str) -> String {
    let mut out = Vec::with_capacity(s.len());
    let mut rest = s.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match rest {
            [b'%', hi, lo, ..] => hex(*hi).zip(hex(*lo)).map(|(h, l)| h << 4 | l),
            _ => None,
        };
        out.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &rest[3..] } else { tail };
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn hex(b: u8) -> Option<u8> {
    (b as char).to_digit(16).map(|d| d as u8)
}

pub fn reply(status: StatusCode, content_type: &str, body: impl Into<Bytes>) -> Reply {
    let mut r = hyper::Response::new(Full::new(body.into()));
    *r.status_mut() = status;
    if let Ok(v) = content_type.parse() {
        r.headers_mut().insert(CONTENT_TYPE, v);
    }
    r
}

pub fn json<T: Serialize>(status: StatusCode, value: &T) -> Reply {
    match serde_json::to_vec(value) {
        Ok(body) => reply(status, "application/json", body),
        Err(e) => problem(&Problem::new(
            500,
            "encode",
            "The answer can't be written",
            e.to_string(),
        )),
    }
}

pub fn problem(p: &Problem) -> Reply {
    let status = StatusCode::from_u16(p.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    // A Problem is strings and a number: serializing it cannot fail.
    reply(
        status,
        "application/problem+json",
        serde_json::to_vec(p).unwrap_or_default(),
    )
}

/// Turns what a handler found out into an answer.
pub fn outcome<T: Serialize>(ok: StatusCode, result: Result<T, Problem>) -> Reply {
    match result {
        Ok(v) => json(ok, &v),
        Err(p) => problem(&p),
    }
}
