//! Headers of .npy files, as `numpy.lib.format` describes them: a magic text, a version, a length, a literal of Python.

use pswitch_model::DType;

/// Why a file is not a .npy file, or one that is not supported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NpyError {
    /// Other first bytes.
    #[error("it does not begin as numpy.save writes it")]
    Magic,
    /// A version of the format that is not known.
    #[error("its format has version {major}.{minor}: versions 1.0, 2.0 and 3.0 are known")]
    Version {
        /// First number of the version.
        major: u8,
        /// Second number of the version.
        minor: u8,
    },
    /// A file that ends inside of its header.
    #[error("it ends inside of its header: {needed_bytes} bytes are needed, it has {found_bytes}")]
    Truncated {
        /// Bytes of the header and what is ahead of it.
        needed_bytes: u64,
        /// Bytes of the file.
        found_bytes: u64,
    },
    /// A header that is longer than any of a supported array.
    #[error("its header has {found_bytes} bytes: {most_bytes} are enough for every array that is supported")]
    HeaderTooLong {
        /// Bytes of the header.
        found_bytes: u64,
        /// The longest that is read.
        most_bytes: u64,
    },
    /// A header that is not the literal it must be.
    #[error("its header is malformed at byte {at}: {expected} is expected")]
    Malformed {
        /// Where, counted from the header's first byte.
        at: usize,
        /// What should stand there.
        expected: &'static str,
    },
    /// A key that is unknown, there twice or missing.
    #[error("its header has `{key}` {problem}: it must have `descr`, `fortran_order` and `shape`, each once")]
    Key {
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Elements that are not supported.
    #[error(
        "its elements are of type {found}: save it with a little-endian float16, float32, float64, int8, int16, \
         int32, int64, uint8 or bool"
    )]
    ElementType {
        /// What the header says, or the beginning of it.
        found: String,
    },
    /// Columns ahead of rows.
    #[error("it is in Fortran order: save it after numpy.ascontiguousarray")]
    FortranOrder,
    /// More dimensions than arrays have.
    #[error("it has more than {most} dimensions")]
    TooManyDimensions {
        /// The most that are read.
        most: usize,
    },
    /// A shape whose bytes cannot be counted.
    #[error("its shape has more elements than can be counted")]
    TooLarge,
    /// A file that is shorter or longer than its header says.
    #[error("its header asks for {needed_bytes} bytes of data, it has {found_bytes}")]
    Length {
        /// Bytes by shape and type.
        needed_bytes: u64,
        /// Bytes behind the header.
        found_bytes: u64,
    },
}

/// What a header says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) dtype: DType,
    pub(super) shape: Vec<u64>,
    /// Where the data begin in the file.
    pub(super) data_start: usize,
}

const MAGIC: &[u8] = b"\x93NUMPY";
/// Headers of arrays of plain types have some hundred bytes; NumPy itself reads 10,000.
const MOST_HEADER_BYTES: u64 = 10_000;
/// NumPy's own limit.
const MOST_DIMENSIONS: usize = 64;
/// How much of something unexpected an error shows.
const SHOWN_CHARS: usize = 40;

/// Reads the header of a whole file, and holds it against the file's length.
pub(super) fn read(file: &[u8]) -> Result<Header, NpyError> {
    let (text, data_start) = header(file)?;
    let fields = Parser { text, at: 0 }.fields()?;
    if fields.fortran_order {
        return Err(NpyError::FortranOrder);
    }
    let dtype = element_type(&fields.descr)?;
    let found_bytes = (file.len() - data_start) as u64;
    let needed_bytes = dtype.dense_bytes(&fields.shape).ok_or(NpyError::TooLarge)?;
    if needed_bytes != found_bytes {
        return Err(NpyError::Length { needed_bytes, found_bytes });
    }
    Ok(Header { dtype, shape: fields.shape, data_start })
}

/// The literal, and where the data begin.
fn header(file: &[u8]) -> Result<(&[u8], usize), NpyError> {
    let truncated =
        |needed: usize| NpyError::Truncated { needed_bytes: needed as u64, found_bytes: file.len() as u64 };
    let behind = file.strip_prefix(MAGIC).ok_or(NpyError::Magic)?;
    let &[major, minor, ref behind @ ..] = behind else {
        return Err(truncated(MAGIC.len() + 2));
    };
    let (length, ahead) = match (major, minor) {
        (1, 0) => {
            let length = behind.first_chunk().map(|bytes| u64::from(u16::from_le_bytes(*bytes)));
            (length, MAGIC.len() + 2 + 2)
        }
        (2 | 3, 0) => {
            let length = behind.first_chunk().map(|bytes| u64::from(u32::from_le_bytes(*bytes)));
            (length, MAGIC.len() + 2 + 4)
        }
        _ => return Err(NpyError::Version { major, minor }),
    };
    let found_bytes = length.ok_or_else(|| truncated(ahead))?;
    let too_long = NpyError::HeaderTooLong { found_bytes, most_bytes: MOST_HEADER_BYTES };
    if found_bytes > MOST_HEADER_BYTES {
        return Err(too_long);
    }
    let data_start = ahead + usize::try_from(found_bytes).map_err(|_| too_long)?;
    Ok((file.get(ahead..data_start).ok_or_else(|| truncated(data_start))?, data_start))
}

