//! Batches of rows, gathered by a thread of its own while the batch before is computed.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use pswitch_device::{Device, GpuMoment, HostSlice, PinnedMemory, SharedMemory};
use pswitch_protocol::FaultClass;
use pswitch_train::{Batches, RowSource};

use crate::error::{RunError, TaskError};

/// Inputs begin at multiples of this. PyTorch's own tensors on the CPU do at those of 64, and the last bits of some kernels'
/// sums depend on it; on a GPU all allocations do.
pub(super) const ALIGNMENT_BYTES: u64 = 512;

/// One batch in pinned host memory.
pub(super) struct Batch {
    number: u64,
    /// How many rows it has.
    pub(super) rows: u64,
    memory: PinnedMemory,
    /// Taken behind the copy to a GPU; until it is passed the memory is still read.
    copied: Option<GpuMoment>,
}

impl Batch {
    /// Its first byte.
    pub(super) fn memory(&self) -> &PinnedMemory {
        &self.memory
    }

    /// The part of it with one input.
    pub(super) fn slice(&self, place: &Range<u64>) -> Result<HostSlice, RunError> {
        HostSlice::new(self.memory.clone(), place.start, place.end - place.start)
            .map_err(|error| RunError { class: FaultClass::Input, message: error.to_string() })
    }

    /// Says that it is copied until `moment` is passed.
    pub(super) fn is_copied_at(&mut self, moment: GpuMoment) {
        self.copied = Some(moment);
    }

    /// The moment of its last copy, to be taken again.
    pub(super) fn take_moment(&mut self) -> Option<GpuMoment> {
        self.copied.take()
    }

    fn await_copy(&self) -> Result<(), RunError> {
        let Some(moment) = &self.copied else { return Ok(()) };
        // Passed most often: at least a batch has been begun since. Where little is computed for one, more is queued.
        while !moment
            .has_passed()
            .map_err(|error| RunError { class: FaultClass::Model, message: error.to_string() })?
        {
            std::thread::yield_now();
        }
        Ok(())
    }
}

/// Where the inputs lie in a batch of the most rows.
#[derive(Debug, Clone)]
pub(super) struct BatchLayout {
    /// For every input of the program: the array that it comes from, the bytes of a row, and where the first row begins.
    inputs: Vec<(usize, u64, u64)>,
    bytes: u64,
}

impl BatchLayout {
    /// For inputs that take rows of these arrays, each of so many bytes.
    pub(super) fn new(inputs: impl IntoIterator<Item = (usize, u64)>, most_rows: u64) -> Option<Self> {
        let mut end = 0_u64;
        let mut places = Vec::new();
        for (array, row_bytes) in inputs {
            places.push((array, row_bytes, end));
            let bytes = row_bytes.checked_mul(most_rows)?;
            end = end.checked_add(bytes)?.checked_next_multiple_of(ALIGNMENT_BYTES)?;
        }
        Some(Self { inputs: places, bytes: end.max(ALIGNMENT_BYTES) })
    }

    /// All of it.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The bytes of every input in a batch of so many rows.
    pub(super) fn places(&self, rows: u64) -> impl Iterator<Item = Range<u64>> {
        self.inputs.iter().map(move |&(_, row_bytes, at)| at..at + row_bytes * rows)
    }
}

struct Order {
    number: u64,
    memory: PinnedMemory,
    copied: Option<GpuMoment>,
}

type Loaded = (Batch, Result<(), RunError>);

/// Gathers batches in the order in which they are asked for, and always the next one in advance.
pub(super) struct Loader {
    orders: Option<Sender<Order>>,
    loaded: Receiver<Loaded>,
    thread: Option<JoinHandle<()>>,
    current: Option<Batch>,
    /// The batch that is being loaded.
    next: Option<u64>,
    spare: Vec<Batch>,
}

