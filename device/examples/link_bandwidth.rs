//! What the link of a device gives: one large copy against the same bytes in many, with and without the doorbells and
//! events that streaming a model needs.
//!
//! Run with `cargo run --release -p pswitch-device --example link_bandwidth [DEVICE]`. Without an argument it takes the
//! first GPU, or the host where there is none.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pswitch_device::{
    CopyStream, Device, DeviceError, DeviceId, DeviceSlice, Event, HostSlice, LinkThrottle, SharedMemory,
    cuda_devices, doorbell, open_device,
};

const MIB: u64 = 1 << 20;
const COUNTS: [u64; 5] = [1, 8, 16, 64, 512];
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<(), Box<dyn Error>> {
    let id = match std::env::args().nth(1) {
        Some(id) => id.parse()?,
        None => cuda_devices().map_or(DeviceId::Host(0), |devices| devices[0].id),
    };
    let device = open_device(id, LinkThrottle::default())?;
    println!("{id}: {}", device.properties().name);
    if let Some(gpu) = &device.properties().gpu {
        let link = gpu.pci_link.as_deref().unwrap_or("of a kind that the system does not tell");
        let driver = gpu.driver_version.as_deref().unwrap_or("?");
        println!("{}, driver {driver}, CUDA {}.{}", gpu.uuid, gpu.cuda_version.0, gpu.cuda_version.1);
        println!("PCIe {}: link {link}", gpu.pci_address);
    }
    let (bytes, rounds) = if matches!(id, DeviceId::Cuda(_)) { (240 * MIB, 41) } else { (16 * MIB, 5) };
    let rig = Rig::new(device, bytes)?;
    rig.inward(rounds)?;
    rig.outward(rounds)?;
    rig.words(rounds)?;
    Ok(())
}

/// What stands behind each copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Behind {
    Nothing,
    Doorbell,
    DoorbellAndEvent,
}

struct Rig {
    device: Arc<dyn Device>,
    host: HostSlice,
    pool: DeviceSlice,
    words: DeviceSlice,
    bytes: u64,
}

/// How long one round took: until all was enqueued, and until it was done.
struct Round {
    enqueued: Duration,
    done: Duration,
}

impl Rig {
    fn new(device: Arc<dyn Device>, bytes: u64) -> Result<Self, DeviceError> {
        let began = Instant::now();
        let memory = Arc::new(SharedMemory::create("bandwidth", bytes)?);
        // Populated, so that pinning does not have to do it.
        memory.write(0, &vec![0x5A; usize::try_from(bytes).unwrap_or(0)])?;
        let filled = Instant::now();
        let host = HostSlice::new(device.pin(memory)?, 0, bytes)?;
        let pinned = Instant::now();
        let words_bytes = 4 * COUNTS[COUNTS.len() - 1];
        // Room for both directions at once.
        let memory = device.allocate(2 * bytes + words_bytes)?;
        println!(
            "{} MiB: filled in {:.1} ms, pinned in {:.1} ms; pool allocated and zeroed in {:.1} ms\n",
            bytes / MIB,
            ms(filled - began),
            ms(pinned - filled),
            ms(pinned.elapsed())
        );
        let pool = DeviceSlice::new(memory.clone(), 0, 2 * bytes)?;
        let words = DeviceSlice::new(memory, 2 * bytes, words_bytes)?;
        Ok(Self { device, host, pool, words, bytes })
    }

    /// Enqueues the bytes in `count` pieces of nearly the same size.
    fn enqueue(&self, stream: &mut dyn CopyStream, count: u64, behind: Behind) -> Result<(), DeviceError> {
        let piece = (self.bytes / count).next_multiple_of(512);
        for k in 0..count {
            let offset = k * piece;
            let length = piece.min(self.bytes - offset);
            stream.copy_in(&self.host.sub(offset, length)?, &self.pool.sub(offset, length)?)?;
            if behind != Behind::Nothing {
                stream.write_word(&self.words.sub(4 * k, 4)?, doorbell::RUNG)?;
            }
            if behind == Behind::DoorbellAndEvent {
                stream.record()?;
            }
        }
        Ok(())
    }

