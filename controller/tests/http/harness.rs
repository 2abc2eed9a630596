//! A server in this process with the fake service behind it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pswitch_controller::{HttpOptions, HttpServer, InferenceService, Metrics};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::client::Client;
use crate::fake::FakeService;

/// Name of the server's threads, by which its panics are known.
pub(crate) const THREAD_NAME: &str = "server-under-test";

pub(crate) struct Server {
    runtime: Runtime,
    pub(crate) address: SocketAddr,
    pub(crate) service: Arc<FakeService>,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<()>,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::with_options(HttpOptions::default())
    }

    pub(crate) fn with_options(options: HttpOptions) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name(THREAD_NAME)
            .enable_all()
            .build()
            .unwrap();
        let service = FakeService::new(64 << 20);
        let bound = HttpServer::bind(
            "127.0.0.1:0".parse().unwrap(),
            Arc::<FakeService>::clone(&service),
            Metrics::new(),
            options,
        );
        let server = runtime.block_on(bound).unwrap();
        let address = server.address();
        let (stop, stopped) = oneshot::channel();
        let running = runtime.spawn(server.run(async {
            let _ = stopped.await;
        }));
        Self { runtime, address, service, stop: Some(stop), running }
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.address)
    }

    /// Tells the server to stop without waiting for it.
    pub(crate) fn tell_to_stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    /// Waits for the server's end.
    pub(crate) fn wait(self) -> Duration {
        let begun = Instant::now();
        let ended = async { tokio::time::timeout(Duration::from_secs(20), self.running).await };
        self.runtime.block_on(ended).expect("the server ends").unwrap();
        begun.elapsed()
    }

    /// Waits until no request holds slot memory.
    pub(crate) fn wait_until_free(&self) {
        self.wait_for("free slot memory", |in_use_bytes| in_use_bytes == 0);
    }

    /// Waits until a request holds slot memory.
    pub(crate) fn wait_until_held(&self) {
        self.wait_for("a request in its slot", |in_use_bytes| in_use_bytes > 0);
    }

    fn wait_for(&self, what: &str, good: impl Fn(u64) -> bool) {
        let begun = Instant::now();
        while !good(self.service.snapshot().slot_in_use_bytes) {
            assert!(begun.elapsed() < Duration::from_secs(20), "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
