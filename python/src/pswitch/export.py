"""Writes a module as `NAME/model.pt2`, the archive of `torch.export` that the server loads."""

import contextlib
import inspect
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from torch.export.graph_signature import (
    OutputKind,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from .errors import ExportError

# Arguments of a module: positional (a tuple) or by name (a dictionary).
Inputs = tuple | dict

NAMED_BY_NODE = (TensorArgument, SymIntArgument, SymFloatArgument, SymBoolArgument)


def split(inputs: Inputs) -> tuple[tuple, dict]:
    """Positional and named arguments of a call."""
    return (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)


def call(module: torch.nn.Module, inputs: Inputs):
    args, kwargs = split(inputs)
    return module(*args, **kwargs)


def named_forward(call, names: tuple[str, ...]):
    """A function with the given parameter names: an exported program's inputs are named by `forward`'s parameters."""

    def forward(*args, **kwargs):
        return call(*forward.__signature__.bind(*args, **kwargs).args)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    return forward


@contextlib.contextmanager
def eager_as_exported():
    """Inference as an exported program does it.

    The fused inference path of `torch.nn.MultiheadAttention` and `TransformerEncoderLayer` is never captured by
    `torch.export`; with it off, the eager module runs the operators that the program records.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def export_program(
    module: torch.nn.Module,
    inputs: Inputs,
    dynamic_shapes=None,
    output_names: tuple[str, ...] | None = None,
) -> torch.export.ExportedProgram:
    """Traces `module` in evaluation mode.

    Inputs carry the names of the module's parameters. Outputs are named by `output_names`, else by the keys of the
    dictionary, named tuple or dataclass that the module returns, else `output_0`, `output_1` and so on.
    """
    args, kwargs = split(inputs)
    module.eval()
    with eager_as_exported():
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    refuse_higher_order(program)
    name_outputs(program, output_names)
    return program


def refuse_higher_order(program: torch.export.ExportedProgram) -> None:
    """Control flow inside the graph has no operator in libtorch's dispatcher: say so now and not at load."""
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ExportError(
                f"the program contains the higher-order operator '{node.target}' (node '{node.name}'), which the "
                "server does not run: replace torch.cond, torch.map, while loops, autocast blocks and, in training, "
                "no_grad blocks by operators"
            )


def name_outputs(program: torch.export.ExportedProgram, names: tuple[str, ...] | None) -> None:
    """Gives the nodes that produce the program's outputs the outputs' names; the archive takes names from nodes."""
    specs = program.graph_signature.output_specs
    positions = [i for i, spec in enumerate(specs) if spec.kind == OutputKind.USER_OUTPUT]
    if names is None:
        names = derived_names(program.call_spec.out_spec, len(positions))
    elif len(names) != len(positions):
        raise ExportError(f"{len(names)} output names ({', '.join(names)}) for {len(positions)} outputs")
    output_node = program.graph.output_node()
    taken = {node.name for node in program.graph.nodes}
    renamed = {}
    for position, name in zip(positions, names, strict=True):
        node = output_node.args[0][position]
        if not isinstance(node, torch.fx.Node) or node.op != "call_function" or node.name in renamed.values():
            continue
        if name == node.name or name in taken:
            continue
        renamed[node.name] = name
        taken.add(name)
        node.name = name
    module_call = program.module_call_graph[0].signature
    if module_call and not is_serializable(module_call.out_spec):
        module_call.out_spec = pytree.tree_structure(dict.fromkeys(names))
    arguments = [spec.arg for spec in specs] + (list(module_call.outputs) if module_call else [])
    for argument in arguments:
        if isinstance(argument, NAMED_BY_NODE) and argument.name in renamed:
            argument.name = renamed[argument.name]


def is_serializable(spec: pytree.TreeSpec) -> bool:
    """Whether an archive can hold the container that a module returned; a dataclass or named tuple mostly cannot."""
    try:
        pytree.treespec_dumps(spec)
    except NotImplementedError:
        return False
    return True


def derived_names(out_spec: pytree.TreeSpec, count: int) -> tuple[str, ...]:
    """Names from the keys of what the module returned, by position where there is none."""
    fallback = tuple(f"output_{i}" for i in range(count))
    if out_spec.num_leaves != count:
        return fallback
    try:
        paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), out_spec))
    except (TypeError, ValueError):
        return fallback  # a container that does not tell its keys
    names = []
    for path, _ in paths:
        parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        name = re.sub(r"\W+", "_", "_".join(parts)).strip("_")
        names.append(name if name and not name[0].isdigit() else f"output_{name or 0}")
    return tuple(names) if len(set(names)) == count else fallback


def save_program(program: torch.export.ExportedProgram, folder: Path) -> Path:
    """Writes `folder/model.pt2` in one step: who looks sees the whole file or the one before, never a part."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        unfinished = work / "model.pt2"
        torch.export.save(program, unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        path = folder / "model.pt2"
        os.replace(unfinished, path)
        return path
    except OSError as error:
        raise ExportError(f"cannot write {folder}/model.pt2: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def export_model(module, inputs: Inputs, folder: str | Path, dynamic_shapes=None, output_names=None) -> Path:
    """Exports `module` to `folder/model.pt2` and returns that path.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as models:
    ...     path = export_model(torch.nn.Linear(4, 2), (torch.randn(1, 4),), f"{models}/linear")
    ...     path.name
    'model.pt2'
    """
    program = export_program(module, inputs, dynamic_shapes, output_names)
    return save_program(program, Path(folder))
