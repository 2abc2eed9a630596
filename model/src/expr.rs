use std::fmt;

use crate::symbols::Symbols;

/// An expression over symbols, as it stands in the sizes of an exported program: `2*s17 + 1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// A whole number.
    Integer(i64),
    /// A symbol by name.
    Symbol(String),
    /// The sum of all.
    Add(Vec<Expr>),
    /// The product of all.
    Mul(Vec<Expr>),
    /// The first to the power of the second.
    Pow(Box<Expr>, Box<Expr>),
    /// The exact quotient.
    Div(Box<Expr>, Box<Expr>),
    /// The quotient rounded towards minus infinity.
    FloorDiv(Box<Expr>, Box<Expr>),
    /// The remainder of a division, with the sign of the second.
    Mod(Box<Expr>, Box<Expr>),
    /// The largest of all.
    Max(Vec<Expr>),
    /// The smallest of all.
    Min(Vec<Expr>),
    /// The next whole number towards minus infinity.
    Floor(Box<Expr>),
    /// The next whole number towards plus infinity.
    Ceil(Box<Expr>),
    /// The next whole number towards zero.
    Trunc(Box<Expr>),
}

impl Expr {
    /// Reads what `sympy.srepr` writes, which is how archives store expressions:
    /// `Add(Mul(Integer(2), Symbol('s17', positive=True, integer=True)), Integer(1))`.
    ///
    /// None if it holds a function that this crate does not know, is malformed or nested deeper than 64 levels.
    pub fn parse(srepr: &str) -> Option<Expr> {
        crate::srepr::parse(srepr)
    }

    /// The value of this expression, computed exactly.
    ///
    /// None if a symbol has no value, the result is not a whole number, a divisor is zero, or a number on the way does
    /// not fit into 128 bits.
    pub fn evaluate(&self, symbols: &Symbols) -> Option<i64> {
        self.fraction(symbols)?.whole()
    }

    /// Calls `visit` for every symbol, as often as it occurs.
    pub(crate) fn for_each_symbol<'a>(&'a self, visit: &mut impl FnMut(&'a str)) {
        match self {
            Expr::Integer(_) => {}
            Expr::Symbol(name) => visit(name),
            Expr::Add(terms) | Expr::Mul(terms) | Expr::Max(terms) | Expr::Min(terms) => {
                terms.iter().for_each(|term| term.for_each_symbol(visit));
            }
            Expr::Pow(a, b) | Expr::Div(a, b) | Expr::FloorDiv(a, b) | Expr::Mod(a, b) => {
                a.for_each_symbol(visit);
                b.for_each_symbol(visit);
            }
            Expr::Floor(a) | Expr::Ceil(a) | Expr::Trunc(a) => a.for_each_symbol(visit),
        }
    }

    fn fraction(&self, symbols: &Symbols) -> Option<Fraction> {
        let value = |expr: &Expr| expr.fraction(symbols);
        match self {
            Expr::Integer(value) => Some(Fraction::from(*value)),
            Expr::Symbol(name) => symbols.get(name).map(Fraction::from),
            Expr::Add(terms) => fold(terms, value, Fraction::add),
            Expr::Mul(terms) => fold(terms, value, Fraction::mul),
            Expr::Max(terms) => fold(terms, value, |a, b| Some(if a.less(b)? { b } else { a })),
            Expr::Min(terms) => fold(terms, value, |a, b| Some(if b.less(a)? { b } else { a })),
            Expr::Pow(a, b) => value(a)?.pow(value(b)?.whole()?),
            Expr::Div(a, b) => value(a)?.div(value(b)?),
            Expr::FloorDiv(a, b) => value(a)?.div(value(b)?)?.floor(),
            Expr::Mod(a, b) => {
                let (a, b) = (value(a)?, value(b)?);
                a.add(b.mul(a.div(b)?.floor()?)?.negate()?)
            }
            Expr::Floor(a) => value(a)?.floor(),
            Expr::Ceil(a) => value(a)?.negate()?.floor()?.negate(),
            Expr::Trunc(a) => {
                let a = value(a)?;
                if a.numerator < 0 { a.negate()?.floor()?.negate() } else { a.floor() }
            }
        }
    }
}

fn fold(
    terms: &[Expr],
    value: impl Fn(&Expr) -> Option<Fraction>,
    join: impl Fn(Fraction, Fraction) -> Option<Fraction>,
) -> Option<Fraction> {
    let (first, rest) = terms.split_first()?;
    rest.iter().try_fold(value(first)?, |so_far, term| join(so_far, value(term)?))
}

/// A fraction in lowest terms with a positive denominator.
#[derive(Debug, Clone, Copy)]
struct Fraction {
    numerator: i128,
    denominator: i128,
}

