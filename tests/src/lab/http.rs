//! A blocking HTTP/1.1 client on a socket that was made in a given namespace. Small on purpose: what measures must not share
//! code, threads or surprises with what is measured.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;

use super::net::Netns;
use super::sys;

const CONNECT: Duration = Duration::from_secs(2);
const REPLY: Duration = Duration::from_secs(10);
/// Longest header line and largest body that are taken.
const LINE_MAX: u64 = 16 << 10;
const BODY_MAX: u64 = 16 << 20;

pub struct Reply {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.body).with_context(|| format!("not the JSON expected: {}", self.text()))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// An error with the body's words unless the status is 2xx.
    pub fn ok(self) -> Result<Self> {
        if !(200..300).contains(&self.status) {
            bail!("HTTP {}: {}", self.status, self.text());
        }
        Ok(self)
    }
}

/// A connection that stays open between requests.
pub struct Connection {
    stream: BufReader<TcpStream>,
    host: String,
}

impl Connection {
    pub fn open(ns: &Netns, to: (Ipv4Addr, u16), connect: Duration, reply: Duration) -> std::io::Result<Self> {
        let addr = SocketAddr::V4(SocketAddrV4::new(to.0, to.1));
        let stream = sys::in_netns(ns.fd(), || TcpStream::connect_timeout(&addr, connect))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(reply))?;
        stream.set_write_timeout(Some(reply))?;
        Ok(Self {
            stream: BufReader::new(stream),
            host: to.0.to_string(),
        })
    }

    pub fn request(&mut self, method: &str, path: &str, body: Option<&str>, last: bool) -> Result<Reply> {
        let body = body.unwrap_or_default();
        let kind = if body.starts_with(['{', '[']) {
            "application/json"
        } else {
            "text/plain"
        };
        let closing = if last { "connection: close\r\n" } else { "" };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n{closing}\r\n",
            self.host,
            body.len()
        );
        self.stream
            .get_mut()
            .write_all((head + body).as_bytes())
            .context("sending the request")?;
        self.reply()
    }

    fn reply(&mut self) -> Result<Reply> {
        let status = self.line()?;
        let status: u16 = status
            .split_ascii_whitespace()
            .nth(1)
            .and_then(|s| s.parse().ok())
            .with_context(|| format!("not an HTTP status line: {status:?}"))?;
        let (mut length, mut chunked) = (None, false);
        loop {
            let line = self.line()?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            match line.split_once(':') {
                Some(("content-length", n)) => length = Some(n.trim().parse().context("content-length")?),
                Some(("transfer-encoding", t)) => chunked = t.contains("chunked"),
                _ => {}
            }
        }
        let body = match (chunked, length) {
            (true, _) => self.chunks()?,
            (false, Some(n)) => self.exactly(n)?,
            (false, None) if matches!(status, 204 | 304) => Vec::new(),
            (false, None) => {
                let mut body = Vec::new();
                self.stream.by_ref().take(BODY_MAX).read_to_end(&mut body)?;
                body
            }
        };
        Ok(Reply { status, body })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stream
            .by_ref()
            .take(LINE_MAX)
            .read_line(&mut line)
            .context("reading the reply")?;
        if !line.ends_with('\n') {
            bail!("the connection ended in the middle of a reply");
        }
        Ok(line.trim_end().to_owned())
    }

    fn exactly(&mut self, n: u64) -> Result<Vec<u8>> {
        if n > BODY_MAX {
            bail!("a body of {n} bytes");
        }
        let mut body = vec![0; n as usize];
        self.stream.read_exact(&mut body).context("reading the body")?;
        Ok(body)
    }

    fn chunks(&mut self) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = self.line()?;
            let size = line.split(';').next().unwrap_or_default().trim();
            let n = u64::from_str_radix(size, 16).with_context(|| format!("chunk size {size:?}"))?;
            if body.len() as u64 + n > BODY_MAX {
                bail!("a body of more than {BODY_MAX} bytes");
            }
            body.extend(self.exactly(n)?);
            self.line()?;
            if n == 0 {
                return Ok(body);
            }
        }
    }
}

/// One request on a connection of its own.
pub fn request(ns: &Netns, to: (Ipv4Addr, u16), method: &str, path: &str, body: Option<&str>) -> Result<Reply> {
    let what = || format!("{method} http://{}:{}{path}", to.0, to.1);
    Connection::open(ns, to, CONNECT, REPLY)
        .map_err(anyhow::Error::from)
        .and_then(|mut c| c.request(method, path, body, true))
        .with_context(what)
}
