//! Devices of a server: opened, with a pool that is sized, divided and driven.

use std::sync::Arc;

use pswitch_device::{Device, DeviceId, LinkThrottle, SharedMemory, cuda_devices, open_device};
use pswitch_mem_pool::{HostStore, Pool, PoolLayout, Range};

use super::link::{self, LinkFit};
use super::profiling::host_tables;
use crate::config::{Config, DeviceChoice, DeviceConfig, LinkConfig};
use crate::driver::{DriverHandle, DriverParts, HostTables, ModelSpec};
use crate::error::ControllerError;
use crate::slots::SlotMemory;
use crate::supervisor::Supervisor;
use crate::training::{Training, TrainingParts};

/// What an automatic pool has more than it needs.
const SPARE_BYTES: u64 = 256 << 20;

/// Most that is copied to measure the link.
const SCRATCH_BYTES: u64 = 64 << 20;

/// A device with its driver.
#[derive(Debug)]
pub(crate) struct ServedDevice {
    pub(crate) driver: DriverHandle,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) link: LinkFit,
    /// Where tasks train, if there is room for any.
    pub(crate) training: Option<Training>,
    /// Threads that one operator may use on the CPU; 0 leaves it to libtorch.
    pub(crate) threads: u32,
    pub(crate) pool_bytes: u64,
    /// Whether workers can read tables from the host store.
    reads_host_tables: bool,
    /// Whether its workers wait by kernels.
    pub(crate) waits_by_kernels: bool,
    /// Held while a model is timed: models that do not all fit would drive each other out at every run.
    pub(crate) timing: tokio::sync::Mutex<()>,
}

impl ServedDevice {
    /// Tables of a model that this device reads from the host store while its weights are on their way. The host device
    /// could read all of it from there, but then its link would not be what it is told to be.
    pub(crate) fn host_tables(&self, spec: &ModelSpec) -> HostTables {
        if self.reads_host_tables { host_tables(spec) } else { HostTables::default() }
    }
}

/// A device that was opened; the pool comes later, when the models' sizes are known.
#[derive(Debug)]
pub(crate) struct OpenedDevice {
    config: DeviceConfig,
    throttle: LinkThrottle,
    pub(crate) device: Arc<dyn Device>,
}

/// Opens the device that a configuration names; `auto` is the first GPU if there is one, else the host.
pub(crate) fn open(config: &DeviceConfig) -> Result<OpenedDevice, ControllerError> {
    let throttle = config.link.throttle();
    let id = match config.id {
        DeviceChoice::Auto if config.link == LinkConfig::default() => match cuda_devices() {
            Ok(_) => DeviceId::Cuda(0),
            Err(error) => {
                tracing::info!(%error, "no GPU can be used: the device is the host");
                DeviceId::Host(0)
            }
        },
        // A link can be slowed down on the host alone.
        DeviceChoice::Auto => DeviceId::Host(0),
        DeviceChoice::Id(id) => id,
    };
    Ok(OpenedDevice { config: config.clone(), throttle, device: open_device(id, throttle)? })
}

impl OpenedDevice {
    /// Allocates the pool and starts the driver. `span_bytes` are the models that are to be served.
    pub(crate) fn serve(
        self,
        config: &Config,
        span_bytes: &[u64],
        slots: &Arc<SlotMemory>,
        store: &Arc<HostStore>,
        supervisor: &Arc<Supervisor>,
    ) -> Result<ServedDevice, ControllerError> {
        let id = self.device.properties().id;
        let total_bytes = self.device.properties().total_memory_bytes;
        let arena_bytes = self.config.arena_bytes(total_bytes);
        let arenas = self.config.arenas as usize;
        let training_bytes = self.config.training_size.bytes();
        let spans: u64 = span_bytes.iter().sum();
        // Beside the models, the arenas and training: doorbells, and some room for models that are added later.
        let wanted = spans + spans / 4 + arena_bytes * arenas as u64 + SPARE_BYTES;
        let wanted = wanted.saturating_add(training_bytes);
        let pool_bytes = self.config.pool_bytes(id, total_bytes, self.device.free_bytes()?, wanted);
        let layout = PoolLayout::new(pool_bytes, arenas, arena_bytes)?;
        let gives_way = self.config.training_gives_way;
        let layout = if gives_way {
            layout.with_training_in_homes(training_bytes)?
        } else {
            layout.with_training(training_bytes)?
        };
        let pool = Pool::new(self.device.allocate(pool_bytes)?, layout)?;
        let link = self.measure(&pool)?;
        tracing::info!(
            device = %id, pool_bytes, arena_bytes, training_bytes,
            gigabytes_per_s = link.bandwidth_bytes_per_s / 1e9, per_copy_us = link.per_copy_us,
            off_percent = link.rms_percent, "pool allocated"
        );
        let spin = self.config.spin(id);
        let waits_by_kernels = self.device.properties().gpu.is_some() && arenas == 1 && training_bytes == 0;
        let training = (training_bytes > 0).then(|| {
            Training::start(TrainingParts {
                device: Arc::clone(&self.device),
                pool: Arc::clone(pool.memory()),
                region: pool.layout().training,
                gives_way,
                slots: Arc::clone(slots.shared()),
                supervisor: Arc::clone(supervisor),
                threads: self.config.threads,
                spin,
            })
        });
        let training = training.transpose()?;
        let driver = DriverHandle::start(DriverParts {
            name: id.to_string(),
            slots: self.device.pin(Arc::clone(slots.shared()))?,
            device: Arc::clone(&self.device),
            pool,
            store: Arc::clone(store),
            supervisor: Arc::clone(supervisor),
            options: config.limits.scheduler_options(config.homes),
            workers: self.config.workers as usize,
            threads: self.config.threads,
            spin,
            waits_by_kernels,
            gate: training.as_ref().map(|training| Arc::clone(training.gate())),
            room: training.as_ref().and_then(|training| training.room().cloned()),
            training_share: self.config.training_share,
        })?;
        if let Some(training) = &training {
            training.connect(driver.mailbox().clone());
        }
        Ok(ServedDevice {
            driver,
            device: self.device,
            link,
            training,
            threads: self.config.threads,
            pool_bytes,
            waits_by_kernels,
            reads_host_tables: matches!(id, DeviceId::Cuda(_)) && config.pin_weights,
            timing: tokio::sync::Mutex::default(),
        })
    }

    /// Measures the link over a part of the pool that nothing is in yet.
    fn measure(&self, pool: &Pool) -> Result<LinkFit, ControllerError> {
        let homes = pool.layout().homes;
        let mut bytes = homes.bytes.min(SCRATCH_BYTES);
        if let Some(bandwidth) = self.throttle.bandwidth_bytes_per_s {
            // The longest transfer takes some ten milliseconds, however slow the link.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let limit = (bandwidth * 0.01) as u64;
            bytes = bytes.min(limit.next_multiple_of(512).max(512));
        }
        let scratch = SharedMemory::create("pswitch-measure", bytes)?;
        let from = self.device.pin(Arc::new(scratch))?;
        let to = pool.slice(Range::new(homes.offset, bytes))?;
        Ok(link::measure(&self.device, &self.throttle, &from, &to)?)
    }
}
