"""The fixtures' own machinery: what is recorded, when it is made anew, and that programs answer like modules."""

import functools
import json

import pytest
import safetensors
import torch

from pswitch import cases, fixtures, provenance

SMALL = [fixture for fixture in fixtures.FIXTURES if fixture.source.__qualname__.startswith("_small")]


@pytest.mark.parametrize("fixture", SMALL, ids=lambda fixture: fixture.name)
def test_the_exported_program_answers_bit_for_bit(fixture, tmp_path):
    fixtures.make(fixture, tmp_path, "key", verify=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["key"] == "key" and manifest["torch_threads"] == torch.get_num_threads()
    with safetensors.safe_open(tmp_path / "cases.safetensors", "pt") as file:
        assert file.metadata()["torch_threads"] == str(torch.get_num_threads())
        for i, case in enumerate(manifest["cases"]):
            for name, described in case["inputs"].items():
                assert list(file.get_tensor(f"case{i}.input.{name}").shape) == described["shape"]
            for index, described in case["outputs"].items():
                assert list(file.get_tensor(f"case{i}.output.{index}").shape) == described["shape"]


def test_an_index_out_of_range_is_recorded_as_an_error(tmp_path):
    (lookup,) = [fixture for fixture in fixtures.FIXTURES if fixture.name == "lookup"]
    fixtures.make(lookup, tmp_path, "key", verify=False)
    raised = [case["raises"] for case in json.loads((tmp_path / "manifest.json").read_text())["cases"]]
    assert raised == [None, "index out of range in self", None]


def test_fixtures_are_current_until_something_they_depend_on_changes(tmp_path, monkeypatch):
    assert not fixtures.is_current(tmp_path, fixtures.key())
    cases.write_json(tmp_path / "manifest.json", {"key": fixtures.key()})
    assert fixtures.is_current(tmp_path, fixtures.key())
    monkeypatch.setattr(provenance.importlib.metadata, "version", lambda package: "0.0")
    assert not fixtures.is_current(tmp_path, fixtures.key())


def test_a_machine_without_some_of_the_packages_has_a_key_of_its_own(monkeypatch):
    complete = fixtures.key()
    monkeypatch.setattr(provenance, "PACKAGES", (*provenance.PACKAGES[:-1], "there-is-no-such-package"))
    assert fixtures.key() != complete


def test_one_that_fails_leaves_no_folder_and_the_others_are_made(tmp_path, capsys):
    def source():
        raise RuntimeError("no such operator")

    chosen = [fixtures.Fixture("broken", source), SMALL[0]]
    (tmp_path / "broken").mkdir()
    make = functools.partial(fixtures.make, wanted="key", verify=False)
    made, failed = fixtures.update(tmp_path, chosen, "key", make, force=False)
    assert (made, failed) == (1, ["broken"])
    assert [path.name for path in tmp_path.iterdir()] == [SMALL[0].name]
    assert fixtures.report("fixtures", 2, made, failed, 0.0) == 1
    said = capsys.readouterr()
    assert "no such operator" in said.err and "failed: broken" in said.err
    assert "1 made, 0 current" in said.out


def test_names_are_unique():
    names = [fixture.name for fixture in fixtures.FIXTURES]
    assert len(set(names)) == len(names)


def test_same_bits_tells_zeros_apart_and_takes_nan_for_itself():
    def answer(value):
        return cases.Case({}, {0: torch.tensor(value)})

    assert cases.same_bits(answer([1.0, float("nan")]), answer([1.0, float("nan")]))
    assert not cases.same_bits(answer([0.0]), answer([-0.0]))
    assert not cases.same_bits(answer([1.0]), answer([1]))
    assert not cases.same_bits(answer([1.0]), answer([1.0, 1.0]))


def test_constant_parameters_are_varied_and_others_left():
    norm = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    weight = norm[0].weight.clone()
    cases.vary_constants(norm, torch.Generator().manual_seed(0))
    assert torch.equal(norm[0].weight, weight)
    for tensor in (norm[1].weight, norm[1].bias, norm[1].running_mean, norm[1].running_var):
        assert len(tensor.unique()) == 4
    assert bool((norm[1].running_var > 0).all())
