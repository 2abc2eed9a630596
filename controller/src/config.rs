//! What the server is told: one validated type, from a YAML file and from flags.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pswitch_device::{DeviceId, LinkThrottle};
use pswitch_transfer::Algorithm;
use serde::Deserialize;

use crate::error::ControllerError;
use crate::repository::ModelName;
use crate::scheduler::{Homes, SchedulerOptions};
use crate::yaml;

pub(crate) mod fields;
mod size;

pub use size::{Bandwidth, ByteSize, ParseSizeError, SizeSetting};

/// Configuration of the server.
///
/// Every key may be left out; a key that does not exist is refused. `controller/examples/server.yaml` shows all of
/// them with their defaults.
///
/// ```
/// use pswitch_controller::{Config, ConfigOverrides};
///
/// let text = "devices:\n  - id: host\n    pool_size: 2GiB\n    workers: 3\n";
/// let config = Config::parse("server.yaml", text)?.with(ConfigOverrides::default())?;
/// assert_eq!(config.devices[0].workers, 3);
///
/// let error = Config::parse("server.yaml", "limits:\n  queue: 64\n  max_weight: 1\n").unwrap_err();
/// let reason = std::error::Error::source(&error).unwrap().to_string();
/// assert!(reason.starts_with("limits: unknown field `max_weight`, expected one of `queue`"), "{reason}");
/// assert!(reason.ends_with("at line 3 column 3"), "{reason}");
/// # Ok::<(), pswitch_controller::ControllerError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Folder of the models: `NAME/model.pt2`, with an optional `NAME/model.yaml`. Relative to the working directory.
    /// Default: `models`.
    pub repository: PathBuf,
    /// The devices that serve, each with a pool, a transfer engine and workers of its own. Default: one, `auto`.
    pub devices: Vec<DeviceConfig>,
    /// The HTTP front end.
    pub http: HttpConfig,
    /// Shared memory for the inputs and outputs of all requests in flight. Default: `1GiB`.
    pub slot_memory_size: ByteSize,
    /// Queues, time-outs and the order of service.
    pub limits: LimitsConfig,
    /// How transfers are divided into groups: `optimal`, `paper`, `per-layer`, `whole`, `sequential` or `equal-N`.
    /// Default: `optimal`.
    #[serde(deserialize_with = "fields::algorithm")]
    pub plan: Algorithm,
    /// By what models get their places in a pool that has no room for all: `fixed`, each has one for good, which costs nothing;
    /// or `least-recently-used`, as an allocator gives them, which is for measuring what that costs. Default: `fixed`.
    pub homes: Homes,
    /// Whether layer times are kept in `NAME/profiles`, so that the next start need not take them. A folder that cannot
    /// be written to keeps none. Default: `true`.
    pub profile_cache: bool,
    /// Whether the copy of the weights on the host is pinned. `false` is for measuring what that brings: GPUs copy through a
    /// buffer then. Default: `true`.
    pub pin_weights: bool,
    /// What is trained beside serving.
    pub training: TrainingConfig,
    /// What is logged, as in `info` or `warn,pswitch_controller=debug`. Default: `info`.
    #[serde(deserialize_with = "fields::text")]
    pub log: String,
}