    fn inward(&self, rounds: usize) -> Result<(), DeviceError> {
        let kinds = [Behind::Nothing, Behind::Doorbell, Behind::DoorbellAndEvent];
        let mut stream = self.device.copy_stream("in")?;
        let mut second = self.device.copy_stream("in-2")?;
        // Round by round, so that all see the same machine.
        let mut times: Vec<Vec<Round>> = Vec::new();
        times.resize_with(COUNTS.len() * (kinds.len() + 1), Vec::new);
        for round in 0..=rounds {
            let mut times = times.iter_mut();
            for count in COUNTS {
                for behind in kinds {
                    let began = Instant::now();
                    self.enqueue(&mut *stream, count, behind)?;
                    let measured = finish(began, &mut [&mut *stream])?;
                    keep(&mut times, round, measured);
                }
                let began = Instant::now();
                self.enqueue_by_turns(&mut [&mut *stream, &mut *second], count)?;
                let measured = finish(began, &mut [&mut *stream, &mut *second])?;
                keep(&mut times, round, measured);
            }
        }
        let best = median(times[0].iter().map(|round| round.done));
        println!("host to device, medians of {rounds}; share of the bandwidth of one copy in brackets");
        println!(
            "{:>6}  {:>24}  {:>24}  {:>24}  {:>24}",
            "copies", "copies alone", "and doorbells", "doorbells and events", "doorbells, two streams"
        );
        let mut times = times.iter();
        for count in COUNTS {
            let mut line = format!("{count:>6}");
            let mut enqueued = Duration::ZERO;
            for _ in 0..=kinds.len() {
                let Some(rounds) = times.next() else { break };
                let done = median(rounds.iter().map(|round| round.done));
                enqueued = enqueued.max(median(rounds.iter().map(|round| round.enqueued)));
                let share = 100.0 * best.as_secs_f64() / done.as_secs_f64();
                line += &format!(
                    "  {:>8.3} ms {:>5.1} ({share:>5.1})",
                    ms(done),
                    gigabytes_per_s(self.bytes, done)
                );
            }
            println!("{line}   enqueued in {:.0} us", ms(enqueued) * 1e3);
        }
        Ok(())
    }

    /// Piece by piece on one stream and the other.
    fn enqueue_by_turns(
        &self,
        streams: &mut [&mut dyn CopyStream; 2],
        count: u64,
    ) -> Result<(), DeviceError> {
        let piece = (self.bytes / count).next_multiple_of(512);
        for (k, turn) in (0..count).zip([0, 1].into_iter().cycle()) {
            let offset = k * piece;
            let length = piece.min(self.bytes - offset);
            streams[turn].copy_in(&self.host.sub(offset, length)?, &self.pool.sub(offset, length)?)?;
            streams[turn].write_word(&self.words.sub(4 * k, 4)?, doorbell::RUNG)?;
        }
        Ok(())
    }

    fn outward(&self, rounds: usize) -> Result<(), DeviceError> {
        let mut inward = self.device.copy_stream("in")?;
        let mut outward = self.device.copy_stream("out")?;
        // A mapping of its own: the two directions do not write what the other reads.
        let memory = Arc::new(SharedMemory::create("bandwidth-back", self.bytes)?);
        let back = HostSlice::new(self.device.pin(memory)?, 0, self.bytes)?;
        let first = self.pool.sub(0, self.bytes)?;
        let other = self.pool.sub(self.bytes, self.bytes)?;
        let (mut alone, mut both) = (Vec::new(), Vec::new());
        for round in 0..=rounds {
            let began = Instant::now();
            outward.copy_out(&other, &back)?;
            keep(&mut std::iter::once(&mut alone), round, finish(began, &mut [&mut *outward])?);
            let began = Instant::now();
            inward.copy_in(&self.host, &first)?;
            outward.copy_out(&other, &back)?;
            keep(&mut std::iter::once(&mut both), round, finish(began, &mut [&mut *inward, &mut *outward])?);
        }
        let alone = median(alone.iter().map(|round| round.done));
        let both = median(both.iter().map(|round| round.done));
        println!("\ndevice to host  {:>8.3} ms  {:>5.1} GB/s", ms(alone), gigabytes_per_s(self.bytes, alone));
        println!("both at once    {:>8.3} ms  {:>5.1} GB/s", ms(both), gigabytes_per_s(2 * self.bytes, both));
        Ok(())
    }

    /// Words stored and loaded past all streams.
    fn words(&self, rounds: usize) -> Result<(), DeviceError> {
        let word = self.words.sub(0, 4)?;
        let (mut stores, mut loads) = (Vec::new(), Vec::new());
        for _ in 0..=rounds {
            let began = Instant::now();
            self.device.set_word(&word, doorbell::CLEAR)?;
            let stored = Instant::now();
            self.device.word(&word)?;
            stores.push(stored - began);
            loads.push(stored.elapsed());
        }
        println!(
            "\na word stored in {:.1} us, loaded in {:.1} us",
            ms(median(stores.into_iter())) * 1e3,
            ms(median(loads.into_iter())) * 1e3
        );
        Ok(())
    }
}

/// Until the streams are done; looks all the time, to be exact.
fn finish(began: Instant, streams: &mut [&mut dyn CopyStream]) -> Result<Round, DeviceError> {
    let events =
        streams.iter_mut().map(|stream| stream.record()).collect::<Result<Vec<Arc<dyn Event>>, _>>()?;
    let enqueued = began.elapsed();
    for event in &events {
        while !event.is_complete()? {
            if began.elapsed() > PATIENCE {
                event.wait(began)?;
            }
            std::hint::spin_loop();
        }
    }
    let done = events.iter().filter_map(|event| event.completed_at()).max().unwrap_or_else(Instant::now);
    Ok(Round { enqueued, done: done - began })
}

/// The first round warms up.
fn keep<'a>(times: &mut impl Iterator<Item = &'a mut Vec<Round>>, round: usize, measured: Round) {
    if let Some(times) = times.next()
        && round > 0
    {
        times.push(measured);
    }
}

fn median(times: impl Iterator<Item = Duration>) -> Duration {
    let mut times: Vec<Duration> = times.collect();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn gigabytes_per_s(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e9
}
