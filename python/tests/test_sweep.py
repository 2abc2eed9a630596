"""The sweep: what it hands to the check, what it records, what it leaves behind."""

import json
import sys

import pytest

from pswitch import sweep

TINY = ("squeezenet1_1", "torchvision", "torchvision:squeezenet1_1", None)
MISSING = ("resnet19", "torchvision", "torchvision:resnet19", None)
# Succeeds if the folder has what it should.
LOOK = (
    "import os, sys; sys.exit(sorted(os.listdir(sys.argv[1])) != ['cases.safetensors', 'manifest.json', 'model.pt2'])"
)


def run(monkeypatch, capsys, tmp_path, *options, candidates=(TINY,)):
    monkeypatch.setattr(sweep, "candidates", lambda: list(candidates))
    monkeypatch.setattr(sys, "argv", ["sweep", "--out", str(tmp_path), *options])
    status = sweep.main()
    capsys.readouterr()
    return status, json.loads((tmp_path / "coverage.json").read_text())


def test_without_a_check_the_archive_is_compared_in_python(monkeypatch, capsys, tmp_path):
    status, found = run(monkeypatch, capsys, tmp_path)
    assert status == 0
    (result,) = found["results"]
    assert result["exported"] and result["matched"] and result["megabytes"] > 1
    assert not (tmp_path / "squeezenet1_1").exists()


def test_the_check_decides_and_sees_the_whole_folder(monkeypatch, capsys, tmp_path):
    status, found = run(monkeypatch, capsys, tmp_path, "--check", f'{sys.executable} -c "{LOOK}"')
    assert status == 0 and found["results"][0]["matched"]
    code = "import sys; sys.exit('the third output differs')"
    options = ["--keep-failed", "--check", f'{sys.executable} -c "{code}"']
    status, found = run(monkeypatch, capsys, tmp_path, *options)
    assert status == 1
    assert found["results"][0]["reason"] == "exit status 1: the third output differs"
    assert (tmp_path / "squeezenet1_1" / "model.pt2").exists()


def test_a_check_that_hangs_fails(monkeypatch, capsys, tmp_path):
    # Not `sleep 30`: it gets the folder as its second argument and would refuse that.
    options = ["--timeout", "0.2", "--check", "sh -c 'exec sleep 30'"]
    status, found = run(monkeypatch, capsys, tmp_path, *options)
    assert status == 1 and "more than" in found["results"][0]["reason"]


def test_what_cannot_be_exported_counts_and_does_not_stop_the_sweep(monkeypatch, capsys, tmp_path):
    options = ["--target", "50", "--check", "true"]
    status, found = run(monkeypatch, capsys, tmp_path, *options, candidates=(MISSING, TINY))
    assert status == 0
    missing, tiny = found["results"]
    assert not missing["exported"] and "no model 'resnet19'" in missing["reason"]
    assert tiny["matched"]
    assert found["coverage"][-1] == {
        "family": "all",
        "models": 2,
        "exported": 1,
        "matched": 1,
        "percent_of_exported": 100.0,
        "percent": 50.0,
    }


def test_the_list_is_long_and_has_no_name_twice():
    names = [name for name, *_ in sweep.candidates()]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("hf-") for name in names) >= 12
    assert {"resnet152", "vit_b_16", "swin_t"} <= set(names)


def test_a_pattern_that_matches_nothing_is_refused(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, tmp_path, "--only", "nothing*")
