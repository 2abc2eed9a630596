use crate::expr::Expr;

/// Deeper expressions count as unknown; it keeps recursion off the end of the stack.
const MAX_DEPTH: usize = 64;

/// Reads an expression as `sympy.srepr` writes it. None for anything that is malformed, too deep or unknown.
pub(crate) fn parse(text: &str) -> Option<Expr> {
    let mut parser = Parser { rest: text.trim() };
    let expr = parser.expression(MAX_DEPTH)?;
    parser.rest.is_empty().then_some(expr)
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn skip_spaces(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn eat(&mut self, token: char) -> bool {
        self.skip_spaces();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn take_while(&mut self, accept: impl Fn(char) -> bool) -> &'a str {
        self.skip_spaces();
        let end = self.rest.find(|c| !accept(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    fn identifier(&mut self) -> &'a str {
        self.take_while(|c| c.is_alphanumeric() || c == '_')
    }

    fn integer(&mut self) -> Option<i64> {
        self.take_while(|c| c.is_ascii_digit() || c == '-').parse().ok()
    }

    /// `'name'` or `"name"`, without escapes.
    fn string(&mut self) -> Option<&'a str> {
        let quote = if self.eat('\'') {
            '\''
        } else if self.eat('"') {
            '"'
        } else {
            return None;
        };
        let end = self.rest.find([quote, '\\'])?;
        let text = &self.rest[..end];
        self.rest = &self.rest[end..];
        self.eat(quote).then_some(text)
    }

    fn expression(&mut self, depth: usize) -> Option<Expr> {
        let depth = depth.checked_sub(1)?;
        let function = self.identifier();
        if !self.eat('(') {
            return None;
        }
        match function {
            "Integer" => {
                let value = self.integer()?;
                self.eat(')').then_some(Expr::Integer(value))
            }
            "Rational" => {
                let numerator = self.integer()?;
                let denominator = if self.eat(',') { self.integer()? } else { return None };
                self.eat(')').then(|| {
                    Expr::Div(Box::new(Expr::Integer(numerator)), Box::new(Expr::Integer(denominator)))
                })
            }
            "Symbol" => {
                let name = self.string()?.to_owned();
                // Assumptions: `positive=True, integer=True`.
                while self.eat(',') {
                    self.identifier();
                    if !self.eat('=') {
                        return None;
                    }
                    self.identifier();
                }
                self.eat(')').then_some(Expr::Symbol(name))
            }
            _ => {
                let mut terms = vec![self.expression(depth)?];
                while self.eat(',') {
                    terms.push(self.expression(depth)?);
                }
                if self.eat(')') { call(function, terms) } else { None }
            }
        }
    }
}

/// The functions of sympy and of `torch.utils._sympy.functions` that stand in sizes.
fn call(function: &str, terms: Vec<Expr>) -> Option<Expr> {
    fn pair(terms: Vec<Expr>) -> Option<(Box<Expr>, Box<Expr>)> {
        let [a, b] = <[Expr; 2]>::try_from(terms).ok()?;
        Some((Box::new(a), Box::new(b)))
    }
    fn one(terms: Vec<Expr>) -> Option<Box<Expr>> {
        let [a] = <[Expr; 1]>::try_from(terms).ok()?;
        Some(Box::new(a))
    }
    match function {
        "Add" => Some(Expr::Add(terms)),
        "Mul" => Some(Expr::Mul(terms)),
        "Max" => Some(Expr::Max(terms)),
        "Min" => Some(Expr::Min(terms)),
        "Pow" | "PowByNatural" => pair(terms).map(|(a, b)| Expr::Pow(a, b)),
        // Both are exact: a clean division has no remainder, a true one is computed as a fraction here.
        "CleanDiv" | "IntTrueDiv" => pair(terms).map(|(a, b)| Expr::Div(a, b)),
        "FloorDiv" => pair(terms).map(|(a, b)| Expr::FloorDiv(a, b)),
        "CeilDiv" => pair(terms).map(|(a, b)| Expr::Ceil(Box::new(Expr::Div(a, b)))),
        // `Mod` is `PythonMod` of two numbers that are not negative.
        "Mod" | "PythonMod" => pair(terms).map(|(a, b)| Expr::Mod(a, b)),
        "ModularIndexing" => {
            let [base, divisor, modulus] = <[Expr; 3]>::try_from(terms).ok()?;
            let quotient = Expr::FloorDiv(Box::new(base), Box::new(divisor));
            Some(Expr::Mod(Box::new(quotient), Box::new(modulus)))
        }
        "FloorToInt" | "floor" => one(terms).map(Expr::Floor),
        "CeilToInt" | "ceiling" => one(terms).map(Expr::Ceil),
        "TruncToInt" => one(terms).map(Expr::Trunc),
        "Identity" => one(terms).map(|term| *term),
        _ => None,
    }
}
