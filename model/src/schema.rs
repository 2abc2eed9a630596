//! What stands in an archive's JSON: `torch/_export/serde/schema.py`, version 8, field by field.
//!
//! Only what is read is named here; unknown fields are passed over, as the schema's rules for minor versions ask, and
//! unknown kinds of a union (`{"as_...": ...}`) are refused with their name. Nothing is resolved or checked here.

#![expect(clippy::enum_variant_names, reason = "the names are the schema's")]

use std::collections::HashMap;

use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, Visitor};

/// The part of [`ExportedProgram`] that is read first.
#[derive(Debug, Deserialize)]
pub(crate) struct Versioned {
    pub(crate) schema_version: SchemaVersion,
}

#[derive(Debug, Deserialize)]
pub(crate) struct SchemaVersion {
    pub(crate) major: i64,
    pub(crate) minor: i64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ExportedProgram {
    pub(crate) graph_module: GraphModule,
    pub(crate) range_constraints: HashMap<String, RangeConstraint>,
    #[serde(default)]
    pub(crate) torch_version: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RangeConstraint {
    pub(crate) min_val: Option<Number>,
    pub(crate) max_val: Option<Number>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct GraphModule {
    pub(crate) graph: Graph,
    pub(crate) signature: GraphSignature,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Graph {
    pub(crate) inputs: Vec<Argument>,
    pub(crate) outputs: Vec<Argument>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) tensor_values: HashMap<String, TensorMeta>,
    #[serde(default)]
    pub(crate) sym_int_values: HashMap<String, SymInt>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Node {
    pub(crate) target: String,
    pub(crate) inputs: Vec<NamedArgument>,
    pub(crate) outputs: Vec<Argument>,
    pub(crate) metadata: Metadata,
    #[serde(default)]
    pub(crate) name: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Metadata {
    #[serde(default)]
    pub(crate) stack_trace: Option<String>,
    #[serde(default)]
    pub(crate) nn_module_stack: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct NamedArgument {
    pub(crate) name: String,
    pub(crate) arg: Argument,
    /// 1: positional, 2: keyword.
    #[serde(default)]
    pub(crate) kind: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Argument {
    AsNone(IgnoredAny),
    AsTensor(Name),
    AsTensors(Vec<Name>),
    AsInt(i64),
    AsInts(Vec<i64>),
    AsFloat(Number),
    AsFloats(Vec<Number>),
    AsString(String),
    AsStrings(Vec<String>),
    AsSymInt(SymIntArgument),
    AsSymInts(Vec<SymIntArgument>),
    AsScalarType(u64),
    AsMemoryFormat(u64),
    AsLayout(u64),
    AsDevice(Device),
    AsBool(bool),
    AsBools(Vec<bool>),
    AsSymBool(SymBoolArgument),
    AsSymBools(Vec<SymBoolArgument>),
    AsGraph(GraphArgument),
    AsOptionalTensors(Vec<OptionalTensor>),
    AsCustomObj(CustomObject),
    AsOperator(String),
    AsSymFloat(SymFloatArgument),
    AsSymFloats(Vec<SymFloatArgument>),
    AsOptionalTensor(OptionalTensor),
    AsComplex(Complex),
    AsNestedTensors(Vec<Vec<Name>>),
    AsIntLists(Vec<Vec<i64>>),
    AsStringToArgument(IgnoredAny),
}

/// `TensorArgument`, `TokenArgument`.
#[derive(Debug, Deserialize)]
pub(crate) struct Name {
    pub(crate) name: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct CustomObject {
    pub(crate) name: String,
    pub(crate) class_fqn: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct GraphArgument {
    pub(crate) name: String,
    pub(crate) graph: Box<Graph>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Complex {
    pub(crate) real: Number,
    pub(crate) imag: Number,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum OptionalTensor {
    AsTensor(Name),
    AsNone(IgnoredAny),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SymIntArgument {
    AsName(String),
    AsInt(i64),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SymFloatArgument {
    AsName(String),
    AsFloat(Number),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SymBoolArgument {
    AsName(String),
    AsBool(bool),
}

#[derive(Debug, Deserialize)]
pub(crate) struct Device {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) index: Option<u32>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct TensorMeta {
    pub(crate) dtype: u64,
    pub(crate) sizes: Vec<SymInt>,
    pub(crate) requires_grad: bool,
    pub(crate) strides: Vec<SymInt>,
    pub(crate) storage_offset: SymInt,
    pub(crate) layout: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SymInt {
    AsExpr(SymExpr),
    AsInt(i64),
}

#[derive(Debug, Deserialize)]
pub(crate) struct SymExpr {
    pub(crate) expr_str: String,
    #[serde(default)]
    pub(crate) hint: Option<SymExprHint>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SymExprHint {
    AsInt(Number),
    AsBool(IgnoredAny),
    AsFloat(IgnoredAny),
}

#[derive(Debug, Deserialize)]
pub(crate) struct GraphSignature {
    pub(crate) input_specs: Vec<InputSpec>,
    pub(crate) output_specs: Vec<OutputSpec>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum InputSpec {
    UserInput { arg: Argument },
    Parameter { arg: Name, parameter_name: String },
    Buffer { arg: Name, buffer_name: String, persistent: bool },
    TensorConstant { arg: Name, tensor_constant_name: String },
    CustomObj { arg: CustomObject },
    Token { arg: Name },
    ConstantInput { name: String, value: ConstantValue },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ConstantValue {
    AsNone(IgnoredAny),
    AsInt(i64),
    AsFloat(Number),
    AsString(String),
    AsBool(bool),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum OutputSpec {
    UserOutput { arg: Argument },
    LossOutput {},
    BufferMutation { buffer_name: String },
    GradientToParameter { arg: Name },
    GradientToUserInput { arg: Name },
    UserInputMutation { user_input_name: String },
    Token { arg: Name },
    ParameterMutation { parameter_name: String },
}

/// `data/weights/model_weights_config.json` and its like for constants.
#[derive(Debug, Deserialize)]
pub(crate) struct PayloadConfig {
    pub(crate) config: HashMap<String, PayloadMeta>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct PayloadMeta {
    pub(crate) path_name: String,
    pub(crate) use_pickle: bool,
    pub(crate) tensor_meta: Option<TensorMeta>,
}

/// A number of any size. JSON has no infinities, so archives store those as the strings `Infinity`, `-Infinity` and
/// `NaN`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Number {
    Int(i64),
    Float(f64),
}

impl Number {
    pub(crate) fn as_f64(self) -> f64 {
        match self {
            // What Python does with an integer where a float is asked for.
            Number::Int(value) => value as f64,
            Number::Float(value) => value,
        }
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberVisitor;
        impl Visitor<'_> for NumberVisitor {
            type Value = Number;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number, `Infinity`, `-Infinity` or `NaN`")
            }
            fn visit_i64<E>(self, value: i64) -> Result<Number, E> {
                Ok(Number::Int(value))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Number, E> {
                Ok(i64::try_from(value).map_or(Number::Float(value as f64), Number::Int))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Number, E> {
                Ok(Number::Float(value))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Number, E> {
                match value {
                    "Infinity" => Ok(Number::Float(f64::INFINITY)),
                    "-Infinity" => Ok(Number::Float(f64::NEG_INFINITY)),
                    "NaN" => Ok(Number::Float(f64::NAN)),
                    _ => Err(E::invalid_value(de::Unexpected::Str(value), &self)),
                }
            }
        }
        deserializer.deserialize_any(NumberVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::Number;

    /// Models mask with the least `float32`; one unit in the last place below it is out of `float32`'s range.
    #[test]
    fn floats_are_read_to_the_last_bit() {
        for expected in [-3.402_823_466_385_288_6e38, 1e-5, 0.1 + 0.2, 5e-324, f64::MAX] {
            match serde_json::from_str(&format!("{expected:e}")).unwrap() {
                Number::Float(found) => assert_eq!(found.to_bits(), expected.to_bits(), "{expected:e}"),
                Number::Int(found) => panic!("{expected:e} came out as the integer {found}"),
            }
        }
    }
}
