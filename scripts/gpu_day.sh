#!/usr/bin/env bash
# Checks this machine's GPU and measures training, generation and the tokenizer on it, in under 9 minutes.
#
#   bash scripts/gpu_day.sh --output_json=gpu.json                        everything
#   bash scripts/gpu_day.sh --output_json=gpu.json --jobs=machine,train:vqlm_1b
#   bash scripts/gpu_day.sh --output_json=/tmp/tiny.json --tiny           the same program on a CPU, in a minute
#
# Needs the installed project; the section `peer` also needs torch and transformers.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/scripts${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then # JAX refuses both names
    export XLA_CLIENT_MEM_FRACTION=0.95                                          # one process at a time uses the GPU
fi
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}" # errors only
exec "${PYTHON:-python3}" -m gpu_day.main "$@"
