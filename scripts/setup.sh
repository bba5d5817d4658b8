#!/usr/bin/env bash
# Makes the virtual environment .venv (or $VENV) and installs the project into it, on a machine that has Python >= 3.11 and
# nothing else: no torch, no CUDA. Takes about two minutes.
#
#   bash scripts/setup.sh                 what the quickstart needs
#   bash scripts/setup.sh gpu             a machine with NVIDIA GPUs; tpu: a TPU host; several as gpu,video,serve
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=${PYTHON:-$(command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=/path/to/it")'
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[quickstart${1:+,$1}]"
echo "ready: . $venv/bin/activate"
