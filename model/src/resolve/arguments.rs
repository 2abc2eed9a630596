use crate::dtype::{Layout, MemoryFormat};
use crate::program::{Argument, Sym};
use crate::resolve::{Kind, Problem, Resolver, Scope, dims};
use crate::schema::{
    self, Argument as Raw, Number, OptionalTensor, SymBoolArgument, SymFloatArgument, SymIntArgument,
};

impl Resolver<'_> {
    /// Resolves what is passed to an operator.
    pub(super) fn argument(&self, scope: &Scope, argument: Raw) -> Result<Argument, Problem> {
        let tensor = |arg: &schema::Name| self.value_of(scope, &arg.name, Kind::Tensor);
        let optional = |arg: &OptionalTensor| match arg {
            OptionalTensor::AsTensor(arg) => tensor(arg).map(Some),
            OptionalTensor::AsNone(_) => Ok(None),
        };
        let int = |arg: &SymIntArgument| match arg {
            SymIntArgument::AsName(name) => self.value_of(scope, name, Kind::Int).map(Sym::Value),
            SymIntArgument::AsInt(value) => Ok(Sym::Constant(*value)),
        };
        let float = |arg: &SymFloatArgument| match arg {
            SymFloatArgument::AsName(name) => self.value_of(scope, name, Kind::Float).map(Sym::Value),
            SymFloatArgument::AsFloat(value) => Ok(Sym::Constant(value.as_f64())),
        };
        let bool = |arg: &SymBoolArgument| match arg {
            SymBoolArgument::AsName(name) => self.value_of(scope, name, Kind::Bool).map(Sym::Value),
            SymBoolArgument::AsBool(value) => Ok(Sym::Constant(*value)),
        };
        Ok(match argument {
            Raw::AsNone(_) => Argument::None,
            Raw::AsTensor(arg) => Argument::Tensor(tensor(&arg)?),
            Raw::AsTensors(args) => Argument::Tensors(all(&args, tensor)?),
            Raw::AsOptionalTensor(arg) => optional(&arg)?.map_or(Argument::None, Argument::Tensor),
            Raw::AsOptionalTensors(args) => Argument::OptionalTensors(all(&args, optional)?),
            Raw::AsNestedTensors(lists) => Argument::NestedTensors(all(&lists, |list| all(list, tensor))?),
            Raw::AsInt(value) => Argument::Int(value),
            Raw::AsInts(values) => Argument::Ints(values),
            Raw::AsIntLists(lists) => Argument::IntLists(lists),
            Raw::AsFloat(value) => Argument::Float(value.as_f64()),
            Raw::AsFloats(values) => Argument::Floats(values.into_iter().map(Number::as_f64).collect()),
            Raw::AsBool(value) => Argument::Bool(value),
            Raw::AsBools(values) => Argument::Bools(values),
            Raw::AsString(value) => Argument::String(value),
            Raw::AsStrings(values) => Argument::Strings(values),
            Raw::AsComplex(value) => Argument::Complex { re: value.real.as_f64(), im: value.imag.as_f64() },
            Raw::AsScalarType(code) => Argument::ScalarType(dims::dtype(code)?),
            Raw::AsMemoryFormat(code) => {
                let unknown = || format!("takes the memory format {code}; 1 to 4 are supported");
                Argument::MemoryFormat(MemoryFormat::from_schema_code(code).ok_or_else(unknown)?)
            }
            Raw::AsLayout(code) => {
                let unknown = || format!("takes the layout {code}; 1 to 7 are supported");
                Argument::Layout(Layout::from_schema_code(code).ok_or_else(unknown)?)
            }
            Raw::AsDevice(device) => Argument::Device { kind: device.kind, index: device.index },
            Raw::AsSymInt(arg) => Argument::SymInt(int(&arg)?),
            Raw::AsSymInts(args) => Argument::SymInts(all(&args, int)?),
            Raw::AsSymFloat(arg) => Argument::SymFloat(float(&arg)?),
            Raw::AsSymFloats(args) => Argument::SymFloats(all(&args, float)?),
            Raw::AsSymBool(arg) => Argument::SymBool(bool(&arg)?),
            Raw::AsSymBools(args) => Argument::SymBools(all(&args, bool)?),
            Raw::AsGraph(arg) => return Err(unsupported(&format!("the sub-graph `{}`", arg.name))),
            Raw::AsCustomObj(arg) => {
                return Err(unsupported(&format!("the custom object `{}` ({})", arg.name, arg.class_fqn)));
            }
            Raw::AsOperator(name) => return Err(unsupported(&format!("the operator `{name}`"))),
            Raw::AsStringToArgument(_) => return Err(unsupported("a dictionary")),
        })
    }
}

fn all<T, U>(items: &[T], resolve: impl Fn(&T) -> Result<U, Problem>) -> Result<Vec<U>, Problem> {
    items.iter().map(resolve).collect()
}

fn unsupported(what: &str) -> Problem {
    Problem::Reason(format!("takes {what} as an argument, which is not supported"))
}