/// One device of [`Config::devices`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeviceConfig {
    /// `cuda:N`, `host`, `host:N`, or `auto`: the first GPU if there is one, else the host. Default: `auto`.
    pub id: DeviceChoice,
    /// Device memory for weights and activations, as in `8GiB`. Default: `auto`, what all models need but at most
    /// half of the host's memory; of a GPU's, what is free, less 1 GiB for every worker and for one more.
    pub pool_size: SizeSetting,
    /// Part of the pool for the activations of one execution. Default: `auto`, a tenth of the device's memory, at
    /// most `2GiB`, and at most a quarter of what `training_size` leaves of a `pool_size` that is given.
    pub arena_size: SizeSetting,
    /// Part of the pool for training: states, and activations of one step. Default: 0, no task can be trained.
    pub training_size: ByteSize,
    /// Whether models may lie in that part, where not all have room beside it: the states there are set aside in the memory of
    /// steps while a model comes in, or go to the host, and come back when requests leave the device. They take as much pinned
    /// host memory then. Default: `false`.
    pub training_gives_way: bool,
    /// Share of the device's time that requests leave to training although they never end, up to 0.9: then some wait for a
    /// turn of it. Default: 0, training has what they leave by themselves.
    pub training_share: f64,
    /// Executions at a time, each with an arena of its own: 1 to 16. Default: 1.
    #[serde(deserialize_with = "fields::number::<_, _, 1, 16>")]
    pub arenas: u32,
    /// Worker processes: one for every arena and at least one on standby, 2 to 64. Default: 2.
    #[serde(deserialize_with = "fields::number::<_, _, 2, 64>")]
    pub workers: u32,
    /// Threads that one operator may use on the CPU, at most 1024; 0 leaves it to libtorch. Default: 0.
    #[serde(deserialize_with = "fields::number::<_, _, 0, 1024>")]
    pub threads: u32,
    /// How long the server and its workers look for what comes next before they sleep, in microseconds, at most
    /// 1000000. To be woken up takes some 50; to look takes a processor. With 0 nobody is told of requests whose inputs are
    /// still coming. Default: 2000 on a CUDA device, 0 on the host, whose processors are to compute.
    #[serde(rename = "spin_us", deserialize_with = "fields::optional_number::<_, _, 0, 1_000_000>")]
    pub spin_us: Option<u64>,
    /// Slows the link of a host device down to a given speed, to see switching as on real hardware.
    pub link: LinkConfig,
}

/// The link of a host device. Default: as fast as memory.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LinkConfig {
    /// As in `1GB/s`.
    pub bandwidth: Option<Bandwidth>,
    /// Time that every copy costs on top, in microseconds, as in `2.5`.
    #[serde(rename = "per_copy_us", deserialize_with = "fields::microseconds")]
    pub per_copy: Duration,
}

/// The HTTP front end.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Where it listens. Port 0 takes any free one. Default: `127.0.0.1:8000`.
    #[serde(deserialize_with = "fields::address")]
    pub address: SocketAddr,
    /// Longest request body. Default: `256MiB`.
    pub max_body_size: ByteSize,
}

/// Queues, time-outs and the order of service.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Requests that may wait for a device; more are refused. Default: 1024.
    #[serde(deserialize_with = "fields::number::<_, _, 1, 1_000_000>")]
    pub queue: usize,
    /// Time for a request that brings no deadline of its own, waiting included. Default: 60000.
    #[serde(rename = "request_timeout_ms", deserialize_with = "fields::milliseconds::<_, 1>")]
    pub request_timeout: Duration,
    /// Time for one execution; then it is stopped. Default: 30000.
    #[serde(rename = "execution_timeout_ms", deserialize_with = "fields::milliseconds::<_, 1>")]
    pub execution_timeout: Duration,
    /// Time that a worker has to stop an execution; then it is killed and replaced. Default: 2000.
    #[serde(rename = "stop_grace_ms", deserialize_with = "fields::milliseconds::<_, 0>")]
    pub stop_grace: Duration,
    /// A request that has waited so long goes before all that have not, whatever model is resident. Default: 250.
    #[serde(rename = "max_wait_ms", deserialize_with = "fields::milliseconds::<_, 0>")]
    pub max_wait: Duration,
    /// Requests of one model in a row while others wait. Default: 16.
    #[serde(deserialize_with = "fields::number::<_, _, 1, 1_000_000>")]
    pub max_consecutive: u32,
    /// Times that a request is begun if its worker is lost under it, 1 to 100. Default: 2.
    #[serde(deserialize_with = "fields::number::<_, _, 1, 100>")]
    pub attempts: u32,
    /// Whether weights may move ahead of their requests, while others execute. `false` is for measuring what that brings.
    /// Default: `true`.
    pub prefetch: bool,
}

/// What is trained beside serving.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingConfig {
    /// Tasks that are submitted when the server starts: `NAME: FILE.yaml`, the file of the task's configuration, relative
    /// to the working directory. Names are as those of models. Default: none.
    #[serde(deserialize_with = "fields::tasks")]
    pub tasks: BTreeMap<String, PathBuf>,
}

/// Which device to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DeviceChoice {
    /// The host, until workers execute on CUDA devices.
    #[default]
    Auto,
    /// That one.
    Id(DeviceId),
}

