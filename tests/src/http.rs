//! A small HTTP/1.1 client: one request per connection, blocking. Written here so that the tests see
//! the bytes on the wire and share no code with the service.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// An answer.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Panics
    ///
    /// When it is something else.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("status {}, not JSON ({e}): {}", self.status, self.text()))
    }
}

/// Longest silence of the server within one answer; `MILLRACE_TEST_SILENCE_S` gives more time to
/// statements over very much.
fn silence_max() -> Duration {
    let given = std::env::var("MILLRACE_TEST_SILENCE_S").ok();
    let given = given.and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(given.unwrap_or(120))
}

/// Sends a request and reads the whole answer.
pub fn request(
    address: &str,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<Response> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !body.is_empty() || method == "POST" {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    head.push_str("\r\n");
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(body);
    raw(address, &bytes)
}

/// Sends bytes as they are and reads an answer up to the end of the connection.
pub fn raw(address: &str, bytes: &[u8]) -> io::Result<Response> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(silence_max()))?;
    stream.set_nodelay(true)?;
    // A server may answer (too large) before it has read all: its answer counts.
    let written = stream.write_all(bytes);
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    match parse(&answer) {
        Some(response) => Ok(response),
        None => {
            written?;
            read?;
            Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("not an HTTP answer: {}", String::from_utf8_lossy(&answer)),
            ))
        }
    }
}

fn parse(bytes: &[u8]) -> Option<Response> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines
        .next()?
        .strip_prefix("HTTP/1.1 ")?
        .get(..3)?
        .parse()
        .ok()?;
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_string()))
        .collect();
    let header = |name: &str| {
        headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    };
    let rest = &bytes[end + 4..];
    let body = if header("transfer-encoding") == Some("chunked") {
        dechunk(rest)?
    } else if let Some(length) = header("content-length") {
        rest.get(..length.parse().ok()?)?.to_vec()
    } else {
        rest.to_vec()
    };
    Some(Response {
        status,
        headers,
        body,
    })
}

fn dechunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n")?;
        let size = std::str::from_utf8(&rest[..end]).ok()?;
        let size = usize::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
        rest = &rest[end + 2..];
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size + 2..)?;
    }
}

/// Lines of a SUBSCRIBE, as they come.
#[derive(Debug)]
pub struct Lines {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Lines {
    /// Sends the SUBSCRIBE.
    ///
    /// # Panics
    ///
    /// When the server is not there.
    pub fn of(address: &str, relation: &str) -> Self {
        let mut stream = TcpStream::connect(address).expect("connected");
        stream.set_read_timeout(Some(silence_max())).expect("set");
        let body = serde_json::json!({"sql": format!("SUBSCRIBE TO {relation}")}).to_string();
        let head = format!(
            "POST /api/v1/sql HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            address,
            body.len()
        );
        stream.write_all(head.as_bytes()).expect("sent");
        stream.write_all(body.as_bytes()).expect("sent");
        Self {
            stream,
            read: Vec::new(),
        }
    }

    /// The next line that is JSON; heads and sizes of chunks are not. `None` at the end.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Option<serde_json::Value> {
        self.line(|e| panic!("the server goes on: {e}"))
    }

    /// As [`Lines::next`]; a server that is killed is an end like others.
    pub fn next_before_cut(&mut self) -> Option<serde_json::Value> {
        self.line(|_| 0)
    }

    fn line(&mut self, cut: impl Fn(io::Error) -> usize) -> Option<serde_json::Value> {
        loop {
            if let Some(end) = self.read.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                if line.starts_with(b"{") {
                    return Some(serde_json::from_slice(&line).expect("a line is JSON"));
                }
                continue;
            }
            let mut buffer = [0; 8192];
            match self.stream.read(&mut buffer).unwrap_or_else(&cut) {
                0 => return None,
                n => self.read.extend_from_slice(&buffer[..n]),
            }
        }
    }
}
