//! A small blocking HTTP/1.1 client that can also misbehave.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// What came back.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(header, _)| header.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The JSON object and the bytes behind it.
    pub(crate) fn parts(&self) -> (Value, &[u8]) {
        let length: usize = self.header("inference-header-content-length").unwrap().parse().unwrap();
        let (json, binary) = self.body.split_at(length);
        (serde_json::from_slice(json).unwrap(), binary)
    }

    /// The message of an error, after a check of the status.
    pub(crate) fn error(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        assert_eq!(self.header("content-type"), Some("application/json"));
        self.json()["error"].as_str().unwrap().to_owned()
    }
}

/// One connection.
pub(crate) struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { stream: BufReader::with_capacity(1 << 20, stream) }
    }

    /// Bytes as they are.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// Tells the server that nothing more comes.
    pub(crate) fn finish_sending(&mut self) {
        // The server may have closed the connection already.
        let _ = self.stream.get_mut().shutdown(Shutdown::Write);
    }

    pub(crate) fn get(&mut self, path: &str) -> Response {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").as_bytes()).unwrap();
        self.response().unwrap()
    }

    pub(crate) fn post(&mut self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        let mut request = format!("POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        let mut request = (request + "\r\n").into_bytes();
        request.extend_from_slice(body);
        self.send(&request).unwrap();
        self.response().unwrap()
    }

    /// An inference request in JSON.
    pub(crate) fn infer(&mut self, model: &str, request: &Value) -> Response {
        self.post(&format!("/v2/models/{model}/infer"), &[], request.to_string().as_bytes())
    }

    /// An inference request with binary data.
    pub(crate) fn infer_binary(&mut self, model: &str, request: &Value, binary: &[u8]) -> Response {
        let mut body = request.to_string().into_bytes();
        let length = body.len().to_string();
        body.extend_from_slice(binary);
        self.post(
            &format!("/v2/models/{model}/infer"),
            &[("Inference-Header-Content-Length", &length)],
            &body,
        )
    }

    /// The next response; `None` if the server closed the connection instead.
    pub(crate) fn response(&mut self) -> Option<Response> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let status = line.split(' ').nth(1)?.parse().ok()?;
        let mut headers = Vec::new();
        loop {
            line.clear();
            self.stream.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        let mut response = Response { status, headers, body: Vec::new() };
        if status == 100 {
            return self.response();
        }
        let length = response.header("content-length").map_or(0, |length| length.parse().unwrap());
        response.body.resize(length, 0);
        self.stream.read_exact(&mut response.body).ok()?;
        Some(response)
    }
}
