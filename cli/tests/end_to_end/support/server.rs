//! The real binary, run as a server or to its end.

use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::{Client, Fixture, Models, PATIENCE, Process, children, eventually};

/// The binary under test, which dies with the test.
pub(crate) fn pswitch() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pswitch"));
    command.env_remove("PSWITCH_SERVER").stdin(Stdio::null());
    // Threads of an operator that wait for each other sleep: on a busy machine they would take turns at spinning.
    command.env("OMP_WAIT_POLICY", "passive");
    // SAFETY: between fork and exec it makes one system call.
    unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
    command
}

/// What a run of the binary came to.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs the binary to its end, or kills it when patience is over.
pub(crate) fn run(command: &mut Command) -> Ended {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stdout = collect(child.stdout.take().unwrap());
    let stderr = collect(child.stderr.take().unwrap());
    let status = wait(&mut child);
    let text = |pipe: thread::JoinHandle<String>| pipe.join().unwrap();
    Ended { code: status.and_then(|status| status.code()), stdout: text(stdout), stderr: text(stderr) }
}

fn collect(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Waits for the end of a child; kills one that does not come to it and returns nothing.
fn wait(child: &mut Child) -> Option<ExitStatus> {
    let begin = std::time::Instant::now();
    while begin.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}

/// Bytes of the weights of one of these models, as the command line tells.
pub(crate) fn span_bytes(fixtures: &[Fixture], name: &str) -> u64 {
    let models = Models::of(fixtures);
    let listed = run(pswitch().args(["models", "--format", "json"]).arg(models.path()));
    let rows: Value = serde_json::from_str(&listed.stdout).unwrap();
    let row = rows.as_array().unwrap().iter().find(|row| row["name"] == name).unwrap();
    row["weight_bytes"].as_u64().unwrap()
}

/// A server to be started.
#[derive(Debug)]
pub(crate) struct Serve {
    command: Command,
    models: Models,
    folder: TempDir,
}

impl Serve {
    /// Serves a repository on any free port of the loopback interface.
    pub(crate) fn new(models: Models) -> Self {
        let mut command = pswitch();
        command.arg("serve").arg(models.path()).args(["--http", "127.0.0.1:0"]);
        Self { command, models, folder: tempfile::tempdir().unwrap() }
    }

    /// Serves on one host device, an operator with so many threads.
    pub(crate) fn host(self, threads: u32) -> Self {
        self.flag("--device", "host").flag("--threads", threads)
    }

    pub(crate) fn flag(mut self, name: &str, value: impl ToString) -> Self {
        self.command.arg(name).arg(value.to_string());
        self
    }

    /// Flags as they are.
    pub(crate) fn flags(mut self, flags: &[&str]) -> Self {
        self.command.args(flags);
        self
    }

    /// Configures it by a file.
    pub(crate) fn config(mut self, yaml: &str) -> Self {
        let path = self.folder.path().join("server.yaml");
        std::fs::write(&path, yaml).unwrap();
        self.command.arg("--config").arg(path);
        self
    }

    /// A pool whose homes have just so many bytes, beside an arena of 4 MiB.
    pub(crate) fn homes(self, bytes: u64) -> Self {
        const ARENA_BYTES: u64 = 4 << 20;
        let mut pool_bytes = bytes + ARENA_BYTES;
        // The doorbells' share depends on the whole.
        for _ in 0..4 {
            let doorbell_bytes = (pool_bytes / 256 / 512 * 512).clamp(4096, 256 << 10);
            pool_bytes = bytes + ARENA_BYTES + doorbell_bytes;
        }
        self.flag("--pool-size", pool_bytes).flag("--arena-size", ARENA_BYTES)
    }

    /// Starts it and waits until it has loaded its models.
    #[track_caller]
    pub(crate) fn start(mut self) -> Server {
        let mut child = self.command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (lines, write) = (BufReader::new(child.stderr.take().unwrap()).lines(), Arc::clone(&log));
        // Ends when the server, the zygote and all workers have closed standard error.
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut log = write.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        let process = Process::of(i32::try_from(child.id()).unwrap());
        let (client, address, models) = (Client::new(""), String::new(), self.models);
        let mut server = Server { client, address, models, child, process, log, _folder: self.folder };
        server.address = eventually("the server starts", || {
            let log = server.log();
            let line = log.lines().find_map(|line| line.split_once("; serving on http://"));
            match (line, server.child.try_wait().unwrap()) {
                (Some((_, address)), _) => Ok(address.to_owned()),
                (None, Some(status)) => panic!("the server ended with {status} and said:\n{log}"),
                (None, None) => Err(format!("said:\n{log}")),
            }
        });
        server.client = Client::new(&server.url());
        server
    }
}

/// A server that is killed, with its workers, when it goes out of scope.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) address: String,
    pub(crate) client: Client,
    pub(crate) process: Process,
    pub(crate) models: Models,
    child: Child,
    log: Arc<Mutex<String>>,
    _folder: TempDir,
}

impl Server {
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What it has said on standard error so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn zygote(&self) -> Process {
        let found = children(self.process.pid);
        assert_eq!(found.len(), 1, "one zygote: {found:?}");
        found[0].clone()
    }

    pub(crate) fn workers(&self) -> Vec<Process> {
        children(self.zygote().pid)
    }

    /// The server, its zygote and its workers.
    pub(crate) fn processes(&self) -> Vec<Process> {
        let mut all = vec![self.process.clone(), self.zygote()];
        all.extend(self.workers());
        all
    }

    /// Waits until so many workers are ready for work, and there are no others.
    #[track_caller]
    pub(crate) fn await_workers(&self, count: u32) -> Vec<Process> {
        eventually("the workers are complete", || {
            let metrics = self.client.metrics();
            let of = |state: &str| metrics[&format!("pswitch_workers{{state=\"{state}\"}}")];
            let workers = self.workers();
            let standby = of("standby");
            let others = ["starting", "active", "stopping", "killed"].map(of);
            if standby == f64::from(count) && others == [0.0; 4] && workers.len() == count as usize {
                Ok(workers)
            } else {
                Err(format!("{standby} on standby, others {others:?}, processes {workers:?}"))
            }
        })
    }

    /// Waits for its end and returns the exit code.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let status = wait(&mut self.child).expect("the server ends");
        assert_eq!(status.signal(), None, "the server ends by itself");
        status.code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- the server said:\n{}---", self.log());
        }
        // One that has ended already needs no killing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