fn element_type(descr: &str) -> Result<DType, NpyError> {
    match descr {
        "<f2" => Ok(DType::F16),
        "<f4" => Ok(DType::F32),
        "<f8" => Ok(DType::F64),
        "|i1" => Ok(DType::I8),
        "<i2" => Ok(DType::I16),
        "<i4" => Ok(DType::I32),
        "<i8" => Ok(DType::I64),
        "|u1" => Ok(DType::U8),
        "|b1" => Ok(DType::Bool),
        _ => Err(NpyError::ElementType { found: descr.chars().take(SHOWN_CHARS).collect() }),
    }
}

/// The values of the three keys.
struct Fields {
    descr: String,
    fortran_order: bool,
    shape: Vec<u64>,
}

/// Reads `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`, and nothing else that Python has.
struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn fields(mut self) -> Result<Fields, NpyError> {
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        self.expect(b'{', "`{`")?;
        while !self.eat(b'}') {
            let key = self.string("a key in quotes")?;
            self.expect(b':', "`:`")?;
            let twice = match key.as_str() {
                "descr" => descr.replace(self.descr()?).is_some(),
                "fortran_order" => fortran_order.replace(self.boolean()?).is_some(),
                "shape" => shape.replace(self.shape()?).is_some(),
                _ => return Err(problem(&key, "which is unknown")),
            };
            if twice {
                return Err(problem(&key, "twice"));
            }
            if !self.eat(b',') {
                self.expect(b'}', "`,` or `}`")?;
                break;
            }
        }
        self.skip_spaces();
        if self.at != self.text.len() {
            return Err(self.malformed("the end"));
        }
        let missing = |key| problem(key, "missing");
        Ok(Fields {
            descr: descr.ok_or_else(|| missing("descr"))?,
            fortran_order: fortran_order.ok_or_else(|| missing("fortran_order"))?,
            shape: shape.ok_or_else(|| missing("shape"))?,
        })
    }

    fn descr(&mut self) -> Result<String, NpyError> {
        self.skip_spaces();
        if self.text.get(self.at) == Some(&b'[') {
            // Records: a list of fields.
            let shown = String::from_utf8_lossy(&self.text[self.at..]).chars().take(SHOWN_CHARS).collect();
            return Err(NpyError::ElementType { found: shown });
        }
        self.string("a type in quotes")
    }

    fn string(&mut self, expected: &'static str) -> Result<String, NpyError> {
        self.skip_spaces();
        let quote = match self.text.get(self.at) {
            Some(quote @ (b'\'' | b'"')) => *quote,
            _ => return Err(self.malformed(expected)),
        };
        let rest = &self.text[self.at + 1..];
        let end = rest.iter().position(|byte| [quote, b'\\', b'\n'].contains(byte));
        let Some(end) = end.filter(|end| rest[*end] == quote) else {
            return Err(self.malformed(expected));
        };
        let Ok(text) = str::from_utf8(&rest[..end]) else {
            return Err(self.malformed(expected));
        };
        self.at += end + 2;
        Ok(text.to_owned())
    }

    fn boolean(&mut self) -> Result<bool, NpyError> {
        self.skip_spaces();
        for (word, value) in [(b"True".as_slice(), true), (b"False", false)] {
            if self.text[self.at..].starts_with(word) {
                self.at += word.len();
                return Ok(value);
            }
        }
        Err(self.malformed("True or False"))
    }

    fn shape(&mut self) -> Result<Vec<u64>, NpyError> {
        let mut shape = Vec::new();
        self.expect(b'(', "`(`")?;
        while !self.eat(b')') {
            if shape.len() == MOST_DIMENSIONS {
                return Err(NpyError::TooManyDimensions { most: MOST_DIMENSIONS });
            }
            shape.push(self.number()?);
            if !self.eat(b',') {
                // Python's `(3)` is a number in parentheses.
                self.expect(b')', if shape.len() == 1 { "`,`" } else { "`,` or `)`" })?;
                if shape.len() == 1 {
                    return Err(self.malformed("`,` ahead of `)`"));
                }
                break;
            }
        }
        Ok(shape)
    }

    fn number(&mut self) -> Result<u64, NpyError> {
        self.skip_spaces();
        let rest = &self.text[self.at..];
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if digits == 0 {
            return Err(self.malformed("a number"));
        }
        let value = rest[..digits]
            .iter()
            .try_fold(0u64, |value, digit| value.checked_mul(10)?.checked_add(u64::from(*digit - b'0')));
        self.at += digits;
        value.ok_or(NpyError::TooLarge)
    }

    fn expect(&mut self, byte: u8, expected: &'static str) -> Result<(), NpyError> {
        if self.eat(byte) { Ok(()) } else { Err(self.malformed(expected)) }
    }

    fn eat(&mut self, byte: u8) -> bool {
        self.skip_spaces();
        let found = self.text.get(self.at) == Some(&byte);
        self.at += usize::from(found);
        found
    }

    fn skip_spaces(&mut self) {
        self.at += self.text[self.at..].iter().take_while(|byte| [b' ', b'\n'].contains(byte)).count();
    }

    fn malformed(&self, expected: &'static str) -> NpyError {
        NpyError::Malformed { at: self.at, expected }
    }
}

fn problem(key: &str, problem: &'static str) -> NpyError {
    NpyError::Key { key: key.chars().take(SHOWN_CHARS).collect(), problem }
}

#[cfg(test)]
mod tests;
