"""What PyTorch itself takes for a request: `python -m pswitch.pytorch_rows --device cuda:0 MODEL.pt2 ...`.

The rows that figure 5 of `pswitch bench` has beside its mechanisms, each what a user of PyTorch may do:

- `pytorch-eager`: the program with its weights on the device, operator by operator;
- `pytorch-graph`: the same as a CUDA graph; only on a GPU;
- `pytorch-copy-then-run`: weights in pinned memory, all copied to the device for each request, then operator by
  operator;
- `pytorch-stop-and-start`: a process of Python that is started for the request: from its start to the answer. Python,
  torch and, on a GPU, CUDA are loaded, the archive is read and run once. What it takes to end another process is not
  in it.

Inputs are those of case 0 in `cases.safetensors` beside the archive, in pinned memory, and outputs go there. Prints
one JSON object to standard output: for each model the latencies in milliseconds of each row, and why others are left
out. Standard error says which row is being measured.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pswitch import measuring
from pswitch.ready_latency import WARM_UP, Model, Request, latencies_ms, name_of

# What a process that was started for one request prints when it has the outputs.
ANSWERED = "answered"
# Copies ahead of those that count.
FEW = 3


class Weights:
    """The weights of a model in pinned memory, and on the device from one request to its end."""

    def __init__(self, model: Model, device: torch.device):
        self._device = device
        tensors = list(model.weights())
        on_gpu = device.type == "cuda"
        self._places = [(tensor, self._kept(tensor, on_gpu)) for tensor in tensors]

    @staticmethod
    def _kept(tensor: torch.Tensor, pinned: bool) -> torch.Tensor:
        copy = tensor.detach().to("cpu", copy=True)
        return copy.pin_memory() if pinned else copy

    def bring(self) -> None:
        for tensor, kept in self._places:
            tensor.data = kept.to(self._device, non_blocking=True, copy=True)

    def drop(self) -> None:
        for tensor, kept in self._places:
            tensor.data = torch.empty(0, dtype=kept.dtype, device=self._device)


def copy_then_run_ms(model: Model, request: Request, device: torch.device, requests: int) -> list[float]:
    """What requests take that bring all weights of the model first."""
    weights = Weights(model, device)
    times_ms = []
    for number in range(FEW + requests):
        weights.drop()
        begun = time.perf_counter_ns()
        weights.bring()
        request.eager()
        if number >= FEW:
            times_ms.append((time.perf_counter_ns() - begun) / 1e6)
    return times_ms


def stop_and_start_ms(archive: Path, device: torch.device, threads: int, starts: int) -> list[float]:
    """What it takes from the start of a Python process to its first answer.

    None is started ahead of those that count: whoever measures has run the same program before, so that torch's
    files, and the archive, have been read.
    """
    command = [sys.executable, "-m", "pswitch.pytorch_rows", "--first", "--device", str(device)]
    command += ["--threads", str(threads), str(archive)]
    times_ms = []
    for _ in range(starts):
        begun = time.perf_counter_ns()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            said = process.stdout.readline().strip()
            took_ms = (time.perf_counter_ns() - begun) / 1e6
        if said != ANSWERED or process.returncode != 0:
            raise RuntimeError(f"a process that was started for a request ended with {process.returncode}")
        times_ms.append(took_ms)
    return times_ms


class Rows:
    """What is measured of one archive."""

    def __init__(self, model: str):
        self._model = model
        self.rows: dict[str, list[float]] = {}
        self.left_out: dict[str, str] = {}

    def add(self, name: str, measured: Callable[[], list[float]]) -> None:
        """A row, or the reason why there is none."""
        print(f"{self._model}: {name} ...", file=sys.stderr, flush=True)
        try:
            self.rows[name] = measured()
        except Exception as error:  # Whatever it is, the other rows are measured.
            self.left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]


@torch.no_grad()
def measure_here(rows: Rows, archive: Path, device: torch.device, requests: int) -> None:
    """The rows of a process that is there when a request comes."""
    model = Model(archive, device)
    request = Request(model, device)
    rows.add("pytorch-eager", lambda: latencies_ms(request.eager, requests, WARM_UP))
    if device.type == "cuda":
        rows.add("pytorch-graph", lambda: latencies_ms(request.graph(), requests, WARM_UP))
    else:
        rows.left_out["pytorch-graph"] = "CUDA graphs need a GPU"
    rows.add("pytorch-copy-then-run", lambda: copy_then_run_ms(model, request, device, requests))


def measure(archive: Path, device: torch.device, options: argparse.Namespace) -> dict:
    """All rows of one archive, as they are printed."""
    rows = Rows(name_of(archive))
    measure_here(rows, archive, device, options.requests)
    # One model at a time: their weights need not fit together.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rows.add("pytorch-stop-and-start", lambda: stop_and_start_ms(archive, device, options.threads, options.starts))
    return {"rows": rows.rows, "left_out": rows.left_out}


def answer_once(archive: Path, device: torch.device) -> None:
    """All that a process does which is started for one request."""
    with torch.inference_mode():
        model = Model(archive, device)
        outputs = model([tensor.to(device) for tensor in model.inputs])
        # Also waits until they are there.
        outputs = [output.to("cpu") for output in outputs]
    print(ANSWERED, flush=True)


def main() -> None:
    parser = measuring.parser("pswitch.pytorch_rows", __doc__)
    parser.add_argument("archives", nargs="+", type=Path, metavar="MODEL.pt2", help="archives with cases beside them")
    parser.add_argument("--requests", type=int, default=90, help="requests that count, of each model and row")
    parser.add_argument("--starts", type=int, default=10, help="processes that count, of each model")
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.requests, options.starts) < 1:
        parser.error("--requests and --starts must be 1 or more")
    with measuring.device_of(options):
        if options.first:
            answer_once(options.archives[0], options.device)
            return
        archives = [path.resolve() for path in options.archives]
        models = {name_of(archive): measure(archive, options.device, options) for archive in archives}
    print(json.dumps({"torch": torch.__version__, "models": models}, indent=1))


if __name__ == "__main__":
    main()
