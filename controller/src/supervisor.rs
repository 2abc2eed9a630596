//! The controller's side of the zygote: workers are forked, killed and reported lost through it.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use pswitch_protocol::{Channel, FromZygote, ProtocolError, ToZygote};
use tokio::sync::watch;

use crate::driver::{Mail, Mailbox};
use crate::scheduler::WorkerId;

/// One a server; all drivers share it.
#[derive(Debug)]
pub(crate) struct Supervisor {
    channel: Arc<Channel>,
    routes: Routes,
    next: AtomicU32,
    failure: watch::Sender<bool>,
}

/// Whose worker is whose.
type Routes = Arc<Mutex<HashMap<WorkerId, Mailbox>>>;

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
    /// not be forked, comes to `mailbox`.
    pub(crate) fn fork(&self, mailbox: &Mailbox) -> Result<(WorkerId, Channel), ProtocolError> {
        let worker = WorkerId(self.next.fetch_add(1, Ordering::Relaxed));
        let (ours, theirs) = Channel::pair()?;
        lock(&self.routes).insert(worker, mailbox.clone());
        if let Err(error) = self.channel.send(&ToZygote::Fork { worker: worker.0 }, &[theirs.as_fd()]) {
            lock(&self.routes).remove(&worker);
            return Err(error);
        }
        Ok((worker, ours))
    }

    /// Kills a worker, unless it has ended by itself. Its loss comes to its mailbox once it is reaped.
    pub(crate) fn kill(&self, worker: WorkerId) {
        if let Err(error) = self.channel.send(&ToZygote::Kill { worker: worker.0 }, &[]) {
            // The zygote is gone, and all workers with it: `lost` has been called.
            tracing::warn!(%worker, %error, "cannot ask the zygote to kill");
        }
    }
}

fn lock(routes: &Routes) -> MutexGuard<'_, HashMap<WorkerId, Mailbox>> {
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
                    let worker = WorkerId(worker);
                    self.route(worker, Mail::ForkFailed { worker, reason });
                }
                FromZygote::Exited { worker, cause } => {
                    let worker = WorkerId(worker);
                    self.route(worker, Mail::Exited { worker, cause });
                }
            }
        }
    }

    /// Both messages that are routed are a worker's last.
    fn route(&self, worker: WorkerId, mail: Mail) {
        if let Some(mailbox) = lock(&self.routes).remove(&worker) {
            mailbox.put(mail);
        }
    }
}
