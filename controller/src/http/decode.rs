//! Tensors written as JSON: from a list's text straight into the slot.

use crate::service::{Datatype, ServiceError, TensorSpec};

/// Bytes of elements that are gathered before they are handed on.
const GATHER_BYTES: usize = 16 << 10;

/// Longest piece of a client's text that a message repeats.
const QUOTE_CHARACTERS: usize = 40;

/// Hands the bytes of a tensor's elements on, front to back.
pub(super) type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), ServiceError>;

/// Decodes a tensor's `data`, a flat list or lists nested as the shape says.
///
/// `text` must be one well-formed JSON value: the caller has parsed the request around it. The walk is a loop, so
/// lists nested ever so deep cost no stack.
///
/// # Errors
/// [`ServiceError::InvalidInput`] that names the element, what it should be and what it is; what `sink` says.
pub(super) fn decode_json(spec: &TensorSpec, text: &str, sink: Sink<'_>) -> Result<(), ServiceError> {
    if !spec.datatype.has_json_form() {
        let message = format!(
            "{} cannot be written as JSON; send it with the binary tensor data extension (binary_data_size)",
            spec.datatype
        );
        return Err(ServiceError::input(&spec.name, message));
    }
    let elements = spec.elements().unwrap_or(u64::MAX);
    let gathered = Vec::with_capacity(GATHER_BYTES + 8);
    Walk { spec, text, elements, counts: Vec::new(), nested: None, found: 0, gathered, sink }.run()
}

struct Walk<'a> {
    spec: &'a TensorSpec,
    text: &'a str,
    /// Elements that the shape has.
    elements: u64,
    /// For every list that is open, the items that were completed in it.
    counts: Vec<u64>,
    /// Whether the lists are nested as the shape is; unknown until the first item of the outermost list.
    nested: Option<bool>,
    /// Elements found so far.
    found: u64,
    /// Elements on their way to the sink.
    gathered: Vec<u8>,
    sink: Sink<'a>,
}

impl Walk<'_> {
    fn run(mut self) -> Result<(), ServiceError> {
        let bytes = self.text.as_bytes();
        let mut at = 0;
        while let Some(byte) = bytes.get(at) {
            match byte {
                b'[' => {
                    self.open()?;
                    at += 1;
                }
                b']' => {
                    self.close()?;
                    at += 1;
                }
                b',' | b' ' | b'\n' | b'\r' | b'\t' => at += 1,
                _ => {
                    let end = bytes[at..]
                        .iter()
                        .position(|byte| matches!(byte, b',' | b']' | b' ' | b'\n' | b'\r' | b'\t'));
                    let end = end.map_or(bytes.len(), |length| at + length);
                    self.element(&self.text[at..end], at)?;
                    at = end;
                }
            }
        }
        self.flush()?;
        if self.found != self.elements {
            let message = format!(
                "data has {} elements, shape {:?} has {}",
                self.found, self.spec.shape, self.elements
            );
            return Err(self.wrong(message));
        }
        Ok(())
    }

    fn open(&mut self) -> Result<(), ServiceError> {
        let rank = self.spec.shape.len();
        if self.counts.len() == 1 && self.nested.is_none() {
            self.nested = Some(true);
        }
        if self.nested == Some(false) {
            let message = format!("{} is a list among numbers", self.place());
            return Err(self.wrong(message));
        }
        if self.counts.len() >= rank.max(1) {
            let message =
                format!("{} is a list, shape {:?} nests {rank} deep", self.place(), self.spec.shape);
            return Err(self.wrong(message));
        }
        self.counts.push(0);
        Ok(())
    }

    fn close(&mut self) -> Result<(), ServiceError> {
        let Some(count) = self.counts.pop() else { return Ok(()) };
        if self.nested == Some(true) {
            let expected = self.spec.shape.get(self.counts.len()).copied().unwrap_or(0);
            if count != expected {
                let place = self.place();
                let message =
                    format!("{place} has {count} items, shape {:?} wants {expected}", self.spec.shape);
                return Err(self.wrong(message));
            }
        }
        if let Some(items) = self.counts.last_mut() {
            *items += 1;
        }
        Ok(())
    }

    fn element(&mut self, token: &str, at: usize) -> Result<(), ServiceError> {
        let rank = self.spec.shape.len();
        let nested = *self.nested.get_or_insert(false);
        let depth = self.counts.len();
        let right_depth = if nested { depth == rank } else { depth == 1 || rank == 0 };
        if !right_depth {
            let message = format!(
                "{} must be a list: give all elements in one flat list or in lists nested as shape {:?}, found {}",
                self.place(),
                self.spec.shape,
                quote(token)
            );
            return Err(self.wrong(message));
        }
        if let Err(problem) = push_element(self.spec.datatype, token, &mut self.gathered) {
            // A string may hold anything, so its token may have been cut short: show it from its begin.
            let token = if token.starts_with(['"', '{']) { &self.text[at..] } else { token };
            let message = format!("{} {problem}, found {}", self.place(), quote(token));
            return Err(self.wrong(message));
        }
        self.found += 1;
        if self.found > self.elements {
            let message =
                format!("data has more elements than the {} of shape {:?}", self.elements, self.spec.shape);
            return Err(self.wrong(message));
        }
        if let Some(items) = self.counts.last_mut() {
            *items += 1;
        }
        if self.gathered.len() >= GATHER_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ServiceError> {
        (self.sink)(&self.gathered)?;
        self.gathered.clear();
        Ok(())
    }

    /// Where the walk stands: `data[1][3]`.
    fn place(&self) -> String {
        let indices: Vec<String> = self.counts.iter().map(|index| format!("[{index}]")).collect();
        format!("data{}", indices.concat())
    }

    fn wrong(&self, message: String) -> ServiceError {
        ServiceError::input(&self.spec.name, message)
    }
}

