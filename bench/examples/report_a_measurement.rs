//! Measures copies to the host device and tells of them as `pswitch bench` does: a table, a goal, JSON.
//!
//! Run with `cargo run --release -p pswitch-bench --example report_a_measurement`.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pswitch_bench::{Goal, Machine, Report, Samples, Table};
use pswitch_device::{DeviceId, DeviceSlice, HostSlice, LinkThrottle, SharedMemory, open_device};

const SIZES_BYTES: [u64; 3] = [64 << 10, 1 << 20, 16 << 20];
const COPIES: usize = 50;

fn main() -> Result<(), Box<dyn Error>> {
    let device = open_device(DeviceId::Host(0), LinkThrottle::default())?;
    let from = device.pin(Arc::new(SharedMemory::create("example", SIZES_BYTES[2])?))?;
    let to = device.allocate(SIZES_BYTES[2])?;
    let mut stream = device.copy_stream("example")?;

    let mut table = Table::new(["bytes", "copies", "median ms", "p99 ms", "spread %"]);
    let mut results = Vec::new();
    let mut tail = f64::NAN;
    for bytes in SIZES_BYTES {
        let mut samples = Samples::with_capacity(COPIES);
        for _ in 0..COPIES {
            let begun = Instant::now();
            stream.copy_in(
                &HostSlice::new(from.clone(), 0, bytes)?,
                &DeviceSlice::new(to.clone(), 0, bytes)?,
            )?;
            stream.record()?.wait(begun + Duration::from_secs(10))?;
            samples.push_ms(begun.elapsed());
        }
        let Some(summary) = samples.summary() else { continue };
        table.push([
            bytes.to_string(),
            summary.count.to_string(),
            format!("{:.3}", summary.median),
            format!("{:.3}", summary.p99),
            format!("{:.1}", summary.spread_percent),
        ]);
        tail = summary.p99 / summary.median;
        results.push(serde_json::json!({"bytes": bytes, "copy_ms": summary}));
    }
    let report = Report {
        command: "copies",
        tables: vec![table],
        goals: vec![Goal::at_most("p99 over median of the largest", 1.5, "x", tail)],
        results: results.into(),
    };
    let machine = Machine::here();
    print!("{}", report.text(&machine));
    println!("\nand with --out:\n{:#}", report.json(&machine, &[]));
    Ok(())
}
