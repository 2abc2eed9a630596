use std::collections::BTreeMap;

use crate::error::ModelError;
use crate::expr::Expr;
use crate::program::{Dim, InputKind, Program, SymbolRange};

/// The values of a program's symbols for one set of inputs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Symbols {
    values: BTreeMap<String, i64>,
}

impl Symbols {
    /// The value of a symbol; none if the inputs do not determine it.
    pub fn get(&self, name: &str) -> Option<i64> {
        self.values.get(name).copied()
    }

    /// Gives a symbol a value and returns the one that it had.
    pub fn insert(&mut self, name: &str, value: i64) -> Option<i64> {
        self.values.insert(name.to_owned(), value)
    }

    /// All symbols that have a value, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, i64)> {
        self.values.iter().map(|(name, value)| (name.as_str(), *value))
    }
}

impl Dim {
    /// This size for the given symbols; none if it cannot be known before the program runs.
    pub fn evaluate(&self, symbols: &Symbols) -> Option<u64> {
        match self {
            Dim::Fixed(size) => Some(*size),
            Dim::Symbol { name, .. } => u64::try_from(symbols.get(name)?).ok(),
            Dim::Derived { expr, .. } => u64::try_from(expr.evaluate(symbols)?).ok(),
            Dim::Unknown { .. } => None,
        }
    }

    /// Whether it is the same for all inputs.
    pub fn is_fixed(&self) -> bool {
        matches!(self, Dim::Fixed(_))
    }
}

/// What is given for one input, as far as it decides about symbols.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Given<'a> {
    /// A tensor of this shape.
    Shape(&'a [u64]),
    /// An integer.
    Int(i64),
}

impl Program {
    /// Checks the shapes of all inputs, for programs whose inputs are all tensors: [`Program::bind`].
    ///
    /// # Errors
    ///
    /// As [`Program::bind`].
    pub fn bind_shapes(&self, shapes: &[&[u64]]) -> Result<Symbols, ModelError> {
        let given: Vec<Given<'_>> = shapes.iter().map(|shape| Given::Shape(shape)).collect();
        self.bind(&given)
    }

    /// Checks the shapes of all tensor inputs and the integer inputs, in the order of [`Program::inputs`] without the
    /// constants, and gives the values that they imply for the program's symbols.
    ///
    /// # Errors
    ///
    /// [`ModelError::InputCount`], [`ModelError::InputKind`] and [`ModelError::InputSize`], with the input, the
    /// dimension, what was found and what the program takes.
    pub fn bind(&self, given: &[Given<'_>]) -> Result<Symbols, ModelError> {
        let expected: Vec<_> = self.arguments().collect();
        if expected.len() != given.len() {
            let names: Vec<&str> = expected.iter().map(|(name, _)| *name).collect();
            let (expected, found) = (expected.len(), given.len());
            return Err(ModelError::InputCount { expected, found, names: names.join(", ") });
        }
        // Symbols first, then what follows from them: `2*s17` may come before `s17`.
        let mut binding = Binding::default();
        let mut derived = Vec::new();
        for ((name, kind), given) in expected.into_iter().zip(given) {
            match (kind, *given) {
                (InputKind::Tensor { shape, .. }, Given::Shape(found)) => {
                    if shape.len() != found.len() {
                        return Err(ModelError::InputKind {
                            input: name.to_owned(),
                            expected: format!("a tensor of {} dimensions", shape.len()),
                            found: format!("a tensor of {} dimensions", found.len()),
                        });
                    }
                    for (i, (dim, size)) in shape.iter().zip(found).enumerate() {
                        let place = Place { input: name, dimension: Some(i) };
                        binding.check(place, dim, i128::from(*size), &mut derived)?;
                    }
                }
                (InputKind::SymInt { dim, .. }, Given::Int(found)) => {
                    let place = Place { input: name, dimension: None };
                    binding.check(place, dim, i128::from(found), &mut derived)?;
                }
                (kind, given) => {
                    let expected = match kind {
                        InputKind::Tensor { shape, .. } => format!("a tensor of {} dimensions", shape.len()),
                        _ => "an integer".to_owned(),
                    };
                    let found = match given {
                        Given::Shape(shape) => format!("a tensor of {} dimensions", shape.len()),
                        Given::Int(_) => "an integer".to_owned(),
                    };
                    return Err(ModelError::InputKind { input: name.to_owned(), expected, found });
                }
            }
        }
        for (place, expr, found) in derived {
            binding.solve(self, place, expr, found)?;
        }
        Ok(binding.symbols)
    }

    /// The inputs that a caller passes: all but the constants.
    fn arguments(&self) -> impl Iterator<Item = (&str, &InputKind)> {
        self.inputs
            .iter()
            .filter(|input| !matches!(input.kind, InputKind::Constant(_)))
            .map(|input| (input.name.as_str(), &input.kind))
    }
}

/// Where a size was found.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    input: &'a str,
    dimension: Option<usize>,
}

