//! The directory of a zip archive: which bytes of the file are which entry.
//!
//! Weights are read through a memory map, so all that is needed of the format is where an entry's bytes lie, and it is
//! needed from files that nobody vouches for. This reader takes the entry count, all sizes and all offsets as claims:
//! it allocates nothing before they are checked against the file's length and the limits, takes only one end record
//! (at the end of the file), and refuses what different readers would understand differently: two entries of one
//! name, and entries that overlap.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use crate::error::ModelError;
use crate::limits::Limits;

const LOCAL_HEADER: [u8; 4] = *b"PK\x03\x04";
const CENTRAL_HEADER: [u8; 4] = *b"PK\x01\x02";
const END: [u8; 4] = *b"PK\x05\x06";
const END_64: [u8; 4] = *b"PK\x06\x06";
const END_64_LOCATOR: [u8; 4] = *b"PK\x06\x07";

const LOCAL_HEADER_BYTES: u64 = 30;
const CENTRAL_HEADER_BYTES: u64 = 46;
const END_BYTES: usize = 22;
const END_64_BYTES: u64 = 56;
const END_64_LOCATOR_BYTES: u64 = 20;

/// One entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The name with its folders.
    pub(crate) name: String,
    /// Where its bytes lie in the file; inside it, whatever the archive says.
    pub(crate) range: Range<usize>,
    /// 0: stored as it is.
    pub(crate) method: u16,
    /// Checksum of its contents.
    pub(crate) crc32: u32,
    /// Bytes after decompression.
    pub(crate) size_bytes: u64,
}

/// All entries of an archive, by name and in the order of the directory.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    pub(crate) entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
}

impl Directory {
    /// The index of the entry of this name.
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Reads the directory of the archive whose contents are `bytes`.
    pub(crate) fn read(file: &Path, bytes: &[u8], limits: &Limits) -> Result<Directory, ModelError> {
        let damaged = |reason: String| ModelError::NotAZip { file: file.to_owned(), reason };
        let end = End::find(bytes).map_err(damaged)?;
        if end.entries > limits.entries {
            let (what, found, limit) = ("the number of entries".to_owned(), end.entries, limits.entries);
            return Err(ModelError::Limit { file: file.to_owned(), what, found, limit });
        }
        if end.entries > end.directory_bytes / CENTRAL_HEADER_BYTES {
            let (entries, directory_bytes) = (end.entries, end.directory_bytes);
            return Err(damaged(format!(
                "{entries} entries do not fit into a directory of {directory_bytes} bytes"
            )));
        }
        let mut directory = Directory::default();
        let mut at = end.directory_offset;
        for _ in 0..end.entries {
            let (entry, next) = read_entry(bytes, at, end.directory_offset).map_err(damaged)?;
            at = next;
            if directory.by_name.insert(entry.name.clone(), directory.entries.len()).is_some() {
                return Err(damaged(format!("two entries are named `{}`", entry.name)));
            }
            directory.entries.push(entry);
        }
        directory.check_overlaps().map_err(damaged)?;
        Ok(directory)
    }

    fn check_overlaps(&self) -> Result<(), String> {
        let mut by_place: Vec<&Entry> = self.entries.iter().filter(|entry| !entry.range.is_empty()).collect();
        by_place.sort_by_key(|entry| entry.range.start);
        for pair in by_place.windows(2) {
            if pair[0].range.end > pair[1].range.start {
                return Err(format!("the entries `{}` and `{}` overlap", pair[0].name, pair[1].name));
            }
        }
        Ok(())
    }
}

/// What the end of the archive says about its directory, checked against the file.
struct End {
    entries: u64,
    directory_offset: u64,
    directory_bytes: u64,
}

impl End {
    fn find(bytes: &[u8]) -> Result<End, String> {
        // The end record is followed by a comment of at most 65,535 bytes, which reaches to the end of the file.
        let first = bytes.len().saturating_sub(END_BYTES + usize::from(u16::MAX));
        let end_at = (first..bytes.len())
            .rev()
            .find(|at| {
                bytes[*at..].starts_with(&END)
                    && u16_at(bytes, *at as u64 + 20)
                        .is_some_and(|comment| at + END_BYTES + usize::from(comment) == bytes.len())
            })
            .ok_or("it has no end record (not a zip archive, or cut short)")? as u64;
        let short = "its end record is cut short";
        let mut end = End {
            entries: u16_at(bytes, end_at + 10).ok_or(short)?.into(),
            directory_bytes: u32_at(bytes, end_at + 12).ok_or(short)?.into(),
            directory_offset: u32_at(bytes, end_at + 16).ok_or(short)?.into(),
        };
        // Where a number does not fit, all of them stand in the 64-bit record, to which a locator points.
        let overflows = end.entries == u64::from(u16::MAX)
            || end.directory_bytes == u64::from(u32::MAX)
            || end.directory_offset == u64::from(u32::MAX);
        let mut directory_limit = end_at;
        let locator = end_at.checked_sub(END_64_LOCATOR_BYTES).filter(|_| overflows);
        if let Some(locator) = locator.filter(|locator| starts_with(bytes, *locator, END_64_LOCATOR)) {
            let short = "its 64-bit end record is cut short";
            let at = u64_at(bytes, locator + 8).ok_or(short)?;
            if !starts_with(bytes, at, END_64) || at.checked_add(END_64_BYTES).is_none_or(|end| end > locator)
            {
                return Err(format!("its 64-bit end record is not at offset {at}"));
            }
            end.entries = u64_at(bytes, at + 32).ok_or(short)?;
            end.directory_bytes = u64_at(bytes, at + 40).ok_or(short)?;
            end.directory_offset = u64_at(bytes, at + 48).ok_or(short)?;
            directory_limit = at;
        }
        if end.directory_offset.checked_add(end.directory_bytes).is_none_or(|last| last > directory_limit) {
            return Err(format!(
                "its directory of {} bytes at offset {} does not fit into the file",
                end.directory_bytes, end.directory_offset
            ));
        }
        Ok(end)
    }
}

