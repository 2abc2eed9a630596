"""PyTorch's own training loop: the losses that are printed, and what is made up. On the CPU; a GPU is not needed."""

import json
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from pswitch import training, training_loop, training_reference


@pytest.fixture
def program(tmp_path):
    """A perceptron with its loss, and rows that do not fill their last batch."""
    torch.manual_seed(3)
    module = training.WithLoss(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "cross-entropy", ("input",)
    )
    data = {"input": torch.randn(7, 4), "labels": torch.randint(3, (7,))}
    safetensors.torch.save_file(data, tmp_path / "data.safetensors")
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"input": {0: batch}, "labels": {0: batch}}
    example = {name: values[:3] for name, values in data.items()}
    training.export_training_model(module, example, tmp_path, shapes)
    return tmp_path, module, data


def printed(monkeypatch, capsys, folder, config, *arguments):
    task = folder / "task.json"
    task.write_text(json.dumps({"program": str(folder), **config}))
    monkeypatch.setattr(sys, "argv", ["training_loop", "--task", str(task), "--seconds", "0", *map(str, arguments)])
    training_loop.main()
    return json.loads(capsys.readouterr().out)


def test_losses_are_those_of_the_module(monkeypatch, capsys, program):
    folder, module, data = program
    run = training_reference.Run("adamw", "AdamW", {"lr": 0.01}, micro_batches=2, max_norm=0.5)
    monkeypatch.setattr(training_reference, "STEPS", 6)
    expected = training_reference.train(module, data, 3, run).tolist()
    config = {
        "optimizer": {"kind": "adamw", "lr": 0.01},
        "data": {"files": [str(folder / "data.safetensors")], "batch_size": 3, "shuffle": False},
        "seed": training_reference.SEED,
        "accumulate": 2,
        "clip_norm": 0.5,
    }
    found = printed(monkeypatch, capsys, folder, config, "--steps", 6)
    # Means of two are taken in double precision here.
    assert torch.tensor(found["losses"]).tolist() == expected
    assert found["steps_per_s"] > 0 and found["gpu"] is None and found["torch"] == torch.__version__


def test_data_that_are_made_up_have_no_losses(monkeypatch, capsys, program):
    folder, _, _ = program
    config = {"optimizer": {"kind": "sgd", "lr": 0.1}, "data": {"synthetic": {"rows": 100, "batch_size": 5}}}
    found = printed(monkeypatch, capsys, folder, config, "--steps", 6)
    assert found["losses"] == [] and found["steps_per_s"] > 0


def test_rows_that_are_shuffled_have_no_losses(monkeypatch, capsys, program):
    folder, _, _ = program
    files = [str(folder / "data.safetensors")]
    config = {"optimizer": {"kind": "sgd", "lr": 0.1}, "data": {"files": files, "batch_size": 2}}
    assert printed(monkeypatch, capsys, folder, config, "--steps", 6)["losses"] == []


def test_other_files_are_refused(monkeypatch, capsys, program):
    folder, _, _ = program
    config = {"optimizer": {"kind": "sgd", "lr": 0.1}, "data": {"files": ["x.npy"], "batch_size": 2}}
    with pytest.raises(SystemExit, match=r"x\.npy.*safetensors"):
        printed(monkeypatch, capsys, folder, config)
