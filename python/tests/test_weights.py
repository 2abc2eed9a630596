"""Weights of files: which names fit a module, and what is said of those that do not."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pswitch.errors import ExportError
from pswitch.weights import load_weights

OPTIMIZER = {"optimizer.steps": torch.tensor([7]), "optimizer.fc.weight.exp_avg": torch.zeros(2)}


class Holding(nn.Module):
    """Holds modules under the given names."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def linear(**more):
    return Holding(fc=nn.Linear(3, 2), **more)


def behind(prefix, module):
    return {f"{prefix}{name}": value for name, value in module.state_dict().items()}


def load(module, state, tmp_path):
    path = tmp_path / "step-00000007.safetensors"
    save_file(state, path)
    load_weights(module, path)


@pytest.mark.parametrize("optimizer", [{}, OPTIMIZER])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    "make",
    [
        linear,
        # Modules that have `model` and `optimizer` in names of their own.
        lambda: Holding(model=linear()),
        lambda: Holding(model=nn.Linear(3, 2), fc=nn.Linear(2, 2)),
        lambda: Holding(model=Holding(model=nn.Linear(3, 2), fc=nn.Linear(3, 3))),
    ],
)
def test_checkpoints_fit_the_module_that_was_trained(tmp_path, make, prefix, optimizer):
    trained, served = make(), make()
    load(served, behind(prefix, trained) | optimizer, tmp_path)
    expected = trained.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in served.state_dict().items())


def test_a_module_may_have_an_optimizer_of_its_own(tmp_path):
    trained, served = linear(optimizer=nn.Linear(2, 2)), linear(optimizer=nn.Linear(2, 2))
    load(served, trained.state_dict(), tmp_path)
    assert torch.equal(served.optimizer.weight, trained.optimizer.weight)


def test_of_names_that_do_not_fit_a_few_are_told(tmp_path):
    layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    with pytest.raises(ExportError) as raised:
        load(layers, behind("layers.", layers) | OPTIMIZER, tmp_path)
    message = str(raised.value)
    assert "100 missing (0.weight, 0.bias, 1.weight, ...)" in message
    assert "100 unexpected (layers." in message and message.count("layers.") == 3
    assert "optimizer" not in message and len(message) < 300 + len(str(tmp_path))
    with pytest.raises(ExportError, match=r"of the names, 1 missing \(fc\.bias\)$"):
        load(linear(), {"model.fc.weight": torch.zeros(2, 3)}, tmp_path)


def test_of_shapes_that_do_not_fit_a_few_are_told(tmp_path):
    wide, narrow = (nn.Sequential(*(nn.Linear(size, size) for _ in range(50))) for size in (3, 2))
    with pytest.raises(ExportError) as raised:
        load(narrow, wide.state_dict(), tmp_path)
    message = str(raised.value)
    assert "size mismatch for 0.weight" in message and message.count("size mismatch") == 3
    assert message.endswith("and 97 more")


@pytest.mark.parametrize("content", [[1, 2], {1: torch.zeros(2)}, torch.zeros(2)])
def test_what_is_no_state_dictionary_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ExportError, match="no state dictionary"):
        load_weights(linear(), tmp_path / "weights.pth")
