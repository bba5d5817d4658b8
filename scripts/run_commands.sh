#!/usr/bin/env bash
# Runs the commands that a document shows (its ``` blocks), one after the other.   bash scripts/run_commands.sh DATASET.md
set -euo pipefail
awk '/^```/ { inside = !inside; next } inside' "$1" | bash -euxo pipefail
