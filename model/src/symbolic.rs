use crate::program::SymbolicOperator;

use SymbolicOperator as S;

/// Every operator with the name under which archives store it first, other spellings after it.
const NAMES: [(SymbolicOperator, &[&str]); 27] = [
    (S::Add, &["_operator.add"]),
    (S::Sub, &["_operator.sub"]),
    (S::Mul, &["_operator.mul"]),
    (S::TrueDiv, &["_operator.truediv"]),
    (S::FloorDiv, &["_operator.floordiv"]),
    (S::Mod, &["_operator.mod"]),
    (S::Pow, &["_operator.pow"]),
    (S::Neg, &["_operator.neg"]),
    (S::Pos, &["_operator.pos"]),
    (S::LeftShift, &["_operator.lshift"]),
    (S::RightShift, &["_operator.rshift"]),
    (S::And, &["_operator.and_"]),
    (S::Or, &["_operator.or_"]),
    (S::Not, &["torch.sym_not", "_operator.not_"]),
    (S::Eq, &["_operator.eq"]),
    (S::Ne, &["_operator.ne"]),
    (S::Lt, &["_operator.lt"]),
    (S::Le, &["_operator.le"]),
    (S::Gt, &["_operator.gt"]),
    (S::Ge, &["_operator.ge"]),
    (S::Max, &["torch.sym_max", "builtins.max"]),
    (S::Min, &["torch.sym_min", "builtins.min"]),
    (S::Trunc, &["math.trunc"]),
    (S::ToInt, &["torch.sym_int"]),
    (S::ToFloat, &["torch.sym_float"]),
    (S::IfThenElse, &["torch.sym_ite"]),
    (S::Sqrt, &["torch._sym_sqrt", "torch.sym_sqrt", "math.sqrt"]),
];

impl SymbolicOperator {
    /// The operator that an archive names so: `_operator.add`.
    pub fn from_python_name(name: &str) -> Option<SymbolicOperator> {
        NAMES.iter().find(|(_, names)| names.contains(&name)).map(|(operator, _)| *operator)
    }

    /// The name under which archives store it.
    pub fn python_name(self) -> &'static str {
        // The table is in the order of the variants (a test holds it to that) and no row is empty.
        NAMES[self as usize].1[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_operators() {
        for (index, (operator, names)) in NAMES.iter().enumerate() {
            assert_eq!(*operator as usize, index);
            assert_eq!(operator.python_name(), names[0]);
            for name in *names {
                assert_eq!(SymbolicOperator::from_python_name(name), Some(*operator));
            }
        }
        assert_eq!(SymbolicOperator::from_python_name("_operator.matmul"), None);
    }
}
