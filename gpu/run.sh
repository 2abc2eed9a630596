#!/usr/bin/env bash
# What is run on a GPU machine: exports models there, runs the tests that need a GPU, and measures.
#
# `cargo xtask bundle` puts it beside the binaries. A step is a function `step_NAME`, run in a subshell; its exit status
# is the step's. What it prints goes to run.log, and what it hands to `say` or `show` is seen as well.
set -uo pipefail

default_steps=facts,models,fixtures,tests,switch,plan,switching,kill,training,stops,train,room,figures
# The measurements switch between these; `pswitch.gpu_models` makes them.
model_names=(resnet152 inception_v3 bert-base vit_l_16)
device=cuda:0
# A test that takes longer hangs.
test_limit_s=300
# A measurement that takes longer is told to end: figures keep what they have found until then.
bench_limit_s=540

usage() {
    cat <<END
usage: run.sh [--out FOLDER] [--pack FILE] [--steps STEP,...] [--models FOLDER] [--fixtures FOLDER]

Runs the steps one after the other, also when one fails, and exits with 1 if any did.

  --out FOLDER       run.log and what was measured (default: target/gpu/out)
  --pack FILE        all of that as a .tar.gz, made anew after every step
  --steps STEP,...   these, in this order (default: $default_steps)
  --models FOLDER    models that are measured, made if they are missing (default: target/gpu/models)
  --fixtures FOLDER  small models of the tests, made if they are missing (default: target/gpu/fixtures)

Python is \$PYTHON or python3; it needs torch 2.11.0 for CUDA 13, torchvision, transformers and safetensors.
END
}

refuse() {
    echo "run.sh: $1" >&2
    exit 2
}

say() {
    echo "$*"
    echo "$*" >&3
}

show() {
    local line
    while IFS= read -r line; do say "$line"; done
}

log_bytes() { stat --format %s "$log"; }

log_since() { tail --bytes "+$(($1 + 1))" "$log"; }

step_facts() {
    # Starts only if libtorch is found.
    "$bundle/pswitch" --version | show || return
    "$python" - "$out/facts.json" "$bundle/VERSION" <<'END' | show
import json, os, pathlib, subprocess, sys
import torch

FIELDS = ("name", "driver_version", "memory.total", "pcie.link.gen.max", "pcie.link.width.max", "persistence_mode")
query = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
rows = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()
gpus = [dict(zip(FIELDS, map(str.strip, row.split(",")), strict=True)) for row in rows]
facts = dict(line.split(" ", 1) for line in pathlib.Path(sys.argv[2]).read_text().splitlines())
facts |= {
    "gpus": gpus,
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version(),
    "cores": len(os.sched_getaffinity(0)),
}
pathlib.Path(sys.argv[1]).write_text(json.dumps(facts, indent=1) + "\n")
for gpu in gpus:
    print(", ".join(f"{field} {value}" for field, value in gpu.items()))
print(", ".join(f"{name} {value}" for name, value in facts.items() if name != "gpus"))
if torch.__version__.split("+")[0] != "2.11.0":
    sys.exit("the binaries were built for torch 2.11.0")
END
}

step_models() {
    "$python" -m pswitch.gpu_models --out "$models" --device "$device" --jobs 4 "${model_names[@]}" | show
}

step_fixtures() {
    local begin status
    begin=$(log_bytes)
    "$python" -m pswitch.gpu_models --out "$fixtures" --device "$device" --fixtures --jobs 6
    status=$?
    log_since "$begin" | tail --lines 1 >&3
    return $status
}

step_tests() {
    local test begin status failed=0 count=0
    for test in "$bundle"/tests/*; do
        [ -x "$test" ] || continue
        count=$((count + 1))
        echo "--- ${test##*/}"
        begin=$(log_bytes)
        # Straight into the log, so that it is there even if all of this is killed.
        timeout --kill-after 10 "$test_limit_s" "$test"
        status=$?
        if [ $status -ne 0 ]; then
            say "${test##*/}: exit status $status"
            # The first failures with their messages; all of them are in the log.
            log_since "$begin" | sed -n '/^failures:/,$p' | cut --characters=-200 | head --lines 40 >&3
            failed=$((failed + 1))
        fi
        log_since "$begin" | grep '^test result: ' | sed "s/^/${test##*/}: /" >&3
    done
    [ $count -gt 0 ] || say "there are no tests in $bundle/tests"
    [ $count -gt 0 ] && [ $failed -eq 0 ]
}

step_switch() { bench switch --python "$python" --model "${model_folders[@]}"; }

step_plan() { bench plan --model "${model_folders[@]}"; }

# Without vit_l_16, which takes 51 ms a request: ten thousand are to be over in little more than a minute.
step_switching() {
    local small=mobilenet_v3_small
    "$python" -m pswitch.gpu_models --out "$fixtures" --device "$device" --fixtures "$small" || return
    bench switching --requests 10000 --model "$models"/{resnet152,inception_v3,bert-base} "$fixtures/$small"
}

# Two models: a worker that builds all four takes twice as long to come up.
step_kill() { bench kill --kills 50 --model "$models"/{resnet152,inception_v3}; }

