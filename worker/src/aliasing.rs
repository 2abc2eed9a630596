//! When a program writes to memory that was there before, by the operators' schemas.

use pswitch_model::{Program, Target};

use crate::executable::WRITES_NO_DATA;
use crate::libtorch::CallBuilder;

/// The last node of a program that writes into one of its arguments; none if all of them only make new tensors.
///
/// Operators that libtorch does not have are taken for harmless: the program will be refused anyway.
pub(crate) fn last_write(program: &Program) -> Option<usize> {
    program.nodes.iter().rposition(|node| {
        let Target::Operator { namespace, name, overload } = &node.target else { return false };
        let overload = if overload == "default" { "" } else { overload };
        let builder = CallBuilder::new(&format!("{namespace}::{name}"), overload, program.values.len());
        let Ok(builder) = builder else { return false };
        let writes = |argument: &str| builder.argument(argument).is_some_and(|index| builder.writes(index));
        !WRITES_NO_DATA.contains(&name.as_str()) && node.inputs.iter().any(|input| writes(&input.name))
    })
}
