//! A worker process that is a program of its own: started from nothing, spoken with, ended.

use std::ffi::OsString;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pswitch_device::SharedMemory;
use pswitch_protocol::{Channel, FromWorker, TaskPause, ToWorker, control};

/// Time that anything but training may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Time that a process has to end in good order.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// What becomes such a process.
///
/// Nobody types it: measurements start it.
#[derive(Debug, clap::Args)]
pub(crate) struct WorkerProcess {
    /// The process that it works for, and with which it dies.
    #[arg(long)]
    parent: i32,
}

impl WorkerProcess {
    const NAME: &str = "worker-process";

    /// Never returns: CUDA's exit handlers would wait for streams.
    pub(crate) fn run(&self) -> ! {
        let code = match pswitch_worker::serve_standard_input(self.parent) {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("a worker of its own ends: {:#}", anyhow::Error::from(error));
                1
            }
        };
        // SAFETY: `_exit` has no preconditions.
        unsafe { nix::libc::_exit(code) }
    }
}

/// A worker process, and what it has said of its training. Dropping it ends it, or kills it if it does not end, and returns
/// when it is gone.
///
/// It dies with the thread that has started it.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    channel: Channel,
    control: SharedMemory,
    task: Task,
}

/// The account of a training task.
#[derive(Debug, Default)]
struct Task {
    steps: u64,
    /// Steps when it was last told to train.
    steps_before: u64,
    /// When it has stopped computing, by `CLOCK_MONOTONIC`; none while it computes or nobody has told it to.
    paused_at_ns: Option<u64>,
    /// Why nothing more comes of it.
    over: Option<String>,
}

impl Process {
    /// Starts one with these variables in its environment.
    pub(crate) fn start(environment: &[(&'static str, OsString)]) -> anyhow::Result<Self> {
        let (channel, theirs) = Channel::pair()?;
        let program = std::env::current_exe().context("where is this program?")?;
        let child = Command::new(program)
            .args(["bench", WorkerProcess::NAME, "--parent"])
            .arg(std::process::id().to_string())
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start a process")?;
        let control = SharedMemory::create("pswitch-control", control::BLOCK_BYTES)?;
        Ok(Self { child, channel, control, task: Task::default() })
    }

    pub(crate) fn control(&self) -> &SharedMemory {
        &self.control
    }

    pub(crate) fn send(&mut self, message: &ToWorker, descriptors: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        if self.channel.send(message, descriptors).is_err() {
            return Err(self.loss());
        }
        Ok(())
    }

    /// The next that it says, training aside.
    pub(crate) fn hear(&mut self) -> anyhow::Result<FromWorker> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            ensure!(self.has_said(deadline)?, "a process says nothing for {} s", PATIENCE.as_secs());
            if let Some(message) = self.receive()? {
                return Ok(message);
            }
        }
    }

    /// Takes note of all that it has said of its training.
    pub(crate) fn drain(&mut self) -> anyhow::Result<()> {
        self.check_task()?;
        while self.has_said(Instant::now())? {
            if let Some(message) = self.receive()? {
                bail!("a process says what nobody has asked: {message:?}");
            }
        }
        Ok(())
    }

    /// Tells it to train; a task is prepared, or will be by then.
    pub(crate) fn train(&mut self, order: &ToWorker) -> anyhow::Result<()> {
        // It may have failed while it was prepared.
        self.check_task()?;
        self.set_stop(false)?;
        let steps = self.task.steps;
        self.task = Task { steps_before: steps, steps, ..Task::default() };
        self.send(order, &[])
    }

    /// Whether it has done a step since it was told to train.
    pub(crate) fn is_training(&mut self) -> anyhow::Result<bool> {
        self.drain()?;
        Ok(self.task.steps > self.task.steps_before && self.task.paused_at_ns.is_none())
    }

    pub(crate) fn steps(&mut self) -> anyhow::Result<u64> {
        self.drain()?;
        Ok(self.task.steps)
    }

    /// Sets or clears its stop flag.
    pub(crate) fn set_stop(&self, stop: bool) -> anyhow::Result<()> {
        self.control.word(control::STOP)?.store(u32::from(stop), Ordering::Relaxed);
        Ok(())
    }

    /// Waits until its task computes no more: when that was, by `CLOCK_MONOTONIC`.
    pub(crate) fn await_pause(&mut self) -> anyhow::Result<u64> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.check_task()?;
            if let Some(at_ns) = self.task.paused_at_ns {
                return Ok(at_ns);
            }
            ensure!(self.has_said(deadline)?, "a task does not stop for {} s", PATIENCE.as_secs());
            if let Some(message) = self.receive()? {
                bail!("a process that trains says {message:?}");
            }
        }
    }

    /// Kills it, and returns when the kernel has taken back all that it had.
    pub(crate) fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill().context("cannot kill a process")?;
        self.child.wait().context("cannot wait for a process")?;
        Ok(())
    }

    /// Has it end in good order, and returns when it is gone.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        self.ask_to_end()
    }

    fn ask_to_end(&mut self) -> anyhow::Result<()> {
        self.set_stop(true)?;
        self.send(&ToWorker::Shutdown, &[])?;
        let latest = Instant::now() + END_PATIENCE;
        while self.child.try_wait().context("cannot wait for a process")?.is_none() {
            ensure!(Instant::now() < latest, "a process does not end");
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Waits until there is something to read.
    fn has_said(&self, deadline: Instant) -> anyhow::Result<bool> {
        let mut watched = [PollFd::new(self.channel.as_fd(), PollFlags::POLLIN)];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut watched, left) {
                Ok(ready) => return Ok(ready > 0),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("cannot wait for a process"),
            }
        }
    }

    /// The next message; none if it was about training, or that there is memory now.
    fn receive(&mut self) -> anyhow::Result<Option<FromWorker>> {
        let Some((message, _)) = self.channel.receive::<FromWorker>()? else { return Err(self.loss()) };
        let over = match message {
            FromWorker::Attached | FromWorker::TaskReady { result: Ok(_) } | FromWorker::TaskLeft { .. } => {
                return Ok(None);
            }
            FromWorker::TaskStep(_) => {
                self.task.steps += 1;
                return Ok(None);
            }
            FromWorker::TaskPaused(TaskPause::Stopped { at_ns, .. }) => {
                self.task.paused_at_ns = Some(at_ns);
                return Ok(None);
            }
            FromWorker::TaskReady { result: Err(reason) } => format!("the task cannot be trained: {reason}"),
            FromWorker::TaskPaused(TaskPause::Failed { reason, .. }) => format!("the task failed: {reason}"),
            FromWorker::TaskPaused(TaskPause::Finished) => "the task has come to its end".to_owned(),
            other => return Ok(Some(other)),
        };
        self.task.over = Some(over);
        self.check_task()?;
        Ok(None)
    }

    /// Whoever asks hears of it, also when it was read in passing.
    fn check_task(&self) -> anyhow::Result<()> {
        self.task.over.as_ref().map_or(Ok(()), |reason| Err(anyhow::anyhow!("{reason}")))
    }

    /// Why it is not there any more.
    fn loss(&mut self) -> anyhow::Error {
        // Its connection closes a moment before it can be waited for.
        let latest = Instant::now() + Duration::from_secs(1);
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return anyhow::anyhow!("a process ended: {status}"),
                Ok(None) if Instant::now() < latest => std::thread::sleep(Duration::from_millis(1)),
                _ => return anyhow::anyhow!("a process has closed its connection"),
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already. A client of MPS that is killed may take the daemon's server with it.
        if self.ask_to_end().is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
