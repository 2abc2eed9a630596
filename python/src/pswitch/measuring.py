"""What the modules that measure PyTorch have in common: flags for the device and its threads, and what they do."""

import argparse
import contextlib
import warnings
from collections.abc import Iterator

import torch


def parser(module: str, about: str) -> argparse.ArgumentParser:
    """A parser with the flags that say where is measured."""
    flags = argparse.ArgumentParser(prog=f"python -m {module}", description=about.splitlines()[0])
    flags.add_argument(
        "--device", type=torch.device, default=torch.device("cpu"), help="as in cuda:0; cpu by default"
    )
    flags.add_argument(
        "--threads", type=int, default=0, help="threads of an operator on the CPU; 0 leaves it to torch"
    )
    return flags


@contextlib.contextmanager
def device_of(options: argparse.Namespace) -> Iterator[None]:
    """Computes where the flags say, without warnings that nobody can do anything about."""
    warnings.simplefilter("ignore", UserWarning)
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    with torch.cuda.device(options.device) if options.device.type == "cuda" else contextlib.nullcontext():
        yield


def gpu_name(device: torch.device) -> str | None:
    """The GPU's name; none for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
