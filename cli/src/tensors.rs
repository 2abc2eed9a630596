//! Tensors on the command line: .npy files, JSON text, and the bytes that travel.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use half::{bf16, f16};
use npyz::{NpyFile, Order, WriterBuilder as _};
use serde_json::Value;

/// A tensor as it travels: little-endian, dense, row-major.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) datatype: String,
    pub(crate) shape: Vec<u64>,
    pub(crate) data: Vec<u8>,
}

/// An element type of the protocol with a form in memory.
trait Element: Sized + Copy {
    /// The type that stands for it in a .npy file.
    type Npy: npyz::AutoSerialize;
    fn to_npy(self) -> Self::Npy;
    fn to_bytes(self) -> Vec<u8>;
    fn from_bytes(bytes: &[u8]) -> Self;
    /// None if the number is not one of the type's.
    fn from_json(value: &Value) -> Option<Self>;
    fn to_json(self) -> Value;
}

macro_rules! integer_element {
    ($($type:ty),*) => {$(
        impl Element for $type {
            type Npy = Self;
            fn to_npy(self) -> Self {
                self
            }
            fn to_bytes(self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
            fn from_bytes(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().unwrap_or_default())
            }
            fn from_json(value: &Value) -> Option<Self> {
                value.as_i64().and_then(|n| n.try_into().ok()).or_else(|| value.as_u64().and_then(|n| n.try_into().ok()))
            }
            fn to_json(self) -> Value {
                self.into()
            }
        }
    )*};
}

integer_element!(u8, i8, u16, i16, u32, i32, u64, i64);

macro_rules! float_element {
    ($($type:ty: $from:expr, $to:expr, $npy:ty;)*) => {$(
        impl Element for $type {
            type Npy = $npy;
            fn to_npy(self) -> $npy {
                self.into()
            }
            fn to_bytes(self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
            fn from_bytes(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().unwrap_or_default())
            }
            fn from_json(value: &Value) -> Option<Self> {
                value.as_f64().map($from)
            }
            fn to_json(self) -> Value {
                $to(self).into()
            }
        }
    )*};
}

// Rounding to the nearest value of the narrower type is what a number in a text means.
#[allow(clippy::cast_possible_truncation)]
fn to_f32(value: f64) -> f32 {
    value as f32
}

float_element! {
    f32: to_f32, f64::from, f32;
    f64: |value| value, |value: f64| value, f64;
    f16: f16::from_f64, f64::from, f16;
    bf16: bf16::from_f64, f64::from, f32;
}

impl Element for bool {
    type Npy = Self;
    fn to_npy(self) -> Self {
        self
    }
    fn to_bytes(self) -> Vec<u8> {
        vec![u8::from(self)]
    }
    fn from_bytes(bytes: &[u8]) -> Self {
        bytes.first().is_some_and(|byte| *byte != 0)
    }
    fn from_json(value: &Value) -> Option<Self> {
        value.as_bool()
    }
    fn to_json(self) -> Value {
        self.into()
    }
}

/// Calls `$body` with `$type` as the type that a datatype of the protocol has in memory.
macro_rules! with_element {
    ($datatype:expr, $type:ident => $body:expr) => {
        match $datatype {
            "BOOL" => {
                type $type = bool;
                $body
            }
            "UINT8" => {
                type $type = u8;
                $body
            }
            "UINT16" => {
                type $type = u16;
                $body
            }
            "UINT32" => {
                type $type = u32;
                $body
            }
            "UINT64" => {
                type $type = u64;
                $body
            }
            "INT8" => {
                type $type = i8;
                $body
            }
            "INT16" => {
                type $type = i16;
                $body
            }
            "INT32" => {
                type $type = i32;
                $body
            }
            "INT64" => {
                type $type = i64;
                $body
            }
            "FP16" => {
                type $type = f16;
                $body
            }
            "FP32" => {
                type $type = f32;
                $body
            }
            "FP64" => {
                type $type = f64;
                $body
            }
            "BF16" => {
                type $type = bf16;
                $body
            }
            other => bail!("datatype {other} is not known here"),
        }
    };
}