/// What flags say; each one that is given replaces what the file says.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ConfigOverrides {
    /// Replaces [`Config::repository`].
    pub repository: Option<PathBuf>,
    /// Leaves this device alone: as the file configures it if it does, else with defaults.
    pub device: Option<DeviceChoice>,
    /// Replaces [`DeviceConfig::pool_size`] of every device.
    pub pool_size: Option<SizeSetting>,
    /// Replaces [`DeviceConfig::arena_size`] of every device.
    pub arena_size: Option<SizeSetting>,
    /// Replaces [`DeviceConfig::training_size`] of every device.
    pub training_size: Option<ByteSize>,
    /// Replaces [`DeviceConfig::training_gives_way`] of every device.
    pub training_gives_way: Option<bool>,
    /// Replaces [`DeviceConfig::training_share`] of every device.
    pub training_share: Option<f64>,
    /// Replaces [`DeviceConfig::workers`] of every device.
    pub workers: Option<u32>,
    /// Replaces [`DeviceConfig::threads`] of every device.
    pub threads: Option<u32>,
    /// Replaces [`LinkConfig::bandwidth`] of every device.
    pub link_bandwidth: Option<Bandwidth>,
    /// Replaces [`LinkConfig::per_copy`] of every device.
    pub link_per_copy: Option<Duration>,
    /// Replaces [`HttpConfig::address`].
    pub http_address: Option<SocketAddr>,
    /// Replaces [`Config::plan`].
    pub plan: Option<Algorithm>,
    /// Replaces [`LimitsConfig::prefetch`].
    pub prefetch: Option<bool>,
    /// Replaces [`Config::profile_cache`].
    pub profile_cache: Option<bool>,
    /// Replaces [`Config::pin_weights`].
    pub pin_weights: Option<bool>,
    /// Tasks with their files, beside those of [`Config::training`]; a task that is there already gets this file.
    pub training_tasks: Vec<(String, PathBuf)>,
    /// Replaces [`Config::log`].
    pub log: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            repository: PathBuf::from("models"),
            devices: vec![DeviceConfig::default()],
            http: HttpConfig::default(),
            slot_memory_size: ByteSize::from_mib(1024),
            limits: LimitsConfig::default(),
            plan: Algorithm::Optimal,
            homes: Homes::Fixed,
            profile_cache: true,
            pin_weights: true,
            training: TrainingConfig::default(),
            log: "info".to_owned(),
        }
    }
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            id: DeviceChoice::Auto,
            pool_size: SizeSetting::Auto,
            arena_size: SizeSetting::Auto,
            training_size: ByteSize::from_bytes(0),
            training_gives_way: false,
            training_share: 0.0,
            arenas: 1,
            workers: 2,
            threads: 0,
            spin_us: None,
            link: LinkConfig::default(),
        }
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 8000)),
            max_body_size: ByteSize::from_mib(256),
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            queue: 1024,
            request_timeout: Duration::from_secs(60),
            execution_timeout: Duration::from_secs(30),
            stop_grace: Duration::from_secs(2),
            max_wait: Duration::from_millis(250),
            max_consecutive: 16,
            attempts: 2,
            prefetch: true,
        }
    }
}

impl Config {
    /// Reads the file if there is one, puts the flags over it and checks the whole.
    ///
    /// # Errors
    /// [`ControllerError::ReadConfig`], [`ControllerError::ParseConfig`], [`ControllerError::InvalidConfig`].
    pub fn load(file: Option<&Path>, overrides: ConfigOverrides) -> Result<Self, ControllerError> {
        let config = match file {
            Some(path) => {
                let text = fs::read_to_string(path)
                    .map_err(|source| ControllerError::ReadConfig { path: path.to_owned(), source })?;
                Self::parse(path, &text)?
            }
            None => Self::default(),
        };
        config.with(overrides)
    }

    /// Reads the text of a file; `path` is its name in errors. An empty text is the default configuration.
    ///
    /// # Errors
    /// [`ControllerError::ParseConfig`] with line and column, [`ControllerError::InvalidConfig`].
    pub fn parse(path: impl AsRef<Path>, text: &str) -> Result<Self, ControllerError> {
        let config: Self = yaml::read(text)
            .map_err(|source| ControllerError::ParseConfig { path: path.as_ref().to_owned(), source })?;
        config.check()?;
        Ok(config)
    }

