//! The engine: streams plans over a device.

mod lane;
mod rehearsal;
mod room;
mod transfer;

use std::sync::Arc;

use pswitch_device::{CopyStream, Device, DeviceError, DeviceSlice, doorbell};

use crate::TransferError;
use lane::{Lane, Reporter};
use rehearsal::Rehearsal;
use room::Room;
pub use transfer::{BringBack, CopyIn, CopyOut, CopyWithin, GroupCopy, Transfer, TransferId, TransferReport};

/// Told about every transfer, once, when it has landed or failed.
pub type OnLanded = Box<dyn Fn(TransferId, Result<TransferReport, TransferError>) + Send>;

/// Moves models onto a device and state back, and rings a doorbell for every group on the way.
///
/// It has three streams, each with a thread that reports what has landed: for weights, for inputs alone, which overtake
/// the weights of another transfer under way, and for state that makes room for weights or comes back. Within a stream all is
/// done in order. Between streams there is none, but that weights wait for the state in their place to leave it: piece by piece,
/// while those ahead of them come in, since the link is full duplex. State that is [set aside](Transfer::set_aside) does not cross
/// it at all.
///
/// A call checks, enqueues everything and returns; it never waits for the device. May be shared between threads.
///
/// # Reports
///
/// Every transfer that was accepted is reported exactly once, by a call of `on_landed` from a thread of the engine, one
/// call at a time. A report, of a failure too, means that the device is done with all memory of the transfer. After a
/// failure some doorbells may have rung and others never will: it is for the caller to poison them. The callback should
/// be short, since other reports wait for it; it may start transfers. A panic in it is logged and goes no further.
///
/// Dropping the engine waits until everything under way has landed and been reported, and joins its threads; so the
/// callback must not be what drops it.
///
/// See the [crate's example](crate#streaming).
#[derive(Debug)]
pub struct Engine {
    device: Arc<dyn Device>,
    weights: Lane,
    inputs: Lane,
    state: Lane,
    rehearsal: Rehearsal,
}

impl Engine {
    /// An engine for one device.
    ///
    /// # Errors
    /// [`TransferError::Device`] if a stream cannot be opened or there is no memory to rehearse with, some 100 KiB on a GPU;
    /// [`TransferError::Thread`] if a thread cannot be started.
    pub fn new(device: Arc<dyn Device>, on_landed: OnLanded) -> Result<Self, TransferError> {
        let reporter = Arc::new(Reporter::new(on_landed));
        let lane = |name| Lane::open(device.as_ref(), name, Arc::clone(&reporter));
        let (weights, inputs, state) = (lane("weights")?, lane("inputs")?, lane("state")?);
        let rehearsal = Rehearsal::new(&device).map_err(cannot(PREPARE))?;
        Ok(Self { device, weights, inputs, state, rehearsal })
    }

    /// Enqueues a transfer: copies the inputs, rings theirs, then copies group after group and rings for each; doorbells to
    /// be cleared are so before the last one rings. Without groups it goes by the stream for inputs.
    ///
    /// # Errors
    /// [`TransferError::Device`] if something in it cannot be right (ends of different lengths, memory of another device,
    /// a doorbell that is no word). Nothing is enqueued then, and nothing will be reported. Whatever the device fails at
    /// later is reported.
    pub fn start(&self, transfer: Transfer) -> Result<(), TransferError> {
        self.start_and(transfer, || {})
    }

