#!/usr/bin/env bash
# Trains on all hosts of a TPU slice that scripts/tpu/create.sh has made, and prints their log.
#
#   bash scripts/tpu/run.sh NAME ZONE --load_llama_config=vqlm_7b --mesh_dim=1,-1,1 --dtype=bf16 \
#       --train_dataset.json_dataset.path=gs://BUCKET/train.packed \
#       --logger.output_dir=gs://BUCKET/runs --logger.experiment_id=lvm_7b
#
# Arguments are flags of llama_train. Write checkpoints to a bucket: the hosts share no disk, and a preempted slice loses its
# disks. The exit code is that of the training: 0 finished, 75 stopped with its state saved, 70 ended by the
# watchdog, otherwise an error (255: no connection). Ctrl-C ends the connection, and with it the training.
#
# Expect, for vqlm_7b on a v5p-16 with 8 rows of 4096 tokens: 26 GB of each chip, a minute of compilation, 58,000 tokens/s,
# and a checkpoint of 79 GB. These are estimates of llama_plan; nothing was measured on TPUs.
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: bash scripts/tpu/run.sh NAME ZONE [flags of llama_train]" >&2; exit 2; }
name=$1 zone=$2
shift 2
[ $# = 0 ] || printf -v flags ' %q' "$@"

# Worker 0 prints. All processes end with the same code, so one worker's code is the run's.
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="cd lvm && . .venv/bin/activate
    python -u -m EasyLM.models.llama.llama_train --jax_distributed.initialize_jax_distributed=True ${flags:-}"
