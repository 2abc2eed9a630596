//! A server inside this process, over a repository made for the occasion.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use pswitch_controller::{
    Bandwidth, ByteSize, Config, ConfigOverrides, DeviceChoice, HttpOptions, HttpServer, InferenceService,
    LoadObserver, Metrics, ModelState, Server, SizeSetting,
};
use pswitch_device::{DeviceId, cuda_devices};
use pswitch_worker::{Channel, Zygote};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::caller::{Call, Caller};
use crate::processes::{self, Usage};
use crate::subject::{Served, Subject};

/// The part of a pool that doorbells take, where the pool has 64 MiB or more.
const DOORBELL_BYTES: u64 = 256 << 10;

/// Time that workers have to end when their server does.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// How to serve; the same for all commands.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Serving {
    /// Device to serve on: auto, host, host:N or cuda:N.
    #[arg(long, default_value = "host")]
    device: DeviceChoice,
    /// Threads that one operator may use on the CPU; 0 leaves it to libtorch. The command above says what is the default.
    #[arg(long, value_name = "N")]
    threads: Option<u32>,
    /// Part of the pool for the activations of one execution: 64MiB or more.
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = arena_size)]
    arena_size: ByteSize,
    /// Whether the host store is not pinned.
    #[arg(skip)]
    lends_weights: bool,
}

impl Serving {
    /// The same, with a host store that is not pinned.
    pub(crate) fn without_pinning(&self) -> Self {
        Self { lends_weights: true, ..self.clone() }
    }

    /// The device; `auto` is the first GPU, or the host where there is none.
    pub(crate) fn device(&self) -> DeviceId {
        match self.device {
            DeviceChoice::Id(id) => id,
            DeviceChoice::Auto => cuda_devices()
                .ok()
                .and_then(|devices| devices.first().map(|device| device.id))
                .unwrap_or(DeviceId::Host(0)),
        }
    }

    /// Bytes of the pool for the activations of one execution.
    pub(crate) fn arena_bytes(&self) -> u64 {
        self.arena_size.bytes()
    }

    /// With so many threads, unless the flag says otherwise.
    pub(crate) fn with_threads(&self, default: u32) -> Served {
        Served { device: self.device(), threads: self.threads.unwrap_or(default) }
    }

    /// With as many threads as the references were made with, unless the flag says otherwise.
    pub(crate) fn like_references(&self, subjects: &[Subject]) -> Served {
        self.with_threads(subjects.iter().find_map(Subject::reference_threads).unwrap_or_default())
    }
}

fn arena_size(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize =
        text.parse().map_err(|error: pswitch_controller::ParseSizeError| error.to_string())?;
    if size < ByteSize::from_mib(64) { Err("it must be 64MiB or more".to_owned()) } else { Ok(size) }
}

/// Zygotes that were forked before this process had threads, one for every server that it will start.
///
/// A later zygote holds a copy of the earlier one's connection, so that they end together, with this process.
#[derive(Debug)]
pub(crate) struct Zygotes(Vec<Zygote>);

impl Zygotes {
    /// Call it first thing in `main`.
    pub(crate) fn fork(count: usize) -> anyhow::Result<Self> {
        let zygotes = (0..count).map(|_| Zygote::fork(worker)).collect::<Result<_, _>>();
        Ok(Self(zygotes.context("cannot fork a zygote")?))
    }

    fn take(&mut self) -> anyhow::Result<Zygote> {
        self.0.pop().context("more servers were started than zygotes were forked")
    }
}

/// What a worker process does.
fn worker(channel: Channel) -> i32 {
    match pswitch_worker::serve(&channel) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("a worker ends: {:#}", anyhow::Error::from(error));
            1
        }
    }
}

/// What to serve.
pub(crate) struct Plan<'a> {
    pub(crate) serving: &'a Serving,
    pub(crate) served: Served,
    /// Names and archives; an archive may be there under several names.
    pub(crate) models: Vec<(String, &'a Path)>,
    /// Room for weights in the pool; without it all models have some.
    pub(crate) homes_bytes: Option<u64>,
    pub(crate) link_bandwidth: Option<Bandwidth>,
    /// Room for training in the pool.
    pub(crate) training_size: Option<ByteSize>,
    /// Whether that is among the homes, where models may lie too.
    pub(crate) training_gives_way: bool,
}

impl<'a> Plan<'a> {
    /// A model beside one of the same archive and the name `rival`, with room for one of the two: each drives the other
    /// out.
    pub(crate) fn of_rivals(
        serving: &'a Serving,
        served: Served,
        subject: &'a Subject,
        rival: &str,
        link_bandwidth: Option<Bandwidth>,
    ) -> Self {
        let models = vec![(subject.name.clone(), &*subject.archive), (rival.to_owned(), &*subject.archive)];
        Self {
            serving,
            served,
            models,
            homes_bytes: Some(subject.span_bytes),
            link_bandwidth,
            training_size: None,
            training_gives_way: false,
        }
    }
}

/// A server that runs.
pub(crate) struct Bench {
    // In this order: the server's drivers end their workers, then nothing needs the runtime or the archives.
    pub(crate) server: Arc<Server>,
    pub(crate) runtime: Runtime,
    _repository: TempDir,
    zygote: u32,
    pub(crate) moments: Moments,
}

