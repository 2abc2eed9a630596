"""Writes a module and its loss as a training program: `NAME/model.pt2` like any other, but it answers the loss.

The module is in training mode and takes batches by name, the answers that it should give among them. The graph holds
the operators that eager PyTorch runs then: dropout draws from the generator and batch norm writes its running
statistics in place. Parameters keep whether they require gradients, and no operator is taken apart, so that who runs
the program backwards gets the losses and gradients of the eager module, bit for bit.
"""

import dataclasses
import inspect
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils import _pytree as pytree

from . import export
from .errors import ExportError
from .export import Inputs
from .sources import Source

# Losses by name: what the input is called that tells the answers that a model should give, and the function of both.
LOSSES = {"cross-entropy": ("labels", functional.cross_entropy), "mse": ("targets", functional.mse_loss)}


class WithLoss(torch.nn.Module):
    """A model and its loss: takes the model's inputs and the answers that they should have, and returns the loss.

    The names of its parameters are the model's behind `model.`.
    """

    def __init__(self, model: torch.nn.Module, loss: str, input_names: tuple[str, ...]):
        super().__init__()
        self.model = model
        self.input_names = input_names
        target, self.function = LOSSES[loss]
        self.forward = export.named_forward(self._call, (*input_names, target))

    def _call(self, *values):
        *inputs, target = values
        answer = self.model(**dict(zip(self.input_names, inputs, strict=True)))
        return self.function(only_answer(answer), target)


def only_answer(answers) -> torch.Tensor:
    """The one tensor that a model returned, maybe in a container."""
    leaves = pytree.tree_leaves(answers)
    if len(leaves) != 1 or not isinstance(leaves[0], torch.Tensor):
        raise ExportError(
            f"the model returns {len(leaves)} outputs, and --loss goes with one tensor: write a module that computes "
            "its loss itself, and export it as module:function"
        )
    return leaves[0]


def with_loss(source: Source, inputs: Inputs, loss: str, generator: torch.Generator) -> tuple[Source, Inputs]:
    """The source of a model with its loss, and the given example inputs with a target for them."""
    if source.dynamic_shapes is not None:
        raise ExportError(
            "the function returned dynamic shapes: let its module compute the loss and leave --loss out"
        )
    model, target = source.module, LOSSES[loss][0]
    if isinstance(inputs, tuple):
        inputs = dict(inspect.signature(model.forward).bind(*inputs).arguments)
    if target in inputs:
        raise ExportError(f"the model has an input '{target}' already: does it compute its loss itself?")
    model.eval()
    with export.eager_as_exported():
        answer = only_answer(model(**inputs))
    wrapped = WithLoss(model, loss, tuple(inputs))
    axes = source.axes | {target: {0: "batch"}} if source.axes is not None else None
    return dataclasses.replace(source, module=wrapped, axes=axes), inputs | {target: _target(loss, answer, generator)}


def _target(loss: str, answer: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Something that the answer might have had to be."""
    if loss == "mse":
        return torch.randn(answer.shape, generator=generator)
    if answer.dim() < 2:
        raise ExportError(f"cross-entropy takes rows of logits, and the model answers {list(answer.shape)}")
    return torch.randint(answer.shape[1], (answer.shape[0], *answer.shape[2:]), generator=generator)


def export_training_program(
    module: torch.nn.Module,
    inputs: Inputs,
    dynamic_shapes=None,
    output_names: tuple[str, ...] | None = None,
) -> torch.export.ExportedProgram:
    """Traces `module`, which returns its loss, in training mode. The loss is named `loss` unless `output_names` says
    otherwise."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ExportError("no parameter of the module requires gradients: there is nothing to train")
    args, kwargs = export.split(inputs)
    module.train()
    with torch.enable_grad():
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    export.refuse_higher_order(program)
    refuse_other_than_a_loss(program)
    export.name_outputs(program, output_names or ("loss",))
    return program


def refuse_other_than_a_loss(program: torch.export.ExportedProgram) -> None:
    """A training program has one output, a floating-point number without dimensions."""
    outputs = program.graph.output_node().args[0]
    if len(outputs) != 1:
        raise ExportError(f"a training program returns its loss and nothing else, and this one has {_count(outputs)}")
    value = outputs[0].meta["val"] if isinstance(outputs[0], torch.fx.Node) else outputs[0]
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point():
        return
    what = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    raise ExportError(
        f"a training program returns its loss, one floating-point number without dimensions, and this one returns "
        f"{what}: let the module compute its loss, or name one with --loss"
    )


def _count(outputs) -> str:
    return f"{len(outputs)} outputs" if outputs else "no output"


def export_training_model(module, inputs: Inputs, folder: str | Path, dynamic_shapes=None, output_names=None) -> Path:
    """Exports `module`, which returns its loss, to `folder/model.pt2` and returns that path.

    >>> import tempfile, torch
    >>> module = WithLoss(torch.nn.Linear(4, 2), "cross-entropy", ("input",))
    >>> batch = {"input": torch.randn(3, 4), "labels": torch.tensor([0, 1, 1])}
    >>> with tempfile.TemporaryDirectory() as models:
    ...     export_training_model(module, batch, f"{models}/linear").name
    'model.pt2'
    """
    program = export_training_program(module, inputs, dynamic_shapes, output_names)
    return export.save_program(program, Path(folder))
