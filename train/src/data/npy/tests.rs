use proptest::prelude::*;

use super::*;

fn file(version: u8, header: &str, data_bytes: usize) -> Vec<u8> {
    let mut file = MAGIC.to_vec();
    file.extend([version, 0]);
    match version {
        1 => file.extend(u16::try_from(header.len()).unwrap().to_le_bytes()),
        _ => file.extend(u32::try_from(header.len()).unwrap().to_le_bytes()),
    }
    file.extend(header.as_bytes());
    file.resize(file.len() + data_bytes, 0);
    file
}

fn literal(descr: &str, order: &str, shape: &str) -> String {
    format!("{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}      \n")
}

fn error(header: &str, data_bytes: usize) -> NpyError {
    read(&file(1, header, data_bytes)).unwrap_err()
}

#[test]
fn headers_of_all_versions_and_types_are_read() {
    let types = [
        ("'<f2'", DType::F16),
        ("'<f4'", DType::F32),
        ("'<f8'", DType::F64),
        ("'|i1'", DType::I8),
        ("'<i2'", DType::I16),
        ("'<i4'", DType::I32),
        ("'<i8'", DType::I64),
        ("'|u1'", DType::U8),
        ("\"|b1\"", DType::Bool),
    ];
    for version in [1, 2, 3] {
        for (descr, dtype) in types {
            let bytes = usize::try_from(dtype.size_bytes()).unwrap() * 6;
            let file = file(version, &literal(descr, "False", "(3, 2)"), bytes);
            let header = read(&file).unwrap();
            assert_eq!((header.dtype, header.shape.as_slice()), (dtype, [3, 2].as_slice()));
            assert_eq!(file.len() - header.data_start, bytes);
        }
    }
    let shape_of = |shape, bytes| read(&file(1, &literal("'|u1'", "False", shape), bytes)).unwrap().shape;
    assert!(shape_of("()", 1).is_empty());
    assert_eq!(shape_of("(5,)", 5), [5]);
    assert_eq!(shape_of("(2,3,)", 6), [2, 3]);
}

#[test]
fn what_is_not_supported_says_so() {
    let big = error(&literal("'>f4'", "False", "(1,)"), 4);
    assert_eq!(big, NpyError::ElementType { found: ">f4".to_owned() });
    for descr in ["'<c8'", "'|O'", "'<U7'", "'|S3'", "'<M8[s]'", "'<u4'", "'=f4'", "''"] {
        let found = error(&literal(descr, "False", "(1,)"), 4);
        assert!(matches!(found, NpyError::ElementType { .. }), "{descr}: {found}");
    }
    let records = error(&literal("[('x', '<f4')]", "False", "(1,)"), 4);
    assert!(matches!(records, NpyError::ElementType { found } if found.starts_with("[('x'")));
    assert_eq!(error(&literal("'<f4'", "True", "(1,)"), 4), NpyError::FortranOrder);
    assert_eq!(read(&file(4, "", 0)), Err(NpyError::Version { major: 4, minor: 0 }));
    assert_eq!(read(b"PK\x03\x04"), Err(NpyError::Magic));
}

#[test]
fn lengths_are_held_against_the_file() {
    let header = literal("'<f4'", "False", "(3, 2)");
    for data_bytes in [0, 23, 25] {
        let expected = NpyError::Length { needed_bytes: 24, found_bytes: data_bytes as u64 };
        assert_eq!(error(&header, data_bytes), expected);
    }
    let whole = file(1, &header, 24);
    for length in MAGIC.len()..whole.len() - 24 {
        let found = read(&whole[..length]);
        assert!(matches!(found, Err(NpyError::Truncated { .. })), "{length}: {found:?}");
    }
    let claims = [b"\x93NUMPY\x02\x00".as_slice(), &u32::MAX.to_le_bytes()].concat();
    assert!(matches!(read(&claims), Err(NpyError::HeaderTooLong { .. })));
}

#[test]
fn numbers_that_overflow_are_refused() {
    for shape in ["(18446744073709551616,)", "(4294967296, 4294967296)", "(9223372036854775807, 2)"] {
        assert_eq!(error(&literal("'<f4'", "False", shape), 4), NpyError::TooLarge, "{shape}");
    }
    let deep = format!("({})", "1,".repeat(65));
    assert_eq!(error(&literal("'|u1'", "False", &deep), 1), NpyError::TooManyDimensions { most: 64 });
}

#[test]
fn malformed_headers_are_refused() {
    for header in [
        "",
        "{",
        "{}",
        "{'descr'",
        "{'descr': '<f4}",
        "{'descr': '<f\\4', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4' 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': [1]}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)} x",
        "{'descr': '<f4', 'fortran_order': False}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'more': 1}",
        "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1,)}",
    ] {
        let found = error(header, 4);
        let expected = matches!(found, NpyError::Malformed { .. } | NpyError::Key { .. });
        assert!(expected, "{header}: {found}");
    }
}

proptest! {
    /// Whatever the bytes, reading ends with an answer, and an answer that was held against the length.
    #[test]
    fn hostile_headers_are_answered(
        version in 0u8..5,
        length in any::<u16>(),
        text in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..200),
            "[{}()'\",:\\\\ 0-9a-zTF<|\\[\n]{0,120}".prop_map(String::into_bytes),
        ],
    ) {
        let mut file = [MAGIC, &[version, 0], &length.to_le_bytes()].concat();
        file.extend(text);
        if let Ok(header) = read(&file) {
            prop_assert!(header.data_start <= file.len());
        }
    }

    /// As a good header with some bytes changed or cut off.
    #[test]
    fn damaged_headers_are_answered(
        changes in proptest::collection::vec((0usize..100, any::<u8>()), 1..4),
        length in 0usize..120,
    ) {
        let mut file = file(1, &literal("'<i8'", "False", "(1, 1)"), 8);
        for (at, byte) in changes {
            let at = at % file.len();
            file[at] = byte;
        }
        file.truncate(length);
        if let Ok(header) = read(&file) {
            let elements: u64 = header.shape.iter().product();
            let bytes = (file.len() - header.data_start) as u64;
            prop_assert_eq!(elements * header.dtype.size_bytes(), bytes);
        }
    }
}
