//! The zygote: a small process forked before any thread, CUDA or libtorch call, which forks the workers.
//!
//! A process that has started threads or CUDA cannot be forked safely; this one never does either. It stays
//! single-threaded, forks a worker when the controller asks, reaps it when it ends and says how. When the controller
//! is gone it kills its workers and ends.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, SigSet, Signal, kill, signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid};
use pswitch_protocol::{Channel, ExitCause, FromZygote, ProtocolError, ToZygote};

use crate::error::WorkerError;

/// From how many queues CUDA's driver feeds the streams of a process. It looks when it starts; with the 8 that it has
/// otherwise, streams that are stuck at doorbells hold up others.
const CONNECTIONS: &str = "CUDA_DEVICE_MAX_CONNECTIONS";

/// The controller's end of a zygote. Dropping it ends the zygote and all its workers.
#[derive(Debug)]
pub struct Zygote {
    /// Speaks [`ToZygote`] and [`FromZygote`].
    pub channel: Channel,
    /// Process of the zygote.
    pub pid: i32,
}

impl Zygote {
    /// Forks the zygote. Call it first thing in `main`.
    ///
    /// `worker_main` is what a worker runs, in a process of its own; its return value is the exit code.
    ///
    /// # Errors
    /// [`WorkerError::TooLate`] if the process has threads already.
    pub fn fork(worker_main: fn(Channel) -> i32) -> Result<Self, WorkerError> {
        let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count).unwrap_or(1);
        if threads > 1 {
            return Err(WorkerError::TooLate { threads });
        }
        if std::env::var_os(CONNECTIONS).is_none() {
            // SAFETY: the process has one thread, so nobody reads the environment meanwhile.
            unsafe { std::env::set_var(CONNECTIONS, "32") }
        }
        let (ours, theirs) = Channel::pair()?;
        let parent = getpid();
        // SAFETY: the process has one thread, so the child is a whole copy; every lock is free.
        match unsafe { fork() }.map_err(system("fork"))? {
            ForkResult::Parent { child } => Ok(Self { channel: ours, pid: child.as_raw() }),
            ForkResult::Child => {
                drop(ours);
                let code = match enter_child("pswitch-zygote", parent).and_then(|()| run(theirs, worker_main))
                {
                    Ok(()) => 0,
                    Err(error) => {
                        tracing::error!(%error, "the zygote failed");
                        1
                    }
                };
                exit(code)
            }
        }
    }
}

/// Leaves without running destructors or exit handlers: those belong to the process that was forked from.
fn exit(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(code) }
}

fn system(operation: &'static str) -> impl Fn(nix::errno::Errno) -> WorkerError {
    move |errno| WorkerError::System { operation, source: io::Error::from(errno) }
}

/// What every worker process does first: take a name, die with its parent, leave Ctrl-C to the server.
pub(crate) fn enter_child(name: &str, parent: Pid) -> Result<(), WorkerError> {
    let name = std::ffi::CString::new(name).unwrap_or_default();
    prctl::set_name(&name).map_err(system("prctl(PR_SET_NAME)"))?;
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(system("prctl(PR_SET_PDEATHSIG)"))?;
    // The parent may have died before the signal was asked for.
    if getppid() != parent {
        exit(0);
    }
    for ignored in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: ignoring a signal installs no handler.
        unsafe { signal(ignored, SigHandler::SigIgn) }.map_err(system("signal"))?;
    }
    Ok(())
}

