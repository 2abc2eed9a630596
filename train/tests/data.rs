//! Data sets in files and made up: what is read, and what is refused without a panic.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use proptest::prelude::*;
use pswitch_model::DType;
use pswitch_train::{ArrayInfo, Dataset, NpyError, RowSource, Synthetic, SyntheticArray, TrainError};
use tempfile::TempDir;

/// As `numpy.save` writes it.
fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    let padded = (10 + header.len() + 1).next_multiple_of(64) - 10;
    header.push_str(&" ".repeat(padded - header.len() - 1));
    header.push('\n');
    let length = u16::try_from(header.len()).unwrap().to_le_bytes();
    [b"\x93NUMPY\x01\x00".as_slice(), &length, header.as_bytes(), data].concat()
}

fn tensors(header: &str, data_bytes: usize) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), &vec![7; data_bytes]].concat()
}

struct Files(TempDir);

impl Files {
    fn new() -> Files {
        Files(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

fn bytes_of(values: impl IntoIterator<Item = i16>) -> Vec<u8> {
    values.into_iter().flat_map(i16::to_le_bytes).collect()
}

fn gathered(source: &dyn RowSource, array: usize, rows: &[u64]) -> Vec<u8> {
    let bytes = usize::try_from(source.arrays()[array].row_bytes()).unwrap() * rows.len();
    let mut out = vec![0xEE; bytes];
    source.gather(array, rows, &mut out).unwrap();
    out
}

#[test]
fn several_files_are_one_data_set() {
    let files = Files::new();
    let image = files.write("image.npy", &npy("<i2", "(4, 2, 1)", &bytes_of(0..8)));
    let header = r#"{"weight":{"dtype":"BF16","shape":[4],"data_offsets":[4,12]},
        "label":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"__metadata__":{"made":"up"}}"#;
    let mut rest = tensors(header, 12);
    let at = rest.len() - 12;
    rest[at..at + 4].copy_from_slice(&[10, 11, 12, 13]);
    let rest = files.write("rest.safetensors", &rest);

    let data = Dataset::open(&[image, rest]).unwrap();
    assert_eq!(data.rows(), 4);
    let expected = [
        ArrayInfo::new("image", DType::I16, &[2, 1]).unwrap(),
        ArrayInfo::new("label", DType::U8, &[]).unwrap(),
        ArrayInfo::new("weight", DType::BF16, &[]).unwrap(),
    ];
    assert_eq!(data.arrays(), expected);
    assert_eq!(gathered(&data, 0, &[3, 0, 3]), bytes_of([6, 7, 0, 1, 6, 7]));
    assert_eq!(gathered(&data, 1, &[2, 1]), [12, 11]);
    assert_eq!(gathered(&data, 2, &[0]), [7, 7]);
    assert!(gathered(&data, 0, &[]).is_empty());
}

#[test]
fn what_is_asked_for_must_be_there() {
    let files = Files::new();
    let data = Dataset::open(&[files.write("x.npy", &npy("<i2", "(4, 2)", &bytes_of(0..8)))]).unwrap();
    let mut out = vec![0xEE; 8];
    let unknown = data.gather(1, &[0, 1], &mut out).unwrap_err();
    assert!(matches!(unknown, TrainError::UnknownArray { array: 1, arrays: 1 }));
    let unknown = data.gather(0, &[0, 4], &mut out).unwrap_err();
    assert!(matches!(unknown, TrainError::UnknownRow { row: 4, rows: 4 }));
    for rows in [[0].as_slice(), &[0, 1, 2]] {
        let wrong = data.gather(0, rows, &mut out).unwrap_err();
        assert!(matches!(wrong, TrainError::BufferLength { found_bytes: 8, .. }), "{wrong}");
    }
    assert_eq!(out, [0xEE; 8]);
}

#[track_caller]
fn refused(files: &[PathBuf]) -> TrainError {
    Dataset::open(files).unwrap_err()
}

#[test]
fn arrays_must_fit_together() {
    let files = Files::new();
    let four = files.write("four.npy", &npy("|u1", "(4,)", &[0; 4]));
    let five = files.write("five.npy", &npy("|u1", "(5,)", &[0; 5]));
    let expected = format!(
        "array `five` of {} has 5 rows, and `four` of {}, in the same data set, has 4",
        five.display(),
        four.display()
    );
    assert_eq!(refused(&[four.clone(), five.clone()]).to_string(), expected);
    // Of a file with several arrays, and behind another one.
    let both = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
        "b":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}}"#;
    let both = files.write("both.safetensors", &tensors(both, 5));
    let error = refused(&[four.clone(), both.clone(), five]);
    let TrainError::RowsDiffer { array, path, other_path, .. } = error else { panic!("{error}") };
    assert_eq!((array.as_str(), path, other_path), ("b", both, four.clone()));
    let again = r#"{"four":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    let again = files.write("again.safetensors", &tensors(again, 4));
    assert!(matches!(refused(&[four, again]), TrainError::DuplicateArray { array } if array == "four"));
    assert!(matches!(refused(&[]), TrainError::NoArrays));
    let nothing = files.write("nothing.safetensors", &tensors("{}", 0));
    assert!(matches!(refused(&[nothing]), TrainError::NoArrays));
}

