"""PyTorch's own latencies of models that are ready: `python -m pswitch.ready_latency --device cuda:0 MODEL.pt2 ...`.

What a request costs with nothing but PyTorch, beside which `pswitch bench switch` puts what it costs in a server. The
exported program has its weights on the device; inputs come from pinned memory and outputs go there, one request after
another. On a GPU it is run operator by operator and as a CUDA graph; on the CPU operator by operator.

Inputs are those of case 0 in `cases.safetensors` beside the archive. Prints one JSON object to standard output.
"""

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import safetensors
import torch
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from . import measuring

WARM_UP = 20


class Model:
    """A program on a device, and the arguments of one request on the CPU."""

    def __init__(self, archive: Path, device: torch.device):
        program = torch.export.load(archive)
        self.weights_bytes = weights_bytes(program)
        self._in_spec = program.call_spec.in_spec
        self._arguments = case_arguments(program, archive.parent / "cases.safetensors")
        self.inputs = [argument for argument in self._arguments if isinstance(argument, torch.Tensor)]
        if device.type == "cuda":
            enable_cudnn(program)
            allow_other_strides(program)
        self._module = move_to_device_pass(program, str(device)).module()

    def weights(self) -> list[torch.Tensor]:
        """Parameters and buffers, each once."""
        return [*self._module.parameters(), *self._module.buffers()]

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Runs the program on inputs that lie on its device, and returns the tensors that it answers with."""
        tensors = iter(inputs)
        flat = [next(tensors) if isinstance(argument, torch.Tensor) else argument for argument in self._arguments]
        args, kwargs = pytree.tree_unflatten(flat, self._in_spec)
        answer = pytree.tree_leaves(self._module(*args, **kwargs))
        return [leaf for leaf in answer if isinstance(leaf, torch.Tensor)]


def weights_bytes(program: torch.export.ExportedProgram) -> int:
    """Bytes of parameters, buffers and constants; what several names share counts once."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def case_arguments(program: torch.export.ExportedProgram, cases: Path) -> list:
    """The flattened arguments of case 0: tensors, and what was fixed at export or steers the computation as it is."""
    if not cases.exists():
        raise SystemExit(f"there is no {cases}: latencies are those of its first case")
    arguments = []
    with safetensors.safe_open(cases, "pt") as file:
        for spec in program.graph_signature.input_specs:
            if spec.kind != InputKind.USER_INPUT:
                continue
            if isinstance(spec.arg, ConstantArgument):
                arguments.append(spec.arg.value)
                continue
            tensor = file.get_tensor(f"case0.input.{spec.arg.name}")
            arguments.append(tensor if isinstance(spec.arg, TensorArgument) else tensor.item())
    return arguments


def enable_cudnn(program: torch.export.ExportedProgram) -> None:
    """Turns on what a machine without a GPU has written into the program, and what eager PyTorch on a GPU has on."""
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for place, argument in enumerate(node.target._schema.arguments):
            if argument.name == "cudnn_enabled" and place < len(node.args):
                node.update_arg(place, True)


def allow_other_strides(program: torch.export.ExportedProgram) -> None:
    """Lets views copy where a GPU's operators return other strides than those that were seen at export on a CPU."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    program.graph_module.recompile()


class Request:
    """One model's request on a device: pinned inputs, and pinned room for its outputs."""

    def __init__(self, model: Model, device: torch.device):
        self._model = model
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._inputs = [self._pinned(tensor) for tensor in model.inputs]
        self._outputs = [self._pinned(torch.empty_like(output, device="cpu")) for output in self._run()]

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if self._on_gpu else tensor

    def _run(self) -> list[torch.Tensor]:
        return self._model([tensor.to(self._device, non_blocking=True) for tensor in self._inputs])

    def _fetch(self, outputs: list[torch.Tensor]) -> None:
        for pinned, output in zip(self._outputs, outputs, strict=True):
            pinned.copy_(output, non_blocking=True)
        if self._on_gpu:
            torch.cuda.synchronize(self._device)

    def eager(self) -> None:
        """Operator by operator."""
        self._fetch(self._run())

    def graph(self) -> Callable[[], None]:
        """Captures the program, and returns what replays it."""
        static = [tensor.to(self._device) for tensor in self._inputs]
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self._model(static)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._model(static)

        def replay() -> None:
            for place, pinned in zip(static, self._inputs, strict=True):
                place.copy_(pinned, non_blocking=True)
            graph.replay()
            self._fetch(outputs)

        return replay


def latencies_ms(request: Callable[[], None], requests: int, warm_up: int) -> list[float]:
    """What so many requests take, after some that do not count."""
    times_ms = []
    for number in range(warm_up + requests):
        begun = time.perf_counter_ns()
        request()
        if number >= warm_up:
            times_ms.append((time.perf_counter_ns() - begun) / 1e6)
    return times_ms


def quantiles_ms(request: Callable[[], None], requests: int) -> dict[str, float]:
    """Quantiles of what so many requests take."""
    times_ms = latencies_ms(request, requests, WARM_UP)
    median, p99 = numpy.quantile(times_ms, [0.5, 0.99])
    figures = {"median": median, "p99": p99, "least": min(times_ms), "most": max(times_ms)}
    return {name: float(milliseconds) for name, milliseconds in figures.items()}


def measure(archive: Path, device: torch.device, requests: int) -> dict:
    """The latencies of one archive, as they are printed."""
    model = Model(archive, device)
    with torch.inference_mode():
        request = Request(model, device)
        return {
            "eager_ms": quantiles_ms(request.eager, requests),
            "graph_ms": quantiles_ms(request.graph(), requests) if device.type == "cuda" else None,
            "weights_bytes": model.weights_bytes,
        }


def name_of(archive: Path) -> str:
    """The folder's name for an archive that is called as in a repository, else its own."""
    return archive.parent.name if archive.name == "model.pt2" else archive.stem


def main() -> None:
    parser = measuring.parser("pswitch.ready_latency", __doc__)
    parser.add_argument("archives", nargs="+", type=Path, metavar="MODEL.pt2", help="archives with cases beside them")
    parser.add_argument("--requests", type=int, default=200, help="requests that count, of each model and kind")
    options = parser.parse_args()
    if options.requests < 1:
        parser.error("--requests must be 1 or more")
    models = {}
    with measuring.device_of(options):
        for archive in options.archives:
            models[name_of(archive.resolve())] = measure(archive, options.device, options.requests)
            # One model at a time: their weights need not fit together.
            gc.collect()
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
    gpu = measuring.gpu_name(options.device)
    print(json.dumps({"torch": torch.__version__, "gpu": gpu, "models": models}, indent=1))


if __name__ == "__main__":
    main()
