//! NVIDIA MPS: a process that trains and one that serves share the GPU, both there at all times.

use std::ffi::OsString;
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use pswitch_device::DeviceId;
use tempfile::TempDir;

use super::desk::{Desk, Request};
use super::process::Process;
use super::service::{Answered, Procedure};

/// NVIDIA's program that starts and ends the daemon.
const CONTROL: &str = "nvidia-cuda-mps-control";

/// Time that the daemon has to end.
const END_PATIENCE: Duration = Duration::from_secs(15);

/// Two clients of a daemon of their own. Training never stops.
pub(crate) struct Mps {
    // In this order: the daemon ends when its clients have.
    serves: Process,
    trains: Process,
    desk: Arc<Desk>,
    is_told: bool,
    _daemon: Daemon,
}

impl Mps {
    pub(crate) fn new(desk: Arc<Desk>) -> anyhow::Result<Self> {
        if let DeviceId::Host(_) = desk.device() {
            bail!("MPS shares GPUs alone");
        }
        let daemon = Daemon::start()?;
        let environment = daemon.environment();
        let mut serves = desk.start(&environment, desk.room.bytes(), true)?;
        desk.load(&mut serves, true)?;
        desk.bring(&mut serves, desk.whole())?;
        let trains = desk.start(&environment, desk.training_bytes(), false)?;
        Ok(Self { serves, trains, desk, is_told: false, _daemon: daemon })
    }
}

impl Procedure for Mps {
    fn train(&mut self) -> anyhow::Result<()> {
        if self.is_told {
            return Ok(());
        }
        self.is_told = true;
        self.desk.train(&mut self.trains, self.desk.training_bytes())
    }

    fn is_training(&mut self) -> anyhow::Result<bool> {
        self.trains.is_training()
    }

    fn steps(&mut self) -> anyhow::Result<u64> {
        self.trains.steps()
    }

    fn answer(&mut self, request: &Request) -> anyhow::Result<Answered> {
        let executed = self.desk.bring_and_run(&mut self.serves, request, Vec::new())?;
        Ok(Answered { executed, stopped_ns: None, switched: false })
    }
}

/// The daemon, with folders of its own: no other user of the GPU meets it, and no setting of the GPU is touched.
struct Daemon {
    folder: TempDir,
}

impl Daemon {
    fn start() -> anyhow::Result<Self> {
        // A socket's path has to be short.
        let folder = tempfile::Builder::new().prefix("mps").tempdir().context("no folder for MPS")?;
        for name in ["pipe", "log"] {
            fs::create_dir(folder.path().join(name)).context("no folder for MPS")?;
        }
        let daemon = Self { folder };
        let started = daemon.control().arg("-d").stdin(Stdio::null()).output();
        let started = match started {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                bail!("there is no program {CONTROL} on this machine")
            }
            started => started.with_context(|| format!("cannot run {CONTROL}"))?,
        };
        let said = String::from_utf8_lossy(&started.stderr);
        ensure!(started.status.success(), "the daemon of MPS does not start: {}", said.trim());
        Ok(daemon)
    }

    fn control(&self) -> Command {
        let mut command = Command::new(CONTROL);
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
        fs::exists(format!("/proc/{pid}")).unwrap_or(false).then_some(pid)
    }

    /// Tells it to end, and waits until it has.
    fn quit(&self) -> anyhow::Result<()> {
        let Some(pid) = self.pid() else { return Ok(()) };
        let mut quit = self.control().stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        if let Some(mut input) = quit.stdin.take() {
            input.write_all(b"quit -t 5\n")?;
        }
        let latest = Instant::now() + END_PATIENCE;
        while fs::exists(format!("/proc/{pid}")).unwrap_or(false) {
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

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.quit() {
            eprintln!("MPS: {error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_has_folders_that_are_gone_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let daemon = Daemon { folder };
        let names = daemon.environment().map(|(name, value)| (name, value == path.join("pipe")));
        assert_eq!(names, [("CUDA_MPS_PIPE_DIRECTORY", true), ("CUDA_MPS_LOG_DIRECTORY", false)]);
        assert_eq!(daemon.pid(), None);
        drop(daemon);
        assert!(!path.exists());
    }
}