impl From<i64> for Fraction {
    fn from(value: i64) -> Self {
        Fraction { numerator: value.into(), denominator: 1 }
    }
}

impl Fraction {
    fn new(numerator: i128, denominator: i128) -> Option<Fraction> {
        let (mut a, mut b) = (numerator.unsigned_abs(), denominator.unsigned_abs());
        while b != 0 {
            (a, b) = (b, a % b);
        }
        let divisor = i128::try_from(a).ok()?;
        if denominator == 0 {
            return None;
        }
        let divisor = if denominator < 0 { -divisor } else { divisor };
        Some(Fraction {
            numerator: numerator.checked_div(divisor)?,
            denominator: denominator.checked_div(divisor)?,
        })
    }

    fn whole(self) -> Option<i64> {
        if self.denominator == 1 { i64::try_from(self.numerator).ok() } else { None }
    }

    fn add(self, other: Fraction) -> Option<Fraction> {
        let left = self.numerator.checked_mul(other.denominator)?;
        let right = other.numerator.checked_mul(self.denominator)?;
        Fraction::new(left.checked_add(right)?, self.denominator.checked_mul(other.denominator)?)
    }

    fn mul(self, other: Fraction) -> Option<Fraction> {
        Fraction::new(
            self.numerator.checked_mul(other.numerator)?,
            self.denominator.checked_mul(other.denominator)?,
        )
    }

    fn div(self, other: Fraction) -> Option<Fraction> {
        Fraction::new(
            self.numerator.checked_mul(other.denominator)?,
            self.denominator.checked_mul(other.numerator)?,
        )
    }

    fn negate(self) -> Option<Fraction> {
        Some(Fraction { numerator: self.numerator.checked_neg()?, denominator: self.denominator })
    }

    fn floor(self) -> Option<Fraction> {
        Some(Fraction { numerator: self.numerator.checked_div_euclid(self.denominator)?, denominator: 1 })
    }

    fn less(self, other: Fraction) -> Option<bool> {
        let left = self.numerator.checked_mul(other.denominator)?;
        let right = other.numerator.checked_mul(self.denominator)?;
        Some(left < right)
    }

    fn pow(self, exponent: i64) -> Option<Fraction> {
        let steps = u32::try_from(exponent.unsigned_abs()).ok()?;
        let power = Fraction {
            numerator: self.numerator.checked_pow(steps)?,
            denominator: self.denominator.checked_pow(steps)?,
        };
        if exponent < 0 { Fraction::from(1).div(power) } else { Some(power) }
    }
}

