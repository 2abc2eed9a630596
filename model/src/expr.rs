use std::fmt;

/// An expression over symbols, as it stands in the sizes of an exported program.
#[derive(Debug, Clone, PartialEq)]
pub enum Expr {
    /// A whole number.
    Integer(i64),
    /// A fraction of whole numbers; the second is positive.
    Rational(i64, i64),
    /// A symbol by name.
    Symbol(String),
    /// The sum of all.
    Add(Vec<Expr>),
    /// The product of all.
    Mul(Vec<Expr>),
    /// The first to the power of the second.
    Pow(Box<Expr>, Box<Expr>),
    /// The first divided by the second, rounded towards minus infinity.
    FloorDiv(Box<Expr>, Box<Expr>),
    /// The first divided by the second, which divides it without a remainder.
    CleanDiv(Box<Expr>, Box<Expr>),
    /// The remainder of a division, with the sign of the second.
    Mod(Box<Expr>, Box<Expr>),
    /// The largest of all.
    Max(Vec<Expr>),
    /// The smallest of all.
    Min(Vec<Expr>),
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn list(f: &mut fmt::Formatter<'_>, terms: &[Expr], between: &str) -> fmt::Result {
            for (i, term) in terms.iter().enumerate() {
                if i > 0 {
                    f.write_str(between)?;
                }
                match term {
                    Expr::Add(_) => write!(f, "({term})")?,
                    _ => write!(f, "{term}")?,
                }
            }
            Ok(())
        }
        match self {
            Expr::Integer(value) => write!(f, "{value}"),
            Expr::Rational(p, q) => write!(f, "({p}/{q})"),
            Expr::Symbol(name) => f.write_str(name),
            Expr::Add(terms) => list(f, terms, " + "),
            Expr::Mul(terms) => list(f, terms, "*"),
            Expr::Pow(a, b) => write!(f, "({a})**({b})"),
            Expr::FloorDiv(a, b) => write!(f, "(({a}) // ({b}))"),
            Expr::CleanDiv(a, b) => write!(f, "(({a}) / ({b}))"),
            Expr::Mod(a, b) => write!(f, "(({a}) % ({b}))"),
            Expr::Max(terms) => {
                f.write_str("max(")?;
                list(f, terms, ", ")?;
                f.write_str(")")
            }
            Expr::Min(terms) => {
                f.write_str("min(")?;
                list(f, terms, ", ")?;
                f.write_str(")")
            }
        }
    }
}
