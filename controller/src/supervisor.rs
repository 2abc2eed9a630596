//! The controller's side of the zygote: workers are forked, killed and reported lost through it.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use pswitch_protocol::{Channel, ExitCause, FromZygote, ProtocolError, ToZygote};
use tokio::sync::watch;

use crate::scheduler::WorkerId;

/// One a server; all drivers share it.
pub(crate) struct Supervisor {
    channel: Arc<Channel>,
    routes: Routes,
    next: AtomicU32,
    failure: watch::Sender<bool>,
}

impl fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supervisor").field("channel", &self.channel).finish_non_exhaustive()
    }
}

/// Told once of a worker, when it is gone and reaped or could not be forked: how.
pub(crate) type OnLoss = Box<dyn FnOnce(WorkerId, Loss) + Send>;

/// How a worker was lost.
#[derive(Debug)]
pub(crate) enum Loss {
    Exited(ExitCause),
    NotForked(String),
}

/// Whom the loss of a worker is told.
type Routes = Arc<Mutex<HashMap<WorkerId, OnLoss>>>;

impl Supervisor {
    /// Starts listening to the zygote. When it is gone, its workers are dead and no new one can be forked: then the
    /// server has to end, as after [`fail`](Self::fail).
    pub(crate) fn start(channel: Channel) -> std::io::Result<Arc<Self>> {
        let channel = Arc::new(channel);
        let routes = Routes::default();
        let failure = watch::Sender::new(false);
        let failed = failure.clone();
        let listener = Listener { channel: Arc::clone(&channel), routes: Arc::clone(&routes) };
        thread::Builder::new().name("pswitch-zygote".to_owned()).spawn(move || {
            listener.run();
            failed.send_replace(true);
        })?;
        Ok(Arc::new(Self { channel, routes, next: AtomicU32::new(0), failure }))
    }

    /// Says that the server cannot go on.
    pub(crate) fn fail(&self) {
        self.failure.send_replace(true);
    }

    /// Becomes true when the server cannot go on.
    pub(crate) fn failure(&self) -> watch::Receiver<bool> {
        self.failure.subscribe()
    }

    /// Has a worker forked; the answer is its number and this side's end of its connection. Its loss, or that it could
    /// not be forked, is told by `lost`, from another thread.
    pub(crate) fn fork(&self, lost: OnLoss) -> Result<(WorkerId, Channel), ProtocolError> {
        let worker = WorkerId(self.next.fetch_add(1, Ordering::Relaxed));
        let (ours, theirs) = Channel::pair()?;
        lock(&self.routes).insert(worker, lost);
        if let Err(error) = self.channel.send(&ToZygote::Fork { worker: worker.0 }, &[theirs.as_fd()]) {
            lock(&self.routes).remove(&worker);
            return Err(error);
        }
        Ok((worker, ours))
    }

    /// Kills a worker, unless it has ended by itself. Its loss is told once it is reaped.
    pub(crate) fn kill(&self, worker: WorkerId) {
        if let Err(error) = self.channel.send(&ToZygote::Kill { worker: worker.0 }, &[]) {
            // The zygote is gone, and all workers with it: `lost` has been called.
            tracing::warn!(%worker, %error, "cannot ask the zygote to kill");
        }
    }
}

fn lock(routes: &Routes) -> MutexGuard<'_, HashMap<WorkerId, OnLoss>> {
    routes.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Listener {
    channel: Arc<Channel>,
    routes: Routes,
}

impl Listener {
    fn run(&self) {
        loop {
            let message = match self.channel.receive::<FromZygote>() {
                Ok(Some((message, _))) => message,
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, "the zygote broke the protocol");
                    return;
                }
            };
            match message {
                FromZygote::Forked { worker, pid } => tracing::debug!(worker, pid, "worker forked"),
                FromZygote::ForkFailed { worker, reason } => {
                    self.route(WorkerId(worker), Loss::NotForked(reason));
                }
                FromZygote::Exited { worker, cause } => self.route(WorkerId(worker), Loss::Exited(cause)),
            }
        }
    }

    /// Both messages that are routed are a worker's last.
    fn route(&self, worker: WorkerId, loss: Loss) {
        let lost = lock(&self.routes).remove(&worker);
        if let Some(lost) = lost {
            lost(worker, loss);
        }
    }
}
