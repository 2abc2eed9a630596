"""Models with reference outputs of a GPU: `python -m pswitch.gpu_models --out models`.

The four models of pswitch's measurements, exported on the CPU with seeded random weights, each a folder as
`pswitch.cases` describes it. What the outputs must be is computed by eager PyTorch on `--device`, with PyTorch's
default flags. With `--fixtures` the same is done for the list of `pswitch.fixtures`. What is current is left.
"""

import argparse
import contextlib
import functools
import subprocess
import sys
import time
import warnings
from pathlib import Path

from . import fixtures, provenance
from .fixtures import Fixture, from_spec

BERT_TOKENS = 251


def bert():
    """BERT-base with the inputs of the paper: tokens and segments, without a mask."""
    from . import transformers_source

    return transformers_source.config_source("bert-base", None, ("input_ids", "token_type_ids"))


def models(batch: int) -> list[Fixture]:
    """Two cases each: an answer that was left over from the other input is a wrong one."""

    def model(name: str, source, sequence: int = 1) -> Fixture:
        return Fixture(name, source, cases=((batch, sequence),) * 2, batch=str(batch), sequence=str(sequence))

    return [
        model("resnet152", from_spec("torchvision:resnet152")),
        model("inception_v3", from_spec("torchvision:inception_v3")),
        model("bert-base", bert, BERT_TOKENS),
        model("vit_l_16", from_spec("torchvision:vit_l_16")),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pswitch.gpu_models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="these only")
    parser.add_argument("--out", type=Path, required=True, help="folder of the models")
    parser.add_argument("--batch", type=int, default=8, help="batch size of the models (default: 8)")
    parser.add_argument("--device", default="cuda", help="where eager PyTorch computes: cuda, cuda:N or cpu")
    parser.add_argument(
        "--fixtures", action="store_true", help="make the fixtures of the tests instead of the models"
    )
    parser.add_argument("--force", action="store_true", help="make them anew whatever is there")
    parser.add_argument("--verify", action="store_true", help="run the exported programs in Python on the device too")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="make N at a time (default: 1)")
    # For the processes of --jobs: the one that started them holds the lock.
    parser.add_argument("--locked", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batch < 1 or options.jobs < 1:
        parser.error("--batch and --jobs are at least 1")
    known = fixtures.FIXTURES if options.fixtures else models(options.batch)
    unknown = set(options.names) - {fixture.name for fixture in known}
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(f.name for f in known)}")
    device_name = name_of_device(parser, options.device)
    warnings.simplefilter("ignore", UserWarning)
    started = time.monotonic()
    chosen = [fixture for fixture in known if is_chosen(fixture, options.names)]
    if options.fixtures:
        wanted = fixtures.key(device_name)
    else:
        scripts = (*fixtures.SCRIPTS, "gpu_models.py")
        wanted = provenance.key(scripts, provenance.processor(), device_name, f"batch {options.batch}")
    with contextlib.nullcontext() if options.locked else fixtures.locked(options.out):
        if options.jobs > 1:
            return in_parallel(options, [fixture.name for fixture in chosen])
        making = functools.partial(fixtures.make, wanted=wanted, verify=options.verify, device=options.device)
        made, failed = fixtures.update(options.out, chosen, wanted, making, force=options.force)
    return fixtures.report(device_name, len(chosen), made, failed, started)


def in_parallel(options: argparse.Namespace, names: list[str]) -> int:
    """Has several processes make the models: one by one, most of the time goes to one core."""
    command = [sys.executable, "-m", "pswitch.gpu_models", "--locked", "--out", str(options.out)]
    command += ["--device", options.device, "--batch", str(options.batch)]
    command += [f"--{flag}" for flag in ("fixtures", "force", "verify") if getattr(options, flag)]
    jobs = min(options.jobs, len(names))
    children = [subprocess.Popen([*command, *names[start::jobs]]) for start in range(jobs)]
    # Of all, also when one has failed.
    return max([child.wait() for child in children], default=0)


def is_chosen(fixture: Fixture, names: list[str]) -> bool:
    """Weights that come in packages of their own are used only where they are asked for: a machine may lack them."""
    return fixture.name in names if names else "pretrained" not in fixture.tags


def name_of_device(parser: argparse.ArgumentParser, device: str) -> str:
    """What reference outputs of the device are recorded under; ends the program if there is no such device."""
    # torch takes seconds to import: not for --help.
    import torch

    from . import cases

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        parser.error(f"--device {device}: {error}")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {device}: PyTorch finds no GPU here")
    return cases.device_name(device)


if __name__ == "__main__":
    sys.exit(main())