impl Loader {
    /// Over memory that `device` can copy from.
    pub(super) fn new(
        source: Arc<dyn RowSource>,
        mut batches: Batches,
        layout: BatchLayout,
        device: &dyn Device,
    ) -> Result<Self, TaskError> {
        let failed =
            |reason: String| TaskError::Run(RunError { class: FaultClass::OutOfMemory, message: reason });
        let memory = |_| {
            let memory = SharedMemory::create("pswitch-batch", layout.bytes())
                .and_then(|memory| device.pin(Arc::new(memory)))
                .map_err(|error| failed(error.to_string()))?;
            Ok(Batch { number: u64::MAX, rows: 0, memory, copied: None })
        };
        let spare = (0..2).map(memory).collect::<Result<Vec<_>, TaskError>>()?;
        let (orders, ordered) = channel::<Order>();
        let (done, loaded) = channel::<Loaded>();
        let thread = std::thread::Builder::new()
            .name("pswitch-batches".to_owned())
            .spawn(move || {
                while let Ok(Order { number, memory, copied }) = ordered.recv() {
                    let rows = batches.batch(number).rows;
                    let gathered = gather(source.as_ref(), &layout, &rows, &memory);
                    let batch = Batch { number, rows: rows.len() as u64, memory, copied };
                    if done.send((batch, gathered)).is_err() {
                        return;
                    }
                }
            })
            .map_err(|error| failed(format!("no thread for batches: {error}")))?;
        let (orders, thread) = (Some(orders), Some(thread));
        Ok(Self { orders, loaded, thread, current: None, next: None, spare })
    }

    /// A batch, to be used until the next one is asked for. The one that follows is loaded meanwhile.
    ///
    /// # Errors
    /// If the data cannot be read. It can be asked for again.
    pub(super) fn take(&mut self, number: u64) -> Result<&mut Batch, RunError> {
        if self.current.as_ref().is_none_or(|current| current.number != number) {
            self.spare.extend(self.current.take());
            let mut found = self.receive(number)?;
            if found.is_none() {
                self.order(number)?;
                found = self.receive(number)?;
            }
            self.current = found;
        }
        if self.next.is_none() {
            self.order(number + 1)?;
        }
        self.current.as_mut().ok_or_else(gone)
    }

    /// What is being loaded, once it is there, if it is this batch; what else it is can be loaded over.
    fn receive(&mut self, number: u64) -> Result<Option<Batch>, RunError> {
        let Some(next) = self.next.take() else { return Ok(None) };
        let (batch, gathered) = self.loaded.recv().map_err(|_| gone())?;
        if next != number {
            self.spare.push(batch);
            return Ok(None);
        }
        if let Err(error) = gathered {
            self.spare.push(batch);
            return Err(error);
        }
        Ok(Some(batch))
    }

    fn order(&mut self, number: u64) -> Result<(), RunError> {
        let (Some(orders), Some(batch)) = (&self.orders, self.spare.pop()) else { return Err(gone()) };
        if let Err(error) = batch.await_copy() {
            self.spare.push(batch);
            return Err(error);
        }
        let Batch { memory, copied, .. } = batch;
        self.next = Some(number);
        orders.send(Order { number, memory, copied }).map_err(|_| gone())
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // The thread ends when nothing more can be ordered.
        self.orders = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that gathers batches panicked");
        }
    }
}

fn gone() -> RunError {
    RunError { class: FaultClass::Input, message: "the thread that gathers batches is gone".to_owned() }
}

