//! Asks another daemon: JSON over HTTP/1.1, with the peer's own words in the error.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use serde::de::DeserializeOwned;
use umbra_api::problem::Problem;

/// Most bytes of an answer that are read.
const ANSWER_MAX: usize = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("{url} is no address: {reason}")]
    Address { url: String, reason: String },
    /// Nothing was answered: whether the request had an effect is not known.
    #[error("{url}: {reason}")]
    Unreachable { url: String, reason: String },
    #[error("{url}: no answer within {after:?}")]
    Timeout { url: String, after: Duration },
    /// The peer answered with an error of its own.
    #[error("{url}: {problem}")]
    Refused { url: String, problem: Box<Problem> },
    #[error("{url}: the answer is not understood: {reason}")]
    Answer { url: String, reason: String },
}

impl ClientError {
    /// The peer's own words, if it spoke.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Refused { problem, .. } => Some(problem),
            _ => None,
        }
    }
}

/// Cheap to clone; keeps connections open between requests.
#[derive(Clone, Debug)]
pub struct Client {
    base: String,
    timeout: Duration,
    pool: Pool<HttpConnector, Full<Bytes>>,
}

impl Client {
    /// `base` is `http://host:port`.
    pub fn new(base: &str, timeout: Duration) -> Result<Self, ClientError> {
        let base = base.trim_end_matches('/').to_owned();
        let uri: Uri = base.parse().map_err(|e| ClientError::Address {
            url: base.clone(),
            reason: format!("{e}"),
        })?;
        if uri.scheme_str() != Some("http") || uri.host().is_none() {
            return Err(ClientError::Address {
                url: base,
                reason: "expected http://host:port".into(),
            });
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(timeout));
        let pool = Pool::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(20))
            .build(connector);
        Ok(Self { base, timeout, pool })
    }

    pub fn base(&self) -> &str {
        &self.base
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.ask(Method::GET, path, Bytes::new()).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.ask(Method::POST, path, self.encode(path, body)?).await
    }

    pub async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.ask(Method::PUT, path, self.encode(path, body)?).await
    }

    /// The answer's body as it is.
    pub async fn get_text(&self, path: &str) -> Result<String, ClientError> {
        let (_, body) = self.exchange(Method::GET, path, Bytes::new()).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Sends a body, and gives the answer's as it is.
    pub async fn send_text(&self, method: Method, path: &str, body: &impl Serialize) -> Result<String, ClientError> {
        let (_, body) = self.exchange(method, path, self.encode(path, body)?).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    fn encode(&self, path: &str, body: &impl Serialize) -> Result<Bytes, ClientError> {
        let bad = |e: serde_json::Error| ClientError::Answer {
            url: self.url(path),
            reason: e.to_string(),
        };
        serde_json::to_vec(body).map(Bytes::from).map_err(bad)
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T, ClientError> {
        let (_, body) = self.exchange(method, path, body).await?;
        // An empty answer is what `()` decodes from.
        let text: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(text).map_err(|e| ClientError::Answer {
            url: self.url(path),
            reason: e.to_string(),
        })
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), ClientError> {
        let url = self.url(path);
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = url.parse().map_err(|e| ClientError::Address {
            url: url.clone(),
            reason: format!("{e}"),
        })?;
        request
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let work = async {
            let answer = self.pool.request(request).await.map_err(|e| crate::chain(&e))?;
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, ANSWER_MAX)
                .collect()
                .await
                .map_err(|e| e.to_string())?;
            Ok::<_, String>((head.status, body.to_bytes()))
        };
        let (status, body) = match tokio::time::timeout(self.timeout, work).await {
            Ok(Ok(x)) => x,
            Ok(Err(reason)) => return Err(ClientError::Unreachable { url, reason }),
            Err(_) => {
                return Err(ClientError::Timeout {
                    url,
                    after: self.timeout,
                });
            }
        };
        match status.is_success() {
            true => Ok((status, body)),
            false => Err(ClientError::Refused {
                url,
                problem: Box::new(problem_of(status, &body)),
            }),
        }
    }
}

/// The peer's problem, or one made of its status and text.
fn problem_of(status: StatusCode, body: &[u8]) -> Problem {
    serde_json::from_slice(body).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(body);
        Problem::new(
            status.as_u16(),
            "http",
            status.to_string(),
            text.chars().take(500).collect::<String>(),
        )
    })
}
