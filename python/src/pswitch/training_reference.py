"""Reference runs: eager PyTorch trains a module, and what comes of it lies beside the archive that must do the same.

A folder holds

- `model.pt2`, the training program with the weights that every run starts from;
- `data.safetensors`, one array for each input of the program, with the rows of all batches;
- `reference.safetensors`, of each run `RUN.losses` and, where the manifest says so, `RUN.final.NAME` for each name of
  the state dictionary;
- `manifest.json`, with the runs and their settings as torch names them.

Batch i is rows `i * batch_size ..`, the last one of an epoch as short as the rows leave it, and then the next epoch
begins. A step of n micro-batches takes n batches: its loss is the mean of theirs, and each is divided by n and run
backwards. Then the gradients are clipped to the norm `max_norm`, if there is one. Before step k the generator gets
the seed `step_seed(seed, k)`, once for all of its micro-batches. Torch has one thread, and each batch is a tensor
that torch allocated.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

from . import cases

SEED = 7
STEPS = 20
WORD = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Run:
    """An optimizer of `torch.optim` and how it is used."""

    name: str
    optimizer: str
    # Those that are not the optimizer's defaults.
    settings: dict
    micro_batches: int = 1
    max_norm: float | None = None


ADAMW = {"lr": 1e-3, "weight_decay": 0.05}

RUNS = (
    Run("sgd", "SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}),
    Run("nesterov", "SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    Run("adam", "Adam", {"lr": 1e-3, "weight_decay": 1e-2}),
    Run("adamw", "AdamW", ADAMW),
    Run("clip-accumulate", "AdamW", ADAMW, micro_batches=2, max_norm=0.5),
)


def step_seed(seed: int, step: int) -> int:
    """The number that splitmix64 draws at `step`, without its lowest bit: a seed of a step that needs no history."""
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return (z ^ (z >> 31)) >> 1


def batch(data: dict[str, torch.Tensor], size: int, index: int) -> dict[str, torch.Tensor]:
    """Batch `index` of the data in their order, epoch after epoch.

    A copy: products of matrices differ in their last bits by how memory is aligned, and rows in the midst of an array
    lie anywhere, whereas what torch allocates begins at a multiple of 64 bytes.
    """
    rows = min(len(values) for values in data.values())
    start = index % -(-rows // size) * size
    return {name: values[start : start + size].clone() for name, values in data.items()}


def optimizer(run: Run, module: torch.nn.Module) -> torch.optim.Optimizer:
    return getattr(torch.optim, run.optimizer)(module.parameters(), **run.settings)


def train(module: torch.nn.Module, data: dict[str, torch.Tensor], batch_size: int, run: Run) -> torch.Tensor:
    """Trains `module`, which returns its loss, for `STEPS` steps and returns the losses."""
    stepping = optimizer(run, module)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step_seed(SEED, step))
        stepping.zero_grad()
        parts = []
        for part in range(run.micro_batches):
            (loss,) = torch.utils._pytree.tree_leaves(
                module(**batch(data, batch_size, step * run.micro_batches + part))
            )
            (loss / run.micro_batches).backward()
            parts.append(loss.detach())
        if run.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), run.max_norm, foreach=True)
        stepping.step()
        losses.append(torch.stack(parts).mean())
    return torch.stack(losses)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all that a state dictionary has."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums of several threads depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def reference(
    module: torch.nn.Module, data: dict[str, torch.Tensor], batch_size: int
) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The losses and the final state of every run, each from the state that `module` has now."""
    initial, answers = state(module), {}
    for run in RUNS:
        module.load_state_dict(initial)
        with one_thread():
            losses = train(module.train(), data, batch_size, run)
        if not bool(losses.isfinite().all()) or len(losses.unique()) < STEPS / 2:
            raise AssertionError(f"the losses of {run.name} prove nothing: {losses.tolist()}")
        answers[run.name] = losses, state(module)
    module.load_state_dict(initial)
    return answers


def check_exported(path: Path, data: dict[str, torch.Tensor], batch_size: int, run: Run, answer) -> None:
    """Trains the exported program, which must come to the last bit to where the eager module did."""
    module = torch.export.load(path).module()
    with one_thread():
        losses = train(module, data, batch_size, run)
    expected_losses, expected = answer
    final = state(module)
    left = cases.Case({}, {"losses": losses} | {name: final[name] for name in expected})
    if not cases.same_bits(left, cases.Case({}, {"losses": expected_losses} | expected)):
        raise AssertionError(f"{path}: the exported program trains differently in the run {run.name}")


def write(
    folder: Path,
    program: torch.export.ExportedProgram,
    module: torch.nn.Module,
    data: dict[str, torch.Tensor],
    batch_size: int,
    answers: dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]],
    finals: tuple[str, ...],
    facts: dict,
) -> None:
    """Writes the data, the reference with the final states of the runs `finals`, and last the manifest."""
    safetensors.torch.save_file(
        {name: values.contiguous() for name, values in data.items()}, folder / "data.safetensors"
    )
    tensors = {}
    for name, (losses, final) in answers.items():
        tensors[f"{name}.losses"] = losses
        if name in finals:
            tensors |= {f"{name}.final.{key}": value.contiguous() for key, value in final.items()}
    safetensors.torch.save_file(tensors, folder / "reference.safetensors")
    manifest = facts | {
        "torch_version": torch.__version__,
        "torch_threads": 1,
        "device": "cpu",
        "seed": SEED,
        "steps": STEPS,
        "batch_size": batch_size,
        "rows": min(len(values) for values in data.values()),
        "inputs": {
            name: {"dtype": str(values.dtype).removeprefix("torch."), "shape": list(values.shape)}
            for name, values in data.items()
        },
        "outputs": cases.output_names(program),
        "runs": {
            run.name: {
                "optimizer": run.optimizer,
                "settings": optimizer(run, module).defaults,
                "micro_batches": run.micro_batches,
                "max_norm": run.max_norm,
                "has_final": run.name in finals,
            }
            for run in RUNS
        },
    }
    cases.write_json(folder / "manifest.json", manifest)