fn run(channel: Channel, worker_main: fn(Channel) -> i32) -> Result<(), WorkerError> {
    let mut child_signals = SigSet::empty();
    child_signals.add(Signal::SIGCHLD);
    child_signals.thread_block().map_err(system("sigprocmask"))?;
    let exits = SignalFd::with_flags(&child_signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(system("signalfd"))?;
    let mut state = State { channel, exits, workers: HashMap::new(), worker_main };
    loop {
        let mut watched = [
            PollFd::new(state.channel.as_fd(), PollFlags::POLLIN),
            PollFd::new(state.exits.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut watched, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(system("poll")(errno)),
        }
        let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let (message, exited) = (ready(&watched[0]), ready(&watched[1]));
        if exited {
            state.reap()?;
        }
        if message && !state.serve()? {
            state.kill_all();
            return Ok(());
        }
    }
}

struct State {
    channel: Channel,
    exits: SignalFd,
    workers: HashMap<u32, Pid>,
    worker_main: fn(Channel) -> i32,
}

impl State {
    /// Serves one message; false when the controller is gone.
    fn serve(&mut self) -> Result<bool, WorkerError> {
        let Some((message, descriptors)) = self.channel.receive::<ToZygote>()? else { return Ok(false) };
        match message {
            ToZygote::Fork { worker } => {
                let found = descriptors.len();
                let Ok([socket]) = <[OwnedFd; 1]>::try_from(descriptors) else {
                    return Err(ProtocolError::Descriptors { message: "Fork", found, expected: 1 }.into());
                };
                let answer = match self.fork_worker(worker, socket) {
                    Ok(pid) => {
                        self.workers.insert(worker, pid);
                        FromZygote::Forked { worker, pid: pid.as_raw() }
                    }
                    Err(error) => FromZygote::ForkFailed { worker, reason: error.to_string() },
                };
                self.channel.send(&answer, &[])?;
            }
            ToZygote::Kill { worker } => {
                // A worker that is in the table is not reaped yet, so its number still means it.
                if let Some(&pid) = self.workers.get(&worker) {
                    kill(pid, Signal::SIGKILL).map_err(system("kill"))?;
                }
            }
        }
        Ok(true)
    }

    fn fork_worker(&self, worker: u32, socket: OwnedFd) -> Result<Pid, WorkerError> {
        let parent = getpid();
        // SAFETY: the zygote has one thread, so the child is a whole copy; every lock is free.
        match unsafe { fork() }.map_err(system("fork"))? {
            ForkResult::Parent { child } => Ok(child),
            ForkResult::Child => {
                // The zygote's own descriptors must not live on in a worker: the controller's end of file would not
                // reach the zygote's successors otherwise.
                // SAFETY: this process never touches the descriptor again.
                let _ = unsafe { libc::close(std::os::fd::AsRawFd::as_raw_fd(&self.channel)) };
                // SAFETY: this process never touches the descriptor again.
                let _ = unsafe { libc::close(std::os::fd::AsRawFd::as_raw_fd(&self.exits)) };
                let _ = SigSet::empty().thread_set_mask();
                if let Err(error) = enter_child(&format!("pswitch-w{worker}"), parent) {
                    tracing::error!(%error, worker, "a worker could not be set up");
                    exit(1);
                }
                let channel = Channel::from_fd(socket);
                let code = std::panic::catch_unwind(|| (self.worker_main)(channel)).unwrap_or(101);
                exit(code)
            }
        }
    }

    fn reap(&mut self) -> Result<(), WorkerError> {
        while let Ok(Some(_)) = self.exits.read_signal() {}
        loop {
            let (pid, cause) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, ExitCause::Code(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, ExitCause::Signal(signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::ECHILD) => return Ok(()),
                Ok(_) | Err(nix::errno::Errno::EINTR) => continue,
                Err(errno) => return Err(system("waitpid")(errno)),
            };
            let worker = self.workers.iter().find_map(|(&worker, &known)| (known == pid).then_some(worker));
            if let Some(worker) = worker {
                self.workers.remove(&worker);
                self.channel.send(&FromZygote::Exited { worker, cause }, &[])?;
            }
        }
    }

    fn kill_all(&mut self) {
        for (_, pid) in self.workers.drain() {
            // Not reaped yet, so the number still means the worker; it may have ended by itself.
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, None);
        }
    }
}
