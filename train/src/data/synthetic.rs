use half::{bf16, f16};
use pswitch_model::DType;

use super::array::{ArrayInfo, RowSource, check_gather, check_names};
use crate::TrainError;
use crate::seed::{Generator, Purpose};

/// An array of made up values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyntheticArray {
    /// Its name, type and shape.
    pub info: ArrayInfo,
    /// What its integers are smaller than: the number of classes or of words. Floats take no notice of it.
    pub below: u64,
}

/// A data set of made up values, which depend on the seed, the place of the array and the row alone.
///
/// Floats are uniform between -1 and 1, without both, and never 0; integers are uniform from 0 to one less than a bound;
/// so are bools, with a bound of 1 or 2.
#[derive(Debug)]
pub struct Synthetic {
    rows: u64,
    seed: u64,
    infos: Vec<ArrayInfo>,
    /// The bounds, in the order of `infos`.
    below: Vec<u64>,
}

impl Synthetic {
    /// Describes a data set; nothing is made up before it is gathered.
    ///
    /// # Errors
    ///
    /// [`TrainError::NoRows`], [`TrainError::NoArrays`], [`TrainError::DuplicateArray`], [`TrainError::Bound`] or
    /// [`TrainError::NotSynthetic`].
    pub fn new(rows: u64, seed: u64, arrays: Vec<SyntheticArray>) -> Result<Synthetic, TrainError> {
        check_names(arrays.iter().map(|array| &array.info))?;
        for array in &arrays {
            let name = || array.info.name().to_owned();
            let dtype = array.info.dtype();
            if rows == 0 {
                return Err(TrainError::NoRows { array: name() });
            }
            match kind(dtype) {
                None => return Err(TrainError::NotSynthetic { array: name(), dtype }),
                Some(Kind::Integer { most }) if !(1..=most).contains(&array.below) => {
                    return Err(TrainError::Bound { array: name(), dtype, below: array.below, most });
                }
                Some(_) => {}
            }
        }
        let (infos, below) = arrays.into_iter().map(|array| (array.info, array.below)).unzip();
        Ok(Synthetic { rows, seed, infos, below })
    }
}

impl RowSource for Synthetic {
    fn rows(&self) -> u64 {
        self.rows
    }

    fn arrays(&self) -> &[ArrayInfo] {
        &self.infos
    }

    fn gather(&self, array: usize, rows: &[u64], out: &mut [u8]) -> Result<(), TrainError> {
        let info = check_gather(self, array, rows, out)?;
        for (row, out) in rows.iter().zip(out.chunks_exact_mut(info.row_len())) {
            let mut generator = Generator::keyed(self.seed, Purpose::Values, &[array as u64, *row]);
            fill(info.dtype(), self.below[array], &mut generator, out);
        }
        Ok(())
    }
}

enum Kind {
    Float,
    /// The largest bound of its values.
    Integer {
        most: u64,
    },
}

fn kind(dtype: DType) -> Option<Kind> {
    let most = match dtype {
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => return Some(Kind::Float),
        DType::Bool => 2,
        DType::I8 => 1 << 7,
        DType::U8 => 1 << 8,
        DType::I16 => 1 << 15,
        DType::U16 => 1 << 16,
        DType::I32 => 1 << 31,
        DType::I64 => 1 << 63,
        _ => return None,
    };
    Some(Kind::Integer { most })
}

fn fill(dtype: DType, below: u64, generator: &mut Generator, out: &mut [u8]) {
    match dtype {
        // One bit less than the significand has, so that no value is rounded.
        DType::F16 => each(out, || f16::from_f64(uniform(generator, 10)).to_le_bytes()),
        DType::BF16 => each(out, || bf16::from_f64(uniform(generator, 7)).to_le_bytes()),
        #[allow(clippy::cast_possible_truncation)] // exact, see above
        DType::F32 => each(out, || (uniform(generator, 23) as f32).to_le_bytes()),
        DType::F64 => each(out, || uniform(generator, 52).to_le_bytes()),
        _ => {
            // `new` has seen to it that these are integers and that the bound fits.
            let size = usize::try_from(dtype.size_bytes()).expect("an element has few bytes");
            for element in out.chunks_exact_mut(size) {
                element.copy_from_slice(&generator.below(below).to_le_bytes()[..size]);
            }
        }
    }
}

fn each<const SIZE: usize>(out: &mut [u8], mut next: impl FnMut() -> [u8; SIZE]) {
    for element in out.chunks_exact_mut(SIZE) {
        element.copy_from_slice(&next());
    }
}

/// An odd multiple of 2^-bits between -1 and 1.
#[allow(clippy::cast_precision_loss)] // at most 53 bits
fn uniform(generator: &mut Generator, bits: u32) -> f64 {
    let steps = (1u64 << bits) as f64;
    let step = (generator.next() >> (64 - bits)) as f64;
    (2.0 * step + 1.0 - steps) / steps
}
