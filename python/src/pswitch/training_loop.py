"""PyTorch's own training loop over a training program: `python -m pswitch.training_loop --task task.json`.

What a task comes to with nothing but PyTorch, beside which `pswitch bench train` and `pswitch bench stops` put what
it comes to in a server. The task is a configuration as `pswitch train submit` takes it, in JSON, with a constant
learning rate. Batches come from pinned memory, and the loss of every step is read, as the server does.

With data from files that are not shuffled, `losses` are those of the first steps, each from the seed that the server
gives it. Then steps are counted for some seconds. Prints one JSON object to standard output.
"""

import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch.export.passes import move_to_device_pass

from . import measuring, ready_latency
from .training_reference import batch, step_seed

WARM_UP = 3

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class Task:
    """A program on a device, its optimizer, and where its batches come from."""

    def __init__(self, config: dict, device: torch.device):
        path = Path(config["program"])
        program = torch.export.load(path / "model.pt2" if path.is_dir() else path)
        if device.type == "cuda":
            ready_latency.enable_cudnn(program)
            ready_latency.allow_other_strides(program)
        self._device = device
        self._module = move_to_device_pass(program, str(device)).module()
        kind = OPTIMIZERS[config["optimizer"]["kind"]]
        settings = {name: value for name, value in config["optimizer"].items() if name != "kind"}
        self._optimizer = kind(self._module.parameters(), **settings)
        self._seed = config.get("seed", 0)
        self._accumulate = config.get("accumulate", 1)
        self._clip_norm = config.get("clip_norm")
        data = config["data"]
        self._batch_size = (data.get("synthetic") or data)["batch_size"]
        self._data = read(data.get("files", ())) or made_up(program, self._batch_size)
        self.has_losses = "files" in data and not data.get("shuffle", True) and not data.get("drop_last", False)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batch after batch, in memory that the device can copy from."""
        for index in itertools.count():
            rows = batch(self._data, self._batch_size, index)
            if self._device.type == "cuda":
                rows = {name: values.pin_memory() for name, values in rows.items()}
            yield rows

    def step(self, number: int, batches: Iterator[dict[str, torch.Tensor]]) -> float:
        """One step, and its loss."""
        torch.manual_seed(step_seed(self._seed, number))
        self._optimizer.zero_grad()
        parts = []
        for rows in itertools.islice(batches, self._accumulate):
            inputs = {name: values.to(self._device, non_blocking=True) for name, values in rows.items()}
            (loss,) = torch.utils._pytree.tree_leaves(self._module(**inputs))
            (loss / self._accumulate).backward()
            parts.append(loss.detach())
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._module.parameters(), self._clip_norm, foreach=True)
        self._optimizer.step()
        return sum(part.item() for part in parts) / len(parts)


def read(files: list[str]) -> dict[str, torch.Tensor]:
    """The arrays of files of safetensors."""
    arrays = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise SystemExit(f"{file}: data are read from .safetensors alone here")
        arrays |= safetensors.torch.load_file(file)
    return arrays


def made_up(program: torch.export.ExportedProgram, rows: int) -> dict[str, torch.Tensor]:
    """A batch of the shapes that a program was exported with."""
    generator = torch.Generator().manual_seed(0)
    arrays = {}
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in program.graph_signature.user_inputs:
            continue
        value = node.meta["val"]
        shape = (rows, *map(int, value.shape[1:]))
        if value.dtype.is_floating_point:
            arrays[node.name] = torch.randn(shape, generator=generator).to(value.dtype)
        else:
            # Two classes are known to every classifier.
            arrays[node.name] = torch.randint(2, shape, generator=generator, dtype=value.dtype)
    return arrays


def deterministic() -> None:
    """As a task that says `deterministic: true`, before anything is computed on a GPU."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def measure(config: dict, device: torch.device, steps: int, seconds: float) -> dict:
    """What is printed, but for the machine."""
    task = Task(config, device)
    batches = task.batches()
    losses = [task.step(number, batches) for number in range(steps)] if task.has_losses else []
    if not all(math.isfinite(loss) for loss in losses):
        raise SystemExit(f"the losses are not finite: {losses}")
    # Which nobody has to gather any more.
    gathered = itertools.cycle(list(itertools.islice(batches, 2)))
    for number in range(WARM_UP):
        task.step(number, gathered)
    done, begun = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - begun < seconds:
        # The loss has been read: the device has done all but the optimizer.
        task.step(done, gathered)
        done += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"losses": losses, "steps_per_s": done / (time.perf_counter() - begun)}


def main() -> None:
    parser = measuring.parser("pswitch.training_loop", __doc__)
    parser.add_argument("--task", type=Path, required=True, help="the configuration, in JSON")
    parser.add_argument("--steps", type=int, default=0, help="steps whose losses are printed")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long steps are counted")
    options = parser.parse_args()
    config = json.loads(options.task.read_text())
    if config.get("deterministic", False):
        deterministic()
    with measuring.device_of(options):
        found = measure(config, options.device, options.steps, options.seconds)
    gpu = measuring.gpu_name(options.device)
    print(json.dumps({"torch": torch.__version__, "gpu": gpu, **found}))


if __name__ == "__main__":
    main()
