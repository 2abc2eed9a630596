//! Where what a training task keeps between its steps lies: pure arithmetic.

use pswitch_model::{DType, Program, Weight, WeightKind};

use crate::TrainError;
use crate::config::Optimizer;

/// Every tensor begins at a multiple of this.
const ALIGNMENT_BYTES: u64 = 512;

/// More than any machine has.
const MOST_BYTES: u64 = 1 << 50;

/// The state of a training task as one range of bytes: the program's span as an archive has it, behind it what the
/// optimizer keeps of every parameter, and last copies of the buffers, on which a step works until it is finished.
///
/// The copies are scratch: what has to be saved and brought back is the first [`state_bytes`](Self::state_bytes).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateLayout {
    /// All tensors that are kept, parameters first, in the order in which the module has them.
    pub tensors: Vec<StateTensor>,
    /// Bytes that are kept between steps; a multiple of 512.
    pub state_bytes: u64,
    /// Bytes in all; a multiple of 512.
    pub bytes: u64,
}

/// A tensor of a training task's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateTensor {
    /// The weight's name in the module: `layer1.0.conv1.weight`.
    pub name: String,
    /// What it is of the weight.
    pub role: Role,
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub sizes: Vec<u64>,
    /// Where it begins in the state.
    pub offset_bytes: u64,
    /// Whether the module's state dict has it: parameters and persistent buffers.
    pub in_state_dict: bool,
    /// Other names that the same tensor has in the state dict.
    pub also_named: Vec<String>,
    /// The weight's index in [`Program::weights`].
    pub weight: usize,
    /// Where the copy that steps work on begins, for a buffer.
    pub copy_bytes: Option<u64>,
}

/// What a tensor of the state is of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The parameter itself, one that gradients flow to.
    Parameter,
    /// A buffer, or a parameter that no gradient flows to.
    Buffer,
    /// The first of what the optimizer keeps of a parameter: momentum, or the average of its gradients.
    First,
    /// The second: the average of the squares of its gradients.
    Second,
}

impl StateTensor {
    /// How many bytes it has, dense.
    pub fn bytes(&self) -> u64 {
        // Those of a layout are far fewer.
        self.dtype.dense_bytes(&self.sizes).unwrap_or(u64::MAX)
    }
}

