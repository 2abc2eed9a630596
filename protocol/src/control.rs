//! Words of shared memory between a controller and each of its workers: read and written at any time, without a message.

/// Length of a worker's block in the control page. A cache line: two workers never share one.
pub const BLOCK_BYTES: u64 = 64;

/// Offset in the block of the stop word, which the controller alone writes: [`GO_ON`], [`END`], or one that
/// [holds](is_hold). The worker looks at it between operators, and a GPU that trains does at the gates in its stream. What runs
/// as graphs is not stopped.
pub const STOP: u64 = 0;

/// Nothing is to stop.
pub const GO_ON: u32 = 0;

/// What computes is to end as soon as it can, as if it had not begun.
pub const END: u32 = 1;

/// The top bit, which closes the gates of a GPU: training is to stand still where it is. The other bits number the times that
/// it was told to, so that one who looks late sees that it is another time.
pub const HOLD: u32 = 1 << 31;

/// Whether a stop word says to stand still.
pub const fn is_hold(word: u32) -> bool {
    word & HOLD != 0
}

/// Offset in the block of the number of allocations of device memory that the worker's libtorch has made outside of the
/// pool since it began. Wraps around.
pub const ALLOCATIONS: u64 = 4;

/// Offset in the block of the KiB that the worker's libtorch has of device memory outside of the pool now.
pub const OUTSIDE_KIB: u64 = 8;

/// Offset in the block of the number of graphs that the worker has captured since it began. Wraps around.
pub const GRAPHS: u64 = 12;

/// Offsets in the block of a worker that trains on a GPU: the numbers of the gates that its stream has come to and gone
/// through last, as the GPU writes them. While they differ it stands still, or is on its way through one.
pub const REACHED: u64 = 16;
/// See [`REACHED`].
pub const PASSED: u64 = 20;

/// Offset in the block of the word by which an execution that is [held back](crate::Execute::held_back) is let go: 1 then, and
/// 0 before. The controller alone writes it.
pub const LET_GO: u64 = 24;

/// All words of a block, to be wiped before it is somebody else's.
pub const WORDS: [u64; 7] = [STOP, ALLOCATIONS, OUTSIDE_KIB, GRAPHS, REACHED, PASSED, LET_GO];