fn gather(
    source: &dyn RowSource,
    layout: &BatchLayout,
    rows: &[u64],
    memory: &PinnedMemory,
) -> Result<(), RunError> {
    for ((array, ..), place) in layout.inputs.iter().zip(layout.places(rows.len() as u64)) {
        let failed = |reason: String| RunError {
            class: FaultClass::Input,
            message: format!("the data cannot be read: {reason}"),
        };
        let shared = memory.memory();
        let outside = || failed("a batch has more rows than there is room for".to_owned());
        if place.end > shared.bytes() {
            return Err(outside());
        }
        let at = usize::try_from(place.start).map_err(|_| outside())?;
        let bytes = usize::try_from(place.end - place.start).map_err(|_| outside())?;
        // SAFETY: the place lies inside of the memory, which belongs to this loader alone; nobody reads a batch that is being
        // loaded, not even a GPU: its last copy is over.
        let out = unsafe { std::slice::from_raw_parts_mut(shared.as_ptr().add(at), bytes) };
        source.gather(*array, rows, out).map_err(|error| failed(error.to_string()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use pswitch_device::{LinkThrottle, open_device};
    use pswitch_model::DType;
    use pswitch_train::{ArrayInfo, TrainError};

    use super::*;

    /// Rows that hold their own numbers; the first batch cannot be read the first time.
    struct Numbers {
        arrays: Vec<ArrayInfo>,
        fails: std::sync::atomic::AtomicBool,
    }

    impl RowSource for Numbers {
        fn rows(&self) -> u64 {
            10
        }

        fn arrays(&self) -> &[ArrayInfo] {
            &self.arrays
        }

        fn gather(&self, array: usize, rows: &[u64], out: &mut [u8]) -> Result<(), TrainError> {
            if self.fails.swap(false, std::sync::atomic::Ordering::Relaxed) {
                return Err(TrainError::UnknownArray { array, arrays: 0 });
            }
            for (row, bytes) in rows.iter().zip(out.chunks_mut(8)) {
                bytes.copy_from_slice(&row.to_le_bytes());
            }
            Ok(())
        }
    }

    fn loader(fails: bool) -> (Loader, BatchLayout) {
        let arrays = vec![ArrayInfo::new("x", DType::I64, &[]).unwrap()];
        let source = Numbers { arrays, fails: fails.into() };
        let device = open_device("host".parse().unwrap(), LinkThrottle::default()).unwrap();
        let layout = BatchLayout::new([(0, 8), (0, 8)], 4).unwrap();
        let batches = Batches::new(10, 4, None, false).unwrap();
        (Loader::new(Arc::new(source), batches, layout.clone(), device.as_ref()).unwrap(), layout)
    }

    fn rows(loader: &mut Loader, layout: &BatchLayout, number: u64) -> Vec<u64> {
        let batch = loader.take(number).unwrap();
        let read = |place: Range<u64>| {
            let mut bytes = vec![0; usize::try_from(place.end - place.start).unwrap()];
            batch.memory().memory().read(place.start, &mut bytes).unwrap();
            bytes.as_chunks::<8>().0.iter().map(|it| u64::from_le_bytes(*it)).collect::<Vec<_>>()
        };
        let mut inputs: Vec<Vec<u64>> = layout.places(batch.rows).map(read).collect();
        let last = inputs.pop().unwrap();
        assert!(inputs.iter().all(|input| *input == last), "both inputs take the same rows");
        last
    }

    #[test]
    fn batches_come_in_any_order_that_they_are_asked_for() {
        let (mut loader, layout) = loader(false);
        for (number, expected) in [
            (0, &[0, 1, 2, 3][..]),
            (1, &[4, 5, 6, 7]),
            // Done again, and then a batch further back.
            (1, &[4, 5, 6, 7]),
            (0, &[0, 1, 2, 3]),
            (2, &[8, 9]),
            (3, &[0, 1, 2, 3]),
            (2, &[8, 9]),
        ] {
            assert_eq!(rows(&mut loader, &layout, number), expected, "{number}");
        }
    }

    #[test]
    fn what_could_not_be_read_is_tried_again() {
        let (mut loader, layout) = loader(true);
        let error = loader.take(0).err().unwrap();
        assert!(error.message.starts_with("the data cannot be read"), "{}", error.message);
        assert_eq!(rows(&mut loader, &layout, 0), [0, 1, 2, 3]);
    }

    #[test]
    fn layouts_that_no_memory_has_are_none() {
        assert!(BatchLayout::new([(0, u64::MAX / 2)], 4).is_none());
        assert_eq!(BatchLayout::new([(0, 8), (1, 513)], 2).unwrap().bytes(), 512 + 1536);
    }
}
