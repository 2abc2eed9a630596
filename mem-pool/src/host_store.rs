use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, PoisonError, RwLock};

use pswitch_device::{Device, HostSlice, PinnedMemory, SharedMemory};

use crate::range::align_up;
use crate::{ModelId, PoolError, Range, TENSOR_ALIGNMENT_BYTES};

/// Pinned host memory with one copy of every model's span.
///
/// Each span is a [`SharedMemory`] of its own, pinned by one device for all devices of its kind. Spans may be filled by
/// several threads at once.
#[derive(Debug, Clone)]
pub struct HostStore {
    device: Arc<dyn Device>,
    pins: bool,
    spans: Spans,
}

type Spans = Arc<RwLock<BTreeMap<ModelId, Span>>>;

#[derive(Debug)]
enum Span {
    /// Being written: reserves the model's name.
    Unsealed,
    Sealed {
        memory: PinnedMemory,
        bytes: u64,
    },
}

/// A span that is being written. [`seal`](Self::seal) puts it into the store; dropping it instead gives it up.
#[derive(Debug)]
pub struct UnsealedSpan {
    reservation: Reservation,
    memory: PinnedMemory,
    bytes: u64,
}

/// A model's name in the store, given back when dropped unless its span has been sealed.
#[derive(Debug)]
struct Reservation {
    model: ModelId,
    spans: Spans,
}

impl HostStore {
    /// An empty store whose spans `device` pins.
    pub fn new(device: Arc<dyn Device>) -> Self {
        Self { device, pins: true, spans: Arc::default() }
    }

    /// An empty store whose spans are not pinned: `device` copies them through a buffer. For measuring what pinning brings.
    pub fn unpinned(device: Arc<dyn Device>) -> Self {
        Self { pins: false, ..Self::new(device) }
    }

    /// Makes room for a model's span, to be filled with [`UnsealedSpan::write`] and put into the store with
    /// [`UnsealedSpan::seal`]. The memory is zeroed and rounded up to whole tensors.
    ///
    /// # Errors
    /// [`PoolError::ModelExists`], [`PoolError::Device`] if there is no memory or it cannot be pinned.
    pub fn insert(&self, model: ModelId, span_bytes: u64) -> Result<UnsealedSpan, PoolError> {
        match self.spans.write().unwrap_or_else(PoisonError::into_inner).entry(model) {
            Entry::Occupied(_) => return Err(PoolError::ModelExists { model }),
            Entry::Vacant(entry) => entry.insert(Span::Unsealed),
        };
        let reservation = Reservation { model, spans: Arc::clone(&self.spans) };
        // A model without weights has a span of no bytes, but memory of no bytes cannot be had.
        let rounded = align_up(span_bytes.max(1), TENSOR_ALIGNMENT_BYTES).unwrap_or(u64::MAX);
        let memory = Arc::new(SharedMemory::create(&format!("pswitch-span-{}", model.0), rounded)?);
        let memory = if self.pins { self.device.pin(memory)? } else { self.device.lend(memory) };
        Ok(UnsealedSpan { reservation, memory, bytes: span_bytes })
    }

    /// Forgets a model's span. Slices of it that are still in use keep its memory.
    ///
    /// # Errors
    /// [`PoolError::UnknownModel`] if it has no sealed span.
    pub fn remove(&self, model: ModelId) -> Result<(), PoolError> {
        let mut spans = self.spans.write().unwrap_or_else(PoisonError::into_inner);
        match spans.entry(model) {
            Entry::Occupied(entry) if matches!(entry.get(), Span::Sealed { .. }) => {
                entry.remove();
                Ok(())
            }
            _ => Err(PoolError::UnknownModel { model }),
        }
    }

    /// Some bytes of a model's span, counted from the span's begin.
    ///
    /// # Errors
    /// [`PoolError::UnknownModel`] if it has no sealed span, [`PoolError::OutOfRange`].
    pub fn slice(&self, model: ModelId, range: Range) -> Result<HostSlice, PoolError> {
        self.with_span(model, |memory, bytes| {
            check_inside(model, range, bytes)?;
            Ok(HostSlice::new(memory.clone(), range.offset, range.bytes)?)
        })
    }

    /// The memory behind a model's span, for handing it to another process.
    ///
    /// # Errors
    /// [`PoolError::UnknownModel`] if it has no sealed span.
    pub fn memory(&self, model: ModelId) -> Result<PinnedMemory, PoolError> {
        self.with_span(model, |memory, _| Ok(memory.clone()))
    }

    /// Bytes of a model's span.
    ///
    /// # Errors
    /// [`PoolError::UnknownModel`] if it has no sealed span.
    pub fn span_bytes(&self, model: ModelId) -> Result<u64, PoolError> {
        self.with_span(model, |_, bytes| Ok(bytes))
    }

    /// Bytes of all sealed spans.
    pub fn total_bytes(&self) -> u64 {
        let sealed = |span: &Span| match span {
            Span::Sealed { bytes, .. } => *bytes,
            Span::Unsealed => 0,
        };
        self.spans.read().unwrap_or_else(PoisonError::into_inner).values().map(sealed).sum()
    }

    fn with_span<T>(
        &self,
        model: ModelId,
        look: impl FnOnce(&PinnedMemory, u64) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        match self.spans.read().unwrap_or_else(PoisonError::into_inner).get(&model) {
            Some(Span::Sealed { memory, bytes }) => look(memory, *bytes),
            _ => Err(PoolError::UnknownModel { model }),
        }
    }
}

impl UnsealedSpan {
    /// Writes a tensor's bytes at `offset` of the span.
    ///
    /// # Errors
    /// [`PoolError::OutOfRange`]; nothing is written then.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), PoolError> {
        check_inside(self.reservation.model, Range::new(offset, data.len() as u64), self.bytes)?;
        Ok(self.memory.memory().write(offset, data)?)
    }

    /// Puts the span into the store.
    pub fn seal(self) {
        let Self { reservation: Reservation { model, spans }, memory, bytes } = &self;
        let sealed = Span::Sealed { memory: memory.clone(), bytes: *bytes };
        spans.write().unwrap_or_else(PoisonError::into_inner).insert(*model, sealed);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut spans = self.spans.write().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(entry) = spans.entry(self.model)
            && matches!(entry.get(), Span::Unsealed)
        {
            entry.remove();
        }
    }
}

fn check_inside(model: ModelId, range: Range, bytes: u64) -> Result<(), PoolError> {
    if Range::new(0, bytes).contains(&range) && range.offset.checked_add(range.bytes).is_some() {
        return Ok(());
    }
    let what = format!("the span of {model}");
    Err(PoolError::OutOfRange { what, offset: range.offset, bytes: range.bytes, capacity_bytes: bytes })
}
