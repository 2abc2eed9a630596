//! Python's arithmetic on the numbers of a program: sizes, and what is computed from them.

use pswitch_model::SymbolicOperator;

use crate::libtorch::Number;

/// Evaluates `operator` on `operands` as Python would.
///
/// # Errors
/// A line that says what Python would raise (division by zero), or that the result does not fit 64 bits.
pub(crate) fn evaluate(operator: SymbolicOperator, operands: &[Number]) -> Result<Number, String> {
    use SymbolicOperator as S;
    let name = operator.python_name();
    match (operator, operands) {
        (S::Neg | S::Pos | S::Not | S::Trunc | S::ToInt | S::ToFloat | S::Sqrt, &[a]) => unary(operator, a),
        (S::IfThenElse, &[condition, then, otherwise]) => Ok(if truth(condition) { then } else { otherwise }),
        (S::IfThenElse, _) => Err(arity(name, 3, operands.len())),
        (S::Neg | S::Pos | S::Not | S::Trunc | S::ToInt | S::ToFloat | S::Sqrt, _) => {
            Err(arity(name, 1, operands.len()))
        }
        (_, &[a, b]) => binary(operator, a, b),
        _ => Err(arity(name, 2, operands.len())),
    }
}

fn arity(name: &str, expected: usize, found: usize) -> String {
    format!("{name} takes {expected} operands, the graph gives {found}")
}

fn truth(number: Number) -> bool {
    match number {
        Number::Bool(value) => value,
        Number::Int(value) => value != 0,
        Number::Float(value) => value != 0.0,
    }
}

fn float(number: Number) -> f64 {
    match number {
        // Python rounds a large integer to the nearest float in the same way.
        #[allow(clippy::cast_precision_loss)]
        Number::Int(value) => value as f64,
        Number::Float(value) => value,
        Number::Bool(value) => f64::from(u8::from(value)),
    }
}

/// The integer, if the number is one (Python's bools are integers).
fn integer(number: Number) -> Option<i64> {
    match number {
        Number::Int(value) => Some(value),
        Number::Bool(value) => Some(i64::from(value)),
        Number::Float(_) => None,
    }
}

fn to_integer(value: f64) -> Result<Number, String> {
    let whole = value.trunc();
    // The bounds are exact in f64: -2^63 and 2^63.
    if (-9_223_372_036_854_775_808.0..9_223_372_036_854_775_808.0).contains(&whole) {
        #[allow(clippy::cast_possible_truncation)]
        return Ok(Number::Int(whole as i64));
    }
    Err(format!("{value} does not fit a 64-bit integer"))
}

fn unary(operator: SymbolicOperator, a: Number) -> Result<Number, String> {
    use SymbolicOperator as S;
    let overflow = || "the result does not fit a 64-bit integer".to_owned();
    match operator {
        S::Neg => match integer(a) {
            Some(value) => value.checked_neg().map(Number::Int).ok_or_else(overflow),
            None => Ok(Number::Float(-float(a))),
        },
        S::Pos => Ok(integer(a).map_or(a, Number::Int)),
        S::Not => Ok(Number::Bool(!truth(a))),
        S::ToFloat => Ok(Number::Float(float(a))),
        S::Sqrt => Ok(Number::Float(float(a).sqrt())),
        // Trunc and ToInt
        _ => integer(a).map_or_else(|| to_integer(float(a)), |value| Ok(Number::Int(value))),
    }
}

fn binary(operator: SymbolicOperator, a: Number, b: Number) -> Result<Number, String> {
    use SymbolicOperator as S;
    match operator {
        S::Eq | S::Ne | S::Lt | S::Le | S::Gt | S::Ge => Ok(Number::Bool(compare(operator, a, b))),
        S::Max => Ok(if compare(S::Gt, b, a) { b } else { a }),
        S::Min => Ok(if compare(S::Lt, b, a) { b } else { a }),
        S::TrueDiv if float(b) == 0.0 => Err("division by zero".to_owned()),
        S::TrueDiv => Ok(Number::Float(float(a) / float(b))),
        S::And | S::Or => match (a, b) {
            (Number::Bool(a), Number::Bool(b)) => {
                Ok(Number::Bool(if operator == S::And { a & b } else { a | b }))
            }
            _ => integers(operator, a, b),
        },
        S::LeftShift | S::RightShift => integers(operator, a, b),
        _ if integer(a).is_some() && integer(b).is_some() => integers(operator, a, b),
        _ => floats(operator, float(a), float(b)),
    }
}

fn compare(operator: SymbolicOperator, a: Number, b: Number) -> bool {
    use SymbolicOperator as S;
    fn by<T: PartialOrd>(operator: SymbolicOperator, a: &T, b: &T) -> bool {
        match operator {
            S::Eq => a == b,
            S::Ne => a != b,
            S::Lt => a < b,
            S::Le => a <= b,
            S::Gt => a > b,
            _ => a >= b,
        }
    }
    match (integer(a), integer(b)) {
        (Some(a), Some(b)) => by(operator, &a, &b),
        _ => by(operator, &float(a), &float(b)),
    }
}

