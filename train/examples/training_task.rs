//! A training task without libtorch: a line is fitted by SGD, the process "dies", and another goes on from the checkpoint
//! to the very same weights.
//!
//! ```sh
//! cargo run -p pswitch-train --example training_task
//! ```

use std::borrow::Cow;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::Duration;

use pswitch_model::DType;
use pswitch_train::{
    Batches, CheckpointState, DataConfig, Dataset, Position, Progress, ProgressEvent, RowSource, SavedTensor,
    TaskConfig, latest_checkpoint, write_checkpoint,
};

const CONFIG: &str = "
program: line.pt2
optimizer: {kind: sgd, lr: 0.05}
schedule: {kind: cosine, warm_up: 20}
data: {files: [points.npy], batch_size: 16}
length: {epochs: 10}
seed: 3
checkpoint: {folder: checkpoints, every_steps: 25}
";

fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("task.yaml"), CONFIG)?;
    fs::write(folder.path().join("points.npy"), points())?;
    let config = TaskConfig::open(&folder.path().join("task.yaml"))?;

    let whole = train(&config, u64::MAX)?;
    fs::remove_dir_all(checkpoints(&config))?;
    train(&config, 60)?;
    println!("the process dies after step 60");
    let resumed = train(&config, u64::MAX)?;

    println!("without the death: {whole:?}, with it: {resumed:?}");
    assert_eq!(whole, resumed);
    Ok(())
}

/// 200 points of the line y = 2 x - 1, as `numpy.save` writes them.
fn points() -> Vec<u8> {
    let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (200, 2), }\n";
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend([u8::try_from(header.len()).expect("it is short"), 0]);
    file.extend(header.as_bytes());
    for point in 0..200u8 {
        let x = f32::from(point) / 100.0 - 1.0;
        file.extend([x, 2.0 * x - 1.0].iter().flat_map(|value| value.to_le_bytes()));
    }
    file
}

fn checkpoints(config: &TaskConfig) -> &Path {
    &config.checkpoint.as_ref().expect("it is configured").folder
}

/// Trains to the end, or until the process dies; returns slope and offset.
fn train(config: &TaskConfig, dies_after: u64) -> Result<[f32; 2], Box<dyn Error>> {
    let DataConfig::Files { files, batch_size, shuffle, drop_last } = &config.data else {
        return Err("the example has files".into());
    };
    let data = Dataset::open(files)?;
    let mut batches = Batches::new(data.rows(), *batch_size, shuffle.then_some(config.seed), *drop_last)?;
    let total_steps = config.total_steps(batches.per_epoch())?;

    let mut weights = [0f32; 2];
    let mut position = Position { step: 0, samples: 0, seed: config.seed };
    if let Some(checkpoint) = latest_checkpoint(checkpoints(config))? {
        position = checkpoint.state().position;
        for (weight, tensor) in weights.iter_mut().zip(checkpoint.model()) {
            *weight = f32::from_le_bytes(tensor.bytes.try_into()?);
        }
        println!("going on from step {}", position.step);
    }

    let mut clock = Duration::ZERO;
    let mut progress = Progress::new(position.step, clock, Duration::from_secs(10));
    while position.step < total_steps.min(dies_after) {
        let rows = batches.batch(position.step).rows;
        let mut bytes = vec![0; rows.len() * 8];
        data.gather(0, &rows, &mut bytes)?;
        let rate = config.schedule.rate(config.optimizer.learning_rate(), position.step, total_steps);
        let loss = step(&mut weights, &bytes, rate);

        position.step += 1;
        position.samples += rows.len() as u64;
        // A made up clock, as `Progress` reads none.
        let duration = Duration::from_millis(2);
        clock += duration;
        let samples = rows.len() as u64;
        progress.handle(clock, ProgressEvent::StepFinished { loss, samples, duration })?;
        if position.step.is_multiple_of(config.log_every_steps) {
            print!("{}", progress.line(clock, rate).to_json());
        }
        if let Some(checkpoint) = &config.checkpoint
            && position.step.is_multiple_of(checkpoint.every_steps)
        {
            let state = CheckpointState { position, optimizer: config.optimizer.kind() };
            let tensors = ["a.slope", "b.offset"].into_iter().zip(weights).map(|(name, weight)| {
                let bytes = weight.to_le_bytes().to_vec();
                SavedTensor::of_model(name, DType::F32, &[], || Ok(Cow::Owned(bytes)))
            });
            write_checkpoint(&checkpoint.folder, checkpoint.keep, &state, tensors)?;
        }
    }
    Ok(weights)
}

/// One step over points that lie in `bytes`; returns the mean square error ahead of it.
#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // weights are 32-bit floats, points few
fn step([slope, offset]: &mut [f32; 2], bytes: &[u8], rate: f64) -> f64 {
    let values: Vec<_> = bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect();
    let points = values.as_chunks::<2>().0;
    let (mut loss, mut by_slope, mut by_offset) = (0f32, 0f32, 0f32);
    for [x, y] in points {
        let error = *slope * x + *offset - y;
        loss += error * error;
        by_slope += 2.0 * error * x;
        by_offset += 2.0 * error;
    }
    let scale = rate as f32 / points.len() as f32;
    *slope -= scale * by_slope;
    *offset -= scale * by_offset;
    f64::from(loss) / points.len() as f64
}
