use crate::error::ModelError;
use crate::program::{NamedArgument, Node, NodeOutput, Sym, SymbolicOperator, Target, ValueId, ValueKind};
use crate::resolve::{Problem, Resolver, Scope};
use crate::schema::{self, SymBoolArgument, SymFloatArgument, SymIntArgument};

/// A node without its arguments: what messages and inlined sub-graphs need of it.
pub(super) struct NodeHead {
    pub(super) name: String,
    pub(super) place: String,
}

impl Resolver<'_> {
    /// Adds a node of a graph, or the nodes of the sub-graph that it calls.
    pub(super) fn node(&mut self, scope: &mut Scope, node: schema::Node) -> Result<(), ModelError> {
        let name = node.name.unwrap_or_else(|| format!("node_{}", self.nodes.len()));
        let head = NodeHead {
            name: format!("{}{name}", scope.prefix),
            place: place(node.metadata.stack_trace.as_deref().unwrap_or("")),
        };
        if let Some(operator) = node.target.strip_prefix("torch.ops.higher_order.") {
            return self.inline(scope, head, operator, node.inputs, node.outputs);
        }
        let module = module(node.metadata.nn_module_stack.as_deref().unwrap_or("")).to_owned();
        let resolved = self.resolve(scope, &head, &node.target, node.inputs, node.outputs);
        let (target, inputs, outputs) = resolved.map_err(|problem| self.node_error(&head, problem))?;
        let NodeHead { name, place } = head;
        self.nodes.push(Node { name, module, target, inputs, outputs, place, grad: scope.grad });
        Ok(())
    }

    fn resolve(
        &mut self,
        scope: &mut Scope,
        head: &NodeHead,
        name: &str,
        inputs: Vec<schema::NamedArgument>,
        outputs: Vec<schema::Argument>,
    ) -> Result<(Target, Vec<NamedArgument>, Vec<NodeOutput>), Problem> {
        let (found, limit) = (self.nodes.len() as u64 + 1, self.limits.nodes);
        if found > limit {
            return Err(Problem::Limit { what: "the number of nodes".to_owned(), found, limit });
        }
        self.check_name(&head.name)?;
        if !self.node_names.insert(head.name.clone()) {
            return Err("is not the only node of this name".into());
        }
        self.check_name(name)?;
        let target = target(name)?;
        let inputs = inputs
            .into_iter()
            .map(|input| {
                self.check_name(&input.name)?;
                let value = self.argument(scope, input.arg)?;
                Ok(NamedArgument { name: input.name, keyword: input.kind == Some(2), value })
            })
            .collect::<Result<Vec<_>, Problem>>()?;
        let outputs = outputs
            .into_iter()
            .map(|output| self.output(scope, output))
            .collect::<Result<Vec<_>, Problem>>()?;
        Ok((target, inputs, outputs))
    }

    /// Defines what a node returns.
    fn output(&mut self, scope: &mut Scope, output: schema::Argument) -> Result<NodeOutput, Problem> {
        Ok(match output {
            schema::Argument::AsNone(_) => NodeOutput::None,
            schema::Argument::AsTensor(arg) => NodeOutput::Tensor(self.define_tensor(scope, &arg.name)?),
            schema::Argument::AsTensors(args) => NodeOutput::Tensors(
                args.iter().map(|arg| self.define_tensor(scope, &arg.name)).collect::<Result<_, _>>()?,
            ),
            schema::Argument::AsOptionalTensor(schema::OptionalTensor::AsNone(_)) => NodeOutput::None,
            schema::Argument::AsOptionalTensor(schema::OptionalTensor::AsTensor(arg)) => {
                NodeOutput::Tensor(self.define_tensor(scope, &arg.name)?)
            }
            schema::Argument::AsOptionalTensors(args) => {
                let define = |arg: &schema::OptionalTensor| match arg {
                    schema::OptionalTensor::AsTensor(arg) => self.define_tensor(scope, &arg.name).map(Some),
                    schema::OptionalTensor::AsNone(_) => Ok(None),
                };
                NodeOutput::OptionalTensors(args.iter().map(define).collect::<Result<_, _>>()?)
            }
            schema::Argument::AsSymInt(SymIntArgument::AsName(name)) => {
                NodeOutput::SymInt(self.define_int(scope, &name)?)
            }
            schema::Argument::AsSymInts(args) => {
                let define = |arg: &SymIntArgument| match arg {
                    SymIntArgument::AsName(name) => self.define_int(scope, name).map(Sym::Value),
                    SymIntArgument::AsInt(value) => Ok(Sym::Constant(*value)),
                };
                NodeOutput::SymInts(args.iter().map(define).collect::<Result<_, _>>()?)
            }
            schema::Argument::AsSymFloat(SymFloatArgument::AsName(name)) => {
                NodeOutput::SymFloat(self.define(scope, &name, ValueKind::Float)?)
            }
            schema::Argument::AsSymBool(SymBoolArgument::AsName(name)) => {
                NodeOutput::SymBool(self.define(scope, &name, ValueKind::Bool)?)
            }
            _ => return Err("returns something other than tensors and symbolic numbers".into()),
        })
    }

    pub(super) fn define_tensor(&mut self, scope: &mut Scope, name: &str) -> Result<ValueId, Problem> {
        let meta = scope.tensors.remove(name).map(|meta| self.tensor_meta(meta)).transpose();
        let meta = meta.map_err(|problem| about(name, problem))?;
        self.define(scope, name, ValueKind::Tensor(meta))
    }

    pub(super) fn define_int(&mut self, scope: &mut Scope, name: &str) -> Result<ValueId, Problem> {
        let dim = match scope.ints.remove(name) {
            Some(int) => self.dim(int, true).map_err(|problem| about(name, problem))?,
            None => crate::program::Dim::Unknown { hint: None },
        };
        self.define(scope, name, ValueKind::Int(dim))
    }

    pub(super) fn node_error(&self, head: &NodeHead, problem: impl Into<Problem>) -> ModelError {
        let file = self.container.file.clone();
        match problem.into() {
            Problem::Reason(reason) => {
                ModelError::Node { file, node: head.name.clone(), place: head.place.clone(), reason }
            }
            Problem::Limit { what, found, limit } => ModelError::Limit { file, what, found, limit },
        }
    }
}

