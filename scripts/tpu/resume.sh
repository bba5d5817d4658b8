#!/usr/bin/env bash
# Trains on TPU machines that can be preempted: creates the slice, trains, and repeats both until --total_steps is reached.
#
#   SPOT=1 bash scripts/tpu/resume.sh NAME ZONE TYPE [flags of llama_train, see scripts/tpu/run.sh]
#
# The flags must name --logger.experiment_id and a bucket as --logger.output_dir, so that each start finds the checkpoint.
# A slice that no longer exists or was preempted is deleted and created again; otherwise the run starts again on the slice
# (exit codes 75 and 70). Before maintenance or preemption of a host the run saves and exits with 75; the next start trains
# until the hosts are taken away. Any other error ends the script. The slice then remains: delete it when you have read the
# error.
set -uo pipefail
[ $# -ge 4 ] || { echo "usage: bash scripts/tpu/resume.sh NAME ZONE TYPE flags of llama_train" >&2; exit 2; }
name=$1 zone=$2 type=$3
shift 3
for flag in --logger.experiment_id --logger.output_dir; do
    case " $*" in *" $flag="*) ;; *) echo "$flag is missing: without it a new start would not find the checkpoint" >&2; exit 2 ;; esac
done
here=$(dirname "$0")

# READY, PREEMPTED, ...; empty if there is no such slice.
state() { gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2> /dev/null; }

for start in $(seq "${MAX_STARTS:-1000}"); do
    if [ "$(state)" != READY ]; then
        gcloud compute tpus tpu-vm delete "$name" --zone="$zone" --quiet 2> /dev/null
        bash "$here/create.sh" "$name" "$zone" "$type" || { sleep "${RETRY_SECONDS:-60}"; continue; } # no capacity: ask again
    fi
    echo "start $start at $(date '+%F %T')"
    bash "$here/run.sh" "$name" "$zone" "$@"
    code=$?
    [ "$code" = 0 ] && exit 0
    if [ "$(state)" = READY ] && [ "$code" != 75 ] && [ "$code" != 70 ]; then
        echo "training failed with exit code $code on a slice that is ready" >&2
        exit "$code"
    fi
done
echo "the run did not finish in $start starts" >&2
exit 75
