//! A small HTTP/1.1 client for the shell: one request per connection, blocking.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use millrace_dataflow::error::{Error, Result};

/// An answer of the server.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub body: Vec<u8>,
}

/// Posts JSON and reads the whole answer.
pub fn post_json(address: &str, path: &str, body: &str) -> Result<Response> {
    request(address, "POST", path, body)
}

/// Sends a request with a body in JSON and reads the whole answer.
pub fn request(address: &str, method: &str, path: &str, body: &str) -> Result<Response> {
    let (host, mut stream) = connect(address)?;
    let away = |e: std::io::Error| Error::unavailable(format!("no answer from {host}: {e}"));
    let head = head(method, path, &host, body);
    stream.write_all(head.as_bytes()).map_err(away)?;
    // A server may answer (too large) without reading all; its answer counts, not the broken write.
    let written = stream.write_all(body.as_bytes());
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    match parse(&bytes) {
        Some(response) => Ok(response),
        None => {
            written.map_err(away)?;
            read.map_err(away)?;
            Err(Error::unavailable(format!(
                "{host} answered with something that is not HTTP"
            )))
        }
    }
}

/// Posts JSON and hands over each line of the answer that is JSON, as it comes, until the answer ends
/// or `take` wants no more.
pub fn post_for_lines(
    address: &str,
    path: &str,
    body: &str,
    mut take: impl FnMut(&str) -> bool,
) -> Result<()> {
    let (host, mut stream) = connect(address)?;
    let away = |e: std::io::Error| Error::unavailable(format!("no answer from {host}: {e}"));
    let head = head("POST", path, &host, body);
    stream.write_all(head.as_bytes()).map_err(away)?;
    stream.write_all(body.as_bytes()).map_err(away)?;
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(away)?;
        // Heads and sizes of chunks begin otherwise.
        if line.starts_with('{') && !take(&line) {
            break;
        }
    }
    Ok(())
}

fn connect(address: &str) -> Result<(String, TcpStream)> {
    let host = address
        .strip_prefix("http://")
        .unwrap_or(address)
        .trim_end_matches('/')
        .to_string();
    let stream = TcpStream::connect(&host).map_err(|e| {
        Error::unavailable(format!("no answer from {host}: {e}"))
            .hint("is `millrace serve` running there? --http names another address")
    })?;
    Ok((host, stream))
}

fn head(method: &str, path: &str, host: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n\
         Accept: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )
}

/// Reads a complete answer; `None` if it is cut off or not HTTP.
fn parse(bytes: &[u8]) -> Option<Response> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines
        .next()?
        .strip_prefix("HTTP/1.")?
        .get(2..5)?
        .parse()
        .ok()?;
    let (mut length, mut chunked) = (None, false);
    for line in lines {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(value.trim().parse::<usize>().ok()?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = value.trim().eq_ignore_ascii_case("chunked");
        }
    }
    let rest = &bytes[end + 4..];
    let body = match (chunked, length) {
        (true, _) => dechunk(rest)?,
        (false, Some(length)) => rest.get(..length)?.to_vec(),
        (false, None) => rest.to_vec(),
    };
    Some(Response { status, body })
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
        rest = rest.get(size.checked_add(2)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_with_length_or_chunks_are_read_whole() {
        let plain = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokrest";
        assert_eq!(parse(plain).expect("whole").body, b"ok");
        let chunked = b"HTTP/1.1 400 Bad\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x\r\nde\r\n0\r\n\r\n";
        let response = parse(chunked).expect("whole");
        assert_eq!(
            (response.status, response.body.as_slice()),
            (400, &b"abcde"[..])
        );
    }

    #[test]
    fn a_cut_off_answer_is_none() {
        assert!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok").is_none());
        assert!(parse(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nok").is_none());
        assert!(parse(b"SSH-2.0-x\r\n\r\n").is_none());
        assert!(parse(b"").is_none());
    }
}
