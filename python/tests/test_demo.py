"""The demonstration's own part: pictures, what is exported again, and that it notices a wrong answer."""

import json

import numpy
import pytest
from PIL import Image

from pswitch import cli, demo
from pswitch.client import Answer, ServerError


def test_a_picture_becomes_the_middle_square():
    picture = Image.new("RGB", (400, 200), (254, 127, 0))
    picture.paste((0, 0, 0), (0, 0, 90, 200))  # left of the middle square
    tensor = demo.prepared(picture)
    assert tensor.shape == (1, 3, 224, 224) and tensor.dtype == numpy.float32
    assert numpy.allclose(tensor[0, :, 112, 112], [127 / 128, 0, -127 / 128])
    assert numpy.allclose(tensor[0, 0, :, 0], 127 / 128)


def test_models_are_exported_once(monkeypatch, tmp_path, capsys):
    exported = []

    def run(options):
        exported.append(options.name)
        path = options.out / options.name / "model.pt2"
        path.parent.mkdir()
        path.write_bytes(b"archive")

    monkeypatch.setattr(cli, "run", run)
    demo.export(tmp_path)
    assert exported == [name for *_, name in demo.MODELS]
    demo.export(tmp_path)
    assert len(exported) == len(demo.MODELS)
    record = json.loads((tmp_path / ".demo.json").read_text())
    record["resnet152"] = "made by something else"
    (tmp_path / ".demo.json").write_text(json.dumps(record))
    (tmp_path / "resnet152" / "model.pt2").unlink()
    (tmp_path / "resnet152").rmdir()
    demo.export(tmp_path)
    assert exported[len(demo.MODELS) :] == ["resnet152"]


class Fake:
    def __init__(self, answers):
        self.answers = answers

    def infer(self, model, inputs):
        value = self.answers(model)
        times = {"queue_us": 10.0, "switch_us": 20_000.0, "compute_us": 30_000.0}
        return Answer({"logits": numpy.array([value], numpy.float32)}, times)


def test_alternating_prints_the_times_of_each_switch(capsys):
    demo.alternate(Fake(lambda model: 1.0))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:4] == ["resnet152", "0.01", "20.00", "30.00"] for line in lines)
    assert "bit for bit" in lines[-1]


def test_an_answer_that_changes_is_an_error(capsys):
    counter = iter(range(100))
    with pytest.raises(ServerError, match="answered the same request differently in 'logits'"):
        demo.alternate(Fake(lambda model: float(next(counter))))


class Loading(Fake):
    """Becomes ready model by model, or fails one."""

    def __init__(self, broken=None):
        super().__init__(lambda model: 0.0)
        self.asked = 0
        self.broken = broken

    def models(self):
        self.asked += 1
        names = [name for *_, name in demo.MODELS]
        states = [{"name": name, "state": "READY" if i < self.asked else "LOADING"} for i, name in enumerate(names)]
        if self.broken is not None and self.asked > 2:
            states[-1] |= {"state": "UNAVAILABLE", "reason": self.broken}
        return states


def test_the_demonstration_waits_for_all_models(capsys):
    server = Loading()
    demo.wait_for_models(server)
    assert server.asked == len(demo.MODELS)
    assert capsys.readouterr().out.count("is ready") == len(demo.MODELS)


def test_a_model_that_does_not_load_is_named(capsys):
    with pytest.raises(ServerError, match="bert-base is unavailable: no room"):
        demo.wait_for_models(Loading(broken="no room"))
