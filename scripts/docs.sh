#!/usr/bin/env bash
# Builds the documentation as a website. A warning, such as a link to a missing page, is an error.
#
#   bash scripts/docs.sh [FOLDER]         (default: build/docs; open build/docs/index.html)
#
# Takes half a minute. Needs the active virtual environment with the extra `docs`: pip install -e '.[docs]'
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/docs}
python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet -c docs -b html . "$out"
cp docs/redirect.html "$out/index.html" # the site's first page is docs/index.html
echo "built $out/index.html"