/// When the server came up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moments {
    /// It was told to start.
    pub(crate) begun: Instant,
    /// Archives were read, pools and workers were there; weights began to be copied.
    pub(crate) started: Instant,
    /// All models were ready.
    pub(crate) ready: Instant,
}

impl Bench {
    /// Starts a server and waits until all models are ready.
    pub(crate) fn start(
        plan: Plan<'_>,
        zygotes: &mut Zygotes,
        observer: LoadObserver,
    ) -> anyhow::Result<Self> {
        let repository = tempfile::tempdir().context("no folder for a repository")?;
        for (name, archive) in &plan.models {
            let folder = repository.path().join(name);
            std::fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
            symlink(archive, folder.join("model.pt2"))
                .with_context(|| format!("cannot link {}", archive.display()))?;
        }
        let arena = plan.serving.arena_size;
        let pool_size =
            plan.homes_bytes.map(|homes| homes.next_multiple_of(512) + arena.bytes() + DOORBELL_BYTES);
        let beside = plan.training_size.filter(|_| !plan.training_gives_way);
        let pool_size = pool_size.map(|bytes| bytes + beside.map_or(0, ByteSize::bytes));
        let config = Config::default().with(ConfigOverrides {
            repository: Some(repository.path().to_owned()),
            device: Some(DeviceChoice::Id(plan.served.device)),
            pool_size: pool_size.map(|bytes| SizeSetting::Fixed(ByteSize::from_bytes(bytes))),
            arena_size: Some(SizeSetting::Fixed(arena)),
            threads: Some(plan.served.threads),
            link_bandwidth: plan.link_bandwidth,
            training_size: plan.training_size,
            pin_weights: Some(!plan.serving.lends_weights),
            training_gives_way: plan.training_gives_way.then_some(true),
            ..ConfigOverrides::default()
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .context("cannot start threads")?;
        let Zygote { channel, pid } = zygotes.take()?;
        let begun = Instant::now();
        let entered = runtime.enter();
        let (server, pending) = Server::start(config, channel, observer)?;
        drop(entered);
        let started = Instant::now();
        runtime.block_on(server.load_all(pending));
        let moments = Moments { begun, started, ready: Instant::now() };
        if let Some(status) = server.models().into_iter().find(|status| status.state != ModelState::Ready) {
            bail!("'{}' is {}: {}", status.name, status.state.name().to_lowercase(), status.reason);
        }
        let zygote = u32::try_from(pid).context("the zygote has no number")?;
        Ok(Self { server, runtime, _repository: repository, zygote, moments })
    }

    /// As [`Caller::call`].
    pub(crate) fn call(&self, caller: &mut Caller) -> anyhow::Result<Call> {
        caller.call(&self.runtime, &self.server)
    }

    /// Opens its HTTP front end on loopback.
    pub(crate) fn front_end(&self) -> anyhow::Result<FrontEnd> {
        FrontEnd::open(&self.runtime, Arc::clone(&self.server) as _)
    }

    /// What this process, the zygote and the workers hold now.
    pub(crate) fn processes(&self) -> anyhow::Result<Vec<Usage>> {
        processes::of_server(self.zygote)
    }

    /// The workers that live now, by the numbers of their processes.
    pub(crate) fn workers(&self) -> anyhow::Result<Vec<u32>> {
        processes::children(self.zygote)
    }

    /// Ends the server, and resolves when its workers have ended.
    pub(crate) fn stop(self) -> anyhow::Result<()> {
        let Self { server, runtime, zygote, .. } = self;
        let drained = runtime.block_on(server.drain(END_TIMEOUT));
        ensure!(drained, "the server still has requests to answer");
        drop(server);
        runtime.shutdown_timeout(END_TIMEOUT);
        let latest = Instant::now() + END_TIMEOUT;
        while !processes::children(zygote)?.is_empty() {
            ensure!(Instant::now() < latest, "a worker outlived its server");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// A front end that listens.
pub(crate) struct FrontEnd {
    pub(crate) address: SocketAddr,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl FrontEnd {
    /// Opens one on loopback.
    pub(crate) fn open(runtime: &Runtime, service: Arc<dyn InferenceService>) -> anyhow::Result<Self> {
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let http = HttpServer::bind(any_port, service, Metrics::new(), HttpOptions::default());
        let http = runtime.block_on(http).context("cannot listen on loopback")?;
        let address = http.address();
        let (stop, stopped) = oneshot::channel();
        let serving = runtime.spawn(http.run(async {
            // A dropped sender stops it as well.
            let _ = stopped.await;
        }));
        Ok(Self { address, stop, serving })
    }

    /// Ends it; connections have to be closed before.
    pub(crate) fn stop(self, runtime: &Runtime) -> anyhow::Result<()> {
        drop(self.stop);
        runtime.block_on(self.serving).context("the front end panicked")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_arenas_are_refused() {
        assert_eq!(arena_size("64MiB"), Ok(ByteSize::from_mib(64)));
        assert_eq!(arena_size("63MiB").unwrap_err(), "it must be 64MiB or more");
        assert!(arena_size("much").unwrap_err().starts_with("'much' is not a size"));
    }
}
