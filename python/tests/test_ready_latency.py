"""PyTorch's own latencies: what is printed, of which inputs, and what is refused. On the CPU; a GPU is not needed."""

import json
import sys

import pytest
import torch
from torch import nn

from pswitch import cases, export, fixture_modules, ready_latency


def write(folder, module, inputs):
    """An archive with one case beside it."""
    program = export.export_program(module, inputs)
    path = export.save_program(program, folder)
    case = cases.run_case(module.eval(), cases.input_names(program), inputs)
    cases.write_cases(folder, program, [case], {})
    return path


def printed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ready_latency", *map(str, arguments)])
    ready_latency.main()
    return json.loads(capsys.readouterr().out)


def test_each_archive_has_its_latencies(monkeypatch, capsys, tmp_path):
    norm = write(tmp_path / "norm", nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (torch.randn(2, 3),))
    two = write(tmp_path / "two", nn.Bilinear(2, 3, 1), (torch.randn(5, 2), torch.randn(5, 3)))
    two = two.rename(two.with_name("bilinear.pt2"))
    found = printed(monkeypatch, capsys, "--requests", 5, norm, two)
    assert found["torch"] == torch.__version__ and found["gpu"] is None
    assert list(found["models"]) == ["norm", "bilinear"]
    assert found["models"]["bilinear"]["weights_bytes"] == 4 * (2 * 3 + 1)
    for model in found["models"].values():
        assert model["graph_ms"] is None
        eager = model["eager_ms"]
        assert 0 < eager["least"] <= eager["median"] <= eager["p99"] <= eager["most"]


def test_arguments_that_were_fixed_at_export_stay(tmp_path):
    inputs = {"features": torch.randn(3, 5), "mode": "sum", "power": 3, "offset": 0.25, "negate": True, "mask": None}
    module = fixture_modules.FixedInputs()
    model = ready_latency.Model(write(tmp_path, module, inputs), torch.device("cpu"))
    (features,) = model.inputs
    assert torch.equal(features, inputs["features"])
    assert torch.equal(model([features])[0], module(**inputs)[0])


def test_cudnn_is_turned_on_where_it_was_exported_off():
    program = export.export_program(nn.BatchNorm1d(4), (torch.randn(2, 4),))

    def flags():
        return [node.args[-1] for node in program.graph.nodes if "batch_norm" in str(node.target)]

    (norm,) = [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    norm.update_arg(len(norm.args) - 1, False)
    ready_latency.enable_cudnn(program)
    assert flags() == [True]


def test_an_archive_without_cases_is_refused(monkeypatch, capsys, tmp_path):
    path = export.export_model(nn.Linear(4, 2), (torch.randn(1, 4),), tmp_path / "model")
    with pytest.raises(SystemExit, match=r"there is no .*cases\.safetensors"):
        printed(monkeypatch, capsys, path)
