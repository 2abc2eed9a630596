"""Weights of a file for a module: state dictionaries, and checkpoints that the server writes while it trains."""

from pathlib import Path

import safetensors.torch
import torch

from .errors import ExportError

# Ahead of the names of what the optimizer keeps, in a checkpoint.
OPTIMIZER_PREFIX = "optimizer."
# Ahead of a model's names in a training program of `training.WithLoss`, and so in its checkpoints.
LOSS_PREFIX = "model."
# How many names of each kind a refusal tells.
NAMES_TOLD = 3


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Fills `module` from a `.safetensors` file, or from what `torch.save` wrote.

    Every name of the module must be there, and no other but those of an optimizer. Names may be those of a training
    program, which has put `model.` before each.
    """
    try:
        state = _weights_for(module, _read(path))
        found = module.load_state_dict(state, strict=False)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"cannot use the weights of {path}: {_shortened(str(error))}") from error
    wrong = [
        f"{len(names)} {what} ({_first(names)})"
        for what, names in (("missing", found.missing_keys), ("unexpected", found.unexpected_keys))
        if names
    ]
    if wrong:
        raise ExportError(f"cannot use the weights of {path}: of the names, {' and '.join(wrong)}")


def _read(path: Path) -> dict:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    while isinstance(state, dict) and set(state) & {"state_dict", "model"}:
        state = state.get("state_dict", state.get("model"))
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise TypeError("it holds no state dictionary")
    return state


def _weights_for(module: torch.nn.Module, state: dict) -> dict:
    """The entries of `state` that are no optimizer's, under the names that `module` has for them."""
    names = set(module.state_dict())
    kept = {name: value for name, value in state.items() if name in names or not name.startswith(OPTIMIZER_PREFIX)}
    if not all(name.startswith(LOSS_PREFIX) for name in kept):
        return kept
    # The module may have such names itself: what fits more of its names is meant.
    bare = {name.removeprefix(LOSS_PREFIX): value for name, value in kept.items()}
    return bare if len(names & bare.keys()) > len(names & kept.keys()) else kept


def _first(names: list[str]) -> str:
    return ", ".join([*names[:NAMES_TOLD], *(["..."] if len(names) > NAMES_TOLD else [])])


def _shortened(reason: str) -> str:
    """What torch says of tensors of other shapes has a line for each, below one of its own."""
    head, *lines = reason.split("\n\t")
    left_out = [f"and {len(lines) - NAMES_TOLD} more"] if len(lines) > NAMES_TOLD else []
    return "\n\t".join([head, *lines[:NAMES_TOLD], *left_out])