/// Names the value that a problem is about.
fn about(name: &str, problem: Problem) -> Problem {
    match problem {
        Problem::Reason(reason) => Problem::Reason(format!("defines `{name}`, which {reason}")),
        limit => limit,
    }
}

/// `torch.ops.aten.conv2d.default` or `_operator.add`.
fn target(name: &str) -> Result<Target, Problem> {
    if let Some(operator) = SymbolicOperator::from_python_name(name) {
        return Ok(Target::Symbolic(operator));
    }
    let parts = name.strip_prefix("torch.ops.").map(|name| name.split('.').collect::<Vec<_>>());
    match parts.as_deref() {
        Some([namespace, name, overload]) => Ok(Target::Operator {
            namespace: (*namespace).to_owned(),
            name: (*name).to_owned(),
            overload: (*overload).to_owned(),
        }),
        _ => Err(format!(
            "calls `{name}`; supported are operators (`torch.ops.NAMESPACE.NAME.OVERLOAD`) and arithmetic on sizes"
        )
        .into()),
    }
}

/// The innermost module of a stack `key,path,type;key,path,type`.
fn module(stack: &str) -> &str {
    let path = stack.rsplit(';').next().and_then(|entry| entry.split(',').nth(1)).unwrap_or("");
    // Nodes that passes have added, of no module.
    if path.starts_with("_empty_nn_module_stack") {
        return "";
    }
    // A module's second call is written `path@1`.
    match path.rsplit_once('@') {
        Some((path, call)) if call.bytes().all(|byte| byte.is_ascii_digit()) => path,
        _ => path,
    }
}

/// `FILE:LINE` of the innermost frame that is not PyTorch's own.
fn place(stack_trace: &str) -> String {
    let frames = stack_trace.lines().filter_map(|line| {
        let (file, rest) = line.trim_start().strip_prefix("File \"")?.split_once("\", line ")?;
        let line = rest.split(',').next().unwrap_or(rest);
        Some((file, line))
    });
    let is_own = |file: &str| file.starts_with("torch/") || file.contains("/torch/");
    let mut last = None;
    let mut last_foreign = None;
    for (file, line) in frames {
        last = Some((file, line));
        if !is_own(file) {
            last_foreign = last;
        }
    }
    last_foreign.or(last).map_or(String::new(), |(file, line)| format!("{file}:{line}"))
}

#[cfg(test)]
mod tests {
    use super::{module, place};

    #[test]
    fn modules_are_the_innermost_ones() {
        assert_eq!(module("L__self__,,M;L__self___a_b,a.b,torch.nn.modules.linear.Linear"), "a.b");
        assert_eq!(module("L__self__,,M;L__self___a,a@1,N"), "a");
        assert_eq!(module("L__self__,,M"), "");
        assert_eq!(module(""), "");
        let empty = "_empty_nn_module_stack_from_metadata_hook";
        assert_eq!(module(&[empty; 3].join(",")), "");
    }

    #[test]
    fn places_are_in_the_models_own_code() {
        let own = "File \"/a/model.py\", line 12, in forward\n    x = self.l(x)\n";
        let torch = "  File \"/env/torch/nn/modules/linear.py\", line 134, in forward\n    return";
        assert_eq!(place(&format!("{own}{torch}")), "/a/model.py:12");
        assert_eq!(place(torch), "/env/torch/nn/modules/linear.py:134");
        assert_eq!(place("nonsense"), "");
    }
}