    /// Puts flags over the configuration and checks the whole.
    ///
    /// # Errors
    /// [`ControllerError::InvalidConfig`].
    pub fn with(mut self, overrides: ConfigOverrides) -> Result<Self, ControllerError> {
        let ConfigOverrides {
            repository,
            device,
            pool_size,
            arena_size,
            training_size,
            training_gives_way,
            training_share,
            workers,
            threads,
            link_bandwidth,
            link_per_copy,
            http_address,
            plan,
            prefetch,
            profile_cache,
            pin_weights,
            training_tasks,
            log,
        } = overrides;
        replace(&mut self.repository, repository);
        replace(&mut self.http.address, http_address);
        replace(&mut self.plan, plan);
        replace(&mut self.limits.prefetch, prefetch);
        replace(&mut self.profile_cache, profile_cache);
        replace(&mut self.pin_weights, pin_weights);
        replace(&mut self.log, log);
        let mut given = BTreeSet::new();
        for (name, file) in training_tasks {
            ensure(given.insert(name.clone()), "training.tasks", || format!("{name:?} is given twice"))?;
            self.training.tasks.insert(name, file);
        }
        if let Some(id) = device {
            let configured = self.devices.iter().find(|device| device.id == id).cloned();
            self.devices = vec![configured.unwrap_or(DeviceConfig { id, ..DeviceConfig::default() })];
        }
        for device in &mut self.devices {
            replace(&mut device.pool_size, pool_size);
            replace(&mut device.arena_size, arena_size);
            replace(&mut device.training_size, training_size);
            replace(&mut device.training_gives_way, training_gives_way);
            replace(&mut device.training_share, training_share);
            replace(&mut device.workers, workers);
            replace(&mut device.threads, threads);
            replace(&mut device.link.per_copy, link_per_copy);
            device.link.bandwidth = link_bandwidth.or(device.link.bandwidth);
        }
        self.check()?;
        // Not before: the tasks may come from the file and the size from a flag.
        let no_room = self.devices.iter().all(|device| device.training_size.bytes() == 0);
        ensure(self.training.tasks.is_empty() || !no_room, "training.tasks", || {
            "no device has a training_size, so that no task can be trained".to_owned()
        })?;
        Ok(self)
    }

    /// Checks what one value alone cannot show, and what flags can break.
    fn check(&self) -> Result<(), ControllerError> {
        ensure(!self.devices.is_empty(), "devices", || "there must be at least one".to_owned())?;
        let mut seen = BTreeSet::new();
        for (index, device) in self.devices.iter().enumerate() {
            let key = |name: &str| format!("devices[{index}].{name}");
            ensure(seen.insert(device.id.to_string()), key("id"), || {
                format!("{} is there already", device.id)
            })?;
            device.check(key)?;
        }
        for (name, file) in &self.training.tasks {
            let key = || format!("training.tasks.{}", name.escape_debug());
            name.parse::<ModelName>().map_err(|error| match error {
                ControllerError::ModelName { reason, .. } => {
                    ControllerError::InvalidConfig { key: key(), reason: reason.to_owned() }
                }
                other => other,
            })?;
            ensure(!file.as_os_str().is_empty(), key(), || "there is no file".to_owned())?;
        }
        let (body, slots) = (self.http.max_body_size, self.slot_memory_size);
        ensure(body.bytes() > 0, "http.max_body_size", || "it must be more than 0".to_owned())?;
        ensure(body <= slots, "slot_memory_size", || {
            format!("{slots} cannot hold a request of http.max_body_size, {body}")
        })
    }
}

/// What a worker on a GPU has beside the pool, amply: its CUDA context, workspaces of cuBLAS and cuDNN, captured graphs.
const WORKER_GPU_BYTES: u64 = 1 << 30;