impl Place<'_> {
    fn describe(&self) -> String {
        match self.dimension {
            Some(i) => format!("dimension {i}"),
            None => "its value".to_owned(),
        }
    }

    fn error(&self, expected: String, found: i128) -> ModelError {
        ModelError::InputSize { input: self.input.to_owned(), dimension: self.describe(), expected, found }
    }
}

#[derive(Default)]
struct Binding<'a> {
    symbols: Symbols,
    /// Where each symbol got its value.
    places: BTreeMap<&'a str, Place<'a>>,
}

impl<'a> Binding<'a> {
    fn check(
        &mut self,
        place: Place<'a>,
        dim: &'a Dim,
        found: i128,
        derived: &mut Vec<(Place<'a>, &'a Expr, i128)>,
    ) -> Result<(), ModelError> {
        match dim {
            Dim::Fixed(size) if i128::from(*size) != found => Err(place.error(size.to_string(), found)),
            Dim::Fixed(_) | Dim::Unknown { .. } => Ok(()),
            Dim::Derived { expr, .. } => {
                derived.push((place, expr, found));
                Ok(())
            }
            Dim::Symbol { name, min, max, .. } => {
                let value = match i64::try_from(found) {
                    Ok(value) if in_range(found, *min, *max) => value,
                    _ => return Err(place.error(describe(name, *min, *max), found)),
                };
                match (self.symbols.get(name), self.places.get(name.as_str())) {
                    (Some(before), Some(other)) if before != value => {
                        let whose = format!("{before}, like {} of `{}`", other.describe(), other.input);
                        Err(place.error(whose, found))
                    }
                    (Some(_), _) => Ok(()),
                    (None, _) => {
                        self.symbols.insert(name, value);
                        self.places.insert(name, place);
                        Ok(())
                    }
                }
            }
        }
    }

    /// Checks a size that follows from symbols. If one of them has no value yet, it gets the one that fits.
    fn solve(
        &mut self,
        program: &Program,
        place: Place<'_>,
        expr: &Expr,
        found: i128,
    ) -> Result<(), ModelError> {
        let Some((name, at_zero, slope)) = expr.line(&self.symbols) else {
            return match expr.evaluate(&self.symbols) {
                Some(value) if i128::from(value) != found => {
                    Err(place.error(format!("{expr} = {value}"), found))
                }
                // Without a value, the expression has symbols that these inputs do not determine.
                _ => Ok(()),
            };
        };
        let range = program.symbols.get(&name).copied().unwrap_or(SymbolRange { min: 0, max: None });
        let wrong = || place.error(format!("{expr} with {}", describe(&name, range.min, range.max)), found);
        let (rest, slope) = (found - i128::from(at_zero), i128::from(slope));
        if rest == 0 && slope == 0 {
            return Ok(());
        }
        if slope == 0 || rest % slope != 0 || !in_range(rest / slope, range.min, range.max) {
            return Err(wrong());
        }
        let value = i64::try_from(rest / slope).map_err(|_| wrong())?;
        self.symbols.insert(&name, value);
        Ok(())
    }
}

impl Expr {
    /// For an expression with exactly one symbol without value in which it is linear (tried at a few points; what is
    /// solved by it is checked again): the symbol, the value at zero and the slope.
    fn line(&self, symbols: &Symbols) -> Option<(String, i64, i64)> {
        let mut unknown: Option<&str> = None;
        let mut several = false;
        self.for_each_symbol(&mut |name| {
            if symbols.get(name).is_none() {
                several |= unknown.is_some_and(|other| other != name);
                unknown = Some(name);
            }
        });
        let name = unknown.filter(|_| !several)?;
        let mut trial = symbols.clone();
        let mut at = |value: i64| {
            trial.insert(name, value);
            self.evaluate(&trial)
        };
        let (zero, one, many) = (at(0)?, at(1)?, at(1000)?);
        let slope = one.checked_sub(zero)?;
        let is_line = slope.checked_mul(1000)?.checked_add(zero)? == many;
        is_line.then(|| (name.to_owned(), zero, slope))
    }
}

fn in_range(value: i128, min: u64, max: Option<u64>) -> bool {
    value >= i128::from(min) && max.is_none_or(|max| value <= i128::from(max))
}

fn describe(name: &str, min: u64, max: Option<u64>) -> String {
    match max {
        Some(max) => format!("{name} from {min} to {max}"),
        None => format!("{name} from {min}"),
    }
}
