#!/usr/bin/env bash
# Runs the commands of a document (its ``` blocks) in order, and stops at the first error.
#
#   bash scripts/run_commands.sh DATASET.md
#
# Takes a few minutes. Needs the active virtual environment; the commands of DATASET.md and evaluation/EVAL.md write to
# /tmp/lvm. Indented blocks of a document are not run.
set -euo pipefail
awk '/^```/ { inside = !inside; next } inside' "$1" | bash -euxo pipefail