# What is trained: ResNet152 by rows that are made up once, in batches of 32; and what has a state of hardly any size.
step_training() {
    [ -f "$training/resnet152/model.pt2" ] ||
        "$python" -m pswitch.cli --train torchvision:resnet152 --loss cross-entropy --batch 32 --out "$training" ||
        return
    "$python" - "$training" <<'END' | show
import pathlib, sys
import safetensors.torch, torch
from pswitch import training, training_fixtures
from pswitch.cases import input_names

folder = pathlib.Path(sys.argv[1])
program = torch.export.load(folder / "resnet152/model.pt2")
generator = torch.Generator().manual_seed(0)
pictures, labels = input_names(program)
safetensors.torch.save_file(
    {
        pictures: torch.randn(128, 3, 224, 224, generator=generator),
        labels: torch.randint(1000, (128,), generator=generator),
    },
    folder / "data.safetensors",
)
task = f'''program: {folder}/resnet152
optimizer: {{kind: sgd, lr: 0.01, momentum: 0.9, weight_decay: 1e-4}}
data: {{files: [{folder}/data.safetensors], batch_size: 32, shuffle: false}}
length: {{steps: 1}}
'''
(folder / "train.yaml").write_text(task)
(folder / "stops.yaml").write_text(task + "deterministic: true\n")
small = folder / "perceptron"
module, rows = training_fixtures.perceptron()
training.export_training_model(module, {name: row[:5] for name, row in rows.items()}, small)
safetensors.torch.save_file({name: row[:20].clone() for name, row in rows.items()}, small / "data.safetensors")
(folder / "small.yaml").write_text(f'''program: {small}
optimizer: {{kind: sgd, lr: 0.05, momentum: 0.9}}
data: {{files: [{small}/data.safetensors], batch_size: 5}}
length: {{steps: 1}}
''')
print(f"a training program with inputs {pictures} and {labels}")
END
}

# Ample: with less memory than it asks for cuDNN takes other kernels, which have other bits.
training_size=64GiB

step_stops() {
    bench stops --task "$training/stops.yaml" --model "$models/resnet152" --training-size $training_size --python "$python"
}

step_train() {
    # A minute of seconds in turn.
    bench train --task "$training/train.yaml" --model "$models/resnet152" --training-size $training_size --turns 30 \
        --python "$python"
}

step_room() {
    bench make-room --task "$training/train.yaml" --small-task "$training/small.yaml" --model "$models/resnet152" \
        --training-size $training_size
}

# After `training`: the figures of the paper beside ResNet152 that trains.
step_figures() {
    bench all --quick --model "$models"/{resnet152,inception_v3,bert-base} --task "$training/train.yaml" \
        --training-size $training_size --python "$python"
}

bench() {
    # Without 3: a daemon of MPS that outlives whoever has started it would keep that open.
    timeout --foreground --kill-after 20 "$bench_limit_s" "$bundle/pswitch" bench "$@" --device "$device" --out "$out" 3>&- | show
}

# Ends daemons of MPS whose measurement was killed.
end_mps() {
    local pid_file
    for pid_file in "${TMPDIR:-/tmp}"/pswitch-mps*/pipe/nvidia-cuda-mps-control.pid; do
        [ -e "$pid_file" ] || continue
        echo quit -t 5 | CUDA_MPS_PIPE_DIRECTORY=${pid_file%/*} timeout 10 nvidia-cuda-mps-control 3>&-
    done
}

pack_up() {
    [ -n "$pack" ] || return 0
    tar --create --gzip --file "$pack.new" --directory "$out" . && mv "$pack.new" "$pack"
}

run_step() {
    local name=$1 begin started=$SECONDS status
    say "==> $name"
    begin=$(log_bytes)
    ("step_$name") 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        summary+=("$(printf '%-12s%-8s%6d s' "$name" ok $((SECONDS - started)))")
    else
        summary+=("$(printf '%-12s%-8s%6d s' "$name" FAILED $((SECONDS - started)))")
        any_failed=1
        echo "--- the end of its log (exit status $status):" >&3
        log_since "$begin" | tail --lines 20 | cut --characters=-200 >&3
    fi
    end_mps
    pack_up
}

out=target/gpu/out models=target/gpu/models fixtures=target/gpu/fixtures steps=$default_steps pack=
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage && exit 0 ;;
        --out | --pack | --steps | --models | --fixtures)
            [ $# -ge 2 ] || refuse "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        *) refuse "there is no option '$1'; --help lists them" ;;
    esac
done
IFS=, read -ra chosen <<<"$steps"
for name in "${chosen[@]}"; do
    declare -F "step_$name" >/dev/null || refuse "there is no step '$name'; there are $default_steps"
done

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bundle=$here
# In the repository the bundle lies where `cargo xtask bundle` puts it.
[ -x "$bundle/pswitch" ] || bundle=$here/../target/bundle
[ -x "$bundle/pswitch" ] || refuse "there is no pswitch here; 'cargo xtask bundle' makes a folder with it"

python=${PYTHON:-python3}
# Found without importing torch, which takes seconds.
libraries=$("$python" - <<'END'
import glob, importlib.util, os, sys

torch = importlib.util.find_spec("torch") or sys.exit("there is no torch")
folder = torch.submodule_search_locations[0]
print(":".join([f"{folder}/lib", *sorted(glob.glob(os.path.join(os.path.dirname(folder), "nvidia/*/lib")))]))
END
) || refuse "$python does not know where torch is"
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$bundle/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

mkdir -p "$out" "$models" "$fixtures" || exit 1
# Absolute: a program may be started somewhere else.
out=$(cd "$out" && pwd) models=$(cd "$models" && pwd) fixtures=$(cd "$fixtures" && pwd)
# Beside the models, and no model of a repository.
training=$models-training
mkdir -p "$training" || exit 1
# Where tests find what was made here, and the binary that they start.
export PSWITCH_MODELS=$models PSWITCH_FIXTURES=$fixtures PSWITCH_BINARY=$bundle/pswitch
model_folders=("${model_names[@]/#/$models/}")

log=$out/run.log summary=() any_failed=0
: >"$log"
exec 3>&1 >>"$log"
for name in "${chosen[@]}"; do
    run_step "$name"
done
say "==> summary"
for line in "${summary[@]}"; do say "$line"; done
say "log and results: $out"
exit $any_failed
