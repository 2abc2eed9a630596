//! One pool of device memory, fixed homes in it, a ledger of every byte, leases and arenas.

mod arena;
mod error;
mod free_list;
mod host_store;
mod id;
mod layout;
mod ledger;
mod pool;
mod range;

pub use arena::{Arena, ArenaStats};
pub use error::PoolError;
pub use free_list::FreeList;
pub use host_store::{HostStore, UnsealedSpan};
pub use id::{ArenaId, ModelId};
pub use layout::PoolLayout;
pub use ledger::{ArenaReport, Home, Lease, Ledger, LedgerReport, ModelReport, Residency};
pub use pool::Pool;
pub use range::{Range, TENSOR_ALIGNMENT_BYTES};
