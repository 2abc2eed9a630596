"""`pswitch-export`: writes models into a repository that `pswitch serve` loads."""

import argparse
import os
import sys
import time
from pathlib import Path

from . import __version__
from .errors import ExportError

EXAMPLES = """\
examples:
  pswitch-export torchvision:resnet152 --batch 1:32 --out models/
  pswitch-export torchvision:resnet18 --weights resnet18.safetensors --name classifier --out models/
  pswitch-export hf-config:bert-base --batch 8 --seq-len 251 --out models/
  pswitch-export hf-config:gpt2,n_layer=4 --batch 1:8 --seq-len 2:128 --out models/
  pswitch-export hf-config:my-model/config.json --head sequence-classification --out models/
  pswitch-export pretrained:all-minilm-l6-v2 --batch 1:32 --seq-len 2:256 --out models/
  pswitch-export my_package.my_module:build --batch 1:16 --out models/
  pswitch-export --train torchvision:resnet50 --loss cross-entropy --batch 64 --out training/
  pswitch-export --train hf-config:bert-base --head sequence-classification --batch 16 --out training/
  pswitch-export torchvision:resnet50 --weights checkpoints/pictures/step-00045000.safetensors --out models/

Models of torchvision and hf-config have random weights unless --weights names a state dictionary, .safetensors or
.pth, or a checkpoint of a training task. `module:function` returns (module, example inputs) or (module, example
inputs, dynamic shapes as torch.export takes them); it gets `batch=N` if it has such a parameter.

--train writes a training program: the module in training mode, which takes a batch with the answers that it should
give and returns the loss. A transformers model computes its loss from `labels`, and the module of a `module:function`
may do so too; --loss puts a loss behind any other model and adds the input `labels` (cross-entropy) or `targets`
(mse). Batch norm over rows needs two of them at least: --batch 2:MAX.
"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pswitch-export",
        description="Exports PyTorch models as NAME/model.pt2 for the pswitch server.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", help="torchvision:NAME, hf-config:NAME|FILE.json, pretrained:NAME or module:function"
    )
    parser.add_argument("--out", type=Path, default=Path("models"), help="the repository (default: models)")
    parser.add_argument("--name", help="the model's name in the repository (default: taken from MODEL)")
    parser.add_argument("--batch", default="1", help="batch size N, or MIN:MAX for a dynamic one (default: 1)")
    parser.add_argument("--example-batch", type=int, help="batch size to trace with (default: 4 if MIN:MAX)")
    parser.add_argument("--seq-len", default="128", help="sequence length N or MIN:MAX of text (default: 128)")
    parser.add_argument("--head", help="head of an hf-config model: causal-lm, masked-lm, ..., none")
    parser.add_argument("--weights", type=Path, help="state dictionary or training checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="convert the model")
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights (default: 0)")
    parser.add_argument("--output-names", help="names of the outputs, separated by commas")
    parser.add_argument("--train", action="store_true", help="export a training program, which returns the loss")
    parser.add_argument("--loss", choices=("cross-entropy", "mse"), help="the loss, if MODEL does not return its own")
    parser.add_argument("--version", action="version", version=f"pswitch {__version__}")
    return parser


def run(options: argparse.Namespace) -> Path:
    # torch takes seconds to import: not for --help.
    import torch

    from . import export, sources, training, weights

    batch, sequence = sources.Range.parse(options.batch), sources.Range.parse(options.seq_len)
    sizes = sources.Sizes(batch.example(options.example_batch), sequence.example(dynamic=16))
    if options.head is not None:
        check_head(options)
    if options.loss is not None:
        check_loss(options)
    torch.manual_seed(options.seed)
    source = sources.resolve(options.model, sizes.batch, options.head)
    if source.fixed_inputs and batch.is_fixed and batch.minimum != 1:
        raise ExportError("--batch N needs a function with a parameter named 'batch'")
    if source.dynamic_shapes is not None and not batch.is_fixed:
        raise ExportError("the function returned dynamic shapes itself: leave --batch MIN:MAX out")
    if options.weights is not None:
        weights.load_weights(source.module, options.weights)
    if options.train and options.model.startswith("hf-config:"):
        from . import transformers_source

        source = transformers_source.with_labels(source)
    generator = torch.Generator().manual_seed(options.seed)
    inputs = source.example(sizes, generator)
    if options.loss is not None:
        source, inputs = training.with_loss(source, inputs, options.loss, generator)
    if options.dtype is not None:
        dtype = getattr(torch, options.dtype)
        source.module.to(dtype)
        inputs = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, inputs
        )
    names = tuple(options.output_names.split(",")) if options.output_names else None
    shapes = sources.dynamic_shapes(source, inputs, batch, sequence)
    folder = options.out / (options.name or source.name)
    if options.train:
        return training.export_training_model(source.module, inputs, folder, shapes, names)
    return export.export_model(source.module, inputs, folder, shapes, names or source.output_names)


def check_head(options: argparse.Namespace) -> None:
    from .transformers_source import HEADS

    if not options.model.startswith("hf-config:") or options.head not in HEADS:
        raise ExportError(f"--head goes with hf-config and is one of {', '.join(HEADS)}")


def check_loss(options: argparse.Namespace) -> None:
    if not options.train:
        raise ExportError("--loss goes with --train")
    if options.model.startswith("hf-config:"):
        raise ExportError("models of transformers compute their loss from 'labels': leave --loss out")


def main() -> int:
    options = parser().parse_args()
    started = time.monotonic()
    try:
        path = run(options)
    except ExportError as error:
        print(f"pswitch-export: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        # What torch.export says about a model it cannot trace is long; its first paragraph names the cause.
        if os.environ.get("PSWITCH_DEBUG"):
            raise
        cause = str(error).strip().split("\n\n")[0]
        print(
            f"pswitch-export: {options.model} cannot be exported: {type(error).__name__}: {cause}",
            file=sys.stderr,
        )
        print("pswitch-export: PSWITCH_DEBUG=1 prints the whole traceback", file=sys.stderr)
        return 1
    megabytes = path.stat().st_size / 1e6
    print(f"{path}: {megabytes:.1f} MB in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
