#!/usr/bin/env bash
# Runs all checks: lint, types, fast and slow tests on 8 virtual CPU devices, the documentation, the commands of the
# documents, the quickstart.
#
#   bash scripts/test.sh          everything: about 50 minutes on two CPU cores
#   bash scripts/test.sh fast     lint, types and fast tests: about 3 minutes
#
# Needs Python 3.11 or newer and a network connection; installs its dependencies into .venv (or $VENV).
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev,text,serve,docs
. "${VENV:-.venv}/bin/activate"
# torch, peft and diffusers check exports and tokenizers. The version of torch is pinned, because other builds install
# gigabytes of CUDA.
python -m pip install --quiet --disable-pip-version-check torch==2.13.0 "transformers>=5" peft diffusers
ruff check .
ruff format --check .
mypy
# Two processes take turns at the files: much of a test is one process that starts or compiles.
processes=(-n 2 --dist loadfile)
if [ "${1:-all}" = fast ]; then
    exec python -m pytest -q -m "not slow" "${processes[@]}"
fi
# The test of the demo page needs a browser, the tests of batch jobs a SLURM, the comparison of image readers libvips. Without
# them these tests are skipped and print the reason. All are slow: the packages are installed while the fast tests run.
install_packages() {
    packages=(chromium chromium-driver slurm-wlm munge iproute2 libvips-tools)
    command -v apt-get > /dev/null && [ "$(id -u)" = 0 ] || return 0
    dpkg -s "${packages[@]}" > /dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}" > /dev/null; } || true
}
install_packages &
python -m pytest -q -m "not slow" "${processes[@]}"
wait $!
python -m pytest -q -m slow "${processes[@]}"

# What follows runs two at a time, like the tests. No two write the same files.
tpu_plans() { # need libtpu; in the environment itself, all other commands would look for a TPU
    libtpu=$(mktemp -d)
    python -m pip install --quiet --disable-pip-version-check --no-deps --target "$libtpu" "$(python -c \
        'from importlib.metadata import requires; print(*(r.partition(";")[0] for r in requires("jax") if r[:6] == "libtpu"))')"
    PYTHONPATH=$libtpu python -m pytest -q -m slow tests/planning/test_accelerators.py
    rm -rf "$libtpu"
}
website() { bash scripts/docs.sh "$(mktemp -d)"; }
sentences() { WANDB_MODE=disabled bash scripts/run_commands.sh DATASET.md; }
evaluation() { WANDB_MODE=disabled bash scripts/run_commands.sh evaluation/EVAL.md; }
own_images() { bash scripts/run_commands.sh README.md "From my images to my model"; }
finetuning() {
    bash scripts/run_commands.sh docs/finetune.md
    python - /tmp/lvm/finetune <<'EOF'
import json
import pathlib
import sys

import numpy as np


def measured(run: str, task: str, metric: str) -> np.ndarray:
    """Returns the values of the queries, which are the same in all runs."""
    tasks = json.loads(pathlib.Path(sys.argv[1], f"{run}.json").read_text())["tasks"]
    values = tasks[task]["curve"][-1]["per_query"][metric]
    return np.array(values["model"] if metric == "mse" else values)


for run in ("lora", "full"):
    for metric, scale in {"perplexity": np.log, "mse": np.asarray}.items():
        gains = scale(measured("before", "cutout", metric)) - scale(measured(run, "cutout", metric))
        error = gains.std(ddof=1) / len(gains) ** 0.5
        print(f"{run}: {metric} of the new task improves by {gains.mean():.3g} ± {error:.2g}")
        assert gains.mean() > 3 * error, f"{run}: the new task is not learned: {metric}"
    before, after = (measured(name, "segmentation", "perplexity").mean() for name in ("before", run))
    assert after < 1.4 * before, f"{run}: segmentation is forgotten: perplexity {after:.3g}, before {before:.3g}"
EOF
    # The page at the end of the guide offers both models.
    $(sed -n 's/^    \(python -m evaluation.demo .*\)/\1/p' docs/finetune.md) --port=8472 --warm_up= &
    page=$!
    trap 'kill $page' EXIT
    curl --silent --fail --retry 300 --retry-delay 1 --retry-connrefused http://127.0.0.1:8472/config \
        --output /tmp/lvm/finetune/page.json
    grep --quiet '"choices":\[\["model","model"\],\["demo_model","demo_model"\]\]' /tmp/lvm/finetune/page.json
}
quickstart() {
    out=$(mktemp -d)
    QUICKSTART_STEPS=20 bash scripts/quickstart.sh "$out"
    python - "$out/figures.json" <<'EOF'
import json
import sys

import numpy as np

for task, measured in json.load(open(sys.argv[1]))["tasks"].items():
    values = measured["curve"][-1]["per_query"]
    nats = np.log([values["unigram_perplexity"], values["perplexity"]])
    gains = {"nats over unigrams": nats[0] - nats[1]}
    for baseline in ("copy_last", "mean_annotation"):
        gains[f"mse under {baseline}"] = np.subtract(values["mse"][baseline], values["mse"]["model"])
    for name, of_queries in gains.items():
        error = of_queries.std(ddof=1) / len(of_queries) ** 0.5
        print(f"{task}: {name} {of_queries.mean():.3g} ± {error:.2g}")
        # The next frame of a clip is about as near to a copy of the last frame as to the model's answer.
        least = -error if (task, name) == ("frames", "mse under copy_last") else 2 * error
        assert of_queries.mean() > least, "the quickstart's answers must beat their baselines"
EOF
}
rm -rf /tmp/lvm # output folder of the documents' commands
export -f tpu_plans website sentences evaluation own_images finetuning quickstart
# The long ones first. The quickstart begins, because it installs the project again; meanwhile `evaluation` runs modules of
# this folder, which do not need the installed project.
printf '%s\n' quickstart evaluation finetuning sentences own_images tpu_plans website | xargs -P 2 -I CHECK bash -c '
    log=$(mktemp)
    bash -euo pipefail -c CHECK > "$log" 2>&1 && code=0 || code=$?
    echo "== CHECK"
    cat "$log"
    echo "== CHECK: exit code $code"
    exit "$code"'