#[test]
fn arrays_must_have_rows_with_something_in_them() {
    let files = Files::new();
    let refused_file = |file: &PathBuf| match refused(std::slice::from_ref(file)) {
        TrainError::DataFile { path, source } if path == *file => *source,
        error => panic!("{error}"),
    };
    let scalar = files.write("scalar.npy", &npy("<i2", "()", &[0; 2]));
    assert!(matches!(refused_file(&scalar), TrainError::NoRows { array } if array == "scalar"));
    let none = files.write("none.npy", &npy("<i2", "(0, 3)", &[]));
    assert!(matches!(refused_file(&none), TrainError::NoRows { .. }));
    // Any number of rows would fit into no bytes at all.
    let hollow = files.write("hollow.npy", &npy("<i2", "(4294967296, 0)", &[]));
    assert!(matches!(refused_file(&hollow), TrainError::EmptyRows { row_shape, .. } if row_shape == [0]));
    let hollow = r#"{"x":{"dtype":"U8","shape":[4294967296,0],"data_offsets":[0,0]}}"#;
    let hollow = files.write("hollow.safetensors", &tensors(hollow, 0));
    assert!(matches!(refused_file(&hollow), TrainError::EmptyRows { .. }));
    let error = refused(std::slice::from_ref(&hollow));
    assert_eq!(error.to_string(), format!("{} cannot be used as data", hollow.display()));
}

#[test]
fn files_that_are_no_data_are_refused() {
    let files = Files::new();
    let text = files.write("x.csv", b"1,2");
    assert!(matches!(refused(&[text]), TrainError::UnknownFormat { .. }));
    assert!(matches!(refused(&[files.0.path().join("absent.npy")]), TrainError::Io { action: "open", .. }));
    let folder = files.0.path().join("folder.npy");
    fs::create_dir(&folder).unwrap();
    assert!(matches!(refused(&[folder]), TrainError::NotAFile { .. }));
    for name in ["empty.npy", "empty.safetensors"] {
        assert!(matches!(refused(&[files.write(name, b"")]), TrainError::EmptyFile { .. }));
    }
    let big_endian = files.write("x.npy", &npy(">f4", "(1,)", &[0; 4]));
    let TrainError::Npy { source, .. } = refused(&[big_endian]) else { panic!() };
    assert_eq!(source, NpyError::ElementType { found: ">f4".to_owned() });
    let torn = files.write("x.npy", &npy("<f4", "(2,)", &[0; 7]));
    let TrainError::Npy { source, .. } = refused(&[torn]) else { panic!() };
    assert_eq!(source, NpyError::Length { needed_bytes: 8, found_bytes: 7 });
}

