//! A client of the HTTP front end that costs as little as one can: one connection, requests made ready in advance.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use serde_json::json;

use crate::subject::Example;

const HEADER_LENGTH: &str = "Inference-Header-Content-Length";

/// A connection that stays open.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
    body: Vec<u8>,
    /// Length of the JSON in front of the binary data in `body`.
    json_bytes: usize,
}

/// Where the server says that the time of a request went.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct Parameters {
    pub(crate) queue_us: f64,
    pub(crate) switch_us: f64,
    pub(crate) compute_us: f64,
    /// Whether weights had to move.
    pub(crate) switched: bool,
}

#[derive(Debug, Deserialize)]
struct Header {
    parameters: Parameters,
}

/// A whole request with binary inputs that asks for binary outputs: head, JSON, data.
pub(crate) fn request(model: &str, example: &Example) -> Vec<u8> {
    let inputs: Vec<_> = example
        .inputs
        .iter()
        .map(|(spec, data)| {
            json!({
                "name": spec.name,
                "datatype": spec.datatype.name(),
                "shape": spec.shape,
                "parameters": {"binary_data_size": data.len()},
            })
        })
        .collect();
    let json = json!({"inputs": inputs, "parameters": {"binary_data_output": true}}).to_string();
    let bytes: usize = example.inputs.iter().map(|(_, data)| data.len()).sum();
    let head = format!(
        "POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n{HEADER_LENGTH}: {}\r\n\r\n",
        json.len() + bytes,
        json.len()
    );
    let mut request = [head.as_bytes(), json.as_bytes()].concat();
    request.reserve(bytes);
    for (_, data) in &example.inputs {
        request.extend_from_slice(data);
    }
    request
}

impl Connection {
    pub(crate) fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).context("cannot connect to the front end")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::with_capacity(256 << 10, stream), body: Vec::new(), json_bytes: 0 })
    }

    /// Sends a request and reads the whole response: how long that took, and where the server says the time went.
    pub(crate) fn round(&mut self, request: &[u8]) -> anyhow::Result<(Duration, Parameters)> {
        let begun = Instant::now();
        self.stream.get_mut().write_all(request).context("the front end takes no request")?;
        let status = self.read_response().context("the response broke off")?;
        let took = begun.elapsed();
        if status != 200 {
            bail!("status {status}: {}", String::from_utf8_lossy(&self.body));
        }
        let json = self.body.get(..self.json_bytes).context("the header is longer than the body")?;
        let header: Header = serde_json::from_slice(json).context("the response is not what was expected")?;
        Ok((took, header.parameters))
    }

    /// The binary data of the last response: all outputs, one after the other.
    pub(crate) fn data(&self) -> &[u8] {
        self.body.get(self.json_bytes..).unwrap_or_default()
    }

    /// Reads the body to `self.body`, and returns the status.
    fn read_response(&mut self) -> anyhow::Result<u16> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.with_context(|| format!("no status in {line:?}"))?;
        let (mut length, mut header_length) = (0, None);
        loop {
            line.clear();
            ensure!(self.stream.read_line(&mut line)? > 0, "the head has no end");
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            if name.eq_ignore_ascii_case("Content-Length") {
                length = value.trim().parse()?;
            } else if name.eq_ignore_ascii_case(HEADER_LENGTH) {
                header_length = Some(value.trim().parse()?);
            }
        }
        self.body.resize(length, 0);
        self.stream.read_exact(&mut self.body)?;
        self.json_bytes = header_length.unwrap_or(length);
        Ok(status)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use pswitch_controller::{Datatype, TensorSpec};

    use super::*;

    fn example() -> Example {
        let input = (TensorSpec::new("x", Datatype::Uint8, [4]), vec![1, 2, 3, 4]);
        Example { inputs: vec![input], outputs: None, reference: String::new() }
    }

    #[test]
    fn requests_say_how_long_their_parts_are() {
        let request = request("m", &example());
        let text = String::from_utf8_lossy(&request);
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let (json, data) = body.split_at(body.len() - 4);
        assert!(head.starts_with("POST /v2/models/m/infer HTTP/1.1\r\n"), "{head}");
        assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
        assert!(head.ends_with(&format!("\r\nInference-Header-Content-Length: {}", json.len())), "{head}");
        assert_eq!(data.as_bytes(), [1, 2, 3, 4]);
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(json["inputs"][0]["parameters"]["binary_data_size"], 4);
        assert_eq!(json["inputs"][0]["datatype"], "UINT8");
    }

    /// Answers requests that are as long as the first with what is given, one after the other.
    fn answering(request: usize, answers: Vec<String>) -> SocketAddr {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut read = vec![0; request];
            for answer in answers {
                stream.read_exact(&mut read).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        address
    }

    #[test]
    fn one_connection_serves_many_rounds() {
        let json = r#"{"parameters":{"queue_us":1.5,"switch_us":0.0,"compute_us":20.0,"switched":false}}"#;
        let ok = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\ninference-header-content-length: {}\r\n\r\n{json}data",
            json.len() + 4,
            json.len()
        );
        let refusal = "HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\n\"no!\"".to_owned();
        let request = request("m", &example());
        let mut connection =
            Connection::open(answering(request.len(), vec![ok.clone(), ok, refusal])).unwrap();
        for _ in 0..2 {
            let (took, parameters) = connection.round(&request).unwrap();
            assert!(took > Duration::ZERO);
            assert_eq!((parameters.queue_us, parameters.compute_us), (1.5, 20.0));
            assert_eq!((parameters.switched, connection.data()), (false, b"data".as_slice()));
        }
        assert_eq!(connection.round(&request).unwrap_err().to_string(), "status 404: \"no!\"");
        assert!(connection.round(&request).is_err());
    }
}
