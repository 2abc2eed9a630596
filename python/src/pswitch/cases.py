"""Reference cases: inputs and what the eager module answers, beside the archive that must answer the same.

A folder holds `model.pt2`, `cases.safetensors` and `manifest.json`. Case i has the tensors `case{i}.input.{name}` and
`case{i}.output.{index}`; a number that a program returns is stored as a tensor without dimensions. The manifest says
which case raises an error instead of answering, and both files name the device that the eager module answered on.
"""

import copy
import dataclasses
import json
import os
from pathlib import Path

import safetensors.torch
import torch
from torch.export.graph_signature import InputKind, OutputKind, SymIntArgument, TensorArgument
from torch.utils import _pytree as pytree

from .export import Inputs, call, eager_as_exported, split


@dataclasses.dataclass
class Case:
    """One call: inputs by name, and either the outputs by position or the error."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[int, torch.Tensor]
    raises: str | None = None


def input_names(program: torch.export.ExportedProgram) -> list[str | None]:
    """Names of the flattened inputs; None for one that was fixed at export."""
    return [
        spec.arg.name if isinstance(spec.arg, (TensorArgument, SymIntArgument)) else None
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT
    ]


def output_names(program: torch.export.ExportedProgram) -> list[str | None]:
    """Names of the flattened outputs; None for a constant."""
    return [
        getattr(spec.arg, "name", None) or None
        for spec in program.graph_signature.output_specs
        if spec.kind == OutputKind.USER_OUTPUT
    ]


def device_name(device: str | torch.device) -> str:
    """What is recorded of a device: `cpu`, or the name of the GPU; kernels differ between kinds of GPUs."""
    device = torch.device(device)
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def run_case(
    module: torch.nn.Module, names: list[str | None], inputs: Inputs, device: str | torch.device = "cpu"
) -> Case:
    """Calls `module` as it is on `device`, where it has to be, keeping copies of its inputs, which it may change."""
    inputs = copy.deepcopy(inputs)
    leaves = pytree.tree_leaves(split(inputs))
    kept = {name: _stored(leaf) for name, leaf in zip(names, leaves, strict=True) if name is not None}
    inputs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
    try:
        with eager_as_exported():
            outputs = pytree.tree_leaves(call(module, inputs))
    except (IndexError, RuntimeError) as error:
        return Case(kept, {}, raises=str(error).splitlines()[0])
    return Case(kept, {i: _stored(leaf) for i, leaf in enumerate(outputs) if leaf is not None})


def _stored(value) -> torch.Tensor:
    tensor = value.detach().cpu() if isinstance(value, torch.Tensor) else torch.tensor(value)
    return tensor.clone(memory_format=torch.contiguous_format)


def write_cases(
    folder: Path,
    program: torch.export.ExportedProgram,
    cases: list[Case],
    facts: dict,
    device: str | torch.device = "cpu",
) -> None:
    """Writes `cases.safetensors` and, last, `manifest.json` with `facts` in it: who finds it finds everything."""
    tensors = {}
    for i, case in enumerate(cases):
        tensors |= {f"case{i}.input.{name}": value for name, value in case.inputs.items()}
        tensors |= {f"case{i}.output.{index}": value for index, value in case.outputs.items()}
    metadata = {
        "torch_threads": str(torch.get_num_threads()),
        "torch_version": torch.__version__,
        "device": device_name(device),
        "cases": str(len(cases)),
    }
    safetensors.torch.save_file(tensors, folder / "cases.safetensors", metadata)
    manifest = facts | {
        "torch_version": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "device": device_name(device),
        "inputs": [name for name in input_names(program) if name is not None],
        "outputs": output_names(program),
        "cases": [
            {
                "inputs": {name: _described(value) for name, value in case.inputs.items()},
                "outputs": {str(index): _described(value) for index, value in case.outputs.items()},
                "raises": case.raises,
            }
            for case in cases
        ],
    }
    write_json(folder / "manifest.json", manifest)


def _described(value: torch.Tensor) -> dict:
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}


def write_json(path: Path, content) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def same_bits(left: Case, right: Case) -> bool:
    """Whether two answers agree in every bit, NaNs included."""
    if left.outputs.keys() != right.outputs.keys() or left.raises != right.raises:
        return False
    return all(_same_bits(left.outputs[i], right.outputs[i]) for i in left.outputs)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def vary_constants(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Makes parameters and buffers that are constant at first (biases, norms, running statistics, zeroed heads)
    differ, so that an output tells when one was taken for another."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if (
                not tensor.is_floating_point()
                or tensor.numel() < 2
                or not bool((tensor == tensor.flatten()[0]).all())
            ):
                continue
            noise = torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
            if tensor.flatten()[0] == 0:
                tensor.copy_(noise * 0.1 - 0.05)
            else:
                tensor.mul_(0.8 + 0.4 * noise)