#[test]
fn hostile_tensor_files_are_refused() {
    let files = Files::new();
    let open = |bytes: &[u8]| refused(&[files.write("x.safetensors", bytes)]);

    assert!(matches!(open(&[1, 0, 0]), TrainError::TensorHeaderLength { .. }));
    for claim in [1, 100_000_001, u64::MAX - 7, u64::MAX] {
        assert!(matches!(open(&claim.to_le_bytes()), TrainError::TensorHeaderLength { .. }), "{claim}");
    }
    let good = r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    for data_bytes in [0, 7, 9] {
        let error = open(&tensors(good, data_bytes));
        assert!(matches!(error, TrainError::TensorFileLength { needed_bytes: 8, .. }), "{error}");
    }
    for header in [
        "",
        "[]",
        "\u{0}",
        r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#,
        r#"{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
        r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
        r#"{"x":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#,
        r#"{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}"#,
    ] {
        assert!(matches!(open(&tensors(header, 8)), TrainError::TensorHeader { .. }), "{header}");
    }
    // Sizes whose sum is the last number that there is.
    let (half, most) = (1u64 << 60, u64::MAX);
    let mut parts: Vec<_> = (0..15).map(|i| (format!("x{i}"), i * half, (i + 1) * half)).collect();
    parts.push(("y".to_owned(), 15 * half, most));
    let header: Vec<_> = parts
        .iter()
        .map(|(name, from, to)| {
            format!(r#""{name}":{{"dtype":"U8","shape":[{}],"data_offsets":[{from},{to}]}}"#, to - from)
        })
        .collect();
    let error = open(&tensors(&format!("{{{}}}", header.join(",")), 8));
    assert!(matches!(error, TrainError::TensorFileLength { needed_bytes: u64::MAX, .. }), "{error}");

    let unsigned = r#"{"x":{"dtype":"U32","shape":[2],"data_offsets":[0,8]}}"#;
    let error = open(&tensors(unsigned, 8));
    assert!(matches!(error, TrainError::ElementType { ref found, .. } if found == "U32"), "{error}");
}

fn made(dtype: DType, row_shape: &[u64], below: u64) -> SyntheticArray {
    SyntheticArray { info: ArrayInfo::new(&dtype.to_string(), dtype, row_shape).unwrap(), below }
}

#[test]
fn made_up_values_follow_from_seed_array_and_row() {
    let arrays = || vec![made(DType::F32, &[5], 0), made(DType::I64, &[2, 2], 1000)];
    let data = Synthetic::new(50, 3, arrays()).unwrap();
    assert_eq!((data.rows(), data.arrays().len()), (50, 2));
    let [both, last] = [gathered(&data, 0, &[7, 49]), gathered(&data, 0, &[49])];
    assert_eq!(both[20..], last);
    assert_ne!(both[..20], last);
    let same = Synthetic::new(60, 3, arrays()).unwrap();
    assert_eq!(gathered(&same, 1, &[4]), gathered(&data, 1, &[4]));
    let other = Synthetic::new(50, 4, arrays()).unwrap();
    assert_ne!(gathered(&other, 1, &[4]), gathered(&data, 1, &[4]));
    assert!(matches!(data.gather(0, &[50], &mut [0; 20]), Err(TrainError::UnknownRow { .. })));
}

#[test]
fn made_up_floats_are_between_minus_one_and_one() {
    let dtypes = [DType::F16, DType::BF16, DType::F32, DType::F64];
    let data = Synthetic::new(20, 0, dtypes.map(|dtype| made(dtype, &[500], 0)).into()).unwrap();
    let rows: Vec<_> = (0..20).collect();
    for (array, dtype) in dtypes.into_iter().enumerate() {
        let bytes = gathered(&data, array, &rows);
        let size = usize::try_from(dtype.size_bytes()).unwrap();
        let values: Vec<f64> = bytes
            .chunks_exact(size)
            .map(|value| match dtype {
                DType::F16 => f16::from_le_bytes(value.try_into().unwrap()).to_f64(),
                DType::BF16 => bf16::from_le_bytes(value.try_into().unwrap()).to_f64(),
                DType::F32 => f32::from_le_bytes(value.try_into().unwrap()).into(),
                _ => f64::from_le_bytes(value.try_into().unwrap()),
            })
            .collect();
        assert_eq!(values.len(), 10_000);
        assert!(values.iter().all(|value| -1.0 < *value && *value < 1.0 && *value != 0.0), "{dtype}");
        let mean = values.iter().sum::<f64>() / 1e4;
        let square = values.iter().map(|value| value * value).sum::<f64>() / 1e4;
        // Five standard deviations.
        assert!(mean.abs() < 0.03 && (square - 1.0 / 3.0).abs() < 0.015, "{dtype}: {mean}, {square}");
    }
}

#[test]
fn made_up_integers_are_below_their_bound() {
    let arrays = vec![
        made(DType::I64, &[1000], 10),
        made(DType::I8, &[1000], 128),
        made(DType::U8, &[1000], 256),
        made(DType::Bool, &[1000], 2),
        made(DType::I32, &[1], 1),
    ];
    let data = Synthetic::new(1, 9, arrays).unwrap();
    let values: Vec<_> = gathered(&data, 0, &[0])
        .chunks_exact(8)
        .map(|value| i64::from_le_bytes(value.try_into().unwrap()))
        .collect();
    assert!(
        (0..10).all(|digit| values.contains(&digit)) && values.iter().all(|value| (0..10).contains(value))
    );
    assert!(gathered(&data, 1, &[0]).iter().all(|value| *value < 128));
    assert!(gathered(&data, 2, &[0]).iter().any(|value| *value >= 128));
    let bools = gathered(&data, 3, &[0]);
    assert!(bools.contains(&0) && bools.contains(&1) && bools.iter().all(|value| *value < 2));
    assert_eq!(gathered(&data, 4, &[0]), [0; 4]);
}

#[test]
fn what_cannot_be_made_up_is_refused() {
    let new = |rows, array| Synthetic::new(rows, 0, vec![array]).unwrap_err();
    assert!(matches!(new(0, made(DType::F32, &[], 0)), TrainError::NoRows { .. }));
    assert!(matches!(new(1, made(DType::I8, &[], 0)), TrainError::Bound { most: 128, .. }));
    assert!(matches!(new(1, made(DType::I8, &[], 129)), TrainError::Bound { below: 129, .. }));
    assert!(matches!(new(1, made(DType::Bool, &[], 3)), TrainError::Bound { most: 2, .. }));
    assert!(matches!(new(1, made(DType::C64, &[], 1)), TrainError::NotSynthetic { .. }));
    assert!(matches!(Synthetic::new(1, 0, vec![]), Err(TrainError::NoArrays)));
    let twice = vec![made(DType::F32, &[], 0), made(DType::F32, &[2], 0)];
    assert!(matches!(Synthetic::new(1, 0, twice), Err(TrainError::DuplicateArray { .. })));
    assert!(matches!(ArrayInfo::new("x", DType::F32, &[3, 0]), Err(TrainError::EmptyRows { .. })));
    for row_shape in [[1 << 62, 1].as_slice(), &[1 << 32, 1 << 32]] {
        assert!(matches!(ArrayInfo::new("x", DType::F32, row_shape), Err(TrainError::RowsTooLarge { .. })));
    }
}

/// What a file's rows are, read in the simplest way.
fn naive(bytes: &[u8], row_bytes: usize, rows: &[u64]) -> Vec<u8> {
    rows.iter()
        .flat_map(|row| bytes[usize::try_from(*row).unwrap() * row_bytes..][..row_bytes].to_vec())
        .collect()
}

fn open_npy(folder: &Path, rows: usize, width: usize, bytes: &[u8]) -> Dataset {
    let path = folder.join("x.npy");
    fs::write(&path, npy("<i2", &format!("({rows}, {width})"), bytes)).unwrap();
    Dataset::open(&[path]).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn gathered_rows_are_those_of_the_file(
        rows in 1usize..20,
        width in 1usize..9,
        picks in proptest::collection::vec(any::<prop::sample::Index>(), 0..30),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..rows * width * 2).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let data = open_npy(folder.path(), rows, width, &bytes);
        let picked: Vec<u64> = picks.iter().map(|pick| pick.index(rows) as u64).collect();
        prop_assert_eq!(gathered(&data, 0, &picked), naive(&bytes, width * 2, &picked));
    }
}
