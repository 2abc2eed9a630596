"""Measures the profiles in this folder, on a machine with an NVIDIA GPU, PyTorch, torchvision and transformers.

    python3 measure.py OUTPUT_FOLDER

A layer is an operator of the exported program. Each is captured alone, many times over, in a CUDA graph; the time of a
replay divided by the number of copies is what the operator takes in a graph, launch gap included. Its bytes are those of
the weights that it is the first to use, at 512-byte boundaries. The link's costs are those of PCIe 5 x16 under an H200,
measured apart, with two processes: Python is too slow to enqueue small copies as fast as they are done.
"""

import pathlib
import statistics
import sys

import torch

COPIES_IN_GRAPH = 20
REPLAYS = 9
LINK = "{bandwidth_bytes_per_s: 55.5e9, per_copy_us: 2.5, per_wait_us: 2.7}"


def models():
    import torchvision
    import transformers

    torch.manual_seed(0)
    yield "resnet152", torchvision.models.resnet152(), (torch.randn(8, 3, 224, 224),)
    inception = torchvision.models.inception_v3(weights=None, init_weights=False)
    yield "inception_v3", inception, (torch.randn(8, 3, 299, 299),)
    bert = transformers.BertModel(transformers.BertConfig())
    yield "bert_base", bert, (torch.randint(0, 30000, (8, 251)), torch.ones(8, 251, dtype=torch.int64))


def aligned(bytes_):
    return (bytes_ + 511) // 512 * 512


class Measure(torch.fx.Interpreter):
    """Runs a program operator by operator; `layers` gets name, bytes and microseconds of each."""

    def __init__(self, module, seconds):
        super().__init__(module)
        self.seconds = seconds
        self.layers = []
        self.seen = set()

    def run_node(self, node):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return super().run_node(node)
        with self._set_current_node(node):
            args, kwargs = self.fetch_args_kwargs_from_env(node)
        bytes_ = 0
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                storage = self.env[source].untyped_storage()
                if storage.data_ptr() not in self.seen:
                    self.seen.add(storage.data_ptr())
                    bytes_ += aligned(storage.nbytes())
        us = self.seconds(lambda: node.target(*args, **kwargs)) * 1e6
        self.layers.append((node.name, bytes_, us))
        return node.target(*args, **kwargs)


def graph_seconds(operator):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        operator()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(COPIES_IN_GRAPH):
            operator()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / COPIES_IN_GRAPH)
    return statistics.median(times)


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda")
    for name, model, inputs in models():
        with torch.no_grad():
            program = torch.export.export(model.eval().to(device), tuple(tensor.to(device) for tensor in inputs))
            measure = Measure(program.module(), graph_seconds)
            measure.run(*(tensor.to(device) for tensor in inputs))
        total_bytes = sum(bytes_ for _, bytes_, _ in measure.layers)
        total_us = sum(us for _, _, us in measure.layers)
        with open(folder / f"{name}.yaml", "w") as file:
            print(f"# Measured by measure.py on one {torch.cuda.get_device_name()}, PyTorch {torch.__version__},", file=file)
            print(f"# batch 8, fp32: {len(measure.layers)} layers, {total_bytes} bytes, {total_us:.0f} us.", file=file)
            print(f"model: {name}", file=file)
            print(f"link: {LINK}", file=file)
            print("layers:", file=file)
            for layer, bytes_, us in measure.layers:
                print(f"  - {{name: {layer}, bytes: {bytes_}, compute_us: {us:.2f}}}", file=file)
        print(f"{name}: {len(measure.layers)} layers, {total_bytes} bytes, {total_us:.0f} us")


if __name__ == "__main__":
    main()
