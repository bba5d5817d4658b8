#!/usr/bin/env bash
# Creates the virtual environment .venv (or $VENV) and installs the project into it.
#
#   bash scripts/setup.sh                 for the quickstart, on a CPU
#   bash scripts/setup.sh gpu             with further extras of pyproject.toml (several: gpu,video)
#
# Takes about two minutes. Needs Python 3.11 or newer (set $PYTHON to choose one); no torch, no CUDA toolkit.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
    for python in ${PYTHON:-python3.12 python3.11 python3.13 python3}; do
        # Run the interpreter to check it: a name on the PATH can be a broken link.
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        python=
    done
    [ -n "$python" ] || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/it" >&2; exit 1; }
    "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[quickstart${1:+,$1}]"
echo "ready: . $venv/bin/activate"