impl StateLayout {
    /// The state of a program under an optimizer.
    ///
    /// # Errors
    /// [`TrainError::Program`] if there is nothing to train, parameters overlap without being the same, elements of one tensor share
    /// memory, or the weights are larger than a petabyte.
    pub fn new(program: &Program, optimizer: &Optimizer) -> Result<Self, TrainError> {
        check_lengths(program)?;
        let kept_of_each = kept_tensors(optimizer);
        let span = program.span();
        let place = |weight: &Weight| span.offset(weight.storage) + weight.offset_bytes;
        // Values are numbered in the order of the module's parameters and buffers.
        let mut order: Vec<usize> = (0..program.weights.len()).collect();
        order.sort_by_key(|&index| program.weights[index].value);
        let tensor = |index: usize, role, offset_bytes| {
            let weight = &program.weights[index];
            StateTensor {
                name: weight.name.clone(),
                role,
                dtype: weight.dtype,
                sizes: weight.sizes.clone(),
                offset_bytes,
                in_state_dict: match role {
                    Role::Parameter => true,
                    Role::Buffer => !matches!(weight.kind, WeightKind::Buffer { persistent: false }),
                    Role::First | Role::Second => false,
                },
                also_named: Vec::new(),
                weight: index,
                copy_bytes: None,
            }
        };
        let mut parameters: Vec<StateTensor> = Vec::new();
        for &index in &order {
            let weight = &program.weights[index];
            // Of names of one tensor a program uses one, and not always the first.
            let is_used =
                || program.weights.iter().any(|it| it.first_use.is_some() && it.is_same_tensor(weight));
            if !weight.requires_grad || !is_used() {
                continue;
            }
            check_elements_apart(weight)?;
            let candidate = tensor(index, Role::Parameter, place(weight));
            let end =
                |tensor: &StateTensor| tensor.offset_bytes + program.weights[tensor.weight].extent_bytes();
            let overlaps = |known: &&StateTensor| {
                known.offset_bytes < end(&candidate) && candidate.offset_bytes < end(known)
            };
            match parameters.iter().position(|known| overlaps(&known)) {
                // One parameter under two names.
                Some(known) if program.weights[parameters[known].weight].is_same_tensor(weight) => {
                    parameters[known].also_named.push(candidate.name);
                }
                Some(known) => {
                    return Err(TrainError::Program {
                        reason: format!(
                            "parameters '{}' and '{}' overlap without being the same tensor, which no optimizer is \
                             made for",
                            parameters[known].name, candidate.name
                        ),
                    });
                }
                None => parameters.push(candidate),
            }
        }
        if parameters.is_empty() {
            return Err(TrainError::Program {
                reason: "the program uses no parameter that requires gradients: there is nothing to train; export \
                         the module with `--train` and without `torch.no_grad()`"
                    .to_owned(),
            });
        }
        let mut end = span.bytes;
        let mut take = |bytes: u64| {
            let offset = end;
            end += bytes.next_multiple_of(ALIGNMENT_BYTES);
            offset
        };
        let mut tensors = parameters.clone();
        for role in [Role::First, Role::Second].into_iter().take(kept_of_each) {
            let kept =
                parameters.iter().map(|parameter| tensor(parameter.weight, role, take(parameter.bytes())));
            tensors.extend(kept.collect::<Vec<_>>());
        }
        let trained: Vec<usize> = parameters.iter().map(|parameter| parameter.weight).collect();
        let is_tied = |weight: &Weight| {
            weight.requires_grad && trained.iter().any(|&index| program.weights[index].is_same_tensor(weight))
        };
        let others = order.iter().map(|&index| (index, &program.weights[index]));
        let others: Vec<usize> = others
            .filter(|(_, weight)| !matches!(weight.kind, WeightKind::Constant) && !is_tied(weight))
            .map(|(index, _)| index)
            .collect();
        let state_bytes = {
            let first_copy = take(0);
            for &index in &others {
                let weight = &program.weights[index];
                // Those that no step changes are written, too, when a task goes on from a checkpoint.
                check_elements_apart(weight)?;
                let mut buffer = tensor(index, Role::Buffer, place(weight));
                if matches!(weight.kind, WeightKind::Buffer { .. }) {
                    let (begin, end) = (place(weight), place(weight) + weight.extent_bytes());
                    let overlaps = |known: &&StateTensor| {
                        let other = &program.weights[known.weight];
                        place(other) < end && begin < place(other) + other.extent_bytes()
                    };
                    // What the optimizer keeps lies elsewhere.
                    let beside =
                        tensors.iter().filter(|it| matches!(it.role, Role::Parameter | Role::Buffer));
                    match beside.clone().find(overlaps) {
                        Some(known) if program.weights[known.weight].is_same_tensor(weight) => {
                            buffer.copy_bytes = known.copy_bytes;
                        }
                        Some(known) => {
                            return Err(TrainError::Program {
                                reason: format!(
                                    "buffer '{}' shares memory with '{}': what a step does to one would undo the \
                                     other; export the module with a copy",
                                    buffer.name, known.name
                                ),
                            });
                        }
                        None => buffer.copy_bytes = Some(take(weight.extent_bytes())),
                    }
                }
                tensors.push(buffer);
            }
            first_copy
        };
        Ok(Self { tensors, state_bytes, bytes: end })
    }

    /// Those in a role, in the order of the module.
    pub fn in_role(&self, role: Role) -> impl Iterator<Item = &StateTensor> {
        self.tensors.iter().filter(move |tensor| tensor.role == role)
    }
}

/// How many tensors an optimizer keeps of every parameter.
fn kept_tensors(optimizer: &Optimizer) -> usize {
    match optimizer {
        Optimizer::Sgd { momentum, .. } => usize::from(*momentum != 0.0),
        Optimizer::Adam { .. } | Optimizer::AdamW { .. } => 2,
    }
}

/// Refuses a weight whose elements share memory with each other.
fn check_elements_apart(weight: &Weight) -> Result<(), TrainError> {
    if !weight.sizes.iter().zip(&weight.strides).any(|(&size, &stride)| size > 1 && stride == 0) {
        return Ok(());
    }
    Err(TrainError::Program {
        reason: format!(
            "'{}' has elements that are one in memory (a stride of 0): nobody can change them one by one; export the \
             module with a copy",
            weight.name
        ),
    })
}

/// Refuses weights of so many elements (with strides that overlap, an archive need not have as many) that sums of their lengths
/// would not be what they seem.
fn check_lengths(program: &Program) -> Result<(), TrainError> {
    let mut sum = 0_u64;
    for weight in &program.weights {
        let bytes = weight.dtype.dense_bytes(&weight.sizes);
        let so_far = bytes.and_then(|bytes| sum.checked_add(bytes)).filter(|sum| *sum <= MOST_BYTES);
        sum = so_far.ok_or_else(|| TrainError::Program {
            reason: format!(
                "'{}' has {:?} elements: with it the weights are larger than {MOST_BYTES} bytes",
                weight.name, weight.sizes
            ),
        })?;
    }
    Ok(())
}
