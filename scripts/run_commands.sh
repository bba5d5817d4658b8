#!/usr/bin/env bash
# Runs the commands of a document (its ``` blocks) in order, and stops at the first error.
#
#   bash scripts/run_commands.sh DATASET.md
#   bash scripts/run_commands.sh README.md "From my images to my model"      # the first block below this heading
#
# Takes a few minutes. Needs the active virtual environment; the commands write to /tmp/lvm. Indented blocks of a document
# are not run.
set -euo pipefail
awk -v heading="${2:-}" '
    /^#+ / { title = $0; sub(/^#+ /, "", title); blocks = 0 }
    /^```/ { inside = !inside; blocks += inside; next }
    inside && (heading == "" || (title == heading && blocks == 1))
' "$1" | bash -euxo pipefail
