use crate::error::ModelError;
use crate::program::ValueId;
use crate::resolve::nodes::NodeHead;
use crate::resolve::{Kind, Problem, Resolver, Scope};
use crate::schema::{self, Argument, SymBoolArgument, SymFloatArgument, SymIntArgument};

/// A sub-graph that runs exactly once and whose surroundings change no result.
struct Inlined {
    graph: schema::Graph,
    arguments: Vec<Argument>,
    /// Whether gradients are switched on or off in it.
    grad: Option<bool>,
}

impl Resolver<'_> {
    /// Puts the nodes of a sub-graph in the place of the higher-order operator that calls it; refuses all operators for
    /// which that would not be exact.
    pub(super) fn inline(
        &mut self,
        scope: &mut Scope,
        head: NodeHead,
        operator: &str,
        inputs: Vec<schema::NamedArgument>,
        outputs: Vec<Argument>,
    ) -> Result<(), ModelError> {
        let inlined = select(operator, inputs).map_err(|problem| self.node_error(&head, problem))?;
        let graph = inlined.graph;
        let mut inner = Scope::new(graph.tensor_values, graph.sym_int_values);
        inner.prefix = format!("{}.", head.name);
        inner.grad = inlined.grad.or(scope.grad);
        inner.depth = scope.depth + 1;
        let entered = self.enter(scope, &mut inner, &graph.inputs, &inlined.arguments);
        entered.map_err(|problem| self.node_error(&head, problem))?;
        for node in graph.nodes {
            self.node(&mut inner, node)?;
        }
        let left = self.leave(scope, &inner, &graph.outputs, &outputs);
        left.map_err(|problem| self.node_error(&head, problem))
    }

    /// Lets the sub-graph's inputs stand for the values that are passed to it.
    fn enter(
        &self,
        scope: &Scope,
        inner: &mut Scope,
        inputs: &[Argument],
        arguments: &[Argument],
    ) -> Result<(), Problem> {
        let (found, limit) = (inner.depth, self.limits.graph_depth);
        if found > limit {
            return Err(Problem::Limit { what: "the depth of nested sub-graphs".to_owned(), found, limit });
        }
        self.check_name(&inner.prefix)?;
        if inputs.len() != arguments.len() {
            let (takes, given) = (inputs.len(), arguments.len());
            return Err(format!("calls a sub-graph of {takes} inputs with {given} arguments").into());
        }
        for (input, argument) in inputs.iter().zip(arguments) {
            let (name, kind) = named(input)?;
            let (argument, _) = named(argument)?;
            let value = self.value_of(scope, argument, kind)?;
            self.bind(inner, name, value)?;
        }
        Ok(())
    }

    /// Lets the names that the node defines stand for what the sub-graph returns.
    fn leave(
        &self,
        scope: &mut Scope,
        inner: &Scope,
        returned: &[Argument],
        outputs: &[Argument],
    ) -> Result<(), Problem> {
        let mut returned = returned.iter();
        let mut next = |output: &str, kind: Kind| -> Result<ValueId, Problem> {
            let argument =
                returned.next().ok_or_else(|| format!("has no value for its output `{output}`"))?;
            self.value_of(inner, named(argument)?.0, kind)
        };
        for output in outputs {
            match output {
                Argument::AsTensors(args) => {
                    for arg in args {
                        let value = next(&arg.name, Kind::Tensor)?;
                        self.bind(scope, &arg.name, value)?;
                    }
                }
                output => {
                    let (name, kind) = named(output)?;
                    let value = next(name, kind)?;
                    self.bind(scope, name, value)?;
                }
            }
        }
        match returned.next() {
            None => Ok(()),
            Some(_) => Err("calls a sub-graph that returns more than the node does".into()),
        }
    }
}

/// The higher-order operators whose sub-graph can be inlined.
fn select(operator: &str, inputs: Vec<schema::NamedArgument>) -> Result<Inlined, Problem> {
    let mut inputs = inputs.into_iter().map(|input| input.arg);
    let unexpected =
        || Problem::from(format!("calls the higher-order operator `{operator}` with unknown arguments"));
    match operator {
        // (enable, graph, arguments ...): switching gradients changes no value.
        "wrap_with_set_grad_enabled" => match (inputs.next(), inputs.next()) {
            (Some(Argument::AsBool(enable)), Some(Argument::AsGraph(graph))) => {
                Ok(Inlined { graph: *graph.graph, arguments: inputs.collect(), grad: Some(enable) })
            }
            _ => Err(unexpected()),
        },
        // (device, type, enable, cache, graph, arguments ...): off is what it is around every program.
        "wrap_with_autocast" => {
            let arguments: [Option<Argument>; 5] = std::array::from_fn(|_| inputs.next());
            match arguments {
                [_, _, Some(Argument::AsBool(false)), _, Some(Argument::AsGraph(graph))] => {
                    Ok(Inlined { graph: *graph.graph, arguments: inputs.collect(), grad: None })
                }
                [_, _, Some(Argument::AsBool(true)), ..] => {
                    Err("switches autocast on, which is not supported; export the model in the type that it is to \
                         compute in"
                        .into())
                }
                _ => Err(unexpected()),
            }
        }
        _ => Err(format!(
            "calls the higher-order operator `{operator}`; supported are wrap_with_set_grad_enabled and \
             wrap_with_autocast (off)"
        )
        .into()),
    }
}

/// The name in an argument that is one value.
fn named(argument: &Argument) -> Result<(&str, Kind), Problem> {
    match argument {
        Argument::AsTensor(arg) => Ok((&arg.name, Kind::Tensor)),
        Argument::AsSymInt(SymIntArgument::AsName(name)) => Ok((name, Kind::Int)),
        Argument::AsSymFloat(SymFloatArgument::AsName(name)) => Ok((name, Kind::Float)),
        Argument::AsSymBool(SymBoolArgument::AsName(name)) => Ok((name, Kind::Bool)),
        _ => Err("passes a sub-graph something that is neither a tensor nor a symbolic number".into()),
    }
}
