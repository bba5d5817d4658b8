#!/usr/bin/env bash
# Makes the virtual environment .venv (or $VENV) and installs the project into it, on a machine that has Python >= 3.11 and
# nothing else: no torch, no CUDA. Takes about two minutes.
#
#   bash scripts/setup.sh                 what the quickstart needs
#   bash scripts/setup.sh gpu             a machine with NVIDIA GPUs; tpu: a TPU host; several as gpu,video
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
    for python in ${PYTHON:-python3.12 python3.11 python3.13 python3}; do
        # Tried, not only looked for: a name on the PATH may lead nowhere.
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        python=
    done
    [ -n "$python" ] || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/it" >&2; exit 1; }
    "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[quickstart${1:+,$1}]"
echo "ready: . $venv/bin/activate"
