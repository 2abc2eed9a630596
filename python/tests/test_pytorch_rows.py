"""The rows that figures have of PyTorch itself: what is printed, and that weights come and go. On the CPU."""

import json
import sys

import pytest
import torch
from test_ready_latency import write
from torch import nn

from pswitch import pytorch_rows, ready_latency


@pytest.fixture
def archive(tmp_path):
    return write(tmp_path / "norm", nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (torch.randn(2, 3),))


def printed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["pytorch_rows", *map(str, arguments)])
    pytorch_rows.main()
    return json.loads(capsys.readouterr().out)


def test_every_row_is_measured_or_left_out_with_its_reason(monkeypatch, capsys, archive):
    found = printed(monkeypatch, capsys, "--requests", 5, "--starts", 1, "--threads", 1, archive)
    assert found["torch"] == torch.__version__
    model = found["models"]["norm"]
    counts = {name: len(latencies) for name, latencies in model["rows"].items()}
    assert counts == {"pytorch-eager": 5, "pytorch-copy-then-run": 5, "pytorch-stop-and-start": 1}
    assert model["left_out"] == {"pytorch-graph": "CUDA graphs need a GPU"}
    # It imports torch.
    assert model["rows"]["pytorch-stop-and-start"][0] > 100 > model["rows"]["pytorch-eager"][0] > 0


def test_weights_come_back_as_they_were(archive):
    model = ready_latency.Model(archive, torch.device("cpu"))
    with torch.no_grad():
        expected = model(model.inputs)[0].clone()
        weights = pytorch_rows.Weights(model, torch.device("cpu"))
        weights.drop()
        assert all(tensor.numel() == 0 for tensor in model.weights())
        weights.bring()
        assert torch.equal(model(model.inputs)[0], expected)


def test_a_process_that_fails_leaves_its_row_out(monkeypatch, capsys, archive):
    monkeypatch.setattr(pytorch_rows, "ANSWERED", "something else")
    found = printed(monkeypatch, capsys, "--requests", 1, "--starts", 1, archive)
    model = found["models"]["norm"]
    assert "pytorch-stop-and-start" not in model["rows"]
    assert "started for a request" in model["left_out"]["pytorch-stop-and-start"]
