//! The zip format itself: what other writers may do, and what is refused.

use zip::CompressionMethod;

use crate::support::{Pieces, assert_says, describe, open_bytes};

const END_BYTES: usize = 22;

fn archive() -> Vec<u8> {
    Pieces::of("two_inputs").bytes(CompressionMethod::Stored)
}

fn refusal(bytes: &[u8]) -> String {
    let said = describe(&open_bytes(bytes).expect_err("was accepted"));
    assert_says(&said, &["not a readable zip archive"]);
    said
}

/// Where the directory's record of an entry starts.
fn record(bytes: &[u8], name: &str) -> usize {
    let at = bytes.windows(name.len()).rposition(|part| part == name.as_bytes()).unwrap();
    (0..at).rev().find(|at| bytes[*at..].starts_with(b"PK\x01\x02")).unwrap()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: usize, number: &[u8]) {
    bytes[at..at + number.len()].copy_from_slice(number);
}

/// An archive whose end record says that the numbers are in the 64-bit one.
fn with_64_bit_end(entries: u64, directory_bytes: u64, directory_offset: Option<u64>) -> Vec<u8> {
    let mut bytes = archive();
    let end = bytes.split_off(bytes.len() - END_BYTES);
    let offset = directory_offset.unwrap_or(u32_at(&end, 16).into());
    let entries = if entries == 0 { u64::from(end[10]) } else { entries };
    let directory_bytes = if directory_bytes == 0 { u32_at(&end, 12).into() } else { directory_bytes };
    let at = bytes.len() as u64;
    bytes.extend_from_slice(b"PK\x06\x06");
    bytes.extend_from_slice(&44_u64.to_le_bytes());
    bytes.extend_from_slice(&[0; 12]);
    for number in [entries, entries, directory_bytes, offset] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(b"PK\x06\x07\0\0\0\0");
    bytes.extend_from_slice(&at.to_le_bytes());
    bytes.extend_from_slice(&[1, 0, 0, 0]);
    bytes.extend_from_slice(b"PK\x05\x06\0\0\0\0");
    bytes.extend_from_slice(&[0xff; 12]);
    bytes.extend_from_slice(&[0, 0]);
    bytes
}

/// An archive in which an entry's sizes are in a 64-bit field.
fn with_64_bit_sizes(name: &str, sizes: &[u64]) -> Vec<u8> {
    let mut bytes = archive();
    let at = record(&bytes, name);
    put(&mut bytes, at + 20, &[0xff; 8]);
    let mut field = vec![1, 0, u8::try_from(sizes.len() * 8).unwrap(), 0];
    field.extend(sizes.iter().flat_map(|size| size.to_le_bytes()));
    let length = u16::try_from(field.len()).unwrap();
    put(&mut bytes, at + 30, &length.to_le_bytes());
    let after_name = at + 46 + name.len();
    bytes.splice(after_name..after_name, field);
    let end = bytes.len() - END_BYTES;
    let directory_bytes = u32_at(&bytes, end + 12) + u32::from(length);
    put(&mut bytes, end + 12, &directory_bytes.to_le_bytes());
    bytes
}

#[test]
fn comments_and_64_bit_numbers_are_read() {
    let mut bytes = archive();
    let end = bytes.len() - END_BYTES;
    put(&mut bytes, end + 20, &300_u16.to_le_bytes());
    bytes.extend_from_slice(&[b' '; 300]);
    open_bytes(&bytes).unwrap();
    open_bytes(&with_64_bit_end(0, 0, None)).unwrap();
    open_bytes(&with_64_bit_sizes("two_inputs/data/weights/weight_0", &[48, 48])).unwrap();
}

#[test]
fn numbers_of_the_end_record() {
    let most = u64::MAX;
    assert_says(&refusal(&with_64_bit_end(90_000, 0, None)), &["90000 entries do not fit"]);
    assert_says(&refusal(&with_64_bit_end(0, most, None)), &["does not fit into the file"]);
    assert_says(&refusal(&with_64_bit_end(0, 0, Some(most))), &["does not fit into the file"]);
    assert_says(&refusal(&with_64_bit_end(0, 0, Some(1 << 40))), &["does not fit into the file"]);
    assert_says(&refusal(&with_64_bit_end(0, 0, Some(0))), &["directory is damaged at offset 0"]);
    let many = describe(&open_bytes(&with_64_bit_end(most, 0, None)).unwrap_err());
    assert_says(&many, &["number of entries is 18446744073709551615, over the limit of 100000"]);
    // The locator points nowhere.
    let mut bytes = with_64_bit_end(0, 0, None);
    let locator = bytes.len() - END_BYTES - 20;
    put(&mut bytes, locator + 8, &most.to_le_bytes());
    assert_says(&refusal(&bytes), &["64-bit end record is not at offset"]);
    // There is more after the end than its comment.
    let mut bytes = archive();
    bytes.push(0);
    assert_says(&refusal(&bytes), &["no end record"]);
}

#[test]
fn entries_outside_of_the_file() {
    let weight = "two_inputs/data/weights/weight_0";
    let mut bytes = archive();
    let at = record(&bytes, weight);
    put(&mut bytes, at + 42, &(u32::MAX - 1).to_le_bytes());
    assert_says(&refusal(&bytes), &["weight_0` does not start at offset 4294967294"]);
    let mut bytes = archive();
    put(&mut bytes, at + 20, &(u32::MAX - 1).to_le_bytes());
    assert_says(&refusal(&bytes), &["weight_0` of 4294967294 bytes", "does not fit"]);
    // 64-bit sizes that are announced and missing, in part missing, and too large.
    let mut bytes = archive();
    put(&mut bytes, at + 20, &[0xff; 8]);
    assert_says(&refusal(&bytes), &["weight_0` of 4294967295 bytes", "does not fit"]);
    assert_says(&refusal(&with_64_bit_sizes(weight, &[48])), &["directory is damaged"]);
    assert_says(&refusal(&with_64_bit_sizes(weight, &[48, u64::MAX])), &["does not fit"]);
    // Another size than that of the contents.
    let mut bytes = archive();
    put(&mut bytes, at + 20, &8_u32.to_le_bytes());
    let said = describe(&open_bytes(&bytes).unwrap_err());
    assert_says(&said, &["weight `linear.weight`", "has 8 bytes; the directory promises 48"]);
}

#[test]
fn entries_that_readers_would_understand_differently() {
    let mut bytes = archive();
    let (first, second) = (
        record(&bytes, "two_inputs/data/weights/weight_0"),
        record(&bytes, "two_inputs/data/weights/weight_1"),
    );
    put(&mut bytes, second + 46, b"two_inputs/data/weights/weight_0");
    assert_says(&refusal(&bytes), &["two entries are named `two_inputs/data/weights/weight_0`"]);
    let mut bytes = archive();
    let offset = u32_at(&bytes, first + 42);
    put(&mut bytes, second + 42, &offset.to_le_bytes());
    assert_says(&refusal(&bytes), &["weight_0` and", "weight_1` overlap"]);
    let mut bytes = archive();
    bytes[first + 8] |= 1;
    assert_says(&refusal(&bytes), &["weight_0` is encrypted"]);
    let mut bytes = archive();
    bytes[first + 46] = 0xff;
    assert_says(&refusal(&bytes), &["not UTF-8"]);
}