impl Tensor {
    /// An input from what the command line says: the name of a .npy or .json file, or JSON itself.
    pub(crate) fn parse(name: &str, datatype: &str, value: &str) -> anyhow::Result<Self> {
        let path = Path::new(value);
        let extension = path.extension().and_then(|extension| extension.to_str());
        let (shape, data) = match extension {
            Some("npy") => read_npy(path, datatype).with_context(|| format!("cannot read {value}"))?,
            Some("json") => {
                let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {value}"))?;
                parse_json(&text, datatype).with_context(|| format!("cannot use {value}"))?
            }
            _ => parse_json(value, datatype)?,
        };
        Ok(Self { name: name.to_owned(), datatype: datatype.to_owned(), shape, data })
    }

    /// Its values as JSON, nested as the shape is.
    pub(crate) fn to_json(&self) -> anyhow::Result<Value> {
        let flat = self.values(usize::MAX)?;
        Ok(nest(&mut flat.into_iter(), &self.shape))
    }

    /// Its first values.
    pub(crate) fn values(&self, most: usize) -> anyhow::Result<Vec<Value>> {
        with_element!(self.datatype.as_str(), E => {
            let size = std::mem::size_of::<E>();
            Ok(self.data.chunks_exact(size).take(most).map(|bytes| E::from_bytes(bytes).to_json()).collect())
        })
    }