/// Appends one element's little-endian bytes, or tells what it should have been.
fn push_element(datatype: Datatype, token: &str, to: &mut Vec<u8>) -> Result<(), String> {
    macro_rules! integer {
        ($type:ty) => {{
            let value: $type = token.parse().map_err(|_| {
                if token.parse::<f64>().is_ok() && !token.contains(['.', 'e', 'E']) {
                    format!("must be in the range of {datatype}, {} to {}", <$type>::MIN, <$type>::MAX)
                } else {
                    format!("must be an integer of datatype {datatype}")
                }
            })?;
            to.extend_from_slice(&value.to_le_bytes());
        }};
    }
    macro_rules! float {
        ($type:ty) => {{
            // Rust's parser knows words for what JSON does not have.
            let begins = token.starts_with(|first: char| first == '-' || first.is_ascii_digit());
            let value = token.parse::<$type>().ok().filter(|_| begins);
            let value = value.ok_or_else(|| format!("must be a number of datatype {datatype}"))?;
            if value.is_infinite() {
                return Err(format!("must be in the range of {datatype}, up to {:e}", <$type>::MAX));
            }
            to.extend_from_slice(&value.to_le_bytes());
        }};
    }
    match datatype {
        Datatype::Bool => match token {
            "true" => to.push(1),
            "false" => to.push(0),
            _ => return Err("must be true or false (datatype BOOL)".to_owned()),
        },
        Datatype::Uint8 => integer!(u8),
        Datatype::Uint16 => integer!(u16),
        Datatype::Uint32 => integer!(u32),
        Datatype::Uint64 => integer!(u64),
        Datatype::Int8 => integer!(i8),
        Datatype::Int16 => integer!(i16),
        Datatype::Int32 => integer!(i32),
        Datatype::Int64 => integer!(i64),
        Datatype::Fp32 => float!(f32),
        Datatype::Fp64 => float!(f64),
        Datatype::Fp16 | Datatype::Bf16 => return Err(format!("cannot be of datatype {datatype} in JSON")),
    }
    Ok(())
}

/// A client's text as messages repeat it: its begin.
pub(super) fn quote(text: &str) -> String {
    if text.chars().count() <= QUOTE_CHARACTERS {
        return text.to_owned();
    }
    let begin: String = text.chars().take(QUOTE_CHARACTERS).collect();
    format!("{begin}...")
}
