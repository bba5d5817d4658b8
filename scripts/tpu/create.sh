#!/usr/bin/env bash
# Creates a TPU slice on Google Cloud and installs the project on all its hosts.
#
#   bash scripts/tpu/create.sh NAME ZONE TYPE      (for example: lvm us-east5-a v5p-128)
#
# Set SPOT=1 for spot machines, which are cheaper and can be preempted at any time. REPOSITORY and BRANCH replace the URL and
# the branch of this checkout. Needs gcloud with a project and a zone that has the type.
# https://cloud.google.com/tpu/docs/jax-pods lists types and versions.
# Expect a few minutes for the slice, and two for the installation.
set -euo pipefail
[ $# = 3 ] || { echo "usage: bash scripts/tpu/create.sh NAME ZONE TYPE" >&2; exit 2; }
name=$1 zone=$2 type=$3
case $type in
v4-*) version=tpu-ubuntu2204-base ;;
v5litepod-*) version=v2-alpha-tpuv5-lite ;;
v5p-*) version=v2-alpha-tpuv5 ;;
v6e-*) version=v2-alpha-tpuv6e ;;
*)
    echo "unknown type $type: v4-N, v5litepod-N, v5p-N or v6e-N" >&2
    exit 2
    ;;
esac
repository=${REPOSITORY:-$(git -C "$(dirname "$0")" remote get-url origin)}
branch=${BRANCH:-$(git -C "$(dirname "$0")" branch --show-current)}

gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" --version="$version" ${SPOT:+--spot}
# The machines' own Python is older than 3.11; uv installs one.
install=$(printf 'git clone --quiet --branch %q %q lvm' "${branch:-main}" "$repository")
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="set -e
    $install
    cd lvm
    curl -LsSf https://astral.sh/uv/install.sh | sh
    PATH=\$HOME/.local/bin:\$PATH
    uv venv --quiet --seed --python 3.12 .venv
    bash scripts/setup.sh tpu
    .venv/bin/python -m pip install --quiet gcsfs"
echo "ready: bash scripts/tpu/run.sh $name $zone [flags of llama_train]"
