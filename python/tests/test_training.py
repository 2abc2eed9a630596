"""Training programs: what is exported, what is refused, and that they train as eager PyTorch does."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from pswitch import (
    cases,
    cli,
    export,
    fixture_modules,
    fixtures,
    training,
    training_fixtures,
    training_reference,
    transformers_source,
)
from pswitch.errors import ExportError
from pswitch.sources import Sizes
from pswitch.training_reference import step_seed

TINY = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=64,vocab_size=99"
PERCEPTRON = next(fixture for fixture in training_fixtures.FIXTURES if fixture.name == "perceptron")


class Returning(nn.Module):
    """Returns what is made of logits and labels."""

    def __init__(self, make, frozen=()):
        super().__init__()
        self.make = make
        self.linear = nn.Linear(4, 3)
        for name in frozen:
            self.linear.get_parameter(name).requires_grad_(False)

    def forward(self, features, labels):
        return self.make(self.linear(features), labels)


def exported(make, **options):
    inputs = {"features": torch.randn(5, 4), "labels": torch.randint(3, (5,))}
    return training.export_training_program(Returning(make, **options), inputs)


def operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["pswitch-export", *map(str, arguments)])
    return cli.main(), capsys.readouterr().err


def optimizer_state(name):
    """What a checkpoint of the server has of a parameter beside the state dictionary."""
    averages = {f"optimizer.{name}.{kept}": torch.zeros(3) for kept in ("exp_avg", "exp_avg_sq")}
    return averages | {"optimizer.steps": torch.tensor([7])}


def build_classifier(batch=2):
    """What users hand over as module:function: a model that `--loss` puts a loss behind."""
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
    return nn.Sequential(*layers), (torch.randn(batch, 6),)


def build_with_loss(batch=2):
    """One that returns its loss."""
    return fixture_modules.Perceptron(), {"features": torch.randn(batch, 7), "labels": torch.randint(3, (batch,))}


def build_two_outputs(batch=2):
    return nn.LSTM(3, 4), (torch.randn(5, batch, 3),)


def build_with_shapes():
    return nn.Linear(4, 3), (torch.randn(4, 4),), ({0: torch.export.Dim("rows", min=1, max=9)},)


def build_odd_answers(batch=2):
    return nn.Flatten(0), (torch.randn(batch, 4),)


def test_batch_norm_and_dropout_stay_as_eager_runs_them():
    module, data = training_fixtures.perceptron()
    program = training.export_training_program(module, data)
    assert operators(program) == [
        "aten.linear.default",
        "aten.add_.Tensor",
        "aten.batch_norm.default",
        "aten.relu.default",
        "aten.dropout.default",
        "aten.linear.default",
        "aten.cross_entropy_loss.default",
    ]
    arguments = {node.name: node.args for node in program.graph.nodes}
    assert arguments["batch_norm"][5] is True and arguments["dropout"][1:] == (0.25, True)
    assert arguments["add_"][0].name == "b_layers_1_num_batches_tracked"
    # What is written in place is not among the outputs.
    assert [spec.kind.name for spec in program.graph_signature.output_specs] == ["USER_OUTPUT"]
    assert cases.input_names(program) == ["features", "labels"] and cases.output_names(program) == ["loss"]


def test_losses_gradients_and_statistics_are_those_of_eager(tmp_path):
    for module, data in (training_fixtures.perceptron(), tiny_bert()):
        program = training.export_training_program(module, data)
        loaded = torch.export.load(export.save_program(program, tmp_path)).module()
        answers = []
        for trained in (module, loaded):
            torch.manual_seed(3)
            (loss,) = pytree.tree_leaves(trained(**data))
            loss.backward()
            gradients = {f"gradient {name}": value.grad for name, value in trained.named_parameters()}
            answers.append({"loss": loss.detach()} | gradients | training_reference.state(trained))
        assert cases.same_bits(cases.Case({}, answers[0]), cases.Case({}, answers[1]))


def tiny_bert():
    source = transformers_source.config_source(f"bert,{TINY}", "sequence-classification", ("input_ids",))
    source = transformers_source.with_labels(source)
    sizes = Sizes(6, 9)
    return source.module, source.example(sizes, torch.Generator().manual_seed(0))


def test_parameters_keep_whether_they_require_gradients(tmp_path):
    program = exported(F.cross_entropy, frozen=("bias",))
    loaded = torch.export.load(export.save_program(program, tmp_path)).module()
    assert {name: value.requires_grad for name, value in loaded.named_parameters()} == {
        "linear.weight": True,
        "linear.bias": False,
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda logits, labels: logits, r"returns torch.float32 of shape \[5, 3\]: .* --loss"),
        (lambda logits, labels: logits.argmax(), r"returns torch.int64 of shape \[\]"),
        (lambda logits, labels: (F.cross_entropy(logits, labels), logits), "has 2 outputs"),
        (lambda logits, labels: {}, "has no output"),
        (lambda logits, labels: 3, "returns 3"),
        (
            lambda logits, labels: torch.cond(logits.sum() > 0, lambda x: x.sum(), lambda x: x.mean(), (logits,)),
            "higher-order operator 'cond'",
        ),
    ],
)
def test_what_is_no_loss_is_refused(make, message):
    with pytest.raises(ExportError, match=message):
        exported(make)


def test_blocks_without_gradients_are_refused_by_name():
    def make(logits, labels):
        with torch.no_grad():
            scale = logits.square().mean()
        return F.cross_entropy(logits / scale, labels)

    with pytest.raises(ExportError, match=r"'wrap_with_set_grad_enabled'.*no_grad blocks"):
        exported(make)


def test_a_module_with_nothing_to_train_is_refused():
    with pytest.raises(ExportError, match="nothing to train"):
        exported(F.cross_entropy, frozen=("weight", "bias"))


def test_a_loss_in_a_container_is_a_loss():
    assert cases.output_names(exported(lambda logits, labels: {"sum": logits.sum()})) == ["loss"]


def test_a_loss_is_put_behind_a_model_and_what_it_trained_is_served(monkeypatch, capsys, tmp_path):
    model = ["tests.test_training:build_classifier", "--out", tmp_path]
    options = ["--train", "--loss", "cross-entropy", "--batch", "2:16", "--name", "training"]
    assert run(monkeypatch, capsys, *model, *options) == (0, "")
    program = torch.export.load(tmp_path / "training" / "model.pt2")
    assert cases.input_names(program) == ["input", "labels"] and cases.output_names(program) == ["loss"]
    batch = {"input": torch.randn(9, 6), "labels": torch.randint(3, (9,))}
    module = program.module()
    assert module(**batch).shape == () and int(module.state_dict()["model.1.num_batches_tracked"]) == 1
    checkpoint = training_reference.state(module) | optimizer_state("model.0.weight")
    save_file(checkpoint, tmp_path / "trained.safetensors")
    served = [*model, "--weights", tmp_path / "trained.safetensors", "--name", "served"]
    assert run(monkeypatch, capsys, *served) == (0, "")
    weights = torch.export.load(tmp_path / "served" / "model.pt2").state_dict
    assert torch.equal(weights["1.running_mean"], module.state_dict()["model.1.running_mean"])


def test_a_squared_error_takes_targets_like_the_answers(monkeypatch, capsys, tmp_path):
    options = ["--train", "--loss", "mse", "--batch", "4", "--dtype", "bfloat16", "--out", tmp_path]
    assert run(monkeypatch, capsys, "tests.test_training:build_classifier", *options) == (0, "")
    program = torch.export.load(tmp_path / "build-classifier" / "model.pt2")
    assert cases.input_names(program) == ["input", "targets"]
    loss = program.module()(input=torch.randn(4, 6).bfloat16(), targets=torch.zeros(4, 3).bfloat16())
    assert loss.dtype == torch.bfloat16 and loss.shape == ()


def test_a_module_may_return_its_loss(monkeypatch, capsys, tmp_path):
    options = ["--train", "--batch", "2:16", "--out", tmp_path]
    assert run(monkeypatch, capsys, "tests.test_training:build_with_loss", *options) == (0, "")
    program = torch.export.load(tmp_path / "build-with-loss" / "model.pt2")
    assert cases.input_names(program) == ["features", "labels"]


def test_torchvision_is_trained_by_the_name_of_its_input(monkeypatch, capsys, tmp_path):
    options = ["--train", "--loss", "cross-entropy", "--batch", "2", "--out", tmp_path]
    assert run(monkeypatch, capsys, "torchvision:squeezenet1_1", *options) == (0, "")
    program = torch.export.load(tmp_path / "squeezenet1_1" / "model.pt2")
    assert cases.input_names(program) == ["x", "labels"]
    assert "aten.dropout.default" in operators(program)


@pytest.mark.parametrize(
    ("model", "head", "labels", "classes"),
    [
        (f"bert,{TINY}", "sequence-classification", (4,), 2),
        (f"bert,{TINY}", "token-classification", (4, 6), 2),
        (f"bert,{TINY}", "masked-lm", (4, 6), 99),
        ("gpt2,n_layer=1,n_embd=16,n_head=2,vocab_size=50,bos_token_id=0,eos_token_id=0", "causal-lm", (4, 6), 50),
    ],
)
def test_models_of_transformers_compute_their_loss(monkeypatch, capsys, tmp_path, model, head, labels, classes):
    options = ["--train", "--head", head, "--batch", "2:8", "--seq-len", "6", "--name", "model", "--out", tmp_path]
    assert run(monkeypatch, capsys, f"hf-config:{model}", *options) == (0, "")
    program = torch.export.load(tmp_path / "model" / "model.pt2")
    assert cases.input_names(program) == ["input_ids", "attention_mask", "labels"]
    assert cases.output_names(program) == ["loss"]
    assert program.example_inputs[1]["labels"].shape == labels
    assert int(program.example_inputs[1]["labels"].max()) < classes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests.test_training:build_classifier", "--loss", "mse"], "--loss goes with --train"),
        (["tests.test_training:build_classifier", "--train", "--batch", "2"], "name one with --loss"),
        (["tests.test_training:build_two_outputs", "--train", "--loss", "mse"], "returns 3 outputs"),
        (["tests.test_training:build_with_loss", "--train", "--loss", "cross-entropy"], "input 'labels' already"),
        (["tests.test_training:build_with_shapes", "--train", "--loss", "mse"], "returned dynamic shapes"),
        (["tests.test_training:build_odd_answers", "--train", "--loss", "cross-entropy"], "rows of logits"),
        (["hf-config:bert", "--train", "--loss", "cross-entropy"], "leave --loss out"),
        ([f"hf-config:bert,{TINY}", "--train"], "BertModel takes no labels"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    status, error = run(monkeypatch, capsys, *arguments, "--out", tmp_path)
    assert status == 1 and message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_seeds_of_steps_are_numbers_of_splitmix64():
    # The first outputs for the seed 1234567, as published with the algorithm, halved.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [step_seed(1234567, step) for step in range(3)] == [number >> 1 for number in published]
    assert step_seed(2**64 - 1, 0) == step_seed(-1, 0)


def test_batches_wrap_and_the_last_one_is_short():
    data = {"features": torch.arange(23)}
    batches = [training_reference.batch(data, 5, index)["features"].tolist() for index in range(6)]
    assert batches[4] == [20, 21, 22] and batches[5] == batches[0] == [0, 1, 2, 3, 4]
    assert training_reference.batch({"features": torch.arange(10)}, 5, 2)["features"].tolist() == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def perceptron(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perceptron")
    training_fixtures.make(PERCEPTRON, folder, "key", verify=False)
    return folder


@pytest.mark.parametrize("run", training_reference.RUNS, ids=lambda run: run.name)
def test_the_exported_program_trains_bit_for_bit(perceptron, run):
    data, reference = load_file(perceptron / "data.safetensors"), load_file(perceptron / "reference.safetensors")
    module = torch.export.load(perceptron / "model.pt2").module()
    with training_reference.one_thread():
        losses = training_reference.train(module, data, batch_size=5, run=run)
    assert losses.shape == (20,) and torch.equal(losses, reference[f"{run.name}.losses"])
    for name, value in module.state_dict().items():
        assert torch.equal(value, reference[f"{run.name}.final.{name}"]), name


def test_the_manifest_tells_how_a_reference_was_made(perceptron):
    manifest = json.loads((perceptron / "manifest.json").read_text())
    assert (manifest["key"], manifest["seed"], manifest["steps"], manifest["torch_threads"]) == ("key", 7, 20, 1)
    assert (manifest["batch_size"], manifest["rows"], manifest["outputs"]) == (5, 23, ["loss"])
    assert manifest["inputs"]["features"] == {"dtype": "float32", "shape": [23, 7]}
    assert manifest["runs"].keys() == set(training_fixtures.ALL_RUNS)
    last = manifest["runs"]["clip-accumulate"]
    assert (last["optimizer"], last["micro_batches"], last["max_norm"]) == ("AdamW", 2, 0.5)
    assert last["settings"]["betas"] == [0.9, 0.999] and last["settings"]["weight_decay"] == 0.05


def test_a_difference_between_program_and_module_is_found(perceptron):
    data, reference = load_file(perceptron / "data.safetensors"), load_file(perceptron / "reference.safetensors")
    sgd, adamw = (next(run for run in training_reference.RUNS if run.name == name) for name in ("sgd", "adamw"))
    answer = reference["adamw.losses"], {}
    training_reference.check_exported(perceptron / "model.pt2", data, 5, adamw, answer)
    with pytest.raises(AssertionError, match="trains differently in the run sgd"):
        training_reference.check_exported(perceptron / "model.pt2", data, 5, sgd, answer)


def test_a_reference_that_does_not_move_is_refused():
    module = Returning(lambda logits, labels: logits.sum() * 0)
    data = {"features": torch.randn(5, 4), "labels": torch.zeros(5)}
    with pytest.raises(AssertionError, match="prove nothing"):
        training_reference.reference(module, data, 5)


def test_training_fixtures_are_made_beside_the_others_and_left_while_current(monkeypatch, tmp_path, capsys):
    arguments = [
        "fixtures",
        "--out",
        tmp_path / "fixtures",
        "--training",
        tmp_path / "training",
        "--only",
        "perceptron",
    ]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    for said in ("training: 1 made, 0 current", "training: 0 made, 1 current"):
        assert fixtures.main() == 0
        assert said in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "training" / "perceptron").iterdir()) == [
        "data.safetensors",
        "manifest.json",
        "model.pt2",
        "reference.safetensors",
    ]
    assert not list((tmp_path / "fixtures").glob("*/"))
