//! Connections: accepted, limited in number and time, and ended gracefully.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinError, JoinSet};

use super::routes::{App, router};
use crate::metrics::{ConnectionRecord, Metrics};
use crate::service::InferenceService;

/// Largest buffer of a connection, and with it the largest head of a request.
///
/// hyper's own limit of 400 KiB has its buffers mapped anew by the allocator, a page fault for every page of every
/// request; at this size they are used again.
const BUFFER_BYTES: usize = 128 << 10;

/// Limits of the HTTP front end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpOptions {
    /// Largest body of a request.
    pub max_body_bytes: u64,
    /// Largest JSON part of a body: all of it where no binary data follows.
    pub max_json_bytes: u64,
    /// Memory that the JSON parts of all requests together may take.
    pub json_memory_bytes: u64,
    /// Connections at a time; further ones wait to be accepted.
    pub max_connections: usize,
    /// How long a connection may take for a request's head, waiting for the next request included.
    pub head_timeout: Duration,
    /// How long a request's body may pause; slot memory waits with it.
    pub body_idle_timeout: Duration,
    /// How long a client may leave a response unread; slot memory waits with it.
    pub write_timeout: Duration,
    /// How long requests that run when the server is told to stop may take to end.
    pub shutdown_grace: Duration,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            max_body_bytes: 1 << 30,
            max_json_bytes: 64 << 20,
            json_memory_bytes: 512 << 20,
            max_connections: 1024,
            head_timeout: Duration::from_secs(120),
            body_idle_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            shutdown_grace: Duration::from_secs(30),
        }
    }
}

/// The HTTP front end, bound to its address.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    address: SocketAddr,
    router: Router,
    metrics: Arc<Metrics>,
    options: Arc<HttpOptions>,
}

impl HttpServer {
    /// Binds the address (port 0 for any free one); connections wait until [`run`](Self::run).
    ///
    /// Must be called inside a tokio runtime with IO and time.
    ///
    /// # Errors
    /// What the operating system says, such as an address in use.
    pub async fn bind(
        address: SocketAddr,
        service: Arc<dyn InferenceService>,
        metrics: Arc<Metrics>,
        options: HttpOptions,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let kibibytes = usize::try_from(options.json_memory_bytes / 1024).unwrap_or(usize::MAX);
        let json_memory = Arc::new(Semaphore::new(kibibytes.min(Semaphore::MAX_PERMITS)));
        let options = Arc::new(options);
        let app = App { service, metrics: Arc::clone(&metrics), options: Arc::clone(&options), json_memory };
        Ok(Self { listener, address, router: router(app), metrics, options })
    }

    /// The address that was bound.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` resolves; then accepts nothing new, closes idle connections, lets requests that run
    /// come to their end within the grace of the options and cuts off the rest.
    ///
    /// Requests on connections that are already open reach the service even then: it decides whether it drains.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let permits = Arc::new(Semaphore::new(self.options.max_connections.min(Semaphore::MAX_PERMITS)));
        let (stop, stopped) = watch::channel(false);
        let mut connections = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        loop {
            let accepted = async {
                let permit = Arc::clone(&permits).acquire_owned().await;
                (self.listener.accept().await, permit)
            };
            let (accepted, permit) = tokio::select! {
                () = &mut shutdown => break,
                accepted = accepted => accepted,
                Some(ended) = connections.join_next() => {
                    report(ended);
                    continue;
                }
            };
            match accepted {
                Ok((stream, _)) => {
                    let connection = self.connection(stream, stopped.clone());
                    connections.spawn(async move {
                        connection.await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    // A client that left before it was accepted, or no file descriptor to spare: others go on.
                    tracing::warn!("accepting a connection failed: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        drop(self.listener);
        // The receivers may all be gone: nobody left to tell.
        let _ = stop.send(true);
        let all_ended = async {
            while let Some(ended) = connections.join_next().await {
                report(ended);
            }
        };
        if tokio::time::timeout(self.options.shutdown_grace, all_ended).await.is_err() {
            tracing::warn!("{} connection(s) cut off after the grace for shutting down", connections.len());
            connections.shutdown().await;
        }
    }

    fn connection(
        &self,
        stream: TcpStream,
        mut stopped: watch::Receiver<bool>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let router = self.router.clone();
        let options = Arc::clone(&self.options);
        let record: ConnectionRecord = self.metrics.connection();
        async move {
            let _record = record;
            if let Err(error) = set_options(&stream, &options) {
                tracing::debug!("a connection ended before it began: {error}");
                return;
            }
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(options.head_timeout)
                .max_buf_size(BUFFER_BYTES)
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
            let mut served = pin!(served);
            let ended = tokio::select! {
                ended = served.as_mut() => ended,
                () = told(&mut stopped) => {
                    served.as_mut().graceful_shutdown();
                    served.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!("a connection ended: {error}");
            }
        }
    }
}

/// A connection that panicked took nobody with it, but must not do so in silence.
fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!("a connection's task failed: {error}");
    }
}

/// Resolves when the server stops, or is gone.
async fn told(stopped: &mut watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

fn set_options(stream: &TcpStream, options: &HttpOptions) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // The kernel gives up on a client that takes no data for this long, a window kept shut included.
    let timeout_ms = u32::try_from(options.write_timeout.as_millis()).unwrap_or(u32::MAX);
    setsockopt(stream, sockopt::TcpUserTimeout, &timeout_ms)?;
    Ok(())
}
