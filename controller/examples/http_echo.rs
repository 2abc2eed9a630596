//! The HTTP front end before a service that has no models: it serves, asks itself and ends.
//!
//! `cargo run --example http_echo` sends one request and prints both sides of it; `... -- 30` then goes on for 30
//! seconds, for curl:
//!
//! ```sh
//! curl localhost:8000/v2/models/add/infer -d '{"inputs": [
//!     {"name": "a", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]},
//!     {"name": "b", "shape": [1, 4], "datatype": "FP32", "data": [[10, 20, 30, 40]]}]}'
//! ```

use std::error::Error;
use std::net::SocketAddr;
use std::time::Duration;

use pswitch_controller::{HttpOptions, HttpServer, Metrics};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[path = "../tests/http/fake.rs"]
mod fake;

const REQUEST: &str = r#"{
  "id": "42",
  "inputs": [
    {"name": "a", "shape": [2, 4], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6, 7, 8]},
    {"name": "b", "shape": [2, 4], "datatype": "FP32", "data": [[0.5, 0.5, 0.5, 0.5], [10, 20, 30, 40]]}
  ]
}"#;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let seconds: u64 = std::env::args().nth(1).map_or(Ok(0), |seconds| seconds.parse())?;
    let port = if seconds > 0 { 8000 } else { 0 };
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let service = fake::FakeService::new(16 << 20);
    let server = HttpServer::bind(address, service, Metrics::new(), HttpOptions::default()).await?;
    let address = server.address();
    println!("serving on http://{address}/v2");

    let asked = async move {
        match ask(address).await {
            Ok(response) => println!("{REQUEST}\n\n{response}"),
            Err(error) => println!("no answer: {error}"),
        }
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    };
    server.run(asked).await;
    println!("\nstopped");
    Ok(())
}

async fn ask(address: SocketAddr) -> Result<String, std::io::Error> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!(
        "POST /v2/models/add/infer HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{REQUEST}",
        REQUEST.len()
    );
    stream.write_all(request.as_bytes()).await?;
    let mut response = String::new();
    stream.read_to_string(&mut response).await?;
    Ok(response)
}