/// Division that rounds towards minus infinity, with its remainder; none by zero or on overflow.
fn floor_division(a: i64, b: i64) -> Option<(i64, i64)> {
    let (quotient, remainder) = (a.checked_div(b)?, a.checked_rem(b)?);
    Some(if remainder != 0 && (remainder < 0) != (b < 0) {
        (quotient - 1, remainder + b)
    } else {
        (quotient, remainder)
    })
}

fn integers(operator: SymbolicOperator, a: Number, b: Number) -> Result<Number, String> {
    use SymbolicOperator as S;
    let (Some(a), Some(b)) = (integer(a), integer(b)) else {
        return Err(format!("{} takes integers", operator.python_name()));
    };
    if b == 0 && matches!(operator, S::FloorDiv | S::Mod) {
        return Err("division by zero".to_owned());
    }
    let shift = u32::try_from(b).ok();
    let result = match operator {
        S::Add => a.checked_add(b),
        S::Sub => a.checked_sub(b),
        S::Mul => a.checked_mul(b),
        S::FloorDiv => floor_division(a, b).map(|(quotient, _)| quotient),
        S::Mod => floor_division(a, b).map(|(_, remainder)| remainder),
        S::And => Some(a & b),
        S::Or => Some(a | b),
        S::LeftShift => shift.filter(|&s| s < 63).and_then(|s| a.checked_mul(1 << s)),
        S::RightShift => shift.map(|s| a >> s.min(63)),
        // Pow: a negative exponent gives a float in Python.
        _ => match shift {
            Some(exponent) => a.checked_pow(exponent),
            None => return floats(operator, float(Number::Int(a)), float(Number::Int(b))),
        },
    };
    result
        .map(Number::Int)
        .ok_or_else(|| format!("{}({a}, {b}) does not fit a 64-bit integer", operator.python_name()))
}

fn floats(operator: SymbolicOperator, a: f64, b: f64) -> Result<Number, String> {
    use SymbolicOperator as S;
    if b == 0.0 && matches!(operator, S::FloorDiv | S::Mod) {
        return Err("division by zero".to_owned());
    }
    let result = match operator {
        S::Add => a + b,
        S::Sub => a - b,
        S::Mul => a * b,
        S::FloorDiv => (a / b).floor(),
        S::Mod => a - b * (a / b).floor(),
        S::Pow => a.powf(b),
        _ => return Err(format!("{} takes integers", operator.python_name())),
    };
    Ok(Number::Float(result))
}

#[cfg(test)]
mod tests {
    use super::*;
    use SymbolicOperator as S;

    fn ints(operator: SymbolicOperator, a: i64, b: i64) -> Result<Number, String> {
        evaluate(operator, &[Number::Int(a), Number::Int(b)])
    }

    #[test]
    fn division_rounds_as_in_python() {
        for (a, b, quotient, remainder) in
            [(7, 2, 3, 1), (-7, 2, -4, 1), (7, -2, -4, -1), (-7, -2, 3, -1), (6, -3, -2, 0)]
        {
            assert_eq!(ints(S::FloorDiv, a, b), Ok(Number::Int(quotient)), "{a} // {b}");
            assert_eq!(ints(S::Mod, a, b), Ok(Number::Int(remainder)), "{a} % {b}");
        }
        assert_eq!(ints(S::TrueDiv, 7, 2), Ok(Number::Float(3.5)));
    }

    #[test]
    fn what_python_raises_is_an_error() {
        assert!(ints(S::FloorDiv, 1, 0).is_err());
        assert!(ints(S::Mod, 1, 0).is_err());
        assert!(ints(S::TrueDiv, 1, 0).is_err());
        assert!(ints(S::FloorDiv, i64::MIN, -1).is_err());
        assert!(ints(S::Mul, i64::MAX, 2).is_err());
        assert!(ints(S::Pow, 10, 40).is_err());
        assert!(ints(S::LeftShift, 1, 63).is_err());
        assert!(evaluate(S::ToInt, &[Number::Float(1e30)]).is_err());
        assert!(evaluate(S::Add, &[Number::Int(1)]).is_err());
    }

    #[test]
    fn mixed_numbers_become_floats_and_bools_count() {
        assert_eq!(evaluate(S::Add, &[Number::Int(1), Number::Float(0.5)]), Ok(Number::Float(1.5)));
        assert_eq!(evaluate(S::Add, &[Number::Bool(true), Number::Int(1)]), Ok(Number::Int(2)));
        assert_eq!(evaluate(S::And, &[Number::Bool(true), Number::Bool(false)]), Ok(Number::Bool(false)));
        assert_eq!(evaluate(S::Trunc, &[Number::Float(-2.7)]), Ok(Number::Int(-2)));
        assert_eq!(ints(S::Max, 3, 5), Ok(Number::Int(5)));
        assert_eq!(ints(S::Pow, 2, -1), Ok(Number::Float(0.5)));
        let choice = [Number::Bool(false), Number::Int(1), Number::Int(2)];
        assert_eq!(evaluate(S::IfThenElse, &choice), Ok(Number::Int(2)));
    }
}
