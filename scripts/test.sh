#!/usr/bin/env bash
# The whole test: lint, types, layout, fast and slow tests on 8 virtual CPU devices, then the commands of the documents on small
# sizes. Installs what it needs into .venv (or $VENV). About 30 minutes on two cores; `scripts/test.sh fast` takes 3.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev,text,serve
. "${VENV:-.venv}/bin/activate"
# Pinned: a plain `torch` brings gigabytes of CUDA. Needed only to read .bin weights and to check exports.
python -m pip install --quiet --disable-pip-version-check torch==2.13.0 "transformers>=5"
ruff check .
ruff format --check .
mypy
if [ "${1:-all}" = fast ]; then
    exec python -m pytest -q -m "not slow"
fi
python -m pytest -q -m "not slow"
# The page is tried in a browser where one can be had; elsewhere its test says why it is skipped.
if ! command -v chromedriver > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver > /dev/null || true
fi
python -m pytest -q -m slow
rm -rf /tmp/lvm # where the documents' commands write
for document in DATASET.md evaluation/EVAL.md; do
    WANDB_MODE=disabled bash scripts/run_commands.sh "$document"
done
out=$(mktemp -d)
QUICKSTART_STEPS=20 bash scripts/quickstart.sh "$out"
python - "$out/figures.json" <<'EOF'
import json
import sys

for task, measured in json.load(open(sys.argv[1]))["tasks"].items():
    last = measured["curve"][-1]
    figures = {"perplexity": (last["perplexity"], last["unigram_perplexity"])}
    figures["mse"] = last["mse"]["model"], last["mse"]["copy_last"]
    for name, (ours, baseline) in figures.items():
        print(f"{task} {name}: {ours['mean']:.4g}, baseline {baseline['mean']:.4g}")
        # Within the error: another machine rounds otherwise, and so draws a few other tokens.
        least = ours["mean"] - (ours["standard_error"] if name == "mse" else 0)
        assert least < baseline["mean"], "the quickstart's answers must beat their baselines"
EOF
