//! Unified device memory: one pool, allocated once, and an account of every byte in it.
//!
//! A [`PoolLayout`] divides a pool into doorbell words, homes, arenas and a part for training. Each model's span (its
//! weights, one contiguous range) has a home of its own; homes overlap when not all models fit. A model that is on the host
//! can be given another, as an allocator would that evicts what was used longest ago ([`Ledger::find_room`]). The [`Ledger`] decides who is in the pool: a model
//! that moves in evicts what lies in its place, unless that is leased or moving itself. An execution holds a [`Lease`] on
//! a span and on an arena, from which an [`Arena`] allocates its activations. A [`HostStore`] keeps every span in pinned
//! host memory. [`TrainingMemory`] divides the part for training among tasks.
//!
//! [`FreeList`] and [`Ledger`] are pure: they count offsets and touch no memory, so that random histories can be driven
//! against their invariants. Errors tell what does not fit *now* from what can *never* fit, with the numbers.
//!
//! ```
//! use pswitch_mem_pool::{ArenaId, Ledger, ModelId, PoolError, PoolLayout, Residency};
//!
//! # fn main() -> Result<(), PoolError> {
//! // Room for 8 KiB of weights and one execution.
//! let mut ledger = Ledger::new(&PoolLayout::new(16 << 10, 1, 4 << 10)?);
//! let (bert, resnet) = (ModelId(0), ModelId(1));
//! ledger.place(bert, 6 << 10, 1)?;
//! // No room beside the first one: the homes overlap.
//! ledger.place(resnet, 5 << 10, 1)?;
//!
//! assert_eq!(ledger.begin_move(bert)?, []);
//! ledger.finish_move(bert)?;
//! let lease = ledger.lease(bert, ArenaId(0))?;
//! // A leased span is never evicted ...
//! assert!(matches!(ledger.begin_move(resnet), Err(PoolError::PlaceHeld { .. })));
//! ledger.release(lease)?;
//! // ... and afterwards it makes room.
//! assert_eq!(ledger.begin_move(resnet)?, [bert]);
//! assert_eq!(ledger.state(bert)?, Residency::Host);
//! # Ok(())
//! # }
//! ```

mod arena;
mod division;
mod error;
mod free_list;
mod host_store;
mod id;
mod layout;
mod ledger;
mod pool;
mod range;
mod training;

pub use arena::{Arena, ArenaStats};
pub use division::ArenaDivision;
pub use error::PoolError;
pub use free_list::FreeList;
pub use host_store::{HostStore, UnsealedSpan};
pub use id::{ArenaId, ModelId};
pub use layout::PoolLayout;
pub use ledger::{ArenaReport, Home, Lease, Ledger, LedgerReport, ModelReport, Residency};
pub use pool::Pool;
pub use range::{Range, TENSOR_ALIGNMENT_BYTES};
pub use training::TrainingMemory;

/// The README's example runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