    /// As [`start`](Self::start), with something to do as soon as the inputs and the first group are enqueued: enqueueing the
    /// others takes some microseconds each, in which whoever waits for the first may get ready. It is done unless the transfer is
    /// refused.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_and(&self, transfer: Transfer, meanwhile: impl FnOnce()) -> Result<(), TransferError> {
        let Transfer { id, clear, inputs, input_doorbell, groups, save, set_aside } = transfer;
        let mut bytes = self.check_in(inputs.iter().chain(groups.iter().map(|group| &group.copy)))?;
        for CopyOut { from, to } in &save {
            let saved = self.check_copy(from.bytes(), to.bytes(), from).map_err(cannot(COPY_OUT))?;
            bytes = bytes.saturating_add(saved);
        }
        self.check_within(&set_aside)?;
        self.check_clear(&clear)?;
        for word in input_doorbell.iter().chain(groups.iter().map(|group| &group.doorbell)) {
            self.check_word(word).map_err(cannot(WRITE_WORD))?;
        }
        let mut room = Room::new(&save, &set_aside, &self.state).map_err(cannot(MAKE_ROOM))?;
        let lane = if groups.is_empty() { &self.inputs } else { &self.weights };
        // As late as may be: computation waits for the first groups, and seldom for the last.
        let clear_at = groups.len().saturating_sub(1);
        lane.run(id, bytes, |stream| {
            let mut meanwhile = Some(meanwhile);
            let sent = send_inputs(stream, &inputs, input_doorbell.as_ref()).and_then(|()| {
                if groups.is_empty() {
                    clear_words(stream, &clear)?;
                }
                for (index, GroupCopy { copy, doorbell: word }) in groups.iter().enumerate() {
                    room.copy_in(stream, copy)?;
                    if index == clear_at {
                        clear_words(stream, &clear)?;
                    }
                    write_word(stream, word, doorbell::RUNG)?;
                    if let Some(meanwhile) = meanwhile.take() {
                        meanwhile();
                    }
                }
                Ok(())
            });
            if let Some(meanwhile) = meanwhile.take() {
                meanwhile();
            }
            let saved = room.finish(stream, sent.is_ok());
            sent.and(saved)
        });
        Ok(())
    }

    /// Enqueues the way back of state that was set aside or saved, behind all that is still being saved. What crosses the link meanwhile
    /// comes in between.
    ///
    /// # Errors
    /// As [`start`](Engine::start).
    pub fn bring_back(&self, back: BringBack) -> Result<(), TransferError> {
        let BringBack { id, clear, within, copies } = back;
        let bytes = self.check_in(copies.iter())?;
        self.check_within(&within)?;
        self.check_clear(&clear)?;
        self.state.run(id, bytes, |stream| {
            let mut back = within.iter();
            back.try_for_each(|copy| stream.copy_within(&copy.from, &copy.to))
                .map_err(cannot(COPY_WITHIN))?;
            copies.iter().try_for_each(|copy| room::bring_back(stream, copy)).map_err(cannot(COPY_IN))?;
            clear_words(stream, &clear)
        });
        Ok(())
    }

    /// Does what transfers begin with, for nothing, and returns at once: a short copy and a word by each of the streams for
    /// weights and for inputs that has no transfer under way. Nobody is told of it.
    ///
    /// When a stream has not been used for some milliseconds, the driver's code and data have left the processor's caches: with 16
    /// cores of a virtual machine beside an H200 the first copy took 30 to 60 us to enqueue then, and 6 where this had come
    /// within a quarter of a millisecond.
    ///
    /// # Errors
    /// [`TransferError::Device`].
    pub fn rehearse(&self) -> Result<(), TransferError> {
        let mut idle = [&self.weights, &self.inputs].into_iter().filter(|lane| lane.is_idle());
        idle.try_for_each(|lane| lane.enqueue(|stream| self.rehearsal.run(stream)))
    }

    /// Bytes of copies to the device, if nothing is wrong with them.
    fn check_in<'a>(&self, copies: impl Iterator<Item = &'a CopyIn>) -> Result<u64, TransferError> {
        let mut bytes = 0_u64;
        for CopyIn { from, to } in copies {
            let checked = self.check_copy(from.bytes(), to.bytes(), to).map_err(cannot(COPY_IN))?;
            bytes = bytes.saturating_add(checked);
        }
        Ok(bytes)
    }

    fn check_within(&self, copies: &[CopyWithin]) -> Result<(), TransferError> {
        let check = |CopyWithin { from, to }: &CopyWithin| {
            self.check_device(from)?;
            let bytes = self.check_copy(from.bytes(), to.bytes(), to)?;
            if !from.overlaps(to) {
                return Ok(());
            }
            Err(DeviceError::OverlappingCopy { from_offset: from.offset(), to_offset: to.offset(), bytes })
        };
        copies.iter().try_for_each(check).map_err(cannot(COPY_WITHIN))
    }

    fn check_clear(&self, clear: &[DeviceSlice]) -> Result<(), TransferError> {
        for words in clear {
            self.check_device(words).map_err(cannot(CLEAR))?;
            if !words.bytes().is_multiple_of(4) || !words.address().0.is_multiple_of(4) {
                let (offset, bytes) = (words.offset(), words.bytes());
                return Err(cannot(CLEAR)(DeviceError::NotAWord { offset, bytes }));
            }
        }
        Ok(())
    }

    fn check_copy(&self, from_bytes: u64, to_bytes: u64, there: &DeviceSlice) -> Result<u64, DeviceError> {
        self.check_device(there)?;
        if from_bytes == to_bytes {
            Ok(from_bytes)
        } else {
            Err(DeviceError::UnequalCopy { from_bytes, to_bytes })
        }
    }

    fn check_word(&self, word: &DeviceSlice) -> Result<(), DeviceError> {
        self.check_device(word)?;
        if word.bytes() == 4 && word.address().0.is_multiple_of(4) {
            Ok(())
        } else {
            Err(DeviceError::NotAWord { offset: word.offset(), bytes: word.bytes() })
        }
    }

    fn check_device(&self, slice: &DeviceSlice) -> Result<(), DeviceError> {
        let (device, memory) = (self.device.properties().id, slice.memory().device());
        if memory == device { Ok(()) } else { Err(DeviceError::ForeignMemory { device, memory }) }
    }
}

/// What the device is asked for, as errors say it.
const COPY_IN: &str = "copy to the device";
const COPY_OUT: &str = "copy from the device";
const COPY_WITHIN: &str = "copy within the device";
const MAKE_ROOM: &str = "let state make room";
const WRITE_WORD: &str = "write a doorbell";
const CLEAR: &str = "clear doorbells";
const PREPARE: &str = "make memory to rehearse with";

fn send_inputs(
    stream: &mut dyn CopyStream,
    inputs: &[CopyIn],
    input_doorbell: Option<&DeviceSlice>,
) -> Result<(), TransferError> {
    let copy_in = |copy: &CopyIn| stream.copy_in(&copy.from, &copy.to).map_err(cannot(COPY_IN));
    inputs.iter().try_for_each(copy_in)?;
    input_doorbell.map_or(Ok(()), |word| write_word(stream, word, doorbell::RUNG))
}

fn clear_words(stream: &mut dyn CopyStream, clear: &[DeviceSlice]) -> Result<(), TransferError> {
    clear.iter().try_for_each(|words| stream.clear_words(words).map_err(cannot(CLEAR)))
}

fn write_word(stream: &mut dyn CopyStream, word: &DeviceSlice, value: u32) -> Result<(), TransferError> {
    stream.write_word(word, value).map_err(cannot(WRITE_WORD))
}

fn cannot(what: &'static str) -> impl FnOnce(DeviceError) -> TransferError {
    move |source| TransferError::Device { what, source }
}
