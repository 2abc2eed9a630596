use std::collections::{BTreeMap, HashMap};

use crate::container::Container;
use crate::dtype::DType;
use crate::error::ModelError;
use crate::expr::Expr;
use crate::program::{Dim, SymbolRange, TensorMeta};
use crate::resolve::{Problem, Resolver};
use crate::schema::{self, Number};

/// Bounds from here on mean that there is none: archives write `int_oo` and `sys.maxsize - 1` in different ways.
const NO_LIMIT: u64 = 1 << 62;

const NO_RANGE: SymbolRange = SymbolRange { min: 0, max: None };

/// The ranges of symbols. Those of expressions (`2*s17`) follow from them.
pub(super) fn symbols(
    container: &Container,
    ranges: &HashMap<String, schema::RangeConstraint>,
) -> Result<BTreeMap<String, SymbolRange>, ModelError> {
    let is_symbol = |name: &str| name.chars().all(|c| c.is_alphanumeric() || c == '_');
    let mut symbols = BTreeMap::new();
    for (name, range) in ranges.iter().filter(|(name, _)| is_symbol(name)) {
        let min = range.min_val.map_or(0, lower);
        let max = range.max_val.and_then(upper);
        if let Some(max) = max.filter(|max| *max < min) {
            return Err(ModelError::Signature {
                file: container.file.clone(),
                what: "symbol",
                name: name.clone(),
                reason: format!("has the empty range {min} to {max}"),
            });
        }
        symbols.insert(name.clone(), SymbolRange { min, max });
    }
    Ok(symbols)
}

fn lower(bound: Number) -> u64 {
    match bound {
        Number::Int(value) => u64::try_from(value).unwrap_or(0),
        Number::Float(value) if value >= NO_LIMIT as f64 => NO_LIMIT,
        // Sizes are not negative; this is minus infinity.
        Number::Float(_) => 0,
    }
}

fn upper(bound: Number) -> Option<u64> {
    match bound {
        Number::Int(value) => Some(u64::try_from(value).unwrap_or(0)).filter(|max| *max < NO_LIMIT),
        Number::Float(value) if value < 0.0 => Some(0),
        Number::Float(_) => None,
    }
}

impl Resolver<'_> {
    /// A size, or the meaning of a symbolic integer. `signed` for the latter, which may be negative.
    pub(super) fn dim(&mut self, size: schema::SymInt, signed: bool) -> Result<Dim, Problem> {
        let expr = match size {
            schema::SymInt::AsInt(size) => {
                return match u64::try_from(size) {
                    Ok(size) => Ok(Dim::Fixed(size)),
                    Err(_) if signed => Ok(Dim::Derived { expr: Expr::Integer(size), hint: None }),
                    Err(_) => Err(format!("has the size {size}; sizes are not negative").into()),
                };
            }
            schema::SymInt::AsExpr(expr) => expr,
        };
        if let Some(dim) = self.parsed.get(&expr.expr_str) {
            return Ok(dim.clone());
        }
        let (found, limit) = (expr.expr_str.len() as u64, self.limits.expression_bytes);
        if found > limit {
            return Err(Problem::Limit { what: "the length of an expression".to_owned(), found, limit });
        }
        let hint = match expr.hint {
            Some(schema::SymExprHint::AsInt(Number::Int(hint))) => u64::try_from(hint).ok(),
            _ => None,
        };
        let dim = match Expr::parse(&expr.expr_str) {
            Some(Expr::Symbol(name)) => {
                self.check_name(&name)?;
                let range = *self.symbols.entry(name.clone()).or_insert(NO_RANGE);
                Dim::Symbol { name, hint, min: range.min, max: range.max }
            }
            Some(expr) => Dim::Derived { expr, hint },
            None => Dim::Unknown { hint },
        };
        self.parsed.insert(expr.expr_str, dim.clone());
        Ok(dim)
    }

    pub(super) fn tensor_meta(&mut self, meta: schema::TensorMeta) -> Result<TensorMeta, Problem> {
        let dtype = dtype(meta.dtype)?;
        self.check_dimensions(meta.sizes.len())?;
        let shape = meta.sizes.into_iter().map(|size| self.dim(size, false)).collect::<Result<_, _>>()?;
        Ok(TensorMeta { dtype, shape, requires_grad: meta.requires_grad })
    }

    pub(super) fn check_dimensions(&self, found: usize) -> Result<(), Problem> {
        let (found, limit) = (found as u64, self.limits.dimensions);
        if found > limit {
            return Err(Problem::Limit {
                what: "the number of a tensor's dimensions".to_owned(),
                found,
                limit,
            });
        }
        Ok(())
    }
}

pub(super) fn dtype(code: u64) -> Result<DType, Problem> {
    let unknown = || format!("has the element type {code}; supported are {}", names());
    DType::from_schema_code(code).ok_or_else(|| unknown().into())
}

fn names() -> String {
    let names: Vec<String> = DType::all().map(|dtype| format!("{} ({dtype})", dtype.schema_code())).collect();
    names.join(", ")
}
