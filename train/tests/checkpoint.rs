//! Checkpoints: what is written is read, whole or not at all, and nothing else is touched.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pswitch_model::DType;
use pswitch_train::{
    Checkpoint, CheckpointState, CheckpointTensor, FolderClaim, OptimizerKind, Position, SavedTensor,
    TrainError, check_checkpoint, latest_checkpoint, write_checkpoint, write_diverged,
};
use tempfile::TempDir;

const NAMES: [&str; 3] = ["fc.weight", "bn.num_batches_tracked", "fc.mask"];

fn state(step: u64) -> CheckpointState {
    let position = Position { step, samples: step * 32, seed: u64::MAX };
    CheckpointState { position, optimizer: OptimizerKind::AdamW }
}

fn saved<'a>(name: &str, dtype: DType, shape: &[u64], bytes: &'a [u8]) -> SavedTensor<'a> {
    SavedTensor::of_model(name, dtype, shape, move || Ok(Cow::Borrowed(bytes)))
}

/// A model of three tensors whose order by size is not that of their names, and some state of an optimizer.
fn tensors() -> Vec<SavedTensor<'static>> {
    vec![
        saved("fc.mask", DType::Bool, &[3], &[1, 0, 1]),
        saved("fc.weight", DType::F32, &[2, 1], &[1, 2, 3, 4, 5, 6, 7, 8]),
        SavedTensor::of_optimizer("exp_avg.fc.weight", DType::F32, &[2, 1], || Ok(Cow::Owned(vec![9; 8]))),
        saved("bn.num_batches_tracked", DType::I64, &[], &[5, 0, 0, 0, 0, 0, 0, 0]),
    ]
}

fn write(folder: &Path, keep: u32, step: u64) -> PathBuf {
    write_checkpoint(folder, keep, &state(step), tensors()).unwrap()
}

fn names(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

fn latest_step(folder: &Path) -> Option<u64> {
    latest_checkpoint(folder).unwrap().map(|checkpoint| checkpoint.state().position.step)
}

#[test]
fn what_is_written_is_read() {
    let folder = TempDir::new().unwrap();
    let inner = folder.path().join("not/yet/there");
    assert!(latest_checkpoint(&inner).unwrap().is_none());
    let path = write(&inner, 2, 123);
    assert_eq!(path, inner.join("step-00000123.safetensors"));

    let checkpoint = latest_checkpoint(&inner).unwrap().unwrap();
    assert_eq!((checkpoint.path(), checkpoint.state()), (path.as_path(), &state(123)));
    let model: Vec<_> = checkpoint.model().collect();
    let tensor = |name, dtype, shape, bytes| CheckpointTensor { name, dtype, shape, bytes };
    let expected = [
        tensor("bn.num_batches_tracked", DType::I64, &[], [5, 0, 0, 0, 0, 0, 0, 0].as_slice()),
        tensor("fc.mask", DType::Bool, &[3], &[1, 0, 1]),
        tensor("fc.weight", DType::F32, &[2, 1], &[1, 2, 3, 4, 5, 6, 7, 8]),
    ];
    assert_eq!(model, expected);
    let optimizer: Vec<_> = checkpoint.optimizer().collect();
    assert_eq!(optimizer, [tensor("exp_avg.fc.weight", DType::F32, &[2, 1], &[9; 8])]);
}

#[test]
fn the_file_is_one_that_others_read() {
    let folder = TempDir::new().unwrap();
    let bytes = fs::read(write(folder.path(), 1, 7)).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    assert_eq!(metadata["format"], "pt");
    assert_eq!(metadata["position"], r#"{"step":7,"samples":224,"seed":18446744073709551615}"#);
    assert_eq!(metadata["optimizer"], r#""adamw""#);
    // Names of the state dict as they are, and every tensor aligned to its elements.
    assert!(NAMES.iter().all(|name| header.info(name).is_some()));
    assert!(header.info("optimizer.exp_avg.fc.weight").is_some());
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(length % 8, 0);
    for info in header.tensors().values() {
        assert_eq!(info.data_offsets.0 % (info.dtype.bitsize() / 8), 0);
    }
    // The same state is the same file.
    assert_eq!(fs::read(write(folder.path(), 1, 7)).unwrap(), bytes);
}

#[test]
fn older_checkpoints_go_and_foreign_files_stay() {
    let folder = TempDir::new().unwrap();
    let foreign = ["notes.txt", "step-1.safetensors", "step-00000001.safetensors", ".hidden.partial"];
    for name in foreign {
        fs::write(folder.path().join(name), "by somebody else").unwrap();
    }
    fs::create_dir(folder.path().join("step-00000002.safetensors")).unwrap();
    for step in [10, 20, 30, 40] {
        write(folder.path(), 2, step);
    }
    let mut expected = set(foreign);
    let kept = ["step-00000002.safetensors", "step-00000030.safetensors", "step-00000040.safetensors"];
    expected.extend(set(kept));
    assert_eq!(names(folder.path()), expected);
}

#[test]
fn the_new_checkpoint_stays_even_among_later_ones() {
    let folder = TempDir::new().unwrap();
    for step in [100, 200] {
        write(folder.path(), 2, step);
    }
    fs::write(folder.path().join("step-00000200.safetensors"), "torn").unwrap();
    assert_eq!(latest_step(folder.path()), Some(100));
    write(folder.path(), 1, 110);
    assert_eq!(names(folder.path()), set(["step-00000110.safetensors", "step-00000200.safetensors"]));
    assert_eq!(latest_step(folder.path()), Some(110));
    // The step is computed again, and its checkpoint replaced.
    write(folder.path(), 1, 200);
    assert_eq!(names(folder.path()), set(["step-00000200.safetensors"]));
    assert_eq!(latest_step(folder.path()), Some(200));
}

#[test]
fn torn_and_foreign_files_are_passed_over() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), 9, 1);
    let whole = fs::read(write(folder.path(), 9, 2)).unwrap();
    assert_eq!(latest_step(folder.path()), Some(2));

    let newer = folder.path().join("step-00000003.safetensors");
    for length in [0, 7, 8, 100, whole.len() - 1] {
        fs::write(&newer, &whole[..length]).unwrap();
        assert_eq!(latest_step(folder.path()), Some(2), "{length} bytes");
    }
    // Weights of a model, but no state of a task.
    let header = br#"{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    fs::write(&newer, [&(header.len() as u64).to_le_bytes(), header.as_slice(), &[0]].concat()).unwrap();
    let error = Checkpoint::open(&newer).unwrap_err();
    assert!(matches!(error, TrainError::NotACheckpoint { missing: "position", .. }), "{error}");
    assert_eq!(latest_step(folder.path()), Some(2));
    let header = br#"{"__metadata__":{"position":"{\"step\":1}","optimizer":"\"sgd\""}}"#;
    fs::write(&newer, [&(header.len() as u64).to_le_bytes(), header.as_slice()].concat()).unwrap();
    let error = Checkpoint::open(&newer).unwrap_err();
    assert!(matches!(error, TrainError::CheckpointMetadata { key: "position", .. }), "{error}");
}

