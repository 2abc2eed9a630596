//! What the HTTP front end costs: requests with binary inputs over loopback to a service that does nothing.
//!
//! `cargo bench -p pswitch-controller --bench front_end` prints, for a picture of 602,112 bytes to 4,000 bytes of
//! class scores and for the same tensor echoed, the time that the client sees and the time that the server counts
//! itself (`pswitch_front_end_seconds`, from the request's head to the response). The service takes some
//! microseconds of the former; there is no queue, switch or computation.

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use pswitch_controller::{HttpOptions, HttpServer, Metrics};

#[path = "../tests/http/fake.rs"]
mod fake;

/// Requests that are measured with binary data and with JSON; a tenth of them goes before.
const BINARY_REQUESTS: usize = 3000;
const JSON_REQUESTS: usize = 200;
/// One picture, 3 x 224 x 224 FP32.
const PICTURE_BYTES: usize = 3 * 224 * 224 * 4;

fn main() -> Result<(), Box<dyn Error>> {
    println!("requests one after another, microseconds");
    println!("{:<36}{:>9}{:>9}{:>9}{:>9}{:>14}", "", "median", "p10", "p90", "p99", "server mean");
    for (name, model, count, request) in [
        (
            "602,112 bytes in, 4,000 out",
            "classify",
            BINARY_REQUESTS,
            binary_request("[1,3,224,224]", PICTURE_BYTES),
        ),
        (
            "602,112 bytes in, 602,112 out",
            "echo-fp32",
            BINARY_REQUESTS,
            binary_request("[150528]", PICTURE_BYTES),
        ),
        ("16 bytes in, 16 out", "echo-fp32", BINARY_REQUESTS, binary_request("[4]", 16)),
        ("1.6 MB of JSON in, 4,000 bytes out", "classify", JSON_REQUESTS, json_request()),
    ] {
        measure(name, model, count, &request)?;
    }
    Ok(())
}

/// The lines of a head that are not the same for all, and a body.
type Request = (String, Vec<u8>);

fn binary_request(shape: &str, bytes: usize) -> Request {
    let json = format!(
        "{{\"inputs\":[{{\"name\":\"x\",\"shape\":{shape},\"datatype\":\"FP32\",\"parameters\":\
         {{\"binary_data_size\":{bytes}}}}}],\"parameters\":{{\"binary_data_output\":true}}}}"
    );
    let head = format!("Inference-Header-Content-Length: {}\r\n", json.len());
    let mut body = json.into_bytes();
    body.resize(body.len() + bytes, 0);
    (head, body)
}

fn json_request() -> Request {
    let pixels: Vec<String> =
        (0..PICTURE_BYTES / 4).map(|index| format!("0.{:08}", index * 7919 % 100_000_000)).collect();
    let json = format!(
        "{{\"inputs\":[{{\"name\":\"x\",\"shape\":[1,3,224,224],\"datatype\":\"FP32\",\"data\":[{}]}}],\
         \"parameters\":{{\"binary_data_output\":true}}}}",
        pixels.join(",")
    );
    (String::new(), json.into_bytes())
}

/// A server of its own for every line, so that its counters are of that line alone.
fn measure(name: &str, model: &str, count: usize, (head, body): &Request) -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let service = fake::FakeService::new(64 << 20);
    let address = SocketAddr::from(([127, 0, 0, 1], 0));
    let server =
        runtime.block_on(HttpServer::bind(address, service, Metrics::new(), HttpOptions::default()))?;
    let address = server.address();
    runtime.spawn(server.run(std::future::pending()));

    let length = body.len();
    let request = format!(
        "POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{head}\r\n"
    );
    let request = [request.as_bytes(), body].concat();

    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::with_capacity(256 << 10, stream);
    let mut body = Vec::new();
    for _ in 0..count / 10 {
        round(&mut stream, &request, &mut body)?;
    }
    let before = counted(address, model)?;
    let mut times: Vec<Duration> = Vec::with_capacity(count);
    for _ in 0..count {
        let begun = Instant::now();
        round(&mut stream, &request, &mut body)?;
        times.push(begun.elapsed());
    }
    let after = counted(address, model)?;
    times.sort_unstable();
    let at = |percent: usize| times[(count - 1) * percent / 100].as_secs_f64() * 1e6;
    let server_us = (after.0 - before.0) / (after.1 - before.1) * 1e6;
    println!("{name:<36}{:>9.1}{:>9.1}{:>9.1}{:>9.1}{server_us:>14.1}", at(50), at(10), at(90), at(99));
    runtime.shutdown_background();
    Ok(())
}

fn round(
    stream: &mut BufReader<TcpStream>,
    request: &[u8],
    body: &mut Vec<u8>,
) -> Result<(), Box<dyn Error>> {
    stream.get_mut().write_all(request)?;
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let succeeded = line.contains("200");
    let mut length = 0;
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        if name == "content-length" {
            length = value.trim().parse()?;
        }
    }
    body.resize(length, 0);
    stream.read_exact(body)?;
    if !succeeded {
        return Err(String::from_utf8_lossy(body).into());
    }
    Ok(())
}

/// Sum in seconds and count of the front end's own time.
fn counted(address: SocketAddr, model: &str) -> Result<(f64, f64), Box<dyn Error>> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let value = |suffix: &str| -> Result<f64, Box<dyn Error>> {
        let begin = format!("pswitch_front_end_seconds_{suffix}{{model=\"{model}\"}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&begin));
        Ok(line.ok_or("the metric is missing")?.parse()?)
    };
    Ok((value("sum")?, value("count")?))
}
