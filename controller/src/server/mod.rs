//! The server: repository, devices and front ends brought together.

mod devices;
mod infer;
mod link;
mod model;
mod planning;
mod profile_file;
mod profiling;
mod training;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use pswitch_device::{DeviceId, SharedMemory};
use pswitch_mem_pool::{HostStore, ModelId};
use pswitch_model::Archive;
use pswitch_protocol::Channel;
use tokio::sync::{oneshot, watch};

use crate::config::Config;
use crate::driver::{Mail, ModelSpec};
use crate::error::ControllerError;
use crate::repository::{ModelEntry, Repository};
use crate::service::{ModelState, ModelStatus, ServiceError, TaskStatus};
use crate::slots::SlotMemory;
use crate::supervisor::Supervisor;
use devices::ServedDevice;
pub use link::LinkFit;
use model::ServedModel;
pub use model::describe;
pub use planning::DeviceProfile;
pub use profile_file::profile_yaml;

/// What happens while models are loaded, for whoever shows it to a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoadEvent {
    /// So many models are in the repository.
    Found {
        /// How many.
        models: usize,
    },
    /// A model's archive was opened and its graph read.
    Opened {
        /// The model.
        model: String,
        /// Bytes of its span.
        span_bytes: u64,
    },
    /// Bytes of a model's weights were copied to the host store.
    Copied {
        /// The model.
        model: String,
        /// How many more.
        bytes: u64,
    },
    /// The workers build a model.
    Building {
        /// The model.
        model: String,
    },
    /// A model's layers are timed; not sent where their times were kept from an earlier start.
    Profiling {
        /// The model.
        model: String,
    },
    /// A model takes requests.
    Ready {
        /// The model.
        model: String,
        /// Groups of its plan.
        groups: usize,
    },
    /// A model cannot be served.
    Unavailable {
        /// The model.
        model: String,
        /// Why.
        reason: String,
    },
}

/// Told about every [`LoadEvent`], from several threads.
pub type LoadObserver = Arc<dyn Fn(LoadEvent) + Send + Sync>;

/// A server: devices, workers and models, to be asked through [`InferenceService`](crate::InferenceService).
pub struct Server {
    this: Weak<Self>,
    config: Config,
    devices: Vec<ServedDevice>,
    slots: Arc<SlotMemory>,
    store: Arc<HostStore>,
    models: RwLock<BTreeMap<String, Registered>>,
    next_model: AtomicU32,
    next_request: AtomicU64,
    /// Tasks of the configuration that could not be taken.
    refused: Mutex<Vec<TaskStatus>>,
    draining: AtomicBool,
    loaded: AtomicBool,
    failed: watch::Receiver<bool>,
    observer: LoadObserver,
    // Last: drivers end their workers through it.
    _supervisor: Arc<Supervisor>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("devices", &self.devices).finish_non_exhaustive()
    }
}

/// A model of the repository.
#[derive(Debug, Clone)]
struct Registered {
    state: ModelState,
    reason: String,
    version: String,
    /// While it is ready.
    served: Option<Arc<ServedModel>>,
}

/// Models that were opened before the devices were there.
struct Opened {
    model: ServedModel,
    archive: Archive,
}

/// Models that wait to be loaded; [`Server::load_all`] takes them.
#[must_use]
pub struct PendingModels(Vec<Opened>);

impl fmt::Debug for PendingModels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PendingModels").field(&self.0.len()).finish()
    }
}

