//! `cargo xtask demo`: real models behind a real server in a pool that does not hold them all.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::root::Root;
use crate::{commands, setup};

/// The models' weights are some 900 MB; BERT-base and ResNet152 do not fit together beside the arena, a quarter.
const POOL_SIZE: &str = "768MiB";
const READY_TIMEOUT: Duration = Duration::from_secs(300);
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// Builds, exports, serves and asks.
pub(crate) fn run(root: &Root, keep: bool, port: Option<u16>) -> Result<()> {
    setup::run(root)?;
    println!("\n==> building pswitch (release)");
    commands::run(commands::cargo(root).args(["build", "--release", "--package", "pswitch"]))?;
    println!("\n==> exporting models");
    commands::run(commands::python(root).args(["-m", "pswitch.demo", "export", "--out", "models"]))?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.map_or_else(free_port, Ok)?));
    println!("\n==> serving models on http://{address} with a pool of {POOL_SIZE}");
    let mut server = Server::start(root, address, keep)?;
    server.wait_until_ready(address)?;
    let url = format!("http://{address}");
    commands::run(commands::python(root).args(["-m", "pswitch.demo", "requests", &url]))
        .with_context(|| format!("the server's log is {}", server.log.display()))?;
    if keep {
        let id = server.leave();
        println!(
            "\nThe server goes on at {url} (stop it: kill {id}). Ask it, for example:\n{}",
            curl_line(&url)
        );
        return Ok(());
    }
    server.stop()
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port is free")?;
    Ok(listener.local_addr()?.port())
}

fn curl_line(url: &str) -> String {
    let tensor = |name: &str, data: &str| {
        format!(r#"{{"name":"{name}","shape":[1,5],"datatype":"INT64","data":{data}}}"#)
    };
    let ids = tensor("input_ids", "[101,7592,2088,999,102]");
    let mask = tensor("attention_mask", "[1,1,1,1,1]");
    format!("  curl {url}/v2/models/all-minilm-l6-v2/infer -d '{{\"inputs\":[{ids},{mask}]}}'")
}

/// The server that the demonstration started; stopped when dropped, whatever happened.
struct Server {
    child: Option<Child>,
    log: PathBuf,
}

impl Server {
    fn start(root: &Root, address: SocketAddr, keep: bool) -> Result<Self> {
        let log = root.target().join("demo.log");
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(root.target().join("release/pswitch"));
        command
            .current_dir(root.path())
            .args(["serve", "models", "--pool-size", POOL_SIZE, "--http", &address.to_string()])
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        if keep {
            // Out of the terminal's group: it outlives this command, and an interrupt meant for another.
            command.process_group(0);
        }
        let child = command.spawn().with_context(|| format!("cannot start {}", commands::shown(&command)))?;
        Ok(Self { child: Some(child), log })
    }

    fn wait_until_ready(&mut self, address: SocketAddr) -> Result<()> {
        let started = Instant::now();
        while !is_ready(address) {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                self.child = None;
                bail!("the server stopped ({status}):\n{}", tail(&self.log));
            }
            if started.elapsed() > READY_TIMEOUT {
                bail!("the server is not ready after {} s:\n{}", READY_TIMEOUT.as_secs(), tail(&self.log));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        println!("ready after {:.1} s", started.elapsed().as_secs_f64());
        Ok(())
    }

    /// Lets the server run on; returns its process.
    fn leave(mut self) -> u32 {
        self.child.take().map_or(0, |child| child.id())
    }

    /// Stops the server as an operator would, and sees that it went well.
    fn stop(mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        terminate(&child)?;
        let deadline = Instant::now() + STOP_TIMEOUT;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait()? {
                if !status.success() {
                    bail!("the server stopped with {status}:\n{}", tail(&self.log));
                }
                println!("\nThe server has stopped.");
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.child = Some(child);
        bail!("the server goes on {} s after SIGTERM", STOP_TIMEOUT.as_secs())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Workers die with the server; the exit status no longer matters here.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn terminate(child: &Child) -> Result<()> {
    let id = i32::try_from(child.id()).context("a process id out of range")?;
    kill(Pid::from_raw(id), Signal::SIGTERM).context("cannot stop the server")
}

/// Whether the server answers that it takes requests.
fn is_ready(address: SocketAddr) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        // In one piece: a server that answers before it has read all of it may reset the connection.
        let request =
            format!("GET /v2/health/ready HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut status = [0; 12];
        stream.read_exact(&mut status)?;
        Ok(&status == b"HTTP/1.1 200")
    };
    ask().unwrap_or(false)
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_what_the_server_says() {
        for (answer, ready) in [("200 OK", true), ("503 Service Unavailable", false)] {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let address = listener.local_addr().unwrap();
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut piece = [0; 1024];
                    let read = stream.read(&mut piece).unwrap();
                    assert!(read > 0, "the request broke off");
                    request.extend_from_slice(&piece[..read]);
                }
                // In one piece: who has read the status closes the connection.
                let answer = format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n");
                stream.write_all(answer.as_bytes()).unwrap();
            });
            assert_eq!(is_ready(address), ready);
            server.join().unwrap();
            assert!(!is_ready(address));
        }
    }

    #[test]
    fn the_line_for_curl_is_one_that_a_shell_understands() {
        let line = curl_line("http://127.0.0.1:1");
        assert_eq!(line.matches('\'').count(), 2);
        let json = line.split('\'').nth(1).unwrap();
        let request: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(request["inputs"][1]["name"], "attention_mask");
    }
}
