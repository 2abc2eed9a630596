"""Models that nobody chose: every classification model of torchvision and many configurations of transformers.

Each is exported with random weights and reference outputs as `pswitch.cases` describes, handed to a command, and
deleted before the next. `python -m pswitch.sweep --out DIR --check 'COMMAND'` runs `COMMAND DIR/NAME` for each; exit
status 0 means that the model loaded and that every output was right. Without `--check` the exported program is
compared with the eager module in Python, which shows what is torch.export's doing. Prints the coverage and writes
`DIR/coverage.json`.
"""

import argparse
import dataclasses
import fnmatch
import gc
import logging
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

# Small widths and two layers: what counts is which operators a model is made of. Each list item is a model type of
# transformers with overrides, as `hf-config:` takes it, and a head.
TRANSFORMERS = (
    ("bert,num_hidden_layers=2", "masked-lm"),
    ("roberta,num_hidden_layers=2,pad_token_id=1", "sequence-classification"),
    ("distilbert,n_layers=2", "question-answering"),
    ("albert,num_hidden_layers=2,hidden_size=256,num_attention_heads=4,intermediate_size=512", None),
    ("electra,num_hidden_layers=2", "token-classification"),
    ("mpnet,num_hidden_layers=2", None),
    ("deberta-v2,num_hidden_layers=2,hidden_size=256,num_attention_heads=4,intermediate_size=512", None),
    ("funnel,vocab_size=4000", None),
    ("xlm-roberta,num_hidden_layers=2,vocab_size=4000", "masked-lm"),
    ("camembert,num_hidden_layers=2", None),
    ("mobilebert,num_hidden_layers=2", None),
    ("squeezebert,num_hidden_layers=2", None),
    ("gpt2,n_layer=2", "causal-lm"),
    ("gptj,n_layer=2,n_embd=256,n_head=4,vocab_size=4000,rotary_dim=16", "causal-lm"),
    ("gpt_neox,num_hidden_layers=2,hidden_size=256,num_attention_heads=4,intermediate_size=512", "causal-lm"),
    ("opt,num_hidden_layers=2", "causal-lm"),
    ("bloom,n_layer=2,hidden_size=256,n_head=4,vocab_size=4000", "causal-lm"),
    ("llama,num_hidden_layers=2,hidden_size=256,num_attention_heads=4,intermediate_size=512", "causal-lm"),
    ("mistral,num_hidden_layers=2,hidden_size=256,num_attention_heads=4,num_key_value_heads=2", "causal-lm"),
    (
        "qwen2,num_hidden_layers=2,hidden_size=256,num_attention_heads=4,num_key_value_heads=2,vocab_size=4000",
        "causal-lm",
    ),
    (
        "gemma,num_hidden_layers=2,hidden_size=256,num_attention_heads=4,num_key_value_heads=2,head_dim=64",
        "causal-lm",
    ),
    ("phi,num_hidden_layers=2,hidden_size=256,num_attention_heads=4,intermediate_size=512", "causal-lm"),
    ("falcon,num_hidden_layers=2,hidden_size=256,num_attention_heads=4,vocab_size=4000", "causal-lm"),
    ("t5,num_layers=2,d_model=256,num_heads=4,d_ff=512", "seq2seq-lm"),
    ("bart,encoder_layers=2,decoder_layers=2,d_model=256", "seq2seq-lm"),
    ("vit,num_hidden_layers=2", "image-classification"),
    ("deit,num_hidden_layers=2", "image-classification"),
    ("beit,num_hidden_layers=2", "image-classification"),
    ("convnext", "image-classification"),
    ("swin", "image-classification"),
    ("resnet", "image-classification"),
    ("clip", None),
)
SEQUENCE = 24


@dataclasses.dataclass
class Result:
    """What became of one model."""

    name: str
    family: str
    exported: bool = False
    matched: bool = False
    export_s: float = 0.0
    check_s: float = 0.0
    megabytes: float = 0.0
    # Why not, in one line.
    reason: str = ""


def candidates() -> list[tuple[str, str, str, str | None]]:
    """Name, family, what `pswitch-export` would be given, and the head."""
    from torchvision import models

    names = [(name, "torchvision", f"torchvision:{name}", None) for name in models.list_models(module=models)]
    for text, head in TRANSFORMERS:
        base = text.split(",")[0]
        names.append((f"hf-{base}", "transformers", f"hf-config:{text}", head))
    return names


