//! Streams a made-up model over a slow link of the host device, as one copy and as planned, while a worker computes
//! behind the doorbells; prints when each group was predicted to land and when it did.
//!
//! `cargo run -p pswitch-transfer --example stream_a_span`

use std::error::Error;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use pswitch_device::{
    Device, DeviceId, DeviceMemory, DeviceSlice, ExecutionStream, HostSlice, LinkThrottle, PinnedMemory,
    SharedMemory, open_device,
};
use pswitch_transfer::{
    Algorithm, CopyIn, Engine, GroupCopy, Layer, LinkCosts, Prediction, Profile, Transfer, TransferId, plan,
    predict,
};

/// Twenty layers of 100 to 480 kB and 2 ms, and a link that moves 100 MB/s.
fn profile() -> Profile {
    let layers = (0..20).map(|index| Layer {
        name: format!("layer{index}"),
        bytes: 100_000 + 20_000 * index,
        compute_us: 2000.0,
        host_bytes: 0,
    });
    Profile {
        model: "made up".to_owned(),
        link: LinkCosts { bandwidth_bytes_per_s: 100e6, per_copy_us: 300.0, per_wait_us: 50.0 },
        layers: layers.collect(),
    }
}

/// The groups of a plan over the span and its home, with a doorbell behind the home for each.
fn groups(
    prediction: &Prediction,
    span: &PinnedMemory,
    pool: &Arc<dyn DeviceMemory>,
) -> Result<Vec<GroupCopy>, Box<dyn Error>> {
    let mut offset = 0;
    let mut groups = Vec::new();
    for (times, word) in prediction.groups.iter().zip(0..) {
        let bytes = times.group.bytes;
        groups.push(GroupCopy {
            copy: CopyIn {
                from: HostSlice::new(span.clone(), offset, bytes)?,
                to: DeviceSlice::new(pool.clone(), offset, bytes)?,
            },
            doorbell: DeviceSlice::new(pool.clone(), span.bytes() + 4 * word, 4)?,
        });
        offset += bytes;
    }
    Ok(groups)
}

/// Waits for each group and spends the time of its layers; returns how long everything took since `begun`.
fn compute(
    device: &dyn Device,
    groups: &[GroupCopy],
    prediction: &Prediction,
    begun: Instant,
) -> Result<Duration, Box<dyn Error>> {
    for (group, times) in groups.iter().zip(&prediction.groups) {
        device.wait_doorbell(ExecutionStream::Host, &group.doorbell, begun + Duration::from_secs(10))?;
        println!(
            "  layers {:>2}-{:<2}  {:>7} bytes   predicted to land at {:>5.1} ms   used from {:>5.1} ms",
            times.group.first_layer,
            times.group.last_layer,
            times.group.bytes,
            times.lands_us / 1e3,
            begun.elapsed().as_secs_f64() * 1e3,
        );
        thread::sleep(Duration::from_secs_f64((times.ends_us - times.starts_us) / 1e6));
    }
    Ok(begun.elapsed())
}

fn main() -> Result<(), Box<dyn Error>> {
    let profile = profile();
    let bytes = profile.layers.iter().map(|layer| layer.bytes).sum();
    let throttle = LinkThrottle {
        bandwidth_bytes_per_s: Some(profile.link.bandwidth_bytes_per_s),
        per_copy: Duration::from_secs_f64(profile.link.per_copy_us / 1e6),
    };
    let device = open_device(DeviceId::Host(0), throttle)?;
    let span = device.pin(Arc::new(SharedMemory::create("span", bytes)?))?;

    let (reports, landed) = mpsc::channel();
    let on_landed = Box::new(move |_, result| reports.send(result).expect("main waits for every report"));
    let engine = Engine::new(device.clone(), on_landed)?;

    for (index, algorithm) in (0..).zip([Algorithm::Whole, Algorithm::Optimal]) {
        let plan = plan(&profile, algorithm)?;
        let prediction = predict(&profile, &plan.cuts())?;
        let pool = device.allocate(bytes + 4 * profile.layers.len() as u64)?;
        let groups = groups(&prediction, &span, &pool)?;

        let begun = Instant::now();
        engine.start(Transfer { groups: groups.clone(), ..Transfer::new(TransferId(index)) })?;
        println!("{algorithm}: {} groups", groups.len());
        let took = compute(device.as_ref(), &groups, &prediction, begun)?;
        landed.recv()??;
        println!("  predicted {:.1} ms, took {:.1} ms\n", plan.predicted_us / 1e3, took.as_secs_f64() * 1e3);
    }
    Ok(())
}