impl DeviceConfig {
    fn check(&self, key: impl Fn(&str) -> String) -> Result<(), ControllerError> {
        let (workers, arenas) = (self.workers, self.arenas);
        ensure((arenas + 1..=64).contains(&workers), key("workers"), || {
            format!("{workers} given; {arenas} at work and at least one on standby make {} to 64", arenas + 1)
        })?;
        ensure(self.threads <= 1024, key("threads"), || format!("{} given, at most 1024", self.threads))?;
        for (name, size) in [("pool_size", self.pool_size), ("arena_size", self.arena_size)] {
            let zero = size == SizeSetting::Fixed(ByteSize::from_bytes(0));
            ensure(!zero, key(name), || "it must be more than 0".to_owned())?;
        }
        let share = self.training_share;
        ensure((0.0..=0.9).contains(&share), key("training_share"), || {
            format!("{share} is not between 0 and 0.9")
        })?;
        for (name, is_set) in
            [("training_share", share > 0.0), ("training_gives_way", self.training_gives_way)]
        {
            ensure(!is_set || self.training_size.bytes() > 0, key(name), || {
                "there is no training_size, so that no task can be trained".to_owned()
            })?;
        }
        if let SizeSetting::Fixed(pool) = self.pool_size {
            let mut left_bytes = pool.bytes();
            if let SizeSetting::Fixed(arena) = self.arena_size {
                left_bytes = left_bytes.saturating_sub(arena.bytes().saturating_mul(u64::from(arenas)));
                ensure(left_bytes > 0, key("arena_size"), || {
                    format!("{arenas} of {arena} leave nothing of a pool of {pool} for weights")
                })?;
            }
            let training = self.training_size;
            ensure(training.bytes() < left_bytes, key("training_size"), || {
                format!("{training} beside the arenas leaves nothing of a pool of {pool} for weights")
            })?;
        }
        let throttled = self.link != LinkConfig::default();
        ensure(!throttled || !matches!(self.id, DeviceChoice::Id(DeviceId::Cuda(_))), key("link"), || {
            format!("the link of {} is real and cannot be slowed down; host devices can", self.id)
        })
    }

    /// How long to look for what comes next before sleeping.
    #[must_use]
    pub fn spin(&self, device: DeviceId) -> Duration {
        let by_device = match device {
            DeviceId::Cuda(_) => 2000,
            DeviceId::Host(_) => 0,
        };
        Duration::from_micros(self.spin_us.unwrap_or(by_device))
    }

    /// The size of one arena on a device with that much memory.
    #[must_use]
    pub fn arena_bytes(&self, total_memory_bytes: u64) -> u64 {
        let auto = (total_memory_bytes / 10).min(2 << 30);
        match (self.arena_size, self.pool_size) {
            (SizeSetting::Fixed(size), _) => size.bytes(),
            (SizeSetting::Auto, SizeSetting::Fixed(pool)) => {
                let left_bytes = pool.bytes().saturating_sub(self.training_size.bytes());
                auto.min(left_bytes / 4 / u64::from(self.arenas))
            }
            (SizeSetting::Auto, SizeSetting::Auto) => auto,
        }
    }

    /// The size of the pool on a device with that much memory, `free_memory_bytes` of which nobody uses yet, if everything
    /// together would take `wanted_bytes`. On a GPU it leaves room for what workers have beside it, and for one that starts
    /// while the one before still ends.
    #[must_use]
    pub fn pool_bytes(
        &self,
        device: DeviceId,
        total_memory_bytes: u64,
        free_memory_bytes: u64,
        wanted_bytes: u64,
    ) -> u64 {
        match (self.pool_size, device) {
            (SizeSetting::Fixed(size), _) => size.bytes(),
            (SizeSetting::Auto, DeviceId::Host(_)) => wanted_bytes.min(total_memory_bytes / 2),
            (SizeSetting::Auto, DeviceId::Cuda(_)) => {
                let beside_bytes = WORKER_GPU_BYTES * (u64::from(self.workers) + 1);
                wanted_bytes.min(free_memory_bytes.saturating_sub(beside_bytes).max(free_memory_bytes / 2))
            }
        }
    }
}

impl LinkConfig {
    /// The same for the device.
    #[must_use]
    pub fn throttle(&self) -> LinkThrottle {
        LinkThrottle {
            bandwidth_bytes_per_s: self.bandwidth.map(Bandwidth::bytes_per_s),
            per_copy: self.per_copy,
        }
    }
}

impl LimitsConfig {
    /// The part that the scheduler keeps to, with what it has to know beside.
    #[must_use]
    pub fn scheduler_options(&self, homes: Homes) -> SchedulerOptions {
        SchedulerOptions {
            max_consecutive: self.max_consecutive,
            max_wait: self.max_wait,
            queue_limit: self.queue,
            execution_timeout: self.execution_timeout,
            stop_grace: self.stop_grace,
            attempts: self.attempts,
            prefetch: self.prefetch,
            homes,
        }
    }
}

fn replace<T>(value: &mut T, by: Option<T>) {
    if let Some(by) = by {
        *value = by;
    }
}

fn ensure(
    holds: bool,
    key: impl Into<String>,
    reason: impl FnOnce() -> String,
) -> Result<(), ControllerError> {
    if holds { Ok(()) } else { Err(ControllerError::InvalidConfig { key: key.into(), reason: reason() }) }
}
