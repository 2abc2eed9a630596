//! Executions on the host: this thread waits for doorbells, runs operator after operator and copies the outputs.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pswitch_device::{Device, DeviceError, DeviceSlice, ExecutionStream, doorbell};
use pswitch_protocol::{Executed, FaultClass, PlacedTensor, control, monotonic_ns};

use crate::error::{RunError, WorkerError};
use crate::executable::Watch;
use crate::work::{Model, Shared, Work, place_outputs};

/// Longest that a worker which waits for a group does not look at its stop flag.
const STOP_LATENCY: Duration = Duration::from_millis(20);

/// Runs one execution. The inner error is the execution's, the outer one the controller's.
pub(crate) fn run(
    shared: &Shared,
    model: &mut Model,
    work: &Work<'_>,
) -> Result<Result<Executed, RunError>, WorkerError> {
    if let Err(error) = model.lie_at(work.order.home, shared) {
        return Ok(Err(error));
    }
    let groups = if work.order.resident { Vec::new() } else { model.groups(shared, false)? };
    let mut watch = ExecutionWatch {
        device: &*shared.device,
        doorbells: groups.into_iter().peekable(),
        deadline: work.deadline,
        stop: shared.control.word(shared.block + control::STOP)?,
        waited: Duration::ZERO,
        first_group_ns: None,
        profile: work.order.profile.map(|_| Vec::with_capacity(model.executable.nodes())),
    };
    let result = watch
        .wait(&work.input_doorbell)
        .and_then(|()| {
            // A doorbell for inputs is rung for one execution: whoever has waited for it clears it.
            shared
                .device
                .set_word(&work.input_doorbell, doorbell::CLEAR)
                .map_err(|error| transfer_fault(&error))
        })
        .and_then(|()| {
            watch.waited = Duration::ZERO;
            let begin_ns = monotonic_ns();
            // SAFETY: the inputs lie in the pool, inside of what the controller has leased to this execution; the
            // watch waits for each group before the node that uses it.
            unsafe { model.executable.run(&work.inputs, &mut watch) }?;
            let outputs = write_outputs(shared, model, work)?;
            let waited_ns = u64::try_from(watch.waited.as_nanos()).unwrap_or(u64::MAX);
            let first_layer_ns = watch.first_group_ns.unwrap_or(begin_ns);
            Ok(Executed { outputs, first_layer_ns, finished_ns: monotonic_ns(), waited_ns })
        });
    if let (Some(region), Some(launches), Ok(_)) = (work.order.profile, &watch.profile, &result) {
        let times = node_times(launches);
        shared.slots.write(region.offset, &times)?;
        let wait_us = measure_wait(shared, &work.input_doorbell)?.as_secs_f32() * 1e6;
        // A copy costs the same beside computation: another thread makes it.
        let costs = [wait_us, 0.0].map(f32::to_le_bytes).concat();
        shared.slots.write(region.offset + times.len() as u64, &costs)?;
    }
    model.executable.clear();
    Ok(result)
}

fn write_outputs(shared: &Shared, model: &Model, work: &Work<'_>) -> Result<Vec<PlacedTensor>, RunError> {
    let placed = place_outputs(&model.executable.outputs()?, work.order.outputs, &shared.slots)?;
    for (index, tensor) in placed.iter().enumerate() {
        // Offsets are inside of a mapping, so they fit an address.
        #[allow(clippy::cast_possible_truncation)]
        let offset = tensor.at.offset as usize;
        // SAFETY: the place is inside of the mapping and given to this execution alone.
        unsafe { model.executable.copy_output(index, shared.slots.as_ptr().add(offset)) }?;
    }
    Ok(placed)
}

/// Waits for groups, watches the stop flag and takes the time of every node.
struct ExecutionWatch<'a, D: Iterator<Item = (u32, DeviceSlice)>> {
    device: &'a dyn Device,
    doorbells: std::iter::Peekable<D>,
    deadline: Instant,
    stop: &'a AtomicU32,
    waited: Duration,
    /// When what the first node that waits waits for had landed.
    first_group_ns: Option<u64>,
    /// When each node was launched, and how much waiting there was before.
    profile: Option<Vec<(Instant, Duration)>>,
}

impl<D: Iterator<Item = (u32, DeviceSlice)>> ExecutionWatch<'_, D> {
    fn wait(&mut self, word: &DeviceSlice) -> Result<(), RunError> {
        let begin = Instant::now();
        loop {
            let until = self.deadline.min(Instant::now() + STOP_LATENCY);
            match self.device.wait_doorbell(ExecutionStream::Host, word, until) {
                Ok(()) => break,
                Err(DeviceError::TimedOut { .. }) if until < self.deadline => self.check_stop()?,
                Err(error) => return Err(transfer_fault(&error)),
            }
        }
        self.waited += begin.elapsed();
        Ok(())
    }

    fn check_stop(&self) -> Result<(), RunError> {
        if self.stop.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        Err(RunError { class: FaultClass::Stopped, message: "the execution was stopped".to_owned() })
    }
}

impl<D: Iterator<Item = (u32, DeviceSlice)>> Watch for ExecutionWatch<'_, D> {
    fn before(&mut self, node: usize) -> Result<(), RunError> {
        self.check_stop()?;
        let mut waits = false;
        while let Some((_, word)) = self.doorbells.next_if(|(first, _)| *first as usize == node) {
            self.wait(&word)?;
            waits = true;
        }
        if waits {
            self.first_group_ns.get_or_insert_with(monotonic_ns);
        }
        if let Some(profile) = &mut self.profile {
            profile.push((Instant::now(), self.waited));
        }
        Ok(())
    }
}

fn transfer_fault(error: &DeviceError) -> RunError {
    RunError { class: FaultClass::Transfer, message: error.to_string() }
}

/// What a wait for a doorbell that has rung costs; clear afterwards.
fn measure_wait(shared: &Shared, word: &DeviceSlice) -> Result<Duration, DeviceError> {
    const REPEATS: u32 = 64;
    shared.device.set_word(word, doorbell::RUNG)?;
    let begun = Instant::now();
    for _ in 0..REPEATS {
        shared.device.wait_doorbell(ExecutionStream::Host, word, begun + STOP_LATENCY)?;
    }
    let took = begun.elapsed();
    shared.device.set_word(word, doorbell::CLEAR)?;
    Ok(took / REPEATS)
}

/// Microseconds of every node as little-endian `f32`, waiting left out; the last one ends now.
fn node_times(launches: &[(Instant, Duration)]) -> Vec<u8> {
    let end = launches.last().map(|&(_, waited)| (Instant::now(), waited));
    let next = launches.iter().skip(1).copied().chain(end);
    launches
        .iter()
        .zip(next)
        .flat_map(|(&(begin, waited_before), (end, waited_after))| {
            let busy = (end - begin).saturating_sub(waited_after - waited_before);
            (busy.as_secs_f32() * 1e6).to_le_bytes()
        })
        .collect()
}