/// Reads the directory's record at `at`; gives the entry and where the next record starts. Entries end before the
/// directory.
fn read_entry(bytes: &[u8], at: u64, directory_offset: u64) -> Result<(Entry, u64), String> {
    let short = || format!("its directory is damaged at offset {at}");
    if !starts_with(bytes, at, CENTRAL_HEADER) {
        return Err(short());
    }
    let u16_at = |offset: u64| u16_at(bytes, at + offset).ok_or_else(short);
    let u32_at = |offset: u64| u32_at(bytes, at + offset).ok_or_else(short);
    let (flags, method, crc32) = (u16_at(8)?, u16_at(10)?, u32_at(16)?);
    let mut stored_bytes = u64::from(u32_at(20)?);
    let mut size_bytes = u64::from(u32_at(24)?);
    let (name_bytes, extra_bytes, comment_bytes) = (u16_at(28)?, u16_at(30)?, u16_at(32)?);
    let mut header_offset = u64::from(u32_at(42)?);

    let name_at = at + CENTRAL_HEADER_BYTES;
    let extra_at = name_at + u64::from(name_bytes);
    let next = extra_at + u64::from(extra_bytes) + u64::from(comment_bytes);
    let name = slice(bytes, name_at, name_bytes.into()).ok_or_else(short)?;
    let name = std::str::from_utf8(name).map_err(|_| format!("the name at offset {name_at} is not UTF-8"))?;
    let mut extra = slice(bytes, extra_at, extra_bytes.into()).ok_or_else(short)?;
    // Fields of the form (u16 kind, u16 length, contents); kind 1 has the numbers that do not fit into 32 bits.
    while let Some((kind, length)) = self::u16_at(extra, 0).zip(self::u16_at(extra, 2)) {
        let Some(field) = extra.get(4..4 + usize::from(length)) else { break };
        if kind == 1 {
            let mut field_at = 0;
            for number in [&mut size_bytes, &mut stored_bytes, &mut header_offset] {
                if *number == u64::from(u32::MAX) {
                    *number = u64_at(field, field_at).ok_or_else(short)?;
                    field_at += 8;
                }
            }
        }
        extra = &extra[4 + usize::from(length)..];
    }
    if flags & 1 != 0 {
        return Err(format!("entry `{name}` is encrypted"));
    }
    // The local header repeats the name and has extra fields (padding) of its own.
    let no_header = || format!("entry `{name}` does not start at offset {header_offset}");
    if !starts_with(bytes, header_offset, LOCAL_HEADER) {
        return Err(no_header());
    }
    let local_name_bytes = self::u16_at(bytes, header_offset + 26).ok_or_else(no_header)?;
    let local_extra_bytes = self::u16_at(bytes, header_offset + 28).ok_or_else(no_header)?;
    let start =
        header_offset + LOCAL_HEADER_BYTES + u64::from(local_name_bytes) + u64::from(local_extra_bytes);
    let end = start.checked_add(stored_bytes).filter(|end| *end <= directory_offset);
    let outside =
        || format!("entry `{name}` of {stored_bytes} bytes at offset {start} does not fit into the file");
    let start = usize::try_from(start).map_err(|_| outside())?;
    let end = end.and_then(|end| usize::try_from(end).ok()).ok_or_else(outside)?;
    let range = start..end;
    if bytes.get(range.clone()).is_none() {
        return Err(outside());
    }
    Ok((Entry { name: name.to_owned(), range, method, crc32, size_bytes }, next))
}

fn slice(bytes: &[u8], at: u64, length: u64) -> Option<&[u8]> {
    let start = usize::try_from(at).ok()?;
    let end = usize::try_from(at.checked_add(length)?).ok()?;
    bytes.get(start..end)
}

fn array<const N: usize>(bytes: &[u8], at: u64) -> Option<[u8; N]> {
    slice(bytes, at, N as u64)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: u64) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: u64) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: u64) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

fn starts_with(bytes: &[u8], at: u64, signature: [u8; 4]) -> bool {
    array(bytes, at) == Some(signature)
}