def export_one(name: str, spec: str, head: str | None, folder: Path, result: Result, in_python: bool) -> None:
    """Writes the folder; with `in_python` compares the archive's answers too."""
    import torch

    from . import cases, export, sources

    torch.manual_seed(0)
    source = sources.resolve(spec, batch=1, head=head)
    cases.vary_constants(source.module, torch.Generator().manual_seed(1))
    source.module.eval()
    sizes = sources.Sizes(1, SEQUENCE)
    example = source.example(sizes, torch.Generator().manual_seed(2))
    call = source.example(sizes, torch.Generator().manual_seed(3))
    program = export.export_program(source.module, example, None, source.output_names)
    path = export.save_program(program, folder)
    result.megabytes = round(path.stat().st_size / 1e6, 1)
    names = cases.input_names(program)
    answer = cases.run_case(source.module, names, call)
    if answer.raises is not None:
        raise RuntimeError(f"the eager module raises: {answer.raises}")
    cases.write_cases(folder, program, [answer], {"name": name, "source": spec, "tags": ["sweep"]})
    result.exported = True
    if in_python:
        del source
        again = cases.run_case(torch.export.load(path).module(), names, call)
        result.matched = cases.same_bits(again, answer)
        result.reason = "" if result.matched else "the archive answers differently in Python"


def run_check(command: list[str], folder: Path, timeout_s: float, result: Result) -> None:
    try:
        done = subprocess.run(
            [*command, str(folder)], capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        result.reason = f"the check took more than {timeout_s:.0f} s"
        return
    result.matched = done.returncode == 0
    if not result.matched:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        result.reason = f"exit status {done.returncode}: {lines[-1]}"


def sweep_one(candidate, options: argparse.Namespace, command: list[str] | None) -> Result:
    name, family, spec, head = candidate
    result, folder = Result(name, family), options.out / name
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    try:
        export_one(name, spec, head, folder, result, in_python=command is None)
    except Exception as error:  # whatever a model's code or torch.export raises is a result
        lines = str(error).strip().splitlines() or [""]
        result.reason = f"{type(error).__name__}: {lines[0]}"
    gc.collect()
    result.export_s = round(time.monotonic() - started, 2)
    if result.exported and command is not None:
        started = time.monotonic()
        run_check(command, folder, options.timeout, result)
        result.check_s = round(time.monotonic() - started, 2)
    if not (options.keep or (options.keep_failed and result.exported and not result.matched)):
        shutil.rmtree(folder, ignore_errors=True)
    return result


def coverage(results: list[Result]) -> list[dict]:
    """One row for each family and one for all."""
    rows = []
    for family in [*dict.fromkeys(result.family for result in results), "all"]:
        of = [result for result in results if family in (result.family, "all")]
        matched = sum(result.matched for result in of)
        exported = sum(result.exported for result in of)
        rows.append(
            {
                "family": family,
                "models": len(of),
                "exported": exported,
                "matched": matched,
                "percent_of_exported": round(100 * matched / exported, 1) if exported else 0.0,
                "percent": round(100 * matched / len(of), 1),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pswitch.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to work in")
    parser.add_argument("--only", nargs="*", metavar="PATTERN", help="names with * and ?, such as 'resnet*' 'hf-*'")
    parser.add_argument("--check", metavar="COMMAND", help="command to run with each model's folder")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a check may take (default: 600)")
    parser.add_argument("--keep", action="store_true", help="keep every folder")
    parser.add_argument("--keep-failed", action="store_true", help="keep the folders of failed checks")
    parser.add_argument("--target", type=float, default=95.0, help="percentage to reach for exit status 0")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    patterns = options.only or ["*"]
    chosen = [c for c in candidates() if any(fnmatch.fnmatch(c[0], pattern) for pattern in patterns)]
    if options.list:
        print("\n".join(name for name, *_ in chosen))
        return 0
    if not chosen:
        parser.error(f"no model matches {' '.join(patterns)}")

    from . import cases

    options.out.mkdir(parents=True, exist_ok=True)
    command = shlex.split(options.check) if options.check else None
    results = []
    for candidate in chosen:
        result = sweep_one(candidate, options, command)
        results.append(result)
        verdict = "ok" if result.matched else "FAILED" if result.exported else "not exported"
        times = f"{result.megabytes:8.1f} MB {result.export_s:6.1f} s {result.check_s:6.1f} s"
        print(f"{result.name:28}{times}  {verdict} {result.reason}", flush=True)
        # Written each time: a sweep that is stopped leaves what it found.
        content = {
            "check": options.check,
            "coverage": coverage(results),
            "results": [dataclasses.asdict(result) for result in results],
        }
        cases.write_json(options.out / "coverage.json", content)
    rows = coverage(results)
    print(f"\n{'family':14}{'models':>8}{'exported':>10}{'matched':>9}{'of exported':>13}{'of all':>9}")
    for row in rows:
        print(
            f"{row['family']:14}{row['models']:8}{row['exported']:10}{row['matched']:9}"
            f"{row['percent_of_exported']:12.1f}%{row['percent']:8.1f}%"
        )
    return 0 if rows[-1]["percent"] >= options.target else 1


if __name__ == "__main__":
    sys.exit(main())
