"""Training programs for pswitch's tests, each a folder as `pswitch.training_reference` describes it.

`python -m pswitch.fixtures --training FOLDER` makes them, and leaves what the same scripts made with the same torch
on the same processor.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from . import provenance

SCRIPTS = ("cases.py", "fixture_modules.py", "training.py", "training_fixtures.py", "training_reference.py")
ALL_RUNS = ("sgd", "nesterov", "adam", "adamw", "clip-accumulate")


@dataclasses.dataclass(frozen=True)
class TrainingFixture:
    """How to make one folder."""

    name: str
    # Returns a module that returns its loss, and the rows of its inputs. Called with torch seeded.
    source: Callable
    batch_size: int
    # Smallest and largest batch of a program that takes several sizes.
    batches: tuple[int, int] | None = None
    # The runs whose final states are kept.
    finals: tuple[str, ...] = ALL_RUNS
    # What a test may have to know: "batch-norm", "dropout", "partial-batch",
    # "shared-weights".
    tags: tuple[str, ...] = ()


def perceptron():
    import torch

    from . import fixture_modules

    data = {"features": torch.randn(23, 7), "labels": torch.randint(3, (23,))}
    return fixture_modules.Perceptron(), data


def resnet18():
    import torch
    import torchvision

    from . import fixture_modules

    data = {"images": torch.randn(160, 3, 48, 48), "labels": torch.randint(10, (160,))}
    return fixture_modules.PictureClassifier(torchvision.models.resnet18(num_classes=10)), data


def bert():
    import torch

    from . import sources, transformers_source

    sizes = "num_hidden_layers=2,hidden_size=128,num_attention_heads=2,intermediate_size=512,vocab_size=1000"
    source = transformers_source.config_source(f"bert,{sizes}", "sequence-classification", ("input_ids",))
    source = transformers_source.with_labels(source)
    return source.module, source.example(sources.Sizes(160, 24), torch.Generator().manual_seed(1))


def tied():
    import torch

    from . import fixture_modules

    data = {"tokens": torch.randint(11, (23, 5)), "labels": torch.randint(11, (23, 5))}
    return fixture_modules.TiedTagger(), data


FIXTURES = (
    TrainingFixture("resnet18", resnet18, batch_size=8, finals=("sgd", "adamw"), tags=("batch-norm",)),
    TrainingFixture("bert-2-layers", bert, batch_size=8, tags=("dropout",)),
    TrainingFixture(
        "perceptron",
        perceptron,
        batch_size=5,
        batches=(2, 64),
        tags=("batch-norm", "dropout", "partial-batch"),
    ),
    TrainingFixture("tied", tied, batch_size=5, batches=(2, 64), tags=("partial-batch", "shared-weights")),
)


def key() -> str:
    """What makes a folder current."""
    return provenance.key(SCRIPTS, provenance.processor())


def make(fixture: TrainingFixture, folder: Path, wanted: str, verify: bool) -> None:
    """Writes one fixture anew; `verify` has the exported program train too."""
    import torch
    from torch.export import Dim

    from . import export, training, training_reference

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    module, data = fixture.source()
    shapes = None
    if fixture.batches is not None:
        size = Dim("batch", min=fixture.batches[0], max=fixture.batches[1])
        shapes = {name: {0: size} for name in data}
    example = training_reference.batch(data, fixture.batch_size, 0)
    program = training.export_training_program(module, example, shapes)
    # Written before the module trains: the program shares its parameters.
    path = export.save_program(program, folder)
    answers = training_reference.reference(module, data, fixture.batch_size)
    if verify:
        for run in training_reference.RUNS:
            training_reference.check_exported(path, data, fixture.batch_size, run, answers[run.name])
    facts = {"name": fixture.name, "key": wanted, "tags": list(fixture.tags)}
    training_reference.write(folder, program, module, data, fixture.batch_size, answers, fixture.finals, facts)
