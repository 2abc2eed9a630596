//! Workers that are alone: with memory of their own instead of a server's pool, or with weights that do not stay in their
//! home. What pswitch is measured against is made of them; its own server has none.
//!
//! A worker with memory of its own copies inputs and weights there by itself ([`Bring`]), by the same kind of stream and
//! with the same doorbells as a server's engine. Parts of a span can be moved out of their home, to memory that is
//! allocated or opened for the purpose, and that is given back afterwards.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use pswitch_device::{
    CopyStream, Device, DeviceAddress, DeviceError, DeviceMemory, DeviceSlice, HostSlice, LinkThrottle,
    MemoryHandle, PinnedMemory, SharedMemory, doorbell,
};
use pswitch_model::{Archive, StorageId, Weight};
use pswitch_protocol::{Bring, Channel, Elsewhere, LoadModel, Region};

use crate::error::WorkerError;
use crate::work::{Model, Shared};
use crate::zygote::enter_child;

/// The whole life of a worker that was started as a program of its own, by `parent`: as [`serve`](crate::serve), over the
/// socket that is its standard input. Nothing is there yet of what a zygote's children share.
///
/// # Errors
/// As [`serve`](crate::serve), and when standard input is closed.
pub fn serve_standard_input(parent: i32) -> Result<(), WorkerError> {
    enter_child("pswitch-alone", Pid::from_raw(parent))?;
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|source| WorkerError::System { operation: "taking the socket", source })?;
    crate::serve(&Channel::from_fd(socket))
}

/// The link of a worker with memory of its own.
pub(crate) fn throttle(link_bytes_per_s: Option<u64>) -> LinkThrottle {
    // Rounding the 54th bit of a rate changes nothing.
    #[allow(clippy::cast_precision_loss)]
    let bandwidth_bytes_per_s = link_bytes_per_s.map(|rate| rate as f64);
    LinkThrottle { bandwidth_bytes_per_s, ..LinkThrottle::default() }
}

/// What copies in a worker with memory of its own.
pub(crate) struct Alone {
    slots: PinnedMemory,
    stream: Box<dyn CopyStream>,
}

/// Longest wait for copies that nobody waits for otherwise.
const PATIENCE: Duration = Duration::from_secs(60);

impl Alone {
    pub(crate) fn new(shared: &Shared) -> Result<Self, DeviceError> {
        let slots = shared.device.pin(Arc::clone(&shared.slots))?;
        Ok(Self { slots, stream: shared.device.copy_stream("alone")? })
    }

    /// Enqueues the copies of an order, each with its doorbell behind it; an execution that is told to run now waits for
    /// them as it does in a server.
    pub(crate) fn bring(&mut self, order: &Bring, model: &Model, shared: &Shared) -> Result<(), WorkerError> {
        let input_doorbell = shared.word(order.input_doorbell)?;
        let doorbells = (model.doorbells.offset..).step_by(4).map(|offset| shared.word(offset));
        let doorbells = doorbells.take(order.groups.len()).collect::<Result<Vec<_>, _>>()?;
        // Whatever used this memory before may have left something there. At once: the execution waits in another stream.
        let words: Vec<_> = doorbells.iter().chain([&input_doorbell]).cloned().collect();
        shared.device.set_words(&words, doorbell::CLEAR)?;
        for &(from, to) in &order.inputs {
            let from = HostSlice::new(self.slots.clone(), from.offset, from.bytes)?;
            self.stream.copy_in(&from, &shared.slice(to)?)?;
        }
        self.stream.write_word(&input_doorbell, doorbell::RUNG)?;
        for (&group, word) in order.groups.iter().zip(&doorbells) {
            let from = model.weights.kept(group)?;
            self.stream.copy_in(&from, &model.weights.place(group, shared)?)?;
            self.stream.write_word(word, doorbell::RUNG)?;
        }
        Ok(())
    }

    /// Waits until the stream is done with all memory that it was given.
    pub(crate) fn settle(&mut self) -> Result<(), DeviceError> {
        self.stream.record()?.wait(Instant::now() + PATIENCE)
    }
}

/// A model's weights beside its executable: where they lie, and a copy if the worker keeps one.
pub(crate) struct Weights {
    home: Region,
    /// Those that some node uses, with their places in the span.
    used: Vec<(u64, Weight)>,
    kept: Option<PinnedMemory>,
    moved: Vec<Moved>,
    /// Whether parts have no memory now.
    are_nowhere: bool,
}

/// A part of a span that is not in its home.
struct Moved {
    /// Where it begins in the span.
    offset: u64,
    memory: DeviceSlice,
}

