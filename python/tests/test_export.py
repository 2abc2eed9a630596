"""Exporting modules: names, shapes, refusals, and that what is written is whole."""

import collections
import os

import pytest
import torch
from torch import nn
from torch.export import Dim

from pswitch import cases, export, fixture_modules
from pswitch.errors import ExportError

Pair = collections.namedtuple("Pair", "mean spread")


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, features):
        return self.make(features * self.weight)


def exported(make, inputs=None, **options):
    return export.export_program(Returning(make), inputs or (torch.randn(2, 3),), **options)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda x: x.sin(), ["output_0"]),
        (lambda x: (x.sin(), x.cos()), ["output_0", "output_1"]),
        (lambda x: {"logits": x.sin(), "hidden": [x.cos(), x.tan()]}, ["logits", "hidden_0", "hidden_1"]),
        (lambda x: Pair(x.mean(), x.std()), ["mean", "spread"]),
    ],
)
def test_outputs_are_named_by_what_the_module_returns(make, names, tmp_path):
    program = exported(make)
    assert cases.output_names(program) == names
    assert cases.input_names(program) == ["features"]
    loaded = torch.export.load(export.save_program(program, tmp_path))
    assert cases.output_names(loaded) == names
    features = torch.randn(2, 3)
    expected = torch.utils._pytree.tree_leaves(program.module()(features))
    for left, right in zip(torch.utils._pytree.tree_leaves(loaded.module()(features)), expected, strict=True):
        assert torch.equal(left, right)


def test_given_output_names_win_and_are_counted():
    assert cases.output_names(exported(lambda x: x.sin(), output_names=("wave",))) == ["wave"]
    with pytest.raises(ExportError, match=r"2 output names .* for 1 outputs"):
        exported(lambda x: x.sin(), output_names=("a", "b"))


def test_a_name_that_is_taken_or_an_input_handed_through_keeps_its_own():
    program = exported(lambda x: {"features": x.sin(), "twice": x})
    assert cases.output_names(program)[1] == "twice"
    assert len(set(cases.output_names(program))) == 2


def test_symbolic_outputs_are_named_too(tmp_path):
    shapes = ({0: Dim("batch", min=1, max=8)},)
    program = exported(
        lambda x: {"wave": x.sin(), "rows": x.shape[0] * 2}, (torch.randn(4, 3),), dynamic_shapes=shapes
    )
    assert cases.output_names(torch.export.load(export.save_program(program, tmp_path))) == ["wave", "rows"]


def test_control_flow_is_refused_by_name():
    with pytest.raises(ExportError, match="higher-order operator 'cond'"):
        export.export_program(fixture_modules.Conditional(), (torch.randn(3, 4),))


def test_a_module_is_exported_in_evaluation_mode():
    program = export.export_program(nn.Dropout(0.5).train(), (torch.ones(4, 4),))
    assert torch.equal(program.module()(torch.ones(4, 4)), torch.ones(4, 4))


def test_a_failed_write_leaves_the_old_archive_and_nothing_else(tmp_path, monkeypatch):
    path = export.export_model(nn.Linear(4, 2), (torch.randn(1, 4),), tmp_path / "model")
    before = path.read_bytes()

    def torn(program, unfinished):
        unfinished.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", torn)
    with pytest.raises(ExportError, match="No space left on device"):
        export.export_model(nn.Linear(4, 2), (torch.randn(1, 4),), tmp_path / "model")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path / "model") == ["model.pt2"]


def test_the_eager_reference_leaves_the_fast_path_as_it_was():
    assert torch.backends.mha.get_fastpath_enabled()
    with export.eager_as_exported():
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
