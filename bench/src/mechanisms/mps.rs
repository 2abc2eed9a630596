//! NVIDIA MPS: a process that trains and one that serves share the GPU, both there at all times.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use pswitch_device::DeviceId;
use tempfile::TempDir;

use super::desk::{Desk, Request};
use super::process::Process;
use super::service::{Answered, Procedure};
use super::standby::Trainer;
use crate::machine::field;
use crate::progress;

/// NVIDIA's program that starts and ends the daemon.
const CONTROL: &str = "nvidia-cuda-mps-control";

/// Time that the daemon has to end.
const END_PATIENCE: Duration = Duration::from_secs(15);

/// Two clients of a daemon of their own. Training never stops.
pub(crate) struct Mps {
    // In this order: the daemon ends when its clients have.
    serves: Process,
    trainer: Trainer,
    desk: Arc<Desk>,
    _daemon: Daemon,
}

impl Mps {
    pub(crate) fn new(desk: Arc<Desk>) -> anyhow::Result<Self> {
        if let DeviceId::Host(_) = desk.device() {
            bail!("MPS shares GPUs alone");
        }
        let daemon = Daemon::start(Path::new(CONTROL))?;
        // Clients share the 120 connections that the daemon has; what they inherit is for one process.
        let connections = ("CUDA_DEVICE_MAX_CONNECTIONS", OsString::from("8"));
        let environment = [daemon.environment().as_slice(), &[connections]].concat();
        let trainer = Trainer::start(&desk, &environment)?;
        let mut serves = desk.start(&environment, desk.room.bytes(), true)?;
        desk.load(&mut serves, true)?;
        desk.bring(&mut serves, desk.whole())?;
        Ok(Self { serves, trainer, desk, _daemon: daemon })
    }
}

impl Procedure for Mps {
    fn train(&mut self) -> anyhow::Result<()> {
        self.trainer.train(&self.desk)
    }

    fn is_training(&mut self) -> anyhow::Result<bool> {
        self.trainer.is_training()
    }

    fn steps(&mut self) -> anyhow::Result<u64> {
        self.trainer.steps()
    }

    fn answer(&mut self, request: &Request) -> anyhow::Result<Answered> {
        let executed = self.desk.bring_and_run(&mut self.serves, request, Vec::new())?;
        Ok(Answered { executed, stopped_ns: None, switched: false })
    }
}

/// The daemon, with folders of its own: no other user of the GPU meets it, and no setting of the GPU is touched.
struct Daemon {
    program: PathBuf,
    folder: TempDir,
}

impl Daemon {
    /// `program` is NVIDIA's.
    fn start(program: &Path) -> anyhow::Result<Self> {
        // A socket's path has to be short.
        let folder = tempfile::Builder::new().prefix("pswitch-mps").tempdir().context("no folder for MPS")?;
        for name in ["pipe", "log"] {
            fs::create_dir(folder.path().join(name)).context("no folder for MPS")?;
        }
        let daemon = Self { program: program.to_owned(), folder };
        // To a file: the daemon would hold the other end of a pipe for as long as it lives.
        let said = daemon.folder.path().join("said");
        let file = File::create(&said).context("no file for what MPS says")?;
        let mut control = daemon.control();
        control.arg("-d").stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let status = match control.status() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                bail!("there is no program {} on this machine", program.display())
            }
            status => status.with_context(|| format!("cannot run {}", program.display()))?,
        };
        let said = fs::read_to_string(&said).unwrap_or_default();
        ensure!(status.success(), "the daemon of MPS does not start: {status}, {}", said.trim());
        Ok(daemon)
    }

    fn control(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.envs(self.environment());
        command
    }

    /// By which clients find it.
    fn environment(&self) -> [(&'static str, OsString); 2] {
        let path = |name| self.folder.path().join(name).into_os_string();
        [("CUDA_MPS_PIPE_DIRECTORY", path("pipe")), ("CUDA_MPS_LOG_DIRECTORY", path("log"))]
    }

    /// The number of its process, while it lives.
    fn pid(&self) -> Option<i32> {
        let path = self.folder.path().join("pipe").join(format!("{CONTROL}.pid"));
        let pid = fs::read_to_string(path).ok()?.trim().parse().ok()?;
        is_alive(pid).then_some(pid)
    }

    /// Tells it to end, and waits until it has.
    fn quit(&self) -> anyhow::Result<()> {
        let Some(pid) = self.pid() else { return Ok(()) };
        let mut quit = self.control().stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        if let Some(mut input) = quit.stdin.take() {
            input.write_all(b"quit -t 5\n")?;
        }
        let latest = Instant::now() + END_PATIENCE;
        while is_alive(pid) {
            if Instant::now() >= latest {
                let _ = quit.kill();
                let _ = quit.wait();
                bail!("process {pid}, the daemon of MPS, does not end");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        quit.wait()?;
        Ok(())
    }
}

/// Whether a process has not ended; one that nobody has waited for has.
fn is_alive(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    field(&status, "State").is_some_and(|state| !state.starts_with(['Z', 'X']))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.quit() {
            progress::say(format_args!("MPS: {error:#}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_has_ended_is_not_alive_though_nobody_has_waited() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        while is_alive(pid) {
            std::thread::yield_now();
        }
        assert!(fs::exists(format!("/proc/{pid}")).unwrap());
        child.wait().unwrap();
        assert!(!is_alive(pid) && is_alive(i32::try_from(std::process::id()).unwrap()));
    }

    /// A program that behaves as NVIDIA's, as far as is asked of it here.
    fn stand_in(folder: &Path) -> PathBuf {
        let program = folder.join("control");
        let pid = format!("$CUDA_MPS_PIPE_DIRECTORY/{CONTROL}.pid");
        let script = format!(
            "#!/bin/sh\n\
             if [ \"$1\" = -d ]; then sleep 100 & echo $! > {pid}; exit; fi\n\
             read word rest && [ \"$word\" = quit ] && kill $(cat {pid})\n"
        );
        // By another process: a file that this one has open for writing, or that a fork of it has, cannot be run.
        let write = r#"printf %s "$1" > "$2" && chmod 700 "$2""#;
        let written = Command::new("sh").args(["-c", write, "sh", &script]).arg(&program).status().unwrap();
        assert!(written.success());
        program
    }

    #[test]
    fn a_daemon_ends_with_whoever_has_started_it() {
        let place = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(&stand_in(place.path())).unwrap();
        let (pid, folder) = (daemon.pid().unwrap(), daemon.folder.path().to_owned());
        let names = daemon.environment().map(|(name, value)| (name, value == folder.join("pipe")));
        assert_eq!(names, [("CUDA_MPS_PIPE_DIRECTORY", true), ("CUDA_MPS_LOG_DIRECTORY", false)]);
        assert!(is_alive(pid));
        drop(daemon);
        assert!(!is_alive(pid) && !folder.exists());
    }

    #[test]
    fn a_machine_without_the_program_has_no_daemon() {
        let error = Daemon::start(Path::new("/nowhere/control")).err().unwrap();
        assert_eq!(error.to_string(), "there is no program /nowhere/control on this machine");
    }
}
