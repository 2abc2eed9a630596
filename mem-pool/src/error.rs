use std::fmt;

use pswitch_device::DeviceError;

use crate::{ArenaId, ModelId, Residency};

/// Everything that the pool and its accounts can refuse, with the numbers that explain it.
///
/// What is refused with [`NoRoomNow`](Self::NoRoomNow), [`PlaceHeld`](Self::PlaceHeld), [`ArenaBusy`](Self::ArenaBusy) or
/// [`NoDoorbells`](Self::NoDoorbells) may succeed later; with [`NeverFits`](Self::NeverFits) it will not, whatever is freed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// Larger than all there is: waiting does not help.
    #[error(
        "{what} needs {asked_bytes} bytes and can never fit: there are {capacity_bytes} bytes in all; {advice}"
    )]
    NeverFits {
        /// What was to be placed.
        what: String,
        /// Bytes that it needs.
        asked_bytes: u64,
        /// Bytes that there are when nothing else is in use.
        capacity_bytes: u64,
        /// What to do about it.
        advice: &'static str,
    },
    /// The place of a model's span is held by models that may not be evicted now.
    #[error(
        "{model} ({asked_bytes} bytes) does not fit now: its place is held by {}; try again when they have \
         finished",
        list(held_by)
    )]
    PlaceHeld {
        /// The model that was to move in.
        model: ModelId,
        /// Bytes of its span.
        asked_bytes: u64,
        /// The models in its place that are leased or moving.
        held_by: Vec<ModelId>,
    },
    /// An allocator has no free range that is long enough.
    #[error(
        "{asked_bytes} bytes do not fit now: {in_use_bytes} of {capacity_bytes} bytes are in use and the largest \
         free range has {largest_free_bytes} bytes; free something or make the whole larger"
    )]
    NoRoomNow {
        /// Bytes asked for.
        asked_bytes: u64,
        /// Bytes in use.
        in_use_bytes: u64,
        /// Bytes in all.
        capacity_bytes: u64,
        /// The longest range that could be had.
        largest_free_bytes: u64,
    },
    /// Not enough doorbell words in a row are free.
    #[error(
        "{model} needs {asked} doorbells and does not fit now: {free} of {capacity} are free; unload a model, cut \
         plans into fewer groups or make the pool larger"
    )]
    NoDoorbells {
        /// The model that was to be placed.
        model: ModelId,
        /// Words that it needs.
        asked: u64,
        /// Words that are free, though perhaps not in a row.
        free: u64,
        /// Words in all.
        capacity: u64,
    },
    /// An allocation of nothing.
    #[error("an allocation of 0 bytes was asked for")]
    EmptyAllocation,
    /// An alignment that is no power of two.
    #[error("{alignment} is no alignment: it must be a power of two")]
    InvalidAlignment {
        /// What was given.
        alignment: u64,
    },
    /// A place that does not begin where one may.
    #[error(
        "{at} is no place to begin at: it must be a multiple of {alignment} bytes from the begin of the homes"
    )]
    Misaligned {
        /// The offset given.
        at: u64,
        /// What its distance from the begin of the homes must be a multiple of.
        alignment: u64,
    },
    /// What has one place for good was to have another.
    #[error("the place of {model} is fixed")]
    FixedPlace {
        /// Whose.
        model: ModelId,
    },
    /// Something is freed that was not allocated, or twice.
    #[error("nothing is allocated at {at:#x}")]
    NotAllocated {
        /// The offset or address given.
        at: u64,
    },
    /// No such model.
    #[error("{model} is not known")]
    UnknownModel {
        /// The model asked for.
        model: ModelId,
    },
    /// The model has its place already.
    #[error("{model} is there already")]
    ModelExists {
        /// The model.
        model: ModelId,
    },
    /// The transition does not begin where the model is.
    #[error("{model} cannot {action}: its state is {found}, it must be {needed}")]
    WrongState {
        /// The model.
        model: ModelId,
        /// What was to be done.
        action: &'static str,
        /// Where the model is.
        found: Residency,
        /// Where it would have to be.
        needed: &'static str,
    },
    /// The model is in use.
    #[error("{model} has {leases} leases: they must be released to {action}")]
    Leased {
        /// The model.
        model: ModelId,
        /// How many leases it has.
        leases: usize,
        /// What was to be done.
        action: &'static str,
    },
    /// Somebody lets go of what nobody keeps in its place.
    #[error("{model} is let go, and nobody holds it")]
    NotHeld {
        /// The model.
        model: ModelId,
    },
    /// No such arena.
    #[error("{arena} does not exist: the pool has {arenas}")]
    UnknownArena {
        /// The arena asked for.
        arena: ArenaId,
        /// How many there are, from 0 on.
        arenas: usize,
    },
    /// Another execution holds the arena.
    #[error("{arena} is held by an execution of {held_by} now")]
    ArenaBusy {
        /// The arena.
        arena: ArenaId,
        /// The model that is executed in it.
        held_by: ModelId,
    },
    /// A lease that this ledger did not give.
    #[error("a lease of {model} and {arena} was given back to a ledger that did not grant it")]
    UnknownLease {
        /// The lease's model.
        model: ModelId,
        /// The lease's arena.
        arena: ArenaId,
    },
    /// A range outside of what it should lie in.
    #[error("{bytes} bytes at offset {offset} are outside the {capacity_bytes} bytes of {what}")]
    OutOfRange {
        /// What the range should lie in.
        what: String,
        /// Where the range begins.
        offset: u64,
        /// How long it is.
        bytes: u64,
        /// How much there is.
        capacity_bytes: u64,
    },
    /// The device refused.
    #[error("the device refused")]
    Device(#[from] DeviceError),
}

fn list(models: &[ModelId]) -> impl fmt::Display {
    models.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
