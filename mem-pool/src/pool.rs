use std::sync::Arc;

use pswitch_device::{DeviceMemory, DeviceSlice};

use crate::{ArenaId, Home, PoolError, PoolLayout, Range};

/// A device's pool: its memory and what each part is for.
#[derive(Debug, Clone)]
pub struct Pool {
    memory: Arc<dyn DeviceMemory>,
    layout: PoolLayout,
}

impl Pool {
    /// Divides `memory` by `layout`.
    ///
    /// # Errors
    /// [`PoolError::OutOfRange`] if the layout is made for more memory.
    pub fn new(memory: Arc<dyn DeviceMemory>, layout: PoolLayout) -> Result<Self, PoolError> {
        let (bytes, capacity_bytes) = (layout.bytes(), memory.bytes());
        if bytes > capacity_bytes {
            let what = "the pool that the layout should divide".to_owned();
            return Err(PoolError::OutOfRange { what, offset: 0, bytes, capacity_bytes });
        }
        Ok(Self { memory, layout })
    }

    /// The memory, for handing it to workers.
    pub fn memory(&self) -> &Arc<dyn DeviceMemory> {
        &self.memory
    }

    /// What each part is for.
    pub fn layout(&self) -> &PoolLayout {
        &self.layout
    }

    /// Some bytes of the pool.
    ///
    /// # Errors
    /// [`PoolError::OutOfRange`].
    pub fn slice(&self, range: Range) -> Result<DeviceSlice, PoolError> {
        let Range { offset, bytes } = range;
        DeviceSlice::new(Arc::clone(&self.memory), offset, bytes).map_err(|_| PoolError::OutOfRange {
            what: "the pool".to_owned(),
            offset,
            bytes,
            capacity_bytes: self.memory.bytes(),
        })
    }

    /// The word that announces `group` of a model.
    ///
    /// # Errors
    /// [`PoolError::OutOfRange`] if the model has no such word.
    pub fn doorbell(&self, home: &Home, group: u32) -> Result<DeviceSlice, PoolError> {
        let offset = u64::from(group) * Home::DOORBELL_BYTES;
        let word = Range::new(home.doorbells.offset.saturating_add(offset), Home::DOORBELL_BYTES);
        if !home.doorbells.contains(&word) {
            return Err(PoolError::OutOfRange {
                what: "a model's doorbells".to_owned(),
                offset,
                bytes: Home::DOORBELL_BYTES,
                capacity_bytes: home.doorbells.bytes,
            });
        }
        self.slice(word)
    }

    /// All bytes of an arena.
    ///
    /// # Errors
    /// [`PoolError::UnknownArena`].
    pub fn arena(&self, arena: ArenaId) -> Result<DeviceSlice, PoolError> {
        let range = self.layout.arenas.get(arena.0 as usize).copied();
        let arenas = self.layout.arenas.len();
        self.slice(range.ok_or(PoolError::UnknownArena { arena, arenas })?)
    }
}
