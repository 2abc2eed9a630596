use std::any::Any;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use nix::errno::Errno;

use crate::clock::{make_timers_exact, sleep_until};
use crate::host::event::HostEvent;
use crate::host::link::Link;
use crate::host::{HostWord, shared_memory};
use crate::memory::{check_words, copy_length, copy_length_within};
use crate::{
    CopyStream, DeviceError, DeviceId, DeviceSlice, Event, HostSlice, SharedMemory, doorbell, futex,
};

/// A stream of copies: a thread that works off a queue.
#[derive(Debug)]
pub(super) struct HostCopyStream {
    device: DeviceId,
    name: String,
    inward: Arc<Link>,
    outward: Arc<Link>,
    // `None` only while dropping: the thread ends when it has worked off the queue and the sender is gone.
    queue: Option<Sender<Operation>>,
    thread: Option<JoinHandle<()>>,
}

/// One step of a stream. Everything is checked before it is enqueued.
#[derive(Debug)]
enum Operation {
    Copy {
        from: Place,
        to: Place,
        bytes: u64,
        link: Arc<Link>,
        enqueued_at: Instant,
    },
    /// From one place of the device's memory to another.
    CopyWithin {
        from: Place,
        to: Place,
        bytes: u64,
    },
    Word {
        word: HostWord,
        value: u32,
    },
    Event(Arc<HostEvent>),
    /// Of another stream.
    Wait(Arc<HostEvent>),
}

/// One end of a copy, which stays alive until it is done.
#[derive(Debug)]
struct Place {
    memory: Arc<SharedMemory>,
    offset: u64,
}

impl HostCopyStream {
    pub(super) fn start(
        device: DeviceId,
        name: &str,
        inward: Arc<Link>,
        outward: Arc<Link>,
    ) -> Result<Self, DeviceError> {
        let name = name.replace('\0', "");
        let (queue, operations) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(name.clone())
            .spawn(move || Worker::default().work(&operations))
            .map_err(|error| DeviceError::System {
                call: "spawning a copy stream's thread",
                source: Errno::try_from(error).unwrap_or(Errno::EAGAIN),
            })?;
        Ok(Self { device, name, inward, outward, queue: Some(queue), thread: Some(thread) })
    }

    fn enqueue(&self, operation: Operation) -> Result<(), DeviceError> {
        let ended = || DeviceError::StreamEnded { stream: self.name.clone() };
        self.queue.as_ref().ok_or_else(ended)?.send(operation).map_err(|_| ended())
    }

    fn device_place(&self, slice: &DeviceSlice) -> Result<Place, DeviceError> {
        Ok(Place { memory: shared_memory(self.device, slice)?, offset: slice.offset() })
    }
}

fn host_place(slice: &HostSlice) -> Place {
    Place { memory: Arc::clone(slice.memory().memory()), offset: slice.offset() }
}

impl CopyStream for HostCopyStream {
    fn copy_in(&mut self, from: &HostSlice, to: &DeviceSlice) -> Result<(), DeviceError> {
        let bytes = copy_length(from.bytes(), to.bytes())?;
        let (from, to) = (host_place(from), self.device_place(to)?);
        let link = Arc::clone(&self.inward);
        self.enqueue(Operation::Copy { from, to, bytes, link, enqueued_at: Instant::now() })
    }

    fn copy_out(&mut self, from: &DeviceSlice, to: &HostSlice) -> Result<(), DeviceError> {
        let bytes = copy_length(from.bytes(), to.bytes())?;
        let (from, to) = (self.device_place(from)?, host_place(to));
        let link = Arc::clone(&self.outward);
        self.enqueue(Operation::Copy { from, to, bytes, link, enqueued_at: Instant::now() })
    }

    fn copy_within(&mut self, from: &DeviceSlice, to: &DeviceSlice) -> Result<(), DeviceError> {
        let bytes = copy_length_within(from, to)?;
        let (from, to) = (self.device_place(from)?, self.device_place(to)?);
        self.enqueue(Operation::CopyWithin { from, to, bytes })
    }

    fn write_word(&mut self, word: &DeviceSlice, value: u32) -> Result<(), DeviceError> {
        let word = HostWord::new(self.device, word)?;
        self.enqueue(Operation::Word { word, value })
    }

    fn clear_words(&mut self, words: &DeviceSlice) -> Result<(), DeviceError> {
        shared_memory(self.device, words)?;
        check_words(words)?;
        words.words().try_for_each(|word| self.write_word(&word, doorbell::CLEAR))
    }

    fn record(&mut self) -> Result<Arc<dyn Event>, DeviceError> {
        let event = Arc::new(HostEvent::default());
        self.enqueue(Operation::Event(Arc::clone(&event)))?;
        Ok(event)
    }

    fn wait_event(&mut self, event: &Arc<dyn Event>) -> Result<(), DeviceError> {
        let event: Arc<dyn Any + Send + Sync> = Arc::<dyn Event>::clone(event);
        let foreign = |_| DeviceError::ForeignEvent { device: self.device };
        self.enqueue(Operation::Wait(event.downcast().map_err(foreign)?))
    }
}

impl Drop for HostCopyStream {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(stream = %self.name, "a copy stream's thread panicked");
        }
    }
}

/// The thread's side of a stream.
#[derive(Debug, Default)]
struct Worker {
    /// When the stream's last throttled copy ended, by the link's schedule, or what it waited for was complete.
    ended_at: Option<Instant>,
}

impl Worker {
    fn work(mut self, operations: &Receiver<Operation>) {
        make_timers_exact();
        while let Ok(operation) = operations.recv() {
            match operation {
                Operation::Copy { from, to, bytes, link, enqueued_at } => {
                    self.copy(&from, &to, bytes, &link, enqueued_at);
                }
                // It does not cross the link.
                Operation::CopyWithin { from, to, bytes } => copy_piece(&from, &to, 0, bytes),
                Operation::Word { word, value } => futex::store_and_wake(word.atomic(), value),
                Operation::Event(event) => event.complete(),
                Operation::Wait(event) => self.ended_at = self.ended_at.max(Some(event.await_completion())),
            }
        }
    }

    fn copy(&mut self, from: &Place, to: &Place, bytes: u64, link: &Link, enqueued_at: Instant) {
        if bytes == 0 {
            return;
        }
        let ready = self.ended_at.map_or(enqueued_at, |ended_at| ended_at.max(enqueued_at));
        let Some(reservation) = link.reserve(ready, Instant::now(), bytes) else {
            return copy_piece(from, to, 0, bytes);
        };
        sleep_until(reservation.moves_at);
        let mut done = 0;
        while done < bytes {
            let piece = reservation.piece_bytes.min(bytes - done);
            copy_piece(from, to, done, piece);
            done += piece;
            // After the piece, not before: then the copy ends when it should, not a piece's copying later.
            sleep_until(reservation.arrival(done, bytes));
        }
        self.ended_at = Some(reservation.ends_at);
    }
}

fn copy_piece(from: &Place, to: &Place, done: u64, bytes: u64) {
    from.memory
        .copy(from.offset + done, &to.memory, to.offset + done, bytes)
        .expect("both slices were checked when they were made, and their memory cannot change its size");
}
