use std::collections::HashMap;

use crate::error::ModelError;
use crate::program::{
    Constant, Input, InputKind, Mutation, MutationKind, Output, OutputKind, ValueId, ValueKind, WeightKind,
};
use crate::resolve::{Kind, Problem, Resolver, Scope};
use crate::schema::{self, InputSpec, OutputSpec};

/// A weight as the signature names it; its bytes are found later.
pub(super) struct WeightSpec {
    pub(super) name: String,
    pub(super) value: ValueId,
    pub(super) kind: WeightKind,
}

impl Resolver<'_> {
    /// Defines the graph's inputs: the caller's and the weights.
    pub(super) fn inputs(
        &mut self,
        scope: &mut Scope,
        inputs: Vec<schema::Argument>,
        specs: Vec<InputSpec>,
    ) -> Result<(), ModelError> {
        if inputs.len() != specs.len() {
            let problem = format!("has {} inputs; its signature has {}", inputs.len(), specs.len());
            return Err(self.signature_error("program", "graph", problem));
        }
        for (input, spec) in inputs.iter().zip(specs) {
            match spec {
                InputSpec::Parameter { arg, parameter_name } => {
                    self.weight(scope, input, &arg.name, parameter_name, WeightKind::Parameter)?;
                }
                InputSpec::Buffer { arg, buffer_name, persistent } => {
                    self.weight(scope, input, &arg.name, buffer_name, WeightKind::Buffer { persistent })?;
                }
                InputSpec::TensorConstant { arg, tensor_constant_name } => {
                    self.weight(scope, input, &arg.name, tensor_constant_name, WeightKind::Constant)?;
                }
                InputSpec::UserInput { arg } => self.user_input(scope, input, arg)?,
                InputSpec::ConstantInput { name, value } => {
                    self.add_input(name, InputKind::Constant(constant(value)))?;
                }
                InputSpec::CustomObj { arg } => {
                    let problem =
                        format!("is a custom object ({}); only tensors are supported", arg.class_fqn);
                    return Err(self.signature_error("input", &arg.name, problem));
                }
                InputSpec::Token { arg } => {
                    let problem = "is a token of effectful operators; they are not supported";
                    return Err(self.signature_error("input", &arg.name, problem));
                }
            }
        }
        let (found, limit) = (self.weight_specs.len() as u64, self.limits.weights);
        if found > limit {
            let (file, what) = (self.container.file.clone(), "the number of weights".to_owned());
            return Err(ModelError::Limit { file, what, found, limit });
        }
        Ok(())
    }

    fn weight(
        &mut self,
        scope: &mut Scope,
        input: &schema::Argument,
        value_name: &str,
        name: String,
        kind: WeightKind,
    ) -> Result<(), ModelError> {
        let defined = self.same_name(input, value_name).and_then(|()| self.define_tensor(scope, value_name));
        let value = defined.map_err(|problem| self.signature_error("weight", &name, problem))?;
        if self.weight_values.insert(name.clone(), value).is_some() {
            return Err(self.signature_error("weight", &name, "stands in the signature twice"));
        }
        self.weight_specs.push(WeightSpec { name, value, kind });
        Ok(())
    }

    fn user_input(
        &mut self,
        scope: &mut Scope,
        input: &schema::Argument,
        spec: schema::Argument,
    ) -> Result<(), ModelError> {
        let (name, kind) = match spec {
            schema::Argument::AsTensor(arg) => {
                let defined =
                    self.same_name(input, &arg.name).and_then(|()| self.define_tensor(scope, &arg.name));
                let value = defined.map_err(|problem| self.signature_error("input", &arg.name, problem))?;
                match &self.values[value.index()].kind {
                    ValueKind::Tensor(Some(meta)) => {
                        let (dtype, shape) = (meta.dtype, meta.shape.clone());
                        (arg.name, InputKind::Tensor { value, dtype, shape })
                    }
                    _ => return Err(self.signature_error("input", &arg.name, "has no type and shape")),
                }
            }
            schema::Argument::AsSymInt(schema::SymIntArgument::AsName(name)) => {
                let defined = self.same_name(input, &name).and_then(|()| self.define_int(scope, &name));
                let value = defined.map_err(|problem| self.signature_error("input", &name, problem))?;
                match &self.values[value.index()].kind {
                    ValueKind::Int(dim) => {
                        let dim = dim.clone();
                        (name, InputKind::SymInt { value, dim })
                    }
                    _ => return Err(self.signature_error("input", &name, "is not an integer")),
                }
            }
            _ => {
                let position = self.inputs.len().to_string();
                let problem = "is neither a tensor nor an integer; other kinds must be fixed when exporting";
                return Err(self.signature_error("input", &position, problem));
            }
        };
        self.add_input(name, kind)
    }

    fn add_input(&mut self, name: String, kind: InputKind) -> Result<(), ModelError> {
        let value = match kind {
            InputKind::Tensor { value, .. } => Some(value),
            InputKind::SymInt { .. } | InputKind::Constant(_) => None,
        };
        if self.input_values.insert(name.clone(), value).is_some() {
            return Err(self.signature_error("input", &name, "stands in the signature twice"));
        }
        self.check_name(&name).map_err(|problem| self.signature_error("input", &name, problem))?;
        self.inputs.push(Input { name, kind });
        Ok(())
    }

    /// Whether the graph's input is the one that the signature names.
    fn same_name(&self, input: &schema::Argument, name: &str) -> Result<(), Problem> {
        let found = match input {
            schema::Argument::AsTensor(arg) => &arg.name,
            schema::Argument::AsSymInt(schema::SymIntArgument::AsName(name)) => name,
            _ => return Err("is a constant in the graph".into()),
        };
        if found == name { Ok(()) } else { Err(format!("is `{found}` in the graph").into()) }
    }

    /// Resolves the graph's outputs: what is returned, and what is written back.
    pub(super) fn outputs(
        &mut self,
        scope: &Scope,
        outputs: Vec<schema::Argument>,
        specs: Vec<OutputSpec>,
    ) -> Result<(), ModelError> {
        if outputs.len() != specs.len() {
            let problem = format!("has {} outputs; its signature has {}", outputs.len(), specs.len());
            return Err(self.signature_error("program", "graph", problem));
        }
        // How often each name has been given a suffix.
        let mut taken = HashMap::new();
        for (argument, spec) in outputs.into_iter().zip(specs) {
            let (into, kind) = match spec {
                OutputSpec::UserOutput { arg } => {
                    self.user_output(scope, argument, Some(&arg), false, &mut taken)?;
                    continue;
                }
                OutputSpec::LossOutput {} => {
                    self.user_output(scope, argument, None, true, &mut taken)?;
                    continue;
                }
                OutputSpec::BufferMutation { buffer_name } => (buffer_name, MutationKind::Buffer),
                OutputSpec::ParameterMutation { parameter_name } => (parameter_name, MutationKind::Parameter),
                OutputSpec::UserInputMutation { user_input_name } => (user_input_name, MutationKind::Input),
                OutputSpec::GradientToParameter { arg } | OutputSpec::GradientToUserInput { arg } => {
                    let problem = "is a gradient; export the forward pass only";
                    return Err(self.signature_error("output", &arg.name, problem));
                }
                OutputSpec::Token { arg } => {
                    let problem = "is a token of effectful operators; they are not supported";
                    return Err(self.signature_error("output", &arg.name, problem));
                }
            };
            self.mutation(scope, &argument, &into, kind)
                .map_err(|problem| self.signature_error("mutation of", &into, problem))?;
        }
        Ok(())
    }

    fn mutation(
        &mut self,
        scope: &Scope,
        argument: &schema::Argument,
        into: &str,
        kind: MutationKind,
    ) -> Result<(), Problem> {
        let schema::Argument::AsTensor(from) = argument else { return Err("does not take a tensor".into()) };
        let from = self.value_of(scope, &from.name, Kind::Tensor)?;
        let into = match kind {
            MutationKind::Buffer | MutationKind::Parameter => self.weight_values.get(into).copied(),
            MutationKind::Input => self.input_values.get(into).copied().flatten(),
        };
        let into = into.ok_or("names nothing that the signature has")?;
        self.mutations.push(Mutation { from, into, kind });
        Ok(())
    }

    fn user_output(
        &mut self,
        scope: &Scope,
        argument: schema::Argument,
        spec: Option<&schema::Argument>,
        is_loss: bool,
        taken: &mut HashMap<String, u32>,
    ) -> Result<(), ModelError> {
        let position = self.outputs.len();
        let name =
            spec.and_then(name_of).or(name_of(&argument)).map_or(format!("output_{position}"), str::to_owned);
        let kind = self
            .output_kind(scope, argument)
            .and_then(|kind| self.check_name(&name).map(|()| kind))
            .map_err(|problem| self.signature_error("output", &name, problem))?;
        let mut unique = name.clone();
        while taken.contains_key(&unique) {
            let again = taken.entry(name.clone()).or_insert(0);
            *again += 1;
            unique = format!("{name}_{again}");
        }
        taken.insert(unique.clone(), 0);
        self.outputs.push(Output { name: unique, kind, is_loss });
        Ok(())
    }

    fn output_kind(&mut self, scope: &Scope, argument: schema::Argument) -> Result<OutputKind, Problem> {
        use schema::{SymBoolArgument, SymFloatArgument, SymIntArgument};
        Ok(match argument {
            schema::Argument::AsTensor(arg) => {
                let value = self.value_of(scope, &arg.name, Kind::Tensor)?;
                match &self.values[value.index()].kind {
                    ValueKind::Tensor(Some(meta)) => {
                        OutputKind::Tensor { value, dtype: meta.dtype, shape: meta.shape.clone() }
                    }
                    _ => return Err("has no type and shape".into()),
                }
            }
            schema::Argument::AsSymInt(SymIntArgument::AsName(name)) => {
                OutputKind::SymInt(self.value_of(scope, &name, Kind::Int)?)
            }
            schema::Argument::AsSymFloat(SymFloatArgument::AsName(name)) => {
                OutputKind::SymFloat(self.value_of(scope, &name, Kind::Float)?)
            }
            schema::Argument::AsSymBool(SymBoolArgument::AsName(name)) => {
                OutputKind::SymBool(self.value_of(scope, &name, Kind::Bool)?)
            }
            schema::Argument::AsNone(_) => OutputKind::Constant(Constant::None),
            schema::Argument::AsInt(value) | schema::Argument::AsSymInt(SymIntArgument::AsInt(value)) => {
                OutputKind::Constant(Constant::Int(value))
            }
            schema::Argument::AsFloat(value)
            | schema::Argument::AsSymFloat(SymFloatArgument::AsFloat(value)) => {
                OutputKind::Constant(Constant::Float(value.as_f64()))
            }
            schema::Argument::AsBool(value) | schema::Argument::AsSymBool(SymBoolArgument::AsBool(value)) => {
                OutputKind::Constant(Constant::Bool(value))
            }
            schema::Argument::AsString(value) => OutputKind::Constant(Constant::String(value)),
            _ => return Err("is neither a tensor nor a number; other kinds are not supported".into()),
        })
    }
}

fn name_of(argument: &schema::Argument) -> Option<&str> {
    match argument {
        schema::Argument::AsTensor(arg) => Some(&arg.name),
        schema::Argument::AsSymInt(schema::SymIntArgument::AsName(name))
        | schema::Argument::AsSymFloat(schema::SymFloatArgument::AsName(name))
        | schema::Argument::AsSymBool(schema::SymBoolArgument::AsName(name)) => Some(name),
        _ => None,
    }
}

fn constant(value: schema::ConstantValue) -> Constant {
    match value {
        schema::ConstantValue::AsNone(_) => Constant::None,
        schema::ConstantValue::AsInt(value) => Constant::Int(value),
        schema::ConstantValue::AsFloat(value) => Constant::Float(value.as_f64()),
        schema::ConstantValue::AsString(value) => Constant::String(value),
        schema::ConstantValue::AsBool(value) => Constant::Bool(value),
    }
}