/// How tightly an expression binds, to set parentheses only where they are needed.
fn binds(expr: &Expr) -> u8 {
    match expr {
        Expr::Add(_) => 1,
        Expr::Mul(_) | Expr::Div(..) | Expr::FloorDiv(..) | Expr::Mod(..) => 2,
        Expr::Integer(value) if *value < 0 => 2,
        Expr::Pow(..) => 3,
        _ => 4,
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Writes an operand, in parentheses if it binds less tightly than asked.
        fn operand(f: &mut fmt::Formatter<'_>, expr: &Expr, at_least: u8) -> fmt::Result {
            if binds(expr) < at_least { write!(f, "({expr})") } else { write!(f, "{expr}") }
        }
        fn list(f: &mut fmt::Formatter<'_>, terms: &[Expr], between: &str, at_least: u8) -> fmt::Result {
            for (i, term) in terms.iter().enumerate() {
                if i > 0 {
                    f.write_str(between)?;
                }
                operand(f, term, at_least)?;
            }
            Ok(())
        }
        fn pair(f: &mut fmt::Formatter<'_>, a: &Expr, between: &str, b: &Expr, level: u8) -> fmt::Result {
            operand(f, a, level)?;
            f.write_str(between)?;
            operand(f, b, level + 1)
        }
        fn call(f: &mut fmt::Formatter<'_>, name: &str, terms: &[Expr]) -> fmt::Result {
            write!(f, "{name}(")?;
            list(f, terms, ", ", 0)?;
            f.write_str(")")
        }
        match self {
            Expr::Integer(value) => write!(f, "{value}"),
            Expr::Symbol(name) => f.write_str(name),
            Expr::Add(terms) => list(f, terms, " + ", 1),
            Expr::Mul(terms) => list(f, terms, "*", 3),
            Expr::Pow(a, b) => pair(f, a, "**", b, 3),
            Expr::Div(a, b) => pair(f, a, "/", b, 2),
            Expr::FloorDiv(a, b) => pair(f, a, "//", b, 2),
            Expr::Mod(a, b) => pair(f, a, "%", b, 2),
            Expr::Max(terms) => call(f, "max", terms),
            Expr::Min(terms) => call(f, "min", terms),
            Expr::Floor(a) => write!(f, "floor({a})"),
            Expr::Ceil(a) => write!(f, "ceil({a})"),
            Expr::Trunc(a) => write!(f, "trunc({a})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(srepr: &str) -> Option<i64> {
        let mut symbols = Symbols::default();
        symbols.insert("s0", 7);
        symbols.insert("s1", -7);
        Expr::parse(srepr).expect(srepr).evaluate(&symbols)
    }

    const S0: &str = "Symbol('s0', positive=True, integer=True)";
    const S1: &str = "Symbol('s1', integer=True)";

    #[test]
    fn expressions_have_the_values_that_sympy_gives_them() {
        assert_eq!(value(&format!("Add(Mul(Integer(2), {S0}), Integer(1))")), Some(15));
        assert_eq!(value(&format!("FloorDiv({S0}, Integer(2))")), Some(3));
        assert_eq!(value(&format!("FloorDiv({S1}, Integer(2))")), Some(-4));
        assert_eq!(value(&format!("FloorDiv({S0}, Integer(-2))")), Some(-4));
        assert_eq!(value(&format!("CeilDiv({S0}, Integer(2))")), Some(4));
        assert_eq!(value(&format!("PythonMod({S1}, Integer(3))")), Some(2));
        assert_eq!(value(&format!("PythonMod({S0}, Integer(-3))")), Some(-2));
        assert_eq!(value(&format!("Pow({S0}, Integer(3))")), Some(343));
        assert_eq!(value(&format!("Mul({S0}, Pow({S0}, Integer(-1)))")), Some(1));
        assert_eq!(value(&format!("Mul(Rational(1, 7), {S0})")), Some(1));
        assert_eq!(value(&format!("Mul(Rational(1, 2), {S0})")), None, "is not whole");
        assert_eq!(value(&format!("TruncToInt(IntTrueDiv({S1}, Integer(2)))")), Some(-3));
        assert_eq!(value(&format!("FloorToInt(IntTrueDiv({S1}, Integer(2)))")), Some(-4));
        assert_eq!(value(&format!("CeilToInt(IntTrueDiv({S0}, Integer(2)))")), Some(4));
        assert_eq!(value(&format!("ModularIndexing({S0}, Integer(2), Integer(2))")), Some(1));
        assert_eq!(value(&format!("Max(Integer(3), {S0}, {S1})")), Some(7));
        assert_eq!(value(&format!("Min(Integer(3), {S0}, {S1})")), Some(-7));
    }

    #[test]
    fn what_has_no_value_has_none() {
        assert_eq!(value("Symbol('unknown')"), None);
        assert_eq!(value("FloorDiv(Integer(1), Integer(0))"), None);
        assert_eq!(value("Mod(Integer(1), Integer(0))"), None);
        assert_eq!(value("Rational(1, 0)"), None);
        assert_eq!(value("Pow(Integer(0), Integer(-1))"), None);
        assert_eq!(value("Pow(Integer(2), Integer(9223372036854775807))"), None);
        let most = "Integer(9223372036854775807)";
        assert_eq!(value(&format!("Add({most}, Integer(1))")), None);
        assert_eq!(value(&format!("Mul({most}, {most}, {most})")), None);
        // On the way only.
        assert_eq!(value(&format!("Add({most}, {most}, Mul(Integer(-1), {most}))")), Some(i64::MAX));
    }

    #[test]
    fn what_is_no_expression_is_none() {
        for text in
            ["", "Integer", "Integer(", "Integer()", "Integer(1", "Integer(1))", "Add()", "Symbol(s0)"]
        {
            assert_eq!(Expr::parse(text), None, "{text}");
        }
        assert_eq!(Expr::parse("Magic(Integer(1))"), None);
        assert_eq!(Expr::parse("FloorDiv(Integer(1))"), None);
        assert_eq!(Expr::parse("Integer(9223372036854775808)"), None);
        let nested = |depth: usize| format!("{}Integer(1){}", "Add(".repeat(depth), ")".repeat(depth));
        assert!(Expr::parse(&nested(63)).is_some());
        assert_eq!(Expr::parse(&nested(64)), None);
        assert_eq!(Expr::parse(&nested(1_000_000)), None);
    }

    #[test]
    fn expressions_are_shown_as_people_write_them() {
        let show = |srepr: &str| Expr::parse(srepr).unwrap().to_string();
        assert_eq!(show(&format!("Mul(Integer(2), Add({S0}, Integer(-1)))")), "2*(s0 + -1)");
        assert_eq!(
            show(&format!("FloorDiv(Add({S0}, Integer(1)), Mul(Integer(2), {S0}))")),
            "(s0 + 1)//(2*s0)"
        );
        assert_eq!(show(&format!("Max(Integer(1), Pow({S0}, Integer(2)))")), "max(1, s0**2)");
    }
}