impl Weights {
    /// In their home; with a copy, if the controller wants the worker to have one.
    pub(crate) fn new(archive: &Archive, load: &LoadModel, device: &dyn Device) -> Result<Self, DeviceError> {
        let program = archive.program();
        let span = program.span();
        let place = |weight: &Weight| span.offset(weight.storage) + weight.offset_bytes;
        let used = program.weights.iter().filter(|weight| span.offset(weight.storage) < span.used_bytes);
        let kept = if load.keeps_weights {
            let copy = SharedMemory::create("pswitch-kept", span.used_bytes.max(1))?;
            let storages = (0..).map(StorageId).zip(&span.offsets);
            for (storage, &offset) in storages.filter(|&(_, &offset)| offset < span.used_bytes) {
                copy.write(offset, archive.storage_bytes(storage))?;
            }
            Some(device.pin(Arc::new(copy))?)
        } else {
            None
        };
        Ok(Self {
            home: load.span,
            used: used.map(|weight| (place(weight), weight.clone())).collect(),
            kept,
            moved: Vec::new(),
            are_nowhere: false,
        })
    }

    /// The home over which the model was built.
    pub(crate) fn home(&self) -> Region {
        self.home
    }

    /// All that some node uses, with their places in the span.
    pub(crate) fn used(&self) -> impl Iterator<Item = (u64, &Weight)> {
        self.used.iter().map(|(place, weight)| (*place, weight))
    }

    /// A part of the span in the copy that the worker keeps.
    fn kept(&self, part: Region) -> Result<HostSlice, WorkerError> {
        let none = || WorkerError::Order("to bring weights of which the worker has no copy".to_owned());
        Ok(HostSlice::new(self.kept.clone().ok_or_else(none)?, part.offset, part.bytes)?)
    }

    /// Where a part of the span belongs now: as a whole where it was moved to, or home.
    fn place(&self, part: Region, shared: &Shared) -> Result<DeviceSlice, DeviceError> {
        let moved = self.moved.iter().find_map(|moved| {
            let inside = part.offset.checked_sub(moved.offset)?;
            (inside.checked_add(part.bytes)? <= moved.memory.bytes()).then_some((inside, &moved.memory))
        });
        match moved {
            Some((inside, memory)) => memory.sub(inside, part.bytes),
            None => shared.slice(self.home)?.sub(part.offset, part.bytes),
        }
    }

    /// Sends what was moved to managed memory back to the host.
    pub(crate) fn send_back(&self, device: &dyn Device) -> Result<(), WorkerError> {
        Ok(self.moved.iter().try_for_each(|moved| device.send_back(&moved.memory))?)
    }

    /// Lets go of all memory outside of the home. No copy uses it any more.
    pub(crate) fn release(&mut self) {
        self.are_nowhere |= !self.moved.is_empty();
        self.moved.clear();
    }

    /// Whether parts were moved to memory that has been given back since.
    pub(crate) fn are_nowhere(&self) -> bool {
        self.are_nowhere
    }
}

/// Memory outside of the pool for so many bytes.
pub(crate) fn elsewhere(
    device: &dyn Device,
    bytes: u64,
    to: Elsewhere,
    descriptors: Vec<OwnedFd>,
) -> Result<Arc<dyn DeviceMemory>, DeviceError> {
    match to {
        Elsewhere::Opened(handle) => device.open(MemoryHandle::from_parts(&handle, descriptors)?),
        Elsewhere::Allocated => device.allocate(bytes),
        Elsewhere::Managed => device.allocate_managed(bytes),
    }
}

/// Has the weights of a part of a span lie in other memory from now on.
pub(crate) fn move_part(
    model: &mut Model,
    part: Region,
    memory: Arc<dyn DeviceMemory>,
) -> Result<(), WorkerError> {
    let memory = DeviceSlice::new(memory, 0, part.bytes)?;
    let base = memory.address();
    let end = part.offset.saturating_add(part.bytes);
    let inside = model.weights.used.iter().filter(|(place, _)| (part.offset..end).contains(place));
    let placed = inside.map(|(place, weight)| (weight, DeviceAddress(base.0 + (place - part.offset))));
    if inside_out(model, part) {
        return Err(WorkerError::Order(format!("to cut a weight of '{}' in two", model.name)));
    }
    // SAFETY: the memory is kept until `release`, after which nothing runs until the weights lie somewhere again; every
    // weight that begins inside of the part ends there.
    unsafe { model.executable.move_weights(placed) }
        .map_err(|error| WorkerError::Order(format!("to move weights: {error}")))?;
    model.weights.moved.push(Moved { offset: part.offset, memory });
    model.weights.are_nowhere = false;
    Ok(())
}

/// Whether a weight begins inside of a part of the span and ends outside.
fn inside_out(model: &Model, part: Region) -> bool {
    let end = part.offset.saturating_add(part.bytes);
    let mut weights = model.weights.used.iter();
    weights.any(|(place, weight)| {
        (part.offset..end).contains(place) && place.saturating_add(weight.extent_bytes()) > end
    })
}
