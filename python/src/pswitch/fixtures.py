"""Fixtures of pswitch's tests: `python -m pswitch.fixtures --out target/fixtures --training target/training`.

Every fixture is a folder as `pswitch.cases` describes it. A folder made by the same scripts, the same torch and on
the same processor is left as it is: reference outputs hold for one machine, since kernels differ between processors.
`pswitch.gpu_models` makes the same folders with reference outputs of a GPU. Training programs with reference runs are
made by `pswitch.training_fixtures` and lie in a folder of their own.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import gc
import json
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from . import provenance, training_fixtures

SCRIPTS = ("cases.py", "fixture_modules.py", "fixtures.py")


@dataclasses.dataclass(frozen=True)
class Fixture:
    """How to make one folder."""

    name: str
    # Called with torch seeded; imports what it needs itself.
    source: Callable
    # (batch, sequence) of each case.
    cases: tuple[tuple[int, int], ...] = ((1, 16),)
    batch: str = "1"
    sequence: str = "16"
    # What a test may have to know: "mutable-buffer", "data-dependent", "raises", "refused", "pretrained", ...
    tags: tuple[str, ...] = ()


def from_spec(spec: str):
    def source():
        from . import sources

        return sources.resolve(spec, batch=1)

    return source


def _small(class_name: str, example: Callable, *arguments, axes=None, output_names=None, dynamic_shapes=None):
    def source():
        from . import fixture_modules, sources

        module = getattr(fixture_modules, class_name)(*arguments)
        return sources.Source(
            class_name, module, example, axes=axes, output_names=output_names, dynamic_shapes=dynamic_shapes
        )

    return source


def _normal(*shape, dtype="float32"):
    """An input of normally distributed numbers; `None` in the shape is the batch, `...` the sequence."""

    def make(sizes, generator):
        import torch

        numbers = [sizes.batch if n is None else sizes.sequence if n is ... else n for n in shape]
        return torch.randn(numbers, generator=generator).to(getattr(torch, dtype))

    return make


def _integers(low, high, *shape):
    def make(sizes, generator):
        import torch

        numbers = [sizes.batch if n is None else sizes.sequence if n is ... else n for n in shape]
        # Sizes of 100 and more ask for an index beyond the end.
        values = torch.randint(low, high, numbers, generator=generator)
        if sizes.sequence >= 100:
            values.flatten()[-1] = sizes.sequence
        return values

    return make


def _named(**makers):
    def example(sizes, generator):
        return {name: make(sizes, generator) if callable(make) else make for name, make in makers.items()}

    return example


def _low_precision(dtype: str):
    def source():
        import torch

        return _small("LowPrecision", _named(features=_normal(None, 32, dtype=dtype)), getattr(torch, dtype))()

    return source


def _symbolic_arithmetic():
    from torch.export import Dim

    shapes = {"sequence": {0: Dim("batch", min=1, max=8), 1: 2 * Dim("half", min=2, max=20)}}
    return _small("SymbolicArithmetic", _named(sequence=_normal(None, ..., 6)), dynamic_shapes=shapes)()


BATCH = {0: "batch"}

FIXTURES = (
    Fixture("resnet18", from_spec("torchvision:resnet18"), cases=((2, 1),), batch="2"),
    Fixture("resnet18-dynamic", from_spec("torchvision:resnet18"), cases=((1, 1), (2, 1), (5, 1)), batch="1:8"),
    Fixture("resnet152", from_spec("torchvision:resnet152")),
    Fixture("inception_v3", from_spec("torchvision:inception_v3")),
    Fixture("mobilenet_v3_small", from_spec("torchvision:mobilenet_v3_small"), cases=((2, 1),), batch="2"),
    Fixture("efficientnet-lite0", from_spec("pretrained:efficientnet-lite0"), tags=("pretrained",)),
    Fixture("vit_b_16", from_spec("torchvision:vit_b_16")),
    Fixture("swin_t", from_spec("torchvision:swin_t")),
    Fixture("bert-2-layers", from_spec("hf-config:bert-2-layers"), cases=((2, 24),), batch="2", sequence="24"),
    Fixture(
        "bert-dynamic",
        from_spec("hf-config:bert,num_hidden_layers=2,hidden_size=128,num_attention_heads=4,vocab_size=1000"),
        cases=((1, 7), (3, 20), (8, 64)),
        batch="1:8",
        sequence="2:64",
    ),
    Fixture("bert-base", from_spec("hf-config:bert-base"), cases=((1, 32),), sequence="32"),
    Fixture(
        "all-minilm-l6-v2",
        from_spec("pretrained:all-minilm-l6-v2"),
        cases=((2, 24), (3, 9)),
        batch="1:8",
        sequence="2:64",
        tags=("pretrained",),
    ),
    Fixture("gpt2", from_spec("hf-config:gpt2-4-layers"), cases=((2, 20),), batch="2", sequence="20"),
    Fixture(
        "two-in-three-out",
        _small(
            "TwoInThreeOut",
            _named(image_features=_normal(None, 16), text_features=_normal(None, 8)),
            axes={"image_features": BATCH, "text_features": BATCH},
        ),
        cases=((3, 1), (1, 1)),
        batch="1:16",
    ),
    Fixture(
        "dynamic-batch",
        _small("SmallConvolution", _named(image=_normal(None, 3, 20, 20)), axes={"image": BATCH}),
        cases=((1, 1), (2, 1), (7, 1)),
        batch="1:8",
    ),
    Fixture(
        "integer-outputs",
        _small("IntegerOutputs", _named(features=_normal(None, 12)), axes={"features": BATCH}),
        cases=((4, 1), (2, 1)),
        batch="1:8",
    ),
    Fixture("bfloat16", _low_precision("bfloat16"), cases=((3, 1),), batch="3"),
    Fixture("float16", _low_precision("float16"), cases=((3, 1),), batch="3"),
    Fixture(
        "symbolic-arithmetic",
        _symbolic_arithmetic,
        cases=((2, 8), (1, 4), (4, 30)),
        batch="4",
        sequence="16",
        tags=("symint-output",),
    ),
    Fixture("in-place", _small("InPlace", _named(features=_normal(6, 10)))),
    Fixture(
        "constants",
        _small("Constants", _named(signal=_normal(None, 9)), output_names=("picked", "mixed", "rounded", "table")),
        cases=((4, 1),),
        batch="4",
    ),
    Fixture(
        "fixed-inputs",
        _small(
            "FixedInputs",
            _named(
                features=_normal(None, 5),
                mode="sum",
                power=3,
                offset=0.25,
                negate=True,
                mask=None,
            ),
        ),
        cases=((3, 1),),
        batch="3",
        tags=("fixed-inputs", "constant-output", "input-output"),
    ),
    Fixture(
        "lookup",
        _small("Lookup", _named(ids=_integers(0, 20, 4), positions=_integers(-11, 11, 3))),
        cases=((1, 1), (1, 100), (1, 2)),
        tags=("raises",),
    ),
    Fixture("lists", _small("Lists", _named(features=_normal(3, 12), index=_integers(0, 3, 4)))),
    Fixture(
        "mutable-buffer",
        _small("Counter", _named(features=_normal(None, 4))),
        cases=((2, 1), (2, 2), (2, 3)),
        batch="2",
        tags=("mutable-buffer",),
    ),
    Fixture("writes-chunk", _small("WritesChunk", _named(features=_normal(2, 4))), tags=("mutable-buffer",)),
    Fixture(
        "writes-through-dropout",
        _small("WritesThroughDropout", _named(features=_normal(2, 4))),
        tags=("mutable-buffer",),
    ),
    Fixture("odd-weights", _small("OddWeights", _named(ids=_integers(0, 13, 3)))),
    Fixture("recurrent", _small("Recurrent", _named(sequence=_normal(2, 9, 6)))),
    Fixture(
        "data-dependent",
        _small("DataDependent", _named(features=_normal(6, 4), length=_integers(1, 6))),
        cases=((1, 1), (1, 2)),
        tags=("data-dependent", "symint-output"),
    ),
    Fixture("spectrum", _small("Spectrum", _named(signal=_normal(2, 32)))),
    Fixture("conditional", _small("Conditional", _named(features=_normal(3, 4))), tags=("refused",)),
)


def key(*facts: str) -> str:
    """What makes a folder current; `facts` are those that the fixture itself does not tell."""
    return provenance.key(SCRIPTS, provenance.processor(), *facts)


def is_current(folder: Path, wanted: str) -> bool:
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["key"] == wanted
    except (OSError, ValueError, KeyError):
        return False


def make(fixture: Fixture, folder: Path, wanted: str, verify: bool, device: str = "cpu") -> None:
    """Writes one fixture anew: the archive from the CPU, the answers from `device`."""
    import torch
    from torch.export.passes import move_to_device_pass

    from . import cases, export, sources

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    source = fixture.source()
    if "pretrained" not in fixture.tags:
        cases.vary_constants(source.module, torch.Generator().manual_seed(1))
    batch, sequence = sources.Range.parse(fixture.batch), sources.Range.parse(fixture.sequence)
    traced = sources.Sizes(batch.example(), sequence.example(dynamic=16))
    example = source.example(traced, torch.Generator().manual_seed(2))
    shapes = sources.dynamic_shapes(source, example, batch, sequence)
    source.module.eval()
    facts = {"name": fixture.name, "key": wanted, "tags": list(fixture.tags)}
    if "refused" in fixture.tags:
        with torch.no_grad():
            program = torch.export.export(source.module, *export.split(example), strict=False)
        export.save_program(program, folder)
        cases.write_cases(folder, program, [], facts, device)
        return
    program = export.export_program(source.module, example, shapes, source.output_names)
    # Written before the module runs: the program shares its buffers.
    path = export.save_program(program, folder)
    calls = [
        source.example(sources.Sizes(*sizes), torch.Generator().manual_seed(100 + i))
        for i, sizes in enumerate(fixture.cases)
    ]
    names = cases.input_names(program)
    raised = errors(source.module, names, calls) if "raises" in fixture.tags and device != "cpu" else {}
    source.module.to(device)
    answers = [
        raised.get(i) or cases.run_case(source.module, names, inputs, device) for i, inputs in enumerate(calls)
    ]
    check(fixture, answers)
    if verify:
        exported = move_to_device_pass(torch.export.load(path), device).module()
        for i, (inputs, answer) in enumerate(zip(calls, answers, strict=True)):
            if i not in raised and not cases.same_bits(cases.run_case(exported, names, inputs, device), answer):
                raise AssertionError(f"{fixture.name}: the exported program answers case {i} differently")
    cases.write_cases(folder, program, answers, facts, device)


def errors(module, names: list[str | None], calls: list) -> dict:
    """Answers of `module` on the CPU that are errors, by position: they would cost a process its GPU."""
    from . import cases

    answers = {i: cases.run_case(module, names, inputs) for i, inputs in enumerate(calls)}
    return {i: answer for i, answer in answers.items() if answer.raises is not None}


def check(fixture: Fixture, answers) -> None:
    """A case that is not finite or says the same everywhere would prove nothing."""
    for i, answer in enumerate(answers):
        if answer.raises is not None and "raises" not in fixture.tags:
            raise AssertionError(f"{fixture.name}: case {i} raises {answer.raises}")
        for index, value in answer.outputs.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise AssertionError(f"{fixture.name}: output {index} of case {i} is not finite")
            if value.is_floating_point() and value.numel() > 1 and bool((value == value.flatten()[0]).all()):
                raise AssertionError(f"{fixture.name}: output {index} of case {i} is constant")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pswitch.fixtures", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the fixtures")
    parser.add_argument("--training", type=Path, help="folder of the training fixtures (default: none are made)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these only")
    parser.add_argument("--force", action="store_true", help="make them anew whatever is there")
    parser.add_argument("--verify", action="store_true", help="run the exported programs in Python too")
    options = parser.parse_args()
    training = training_fixtures.FIXTURES if options.training else ()
    names = sorted({fixture.name for fixture in (*FIXTURES, *training)})
    unknown = set(options.only or ()) - set(names)
    if unknown:
        parser.error(f"there is no fixture {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    warnings.simplefilter("ignore", UserWarning)
    status = make_all("fixtures", options.out, FIXTURES, key(), make, options)
    if options.training:
        wanted = training_fixtures.key()
        status |= make_all("training", options.training, training, wanted, training_fixtures.make, options)
    return status


def make_all(what: str, out: Path, known: tuple, wanted: str, make: Callable, options: argparse.Namespace) -> int:
    """Brings the folder `out` of the `known` fixtures up to date, and returns the exit status."""
    started = time.monotonic()
    chosen = [fixture for fixture in known if not options.only or fixture.name in options.only]
    with locked(out):
        making = functools.partial(make, wanted=wanted, verify=options.verify)
        made, failed = update(out, chosen, wanted, making, force=options.force)
        if not options.only:
            keep_only_known(out, known, wanted)
    return report(what, len(chosen), made, failed, started)


def report(what: str, count: int, made: int, failed: list[str], started: float) -> int:
    """Prints what came of it, and returns the exit status."""
    current = count - made - len(failed)
    print(f"{what}: {made} made, {current} current, {time.monotonic() - started:.1f} s")
    if failed:
        print(f"{what}: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def locked(out: Path):
    """Keeps the folder to one process: test programs that start together ask for the fixtures together."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def update(
    out: Path, chosen: Iterable, wanted: str, make: Callable[..., None], *, force: bool
) -> tuple[int, list[str]]:
    """Has `make` write the folders of fixtures that are missing or out of date; returns how many were made and the
    names of those that failed."""
    made, failed = 0, []
    for fixture in chosen:
        folder = out / fixture.name
        if is_current(folder, wanted) and not force:
            continue
        begun = time.monotonic()
        try:
            make(fixture, folder)
            made += 1
            print(f"{fixture.name}: {time.monotonic() - begun:.1f} s", flush=True)
        except Exception:  # whatever it is, the others can be made
            failed.append(fixture.name)
            shutil.rmtree(folder, ignore_errors=True)
            print(f"{fixture.name}: FAILED", file=sys.stderr, flush=True)
            traceback.print_exc()
        # Modules are full of cycles, and the next one may need the memory.
        gc.collect()
    return made, failed


def keep_only_known(out: Path, known: tuple, wanted: str) -> None:
    """Removes folders of fixtures that are no more, and writes the index."""
    names = {fixture.name for fixture in known}
    for folder in out.iterdir():
        if folder.is_dir() and folder.name not in names:
            shutil.rmtree(folder)
    index = {"key": wanted, "fixtures": [{"name": f.name, "tags": list(f.tags)} for f in known]}
    (out / "manifest.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