impl Server {
    /// Reads the repository, allocates the pools and starts the workers. No model takes requests before
    /// [`load_all`](Self::load_all).
    ///
    /// `zygote` is the controller's end of a zygote that was forked first thing in `main`. Blocks for as long as it
    /// takes to read the archives' graphs and to measure the links.
    ///
    /// # Errors
    /// When the repository cannot be listed, or a device cannot be opened or has no memory for its pool.
    pub fn start(
        config: Config,
        zygote: Channel,
        observer: LoadObserver,
    ) -> Result<(Arc<Self>, PendingModels), ControllerError> {
        let supervisor = Supervisor::start(zygote)
            .map_err(|source| ControllerError::System { what: "a thread", source })?;
        let opened_devices = config.devices.iter().map(devices::open).collect::<Result<Vec<_>, _>>()?;
        let repository = Repository::scan(&config.repository)?;
        observer(LoadEvent::Found { models: repository.models.len() });

        let mut models = BTreeMap::new();
        for broken in &repository.broken {
            let reason = chain(&broken.error);
            observer(LoadEvent::Unavailable { model: broken.name.clone(), reason: reason.clone() });
            models.insert(broken.name.clone(), Registered::unavailable("1", reason));
        }
        let next_model = AtomicU32::new(0);
        let mut pending = Vec::new();
        for entry in repository.models {
            let (name, version) = (entry.name.as_str().to_owned(), entry.settings.version.clone());
            match open_archive(entry, &next_model) {
                Ok(opened) => {
                    let span_bytes = opened.model.spec.span_bytes;
                    observer(LoadEvent::Opened { model: name.clone(), span_bytes });
                    models.insert(name, Registered::loading(version));
                    pending.push(opened);
                }
                Err(reason) => {
                    observer(LoadEvent::Unavailable { model: name.clone(), reason: reason.clone() });
                    models.insert(name, Registered::unavailable(version, reason));
                }
            }
        }

        let slots = SlotMemory::new(Arc::new(SharedMemory::create(
            "pswitch-slots",
            config.slot_memory_size.bytes(),
        )?));
        // Pinned for the GPUs, if there are any: a host device reads any memory.
        let pinning = opened_devices
            .iter()
            .find(|opened| matches!(opened.device.properties().id, DeviceId::Cuda(_)))
            .or(opened_devices.first())
            .map(|opened| Arc::clone(&opened.device));
        let pinning = pinning.ok_or_else(|| ControllerError::InvalidConfig {
            key: "devices".to_owned(),
            reason: "there must be at least one".to_owned(),
        })?;
        let store = if config.pin_weights { HostStore::new(pinning) } else { HostStore::unpinned(pinning) };
        let store = Arc::new(store);
        let span_bytes: Vec<u64> = pending.iter().map(|opened| opened.model.spec.span_bytes).collect();
        let devices = opened_devices
            .into_iter()
            .map(|opened| opened.serve(&config, &span_bytes, &slots, &store, &supervisor))
            .collect::<Result<Vec<_>, _>>()?;
        let server = Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            config,
            devices,
            slots,
            store,
            models: RwLock::new(models),
            next_model,
            next_request: AtomicU64::new(0),
            refused: Mutex::default(),
            draining: AtomicBool::new(false),
            loaded: AtomicBool::new(false),
            failed: supervisor.failure(),
            observer,
            _supervisor: supervisor,
        });
        Ok((server, PendingModels(pending)))
    }

    /// Loads the models that [`start`](Self::start) has found: copies their weights to the host store, has the workers
    /// build them, times their layers (unless the times were kept) and plans their transfers; then takes the training tasks of
    /// the configuration. One that fails does not stop the others.
    pub async fn load_all(self: &Arc<Self>, pending: PendingModels) {
        // Weights are copied one model after the other, while workers build those before: both go at memory speed.
        let mut building = tokio::task::JoinSet::new();
        for Opened { model, archive } in pending.0 {
            let name = model.spec.name.clone();
            let server = Arc::clone(self);
            let copied =
                tokio::task::spawn_blocking(move || server.copy_weights(&model, &archive).map(|()| model))
                    .await;
            match copied.map_err(|error| error.to_string()).flatten() {
                Ok(model) => {
                    let server = Arc::clone(self);
                    building.spawn(async move {
                        let name = model.spec.name.clone();
                        let result = server.build(model).await;
                        server.conclude(&name, result);
                    });
                }
                Err(reason) => self.conclude(&name, Err(reason)),
            }
        }
        while building.join_next().await.is_some() {}
        self.loaded.store(true, Ordering::Release);
        self.take_configured_tasks().await;
    }

    /// Refuses what is new and resolves when everything that was accepted has been answered, or the time is over.
    /// Returns whether it was. Training tasks write a last checkpoint, from which they go on when they are submitted again.
    pub async fn drain(&self, timeout: Duration) -> bool {
        self.draining.store(true, Ordering::Release);
        let drained = self.devices.iter().map(|device| {
            let (done, drained) = oneshot::channel();
            device.driver.mailbox().put(Mail::Drain { done });
            drained
        });
        let all = async {
            let requests = async {
                for drained in drained.collect::<Vec<_>>() {
                    let _ = drained.await;
                }
            };
            tokio::join!(requests, self.stop_training());
        };
        tokio::time::timeout(timeout, all).await.is_ok()
    }

    /// Resolves when the server can go on no more: its zygote is gone, and with it all workers, or a driver has failed.
    pub async fn failed(&self) {
        let mut failed = self.failed.clone();
        // The sender lives as long as the zygote is listened to.
        let _ = failed.wait_for(|failed| *failed).await;
    }

    /// Bytes of every device's pool.
    pub fn pool_bytes(&self) -> Vec<u64> {
        self.devices.iter().map(|device| device.pool_bytes).collect()
    }

    /// The server, for work that goes on when the one who asked is gone.
    fn this(&self) -> Result<Arc<Self>, ServiceError> {
        self.this.upgrade().ok_or(ServiceError::Draining)
    }

    fn copy_weights(&self, model: &ServedModel, archive: &Archive) -> Result<(), String> {
        let name = &model.spec.name;
        let span = self.store.insert(model.spec.id, model.spec.span_bytes).map_err(|error| chain(&error))?;
        model::fill(&span, archive, |bytes| {
            (self.observer)(LoadEvent::Copied { model: name.clone(), bytes })
        })?;
        span.seal();
        Ok(())
    }

    /// Host store -> placed on every device that can hold it, built, timed and planned. Returns its groups.
    async fn build(&self, mut model: ServedModel) -> Result<(ServedModel, usize), String> {
        let name = model.spec.name.clone();
        (self.observer)(LoadEvent::Building { model: name });
        let mut reasons = Vec::new();
        for (index, device) in self.devices.iter().enumerate() {
            let (done, placed) = oneshot::channel();
            let (spec, host_tables) = (Arc::clone(&model.spec), device.host_tables(&model.spec));
            device.driver.mailbox().put(Mail::Place { spec, host_tables, done });
            match placed.await.unwrap_or_else(|_| Err("the device's driver has ended".to_owned())) {
                Ok(()) => model.devices.push(index),
                Err(reason) => {
                    tracing::warn!(model = model.spec.name, device = index, reason, "cannot be placed");
                    self.remove_from(index, model.spec.id).await;
                    reasons.push(reason);
                }
            }
        }
        if model.devices.is_empty() {
            self.forget(&model).await;
            return Err(reasons.join("; "));
        }
        let mut groups = 0;
        for index in model.devices.clone() {
            match self.plan_on(&model, index).await {
                Ok((planned, profile)) => {
                    groups = groups.max(planned);
                    model.profiles.extend(profile.map(|profile| (index, profile)));
                }
                Err(reason) => {
                    self.forget(&model).await;
                    return Err(reason);
                }
            }
        }
        Ok((model, groups))
    }

    /// Loading -> Ready or Unavailable.
    fn conclude(&self, name: &str, result: Result<(ServedModel, usize), String>) {
        let (registered, event) = match result {
            Ok((model, groups)) => {
                let registered = Registered {
                    state: ModelState::Ready,
                    reason: String::new(),
                    version: model.settings.version.clone(),
                    served: Some(Arc::new(model)),
                };
                (registered, LoadEvent::Ready { model: name.to_owned(), groups })
            }
            Err(reason) => {
                let version = self.status_of(name).map_or_else(|| "1".to_owned(), |status| status.version);
                let event = LoadEvent::Unavailable { model: name.to_owned(), reason: reason.clone() };
                (Registered::unavailable(version, reason), event)
            }
        };
        self.write().insert(name.to_owned(), registered);
        (self.observer)(event);
    }

    /// Loads one model of the repository anew, or for the first time.
    async fn reload(self: Arc<Self>, name: String) -> Result<(), ServiceError> {
        let unavailable = |reason: String| ServiceError::ModelUnavailable { model: name.clone(), reason };
        let root: PathBuf = self.config.repository.clone();
        let wanted = name.clone();
        let found = tokio::task::spawn_blocking(move || {
            Repository::scan(&root).map(|repository| (wanted, repository))
        })
        .await
        .map_err(|error| unavailable(error.to_string()))?
        .map_err(|error| unavailable(chain(&error)))?;
        let (wanted, repository) = found;
        let broken =
            repository.broken.iter().find(|broken| broken.name == wanted).map(|broken| chain(&broken.error));
        let Some(entry) = repository.models.into_iter().find(|entry| entry.name.as_str() == wanted) else {
            return Err(broken.map_or(ServiceError::UnknownModel { model: wanted }, unavailable));
        };
        let server = Arc::clone(&self);
        let opened = tokio::task::spawn_blocking(move || open_archive(entry, &server.next_model));
        let Opened { model, archive } = match opened.await.map_err(|error| error.to_string()).flatten() {
            Ok(opened) => opened,
            Err(reason) => return Err(unavailable(self.note_unreadable(&name, reason))),
        };
        self.retire(&name, ModelState::Loading).await?;
        let server = Arc::clone(&self);
        let copied =
            tokio::task::spawn_blocking(move || server.copy_weights(&model, &archive).map(|()| model));
        let result = match copied.await.map_err(|error| error.to_string()).flatten() {
            Ok(model) => self.build(model).await,
            Err(reason) => Err(reason),
        };
        let failure = result.as_ref().err().cloned();
        self.conclude(&name, result);
        failure.map_or(Ok(()), |reason| Err(unavailable(reason)))
    }

    /// Notes that an archive cannot be loaded; what was loaded under its name before stays. Returns what to say.
    fn note_unreadable(&self, name: &str, reason: String) -> String {
        match self.status_of(name).map(|status| status.state) {
            Some(ModelState::Ready) => format!("{reason}; what was loaded before goes on"),
            Some(ModelState::Loading | ModelState::Unloading) => reason,
            Some(ModelState::Unavailable) | None => {
                self.conclude(name, Err(reason.clone()));
                reason
            }
        }
    }

    /// Takes a model out of service and frees all that it holds; it is left in `state`.
    async fn retire(&self, name: &str, state: ModelState) -> Result<(), ServiceError> {
        let served = {
            let mut models = self.write();
            let registered =
                models.entry(name.to_owned()).or_insert_with(|| Registered::unavailable("1", String::new()));
            if matches!(registered.state, ModelState::Loading | ModelState::Unloading) {
                let reason = format!("it is {} already", registered.state.name().to_lowercase());
                return Err(ServiceError::ModelUnavailable { model: name.to_owned(), reason });
            }
            registered.state = if state == ModelState::Loading { state } else { ModelState::Unloading };
            registered.reason.clear();
            registered.served.take()
        };
        if let Some(served) = served {
            self.forget(&served).await;
        }
        if let Some(registered) = self.write().get_mut(name) {
            registered.state = state;
            if state == ModelState::Unavailable {
                "unloaded on request".clone_into(&mut registered.reason);
            }
        }
        Ok(())
    }

    /// Removes a model from all its devices and from the host store.
    async fn forget(&self, model: &ServedModel) {
        for &index in &model.devices {
            self.remove_from(index, model.spec.id).await;
        }
        // It is there: a model has devices only after its weights were copied.
        let _ = self.store.remove(model.spec.id);
    }

    async fn remove_from(&self, index: usize, model: ModelId) {
        let (done, removed) = oneshot::channel();
        self.devices[index].driver.mailbox().put(Mail::Remove { model, done });
        let _ = removed.await;
    }

    fn status_of(&self, name: &str) -> Option<ModelStatus> {
        self.read().get(name).map(|registered| registered.status(name))
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Registered>> {
        self.models.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, Registered>> {
        self.models.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registered {
    fn loading(version: String) -> Self {
        Self { state: ModelState::Loading, reason: String::new(), version, served: None }
    }

    fn unavailable(version: impl Into<String>, reason: String) -> Self {
        Self { state: ModelState::Unavailable, reason, version: version.into(), served: None }
    }

    fn status(&self, name: &str) -> ModelStatus {
        let (state, reason) = match self.served.as_ref().and_then(|served| served.spec.lost.get()) {
            Some(reason) => (ModelState::Unavailable, reason),
            None => (self.state, &self.reason),
        };
        ModelStatus { name: name.to_owned(), version: self.version.clone(), state, reason: reason.clone() }
    }
}

fn open_archive(entry: ModelEntry, next_model: &AtomicU32) -> Result<Opened, String> {
    let begin = Instant::now();
    let archive = Archive::open(&entry.archive).map_err(|error| chain(&error))?;
    let id = ModelId(next_model.fetch_add(1, Ordering::Relaxed));
    let model = ServedModel::new(id, entry.name.as_str(), &entry.archive, &archive, entry.settings)?;
    let spec: &ModelSpec = &model.spec;
    tracing::debug!(
        model = spec.name,
        layers = spec.layers.len(),
        ms = begin.elapsed().as_millis(),
        "opened"
    );
    Ok(Opened { model, archive })
}

/// An error and what led to it, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