#[test]
fn a_folder_is_one_claims_at_a_time_by_whatever_path() {
    let place = TempDir::new().unwrap();
    let (folder, link) = (place.path().join("not/yet/there"), place.path().join("link"));
    let first = FolderClaim::new(&folder, Duration::ZERO).unwrap();
    symlink(&folder, &link).unwrap();
    for path in [&folder, &link, &folder.join("../there/.")] {
        let error = FolderClaim::new(path, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(&error, TrainError::FolderTaken { path: taken } if taken == path), "{error}");
    }
    write(&folder, 1, 1);
    assert_eq!(latest_step(&link), Some(1));
    // Another one waits for it.
    let waits = std::thread::spawn(move || FolderClaim::new(&link, Duration::from_secs(60)));
    drop(first);
    let second = waits.join().unwrap().unwrap();
    assert!(FolderClaim::new(&folder, Duration::ZERO).is_err());
    drop(second);
    assert!(FolderClaim::new(&folder, Duration::ZERO).is_ok());

    let file = place.path().join("file");
    fs::write(&file, "").unwrap();
    let error = FolderClaim::new(&file.join("below"), Duration::ZERO).unwrap_err();
    assert!(matches!(error, TrainError::Io { action: "make the folder", .. }), "{error}");
}

#[test]
fn a_full_disk_is_an_error_that_leaves_nothing_behind() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), 1, 1);
    // Where the file will be written, a device that is always full.
    symlink("/dev/full", folder.path().join(".step-00000002.safetensors.partial")).unwrap();
    let error = write_checkpoint(folder.path(), 1, &state(2), tensors()).unwrap_err();
    let TrainError::Io { action: "write", source, .. } = error else { panic!("{error}") };
    assert_eq!(source.kind(), io::ErrorKind::StorageFull);
    assert_eq!(names(folder.path()), set(["step-00000001.safetensors"]));
    assert_eq!(latest_step(folder.path()), Some(1));
}

#[test]
fn a_tensor_that_cannot_be_fetched_leaves_nothing_behind() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), 1, 1);
    let failing = || Err(Box::<dyn Error + Send + Sync>::from("the device is gone"));
    let mut broken = tensors();
    broken.push(SavedTensor::of_model("last", DType::U8, &[1], failing));
    let error = write_checkpoint(folder.path(), 1, &state(2), broken).unwrap_err();
    assert_eq!(error.to_string(), "the bytes of tensor `last` cannot be fetched");
    assert_eq!(error.source().unwrap().to_string(), "the device is gone");
    assert_eq!(names(folder.path()), set(["step-00000001.safetensors"]));
}

