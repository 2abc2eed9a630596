"""Models with reference outputs of a device, with the CPU as the device."""

import json
import subprocess
import sys

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from pswitch import cases, fixture_modules, fixtures, gpu_models, transformers_source

TINY_BERT = "bert,num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=64,vocab_size=99"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_models", *map(str, arguments)])
    return gpu_models.main()


def read(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def tiny_models(monkeypatch):
    """A BERT that is made in a moment in place of the four models."""

    def bert():
        return transformers_source.config_source(TINY_BERT, None, ("input_ids", "token_type_ids"))

    def models(batch):
        return [fixtures.Fixture("tiny", bert, cases=((batch, 11),) * 2, batch=str(batch), sequence="11")]

    monkeypatch.setattr(gpu_models, "models", models)


def test_models_have_two_different_cases_and_name_their_device(tiny_models, monkeypatch, tmp_path):
    assert run(monkeypatch, "--out", tmp_path, "--device", "cpu", "--batch", 3, "--verify") == 0
    manifest = read(tmp_path / "tiny")
    assert manifest["device"] == "cpu"
    assert manifest["inputs"] == ["input_ids", "token_type_ids"]
    assert manifest["cases"][0]["inputs"]["token_type_ids"] == {"dtype": "int64", "shape": [3, 11]}
    with safetensors.safe_open(tmp_path / "tiny" / "cases.safetensors", "pt") as file:
        assert file.metadata()["device"] == "cpu"
        segments = file.get_tensor("case0.input.token_type_ids")
        assert segments.unique().tolist() == [0, 1]
        assert not torch.equal(file.get_tensor("case0.output.0"), file.get_tensor("case1.output.0"))


def test_models_are_left_until_batch_or_device_change(tiny_models, monkeypatch, tmp_path, capsys):
    for batch, said in ((2, "1 made, 0 current"), (2, "0 made, 1 current"), (3, "1 made, 0 current")):
        run(monkeypatch, "--out", tmp_path, "--device", "cpu", "--batch", batch)
        assert said in capsys.readouterr().out
    monkeypatch.setattr(cases, "device_name", lambda device: "another")
    run(monkeypatch, "--out", tmp_path, "--device", "cpu", "--batch", 3)
    assert "another: 1 made" in capsys.readouterr().out


def test_fixtures_are_made_by_name(monkeypatch, tmp_path):
    run(monkeypatch, "--out", tmp_path, "--device", "cpu", "--fixtures", "--verify", "constants", "lists")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["constants", "lists"]
    assert read(tmp_path / "constants")["device"] == "cpu"


def test_weights_from_packages_are_made_only_if_named():
    (minilm,) = [fixture for fixture in fixtures.FIXTURES if fixture.name == "all-minilm-l6-v2"]
    assert not gpu_models.is_chosen(minilm, [])
    assert gpu_models.is_chosen(minilm, ["all-minilm-l6-v2"])


def test_the_four_models_are_asked_as_in_the_paper():
    made = {fixture.name: fixture for fixture in gpu_models.models(8)}
    assert list(made) == ["resnet152", "inception_v3", "bert-base", "vit_l_16"]
    assert made["bert-base"].cases == ((8, 251), (8, 251))
    assert made["vit_l_16"].batch == "8"


@pytest.mark.parametrize("arguments", [("--batch", "0"), ("nothing",), ("--device", "cuda"), ("--device", "abacus")])
def test_what_cannot_be_made_is_refused(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--out", tmp_path, *arguments)
    assert stopped.value.code == 2
    assert not list(tmp_path.iterdir())


def test_calls_that_raise_are_recorded_before_they_reach_a_gpu():
    lookup = fixture_modules.Lookup()
    good = {"ids": torch.tensor([1, 2, 3, 4]), "positions": torch.tensor([0, 1, 2])}
    bad = good | {"ids": torch.tensor([1, 2, 3, 99])}
    raised = fixtures.errors(lookup, ["ids", "positions"], [good, bad, good])
    assert list(raised) == [1] and raised[1].raises == "index out of range in self"
    assert torch.equal(raised[1].inputs["ids"], bad["ids"])


def test_a_fixture_that_raises_keeps_the_error_and_answers_the_rest_on_the_device(monkeypatch, tmp_path):
    asked = []
    run_case = cases.run_case

    def on_the_cpu_after_all(module, names, inputs, device="cpu"):
        asked.append(device)
        return run_case(module, names, inputs)

    monkeypatch.setattr(cases, "run_case", on_the_cpu_after_all)
    (lookup,) = [fixture for fixture in fixtures.FIXTURES if fixture.name == "lookup"]
    # Another name of the same device.
    fixtures.make(lookup, tmp_path, "key", verify=True, device="cpu:0")
    assert asked == ["cpu"] * 3 + ["cpu:0"] * 4
    manifest = read(tmp_path)
    assert [case["raises"] for case in manifest["cases"]] == [None, "index out of range in self", None]
    assert manifest["tags"] == ["raises"]


def test_plain_tensors_of_a_module_move_with_it():
    moved = fixture_modules.Constants().to("meta")
    assert moved.table.is_meta and moved.window.is_meta and moved.weight.is_meta


def test_a_gpu_is_recorded_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    assert cases.device_name("cuda:1") == "GPU of cuda:1"
    assert cases.device_name("cpu") == "cpu"


def test_several_processes_make_the_same(tmp_path):
    command = [sys.executable, "-m", "pswitch.gpu_models", "--device", "cpu", "--fixtures", "constants", "lists"]
    for jobs in (1, 2):
        subprocess.run([*command, "--out", tmp_path / str(jobs), "--jobs", str(jobs)], check=True)
    for name in ("constants", "lists"):
        one, two = (load_file(tmp_path / jobs / name / "cases.safetensors") for jobs in ("1", "2"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    failing = subprocess.run([*command, "nothing", "--out", tmp_path / "3", "--jobs", "2"], check=False)
    assert failing.returncode == 2
