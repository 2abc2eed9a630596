//! What every backend must do, as tests: one suite, run for each of them.
//!
//! A backend's test crate writes a function that makes a [`Fixture`] and calls
//! [`conformance_suite!`](crate::conformance_suite) with it:
//!
//! ```text
//! fn fixture() -> Fixture { .. }
//! pswitch_device::conformance_suite!(fixture);
//! ```
//!
//! The cases panic where a backend does not conform. They look at device memory only through copies and words, so that
//! they hold for memory that the CPU cannot see.

mod copies;
mod doorbells;
mod refusals;
mod sharing;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{
    CopyStream, Device, DeviceError, DeviceMemory, DeviceSlice, ExecutionStream, HostSlice, SharedMemory,
    doorbell,
};

pub use copies::*;
pub use doorbells::*;
pub use refusals::*;
pub use sharing::*;

/// A backend, ready to be tested.
pub struct Fixture {
    /// The device.
    pub device: Arc<dyn Device>,
    /// A stream on which it executes.
    pub execution: ExecutionStream,
    /// Blocks until all that was launched on [`execution`](Self::execution) is done.
    pub synchronize: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Fixture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fixture").field("device", &self.device).field("execution", &self.execution).finish()
    }
}

/// Makes a test of every case. Takes a function that makes a [`Fixture`]. Belongs into an integration test, whose binary
/// starts itself again as the other process where a case needs one.
#[macro_export]
macro_rules! conformance_suite {
    ($fixture:path) => {
        $crate::conformance_suite! { @cases $fixture:
            memory_begins_with_zeros,
            copies_at_odd_places_and_of_odd_sizes_arrive,
            many_small_copies_arrive_in_order,
            what_is_set_aside_within_the_device_is_there_before_it_is_overwritten,
            lent_memory_is_copied,
            copies_of_nothing_do_nothing,
            copies_keep_their_memory_alive,
            both_directions_at_once_do_not_mix,
            a_dropped_stream_finishes_its_queue,
            events_complete_in_order,
            an_event_waits_no_longer_than_its_deadline,
            a_stream_waits_for_events_of_another,
            a_word_follows_the_copies_before_it,
            words_can_be_set_and_read_past_all_streams,
            a_stream_clears_a_range_of_words,
            a_wait_after_the_ring_goes_on,
            a_wait_before_the_ring_is_released,
            many_waiters_are_released,
            poison_releases_waiters,
            a_blocking_wait_ends_at_its_deadline,
            ranges_outside_are_refused,
            unequal_copies_are_refused,
            what_is_no_word_is_refused,
            foreign_memory_is_refused,
            impossible_allocations_are_refused,
            malformed_handles_are_refused,
            an_opened_handle_is_the_same_memory,
            memory_outlives_its_maker_while_it_is_open,
        }

        #[test]
        fn another_process_shares_the_memory() {
            let peer = $crate::conformance::this_binary_as_peer(module_path!(), "peer_process");
            $crate::conformance::another_process_shares_the_memory(&$fixture(), peer);
        }

        #[test]
        #[ignore = "the other process of `another_process_shares_the_memory`, which starts it"]
        fn peer_process() {
            $crate::conformance::peer_process(&$fixture());
        }
    };
    (@cases $fixture:path: $($case:ident,)*) => {
        $(
            #[test]
            fn $case() {
                $crate::conformance::$case(&$fixture());
            }
        )*
    };
}

/// Longer than anything here takes, short enough for a test to fail.
const PATIENCE: Duration = Duration::from_secs(30);

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// What a device did, or the test fails.
#[track_caller]
fn done<T>(result: Result<T, DeviceError>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("the device failed: {error} ({error:?})"),
    }
}

/// What a device refused to do.
#[track_caller]
fn refused<T>(result: Result<T, DeviceError>) -> DeviceError {
    match result {
        Ok(_) => panic!("the device should have refused"),
        Err(error) => error,
    }
}

impl Fixture {
    fn allocate(&self, bytes: u64) -> Arc<dyn DeviceMemory> {
        done(self.device.allocate(bytes))
    }

    fn stream(&self) -> Box<dyn CopyStream> {
        done(self.device.copy_stream("conformance"))
    }

    /// Pinned memory that holds `content`.
    fn pinned(&self, content: &[u8]) -> HostSlice {
        let bytes = content.len() as u64;
        let memory = done(SharedMemory::create("conformance", bytes.max(1)));
        let slice = done(HostSlice::new(done(self.device.pin(Arc::new(memory))), 0, bytes));
        done(slice.write(0, content));
        slice
    }

    /// Writes `content` at the begin of a slice and waits for it.
    fn put(&self, to: &DeviceSlice, content: &[u8]) {
        let mut stream = self.stream();
        done(stream.copy_in(&self.pinned(content), &done(to.sub(0, content.len() as u64))));
        done(done(stream.record()).wait(soon()));
    }

    /// All bytes of a slice.
    fn get(&self, from: &DeviceSlice) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(from.bytes()).expect("tests use little memory")];
        let pinned = self.pinned(&content);
        let mut stream = self.stream();
        done(stream.copy_out(from, &pinned));
        done(done(stream.record()).wait(soon()));
        done(pinned.read(0, &mut content));
        content
    }

    /// Waits on the execution stream until a doorbell has been rung or poisoned, as a worker does.
    fn wait(&self, word: &DeviceSlice, deadline: Instant) -> Result<(), DeviceError> {
        self.device.wait_doorbell(self.execution, word, deadline)?;
        (self.synchronize)();
        // A stream that cannot fail by itself has gone on; the word tells why.
        match self.device.word(word)? {
            doorbell::POISONED => Err(DeviceError::Poisoned),
            doorbell::CLEAR => panic!("the stream went on before the doorbell was rung"),
            _ => Ok(()),
        }
    }
}

fn whole(memory: &Arc<dyn DeviceMemory>) -> DeviceSlice {
    done(DeviceSlice::new(Arc::clone(memory), 0, memory.bytes()))
}

fn slice(memory: &Arc<dyn DeviceMemory>, offset: u64, bytes: u64) -> DeviceSlice {
    done(DeviceSlice::new(Arc::clone(memory), offset, bytes))
}

/// Bytes in which every place differs from its neighbours and from other seeds.
fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..bytes).map(|_| next()).collect()
}