    /// Saves it as a .npy file; BF16, which NumPy does not have, as float32.
    pub(crate) fn save(&self, path: &Path) -> anyhow::Result<()> {
        let file =
            BufWriter::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?);
        let write = |file| -> anyhow::Result<()> {
            with_element!(self.datatype.as_str(), E => {
                let values = self.data.chunks_exact(std::mem::size_of::<E>()).map(|bytes| E::from_bytes(bytes).to_npy());
                write_npy(file, &self.shape, values)
            })
        };
        write(file).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn write_npy<T: npyz::AutoSerialize>(
    file: BufWriter<File>,
    shape: &[u64],
    values: impl Iterator<Item = T>,
) -> anyhow::Result<()> {
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(shape).writer(file).begin_nd()?;
    writer.extend(values)?;
    writer.finish()?;
    Ok(())
}

fn read_npy(path: &Path, datatype: &str) -> anyhow::Result<(Vec<u64>, Vec<u8>)> {
    let npy = NpyFile::new(BufReader::new(File::open(path)?))?;
    ensure!(
        npy.order() == Order::C,
        "the array is in Fortran order; save numpy.ascontiguousarray(...) of it"
    );
    let shape = npy.shape().to_vec();
    let found = npy.dtype().descr();
    ensure!(datatype != "BF16", "NumPy has no BF16; give the values as JSON");
    let data = with_element!(datatype, E => read_values::<E>(npy, &found, datatype)?);
    Ok((shape, data))
}

fn read_values<E: Element>(npy: impl NpyValues<E>, found: &str, datatype: &str) -> anyhow::Result<Vec<u8>> {
    let values =
        npy.into_values().with_context(|| format!("the model takes {datatype}, the file holds {found}"))?;
    Ok(values.into_iter().flat_map(Element::to_bytes).collect())
}

/// Bridges types that npyz reads and those that it does not have.
trait NpyValues<E> {
    fn into_values(self) -> anyhow::Result<Vec<E>>;
}

macro_rules! npy_values {
    ($($type:ty),*) => {$(
        impl NpyValues<$type> for NpyFile<BufReader<File>> {
            fn into_values(self) -> anyhow::Result<Vec<$type>> {
                Ok(self.into_vec::<$type>()?)
            }
        }
    )*};
}

npy_values!(bool, u8, u16, u32, u64, i8, i16, i32, i64, f16, f32, f64);

impl NpyValues<bf16> for NpyFile<BufReader<File>> {
    fn into_values(self) -> anyhow::Result<Vec<bf16>> {
        bail!("NumPy has no BF16")
    }
}

fn parse_json(text: &str, datatype: &str) -> anyhow::Result<(Vec<u64>, Vec<u8>)> {
    let value: Value =
        serde_json::from_str(text).context("it is neither a .npy file, a .json file nor JSON itself")?;
    let mut shape = Vec::new();
    let mut level = &value;
    while let Value::Array(items) = level {
        shape.push(items.len() as u64);
        match items.first() {
            Some(first) => level = first,
            None => break,
        }
    }
    let mut data = Vec::new();
    with_element!(datatype, E => flatten::<E>(&value, &shape, datatype, &mut data)?);
    Ok((shape, data))
}

fn flatten<E: Element>(
    value: &Value,
    shape: &[u64],
    datatype: &str,
    data: &mut Vec<u8>,
) -> anyhow::Result<()> {
    match (value, shape) {
        (Value::Array(items), [length, rest @ ..]) => {
            ensure!(
                items.len() as u64 == *length,
                "a row has {} entries where others have {length}",
                items.len()
            );
            items.iter().try_for_each(|item| flatten::<E>(item, rest, datatype, data))
        }
        (Value::Array(_), []) => bail!("some rows are nested deeper than others"),
        (_, [_, ..]) => bail!("{value} stands where a list is expected"),
        (_, []) => {
            let element = E::from_json(value).with_context(|| format!("{value} is no {datatype}"))?;
            data.extend(element.to_bytes());
            Ok(())
        }
    }
}

fn nest(values: &mut impl Iterator<Item = Value>, shape: &[u64]) -> Value {
    match shape {
        [] => values.next().unwrap_or(Value::Null),
        [length, rest @ ..] => Value::Array((0..*length).map(|_| nest(values, rest)).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_gives_shape_and_bytes() {
        let tensor = Tensor::parse("x", "INT16", "[[1, -2, 3], [4, 5, 6]]").unwrap();
        assert_eq!(tensor.shape, [2, 3]);
        assert_eq!(tensor.data, [1, 0, 254, 255, 3, 0, 4, 0, 5, 0, 6, 0]);
        assert_eq!(tensor.to_json().unwrap(), serde_json::json!([[1, -2, 3], [4, 5, 6]]));
        let scalar = Tensor::parse("x", "FP32", "1.5").unwrap();
        assert_eq!((scalar.shape.len(), scalar.data.as_slice()), (0, 1.5_f32.to_le_bytes().as_slice()));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_value() {
        for (datatype, text, expected) in [
            ("INT8", "[300]", "300 is no INT8"),
            ("UINT8", "[-1]", "-1 is no UINT8"),
            ("INT64", "[1.5]", "1.5 is no INT64"),
            ("BOOL", "[1]", "1 is no BOOL"),
            ("FP32", "[[1, 2], [3]]", "a row has 1 entries where others have 2"),
            ("FP32", "[1, [2]]", "nested deeper"),
            ("FP32", "[[1], 2]", "2 stands where a list is expected"),
            ("FP32", "picture", "neither a .npy file"),
        ] {
            let error = format!("{:#}", Tensor::parse("x", datatype, text).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn npy_files_come_back_as_they_were_saved() {
        let folder = tempfile::tempdir().unwrap();
        for (datatype, text) in
            [("FP32", "[[1.5], [2.5]]"), ("INT64", "[1, 2]"), ("BOOL", "[true, false]"), ("FP16", "[0.5]")]
        {
            let path = folder.path().join("x.npy");
            let tensor = Tensor::parse("x", datatype, text).unwrap();
            tensor.save(&path).unwrap();
            assert_eq!(Tensor::parse("x", datatype, path.to_str().unwrap()).unwrap(), tensor);
        }
        let path = folder.path().join("x.npy");
        let error = format!("{:#}", Tensor::parse("x", "INT32", path.to_str().unwrap()).unwrap_err());
        assert!(error.contains("the model takes INT32"), "{error}");
    }
}