#[test]
fn a_state_that_diverged_is_kept_beside_the_others() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), 1, 1);
    let path = write_diverged(folder.path(), &state(2), tensors()).unwrap();
    assert_eq!(names(folder.path()), set(["step-00000001.safetensors", "diverged-00000002.safetensors"]));
    assert_eq!(latest_step(folder.path()), Some(1));
    assert_eq!(Checkpoint::open(&path).unwrap().state(), &state(2));
    write(folder.path(), 1, 3);
    assert_eq!(names(folder.path()), set(["step-00000003.safetensors", "diverged-00000002.safetensors"]));
}

#[test]
fn what_killed_writers_left_is_removed() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join(".step-00000009.safetensors.partial"), "half").unwrap();
    assert_eq!(latest_step(folder.path()), None);
    write(folder.path(), 1, 10);
    assert_eq!(names(folder.path()), set(["step-00000010.safetensors"]));
}

#[test]
fn a_tensor_is_fetched_when_those_before_it_are_written() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join(".step-00000001.safetensors.partial");
    let header_bytes = Cell::new(0);
    let (file, header_bytes) = (&file, &header_bytes);
    let tensor = |index: u64| {
        SavedTensor::of_model(&index.to_string(), DType::U8, &[1000], move || {
            let length = fs::metadata(file).unwrap().len();
            if index == 0 {
                header_bytes.set(length);
            }
            assert_eq!(length, header_bytes.get() + index * 1000);
            Ok(Cow::Owned(vec![0; 1000]))
        })
    };
    write_checkpoint(folder.path(), 1, &state(1), (0..5).map(tensor)).unwrap();
    assert!(header_bytes.get() > 0);
}

#[test]
fn tensors_that_cannot_be_saved_are_refused() {
    let folder = TempDir::new().unwrap();
    let refused = |tensor| write_checkpoint(folder.path(), 1, &state(1), [tensor]).unwrap_err();
    // The same before there is anything to be written.
    let foreseen = |name: &str, dtype, shape: &[u64]| {
        let tensor = SavedTensor::of_model(name, dtype, shape, || unreachable!("it is not fetched"));
        check_checkpoint(folder.path(), &state(1), [tensor])
    };
    foreseen("x", DType::F32, &[2]).unwrap();
    assert!(matches!(foreseen("optimizer.x", DType::F32, &[2]), Err(TrainError::TensorName { .. })));
    assert!(matches!(foreseen("x", DType::C128, &[1]), Err(TrainError::ElementType { .. })));
    for name in ["__metadata__", "optimizer.weight"] {
        let error = refused(saved(name, DType::U8, &[1], &[0]));
        assert!(matches!(error, TrainError::TensorName { ref tensor, .. } if tensor == name), "{error}");
    }
    let error = refused(saved("x", DType::F32, &[2], &[0; 7]));
    assert_eq!(error.to_string(), "tensor `x` has 8 bytes, and 7 were given");
    let error = refused(saved("x", DType::C128, &[1], &[0; 16]));
    assert!(matches!(error, TrainError::ElementType { ref found, .. } if found == "complex128"), "{error}");
    let error = refused(saved("x", DType::F32, &[1 << 32, 1 << 31], &[]));
    assert!(matches!(error, TrainError::TensorTooLarge { .. }), "{error}");
    let twice = [saved("x", DType::U8, &[1], &[0]), saved("x", DType::U8, &[1], &[1])];
    let error = write_checkpoint(folder.path(), 1, &state(1), twice).unwrap_err();
    assert!(matches!(error, TrainError::TensorName { .. }), "{error}");
    assert!(names(folder.path()).is_empty());

    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = write_checkpoint(&file, 1, &state(1), tensors()).unwrap_err();
    assert!(matches!(error, TrainError::Io { action: "make the folder", .. }), "{error}");
    assert!(matches!(latest_checkpoint(&file), Err(TrainError::Io { action: "list", .. })));
}

#[test]
fn nothing_begins_anew_where_no_checkpoint_can_be_read() {
    let folder = TempDir::new().unwrap();
    let paths = [write(folder.path(), 2, 1), write(folder.path(), 2, 2)];
    fs::write(&paths[1], "torn").unwrap();
    assert_eq!(latest_step(folder.path()), Some(1));
    fs::write(&paths[0], "").unwrap();
    let error = latest_checkpoint(folder.path()).unwrap_err();
    assert!(matches!(error, TrainError::NoCheckpoint { .. }), "{error}");
}

#[test]
fn an_open_checkpoint_outlives_its_file() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), 1, 1);
    let checkpoint = latest_checkpoint(folder.path()).unwrap().unwrap();
    write(folder.path(), 1, 2);
    assert!(!checkpoint.path().exists());
    assert_eq!(checkpoint.optimizer().next().unwrap().bytes, [9; 8]);
}
