"""Where models come from, and the command line over it."""

import json
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from pswitch import cases, cli, sources
from pswitch.errors import ExportError
from pswitch.sources import Range, Sizes

TINY_BERT = (
    "hf-config:bert,num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=64,vocab_size=99"
)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["pswitch-export", *map(str, arguments)])
    status = cli.main()
    return status, capsys.readouterr().err


def load(path):
    return torch.export.load(path)


def build(batch=2):
    """What users hand over as module:function."""
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU()), (torch.randn(batch, 3),)


def build_fixed():
    return nn.Linear(3, 5), {"input": torch.randn(2, 3)}, {"input": {0: torch.export.Dim("n", min=1, max=9)}}


def build_wrong():
    return nn.Linear(3, 5)


@pytest.mark.parametrize("text", ["0", "-1", "4:2", "1:2:3", "a", "", "2:"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ExportError, match="neither a size"):
        Range.parse(text)


def test_dynamic_dimensions_are_not_traced_at_one():
    assert Range.parse("7").example() == 7
    assert Range.parse("1:32").example() == 4
    assert Range.parse("1:3").example() == 3
    assert Range.parse("8:9").example() == 8
    assert Range.parse("1:32").example(2) == 2
    with pytest.raises(ExportError, match="at least 2"):
        Range.parse("1:32").example(1)
    with pytest.raises(ExportError, match="outside"):
        Range.parse("1:32").example(33)


def test_torchvision_with_a_dynamic_batch_and_weights(monkeypatch, capsys, tmp_path):
    weights = sources.torchvision_source("squeezenet1_1").module.state_dict()
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    options = ["torchvision:squeezenet1_1", "--batch", "1:8", "--out", tmp_path, "--name", "small"]
    assert run(monkeypatch, capsys, *options, "--weights", tmp_path / "weights.safetensors") == (0, "")
    program = load(tmp_path / "small" / "model.pt2")
    assert cases.input_names(program) == ["x"] and cases.output_names(program) == ["logits"]
    (bounds,) = program.range_constraints.values()
    assert (bounds.lower, bounds.upper) == (1, 8)
    key = "classifier.1.weight"
    assert torch.equal(program.state_dict[key], weights[key])
    assert program.module()(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_the_seed_decides_the_weights(monkeypatch, capsys, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        options = ["tests.test_sources:build_fixed", "--name", name, "--seed", seed, "--out", tmp_path]
        assert run(monkeypatch, capsys, *options)[0] == 0
    a, b, c = (load(tmp_path / name / "model.pt2").state_dict["weight"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_transformers_with_dynamic_batch_and_sequence(monkeypatch, capsys, tmp_path):
    options = [TINY_BERT, "--batch", "1:8", "--seq-len", "2:32", "--out", tmp_path]
    assert run(monkeypatch, capsys, *options) == (0, "")
    program = load(tmp_path / "bert" / "model.pt2")
    assert cases.input_names(program) == ["input_ids", "attention_mask"]
    assert cases.output_names(program) == ["last_hidden_state", "pooler_output"]
    ids = torch.randint(0, 99, (1, 11))
    assert program.module()(input_ids=ids, attention_mask=torch.ones_like(ids))["last_hidden_state"].shape == (
        1,
        11,
        32,
    )


def test_a_head_and_a_configuration_file(monkeypatch, capsys, tmp_path):
    config = {
        "model_type": "gpt2",
        "n_layer": 1,
        "n_embd": 16,
        "n_head": 2,
        "vocab_size": 50,
        "bos_token_id": 0,
    }
    (tmp_path / "tiny.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    options = [f"hf-config:{tmp_path}/tiny.json", "--head", "causal-lm", "--seq-len", 5, "--out", tmp_path]
    assert run(monkeypatch, capsys, *options)[0] == 0
    program = load(tmp_path / "tiny" / "model.pt2")
    assert cases.output_names(program) == ["logits"]


def test_sentence_embeddings_have_length_one():
    source = sources.resolve("pretrained:all-minilm-l6-v2", batch=1)
    inputs = source.example(Sizes(2, 12), torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedding = source.module(**inputs)["sentence_embedding"]
    assert embedding.shape == (2, 384)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2))


def test_functions(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, capsys, "tests.test_sources:build", "--batch", "1:6", "--out", tmp_path)[0] == 0
    assert load(tmp_path / "build" / "model.pt2").module()(torch.randn(6, 3)).shape == (6, 5)
    assert run(monkeypatch, capsys, "tests.test_sources:build_fixed", "--out", tmp_path)[0] == 0
    assert load(tmp_path / "build-fixed" / "model.pt2").module()(input=torch.randn(9, 3)).shape == (9, 5)
    options = ["tests.test_sources:build", "--dtype", "bfloat16", "--name", "half", "--out", tmp_path]
    assert run(monkeypatch, capsys, *options)[0] == 0
    assert load(tmp_path / "half" / "model.pt2").module()(torch.randn(1, 3).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18"], "names no model"),
        (["torchvision:resnet19"], "torchvision has no model 'resnet19'"),
        (["hf-config:nothing"], "transformers has no configuration 'nothing'"),
        (["hf-config:nothing.json"], "cannot read the configuration nothing.json"),
        (["hf-config:bert,layers"], "not of the form key=value"),
        (["hf-config:whisper"], "takes 'input_features'"),
        (["hf-config:gpt2", "--head", "tail"], "--head goes with hf-config"),
        (["pretrained:resnet18"], "no package with the weights"),
        (["tests.test_sources:missing"], "cannot find"),
        (["nowhere_at_all:build"], "cannot find"),
        (["tests.test_sources:build_wrong"], "must return"),
        (["tests.test_sources:build_fixed", "--batch", "4"], "parameter named 'batch'"),
        (["tests.test_sources:build_fixed", "--batch", "1:4"], "dynamic shapes itself"),
        (["tests.test_sources:build", "--weights", "missing.pth"], "cannot use the weights"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    status, error = run(monkeypatch, capsys, *arguments, "--out", tmp_path)
    assert status == 1 and message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
