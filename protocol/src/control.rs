//! Words of shared memory between a controller and each of its workers: read and written at any time, without a message.

/// Length of a worker's block in the control page. A cache line: two workers never share one.
pub const BLOCK_BYTES: u64 = 64;

/// Offset in the block of the stop flag: the controller sets it to 1, the worker looks at it between operators. What runs
/// as graphs on a GPU is not stopped.
pub const STOP: u64 = 0;

/// Offset in the block of the number of allocations of device memory that the worker's libtorch has made outside of the
/// pool since it began. Wraps around.
pub const ALLOCATIONS: u64 = 4;

/// Offset in the block of the KiB that the worker's libtorch has of device memory outside of the pool now.
pub const OUTSIDE_KIB: u64 = 8;

/// Offset in the block of the number of graphs that the worker has captured since it began. Wraps around.
pub const GRAPHS: u64 = 12;
