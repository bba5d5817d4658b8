#!/usr/bin/env bash
# Trains a model of sentences whose mapping is drawn anew for each of them, so that only the examples define it.
# scripts/in_context/README.md has the results so far; the model is not the demonstration model yet.
#
#   bash scripts/make_in_context_model.sh cpu|gpu [FOLDER]     (default: build/in_context)
#
# gpu: from nothing but seeds, on one H100 with 16 cores, in about 6 minutes.
# cpu: continues from scripts/in_context/model on new scenes, on two cores, in about an hour and a half.
# MOSAICS, SENTENCES, STEPS and BATCH (gpu) make it shorter. Needs the extra `quickstart` and no download.
#
# The gpu form has two stages. The first has mosaics only, with several seeds: tiles that are independent of each other can
# be predicted from the examples only, so the model has to look them up. When it learns to depends on the seed, and the best
# seed goes on. The second stage has all families.
set -euo pipefail
form=${1:-} out=${2:-build/in_context}
case $form in
gpu)
    mosaics=${MOSAICS:-48000} sentences=${SENTENCES:-160000} encode=512
    seeds=${SEEDS:-0 1} batch=${BATCH:-16} rate=1.5e-3 steps=${STEPS:-16000}
    settings=(--dtype=bf16 --mesh_dim=1,-1,1)
    export XLA_PYTHON_CLIENT_PREALLOCATE=false # several processes share the device
    ;;
cpu)
    sentences=${SENTENCES:-6000} encode=64 batch=4 rate=6e-4 steps=${STEPS:-1500}
    settings=(--mesh_dim=-1,1,1)
    # Two CPU devices that split a batch are up to 25% faster than one device with two threads.
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2"
    ;;
*)
    echo "choose the form: bash scripts/make_in_context_model.sh cpu|gpu [FOLDER]" >&2
    exit 2
    ;;
esac
export WANDB_MODE=${WANDB_MODE:-disabled}
mkdir -p "$out"

write() { # NAME FLAGS...
    python -m tokenizer.mappings --vqgan=scripts/in_context/tokenizer --output_file="$out/$1.jsonl" \
        --batch_size="$encode" "${@:2}"
}
train() { # EXPERIMENT FILE STEPS FLAGS...
    python -m EasyLM.models.llama.llama_train --flagfile=configs/demo.flags \
        --load_llama_config=json::scripts/in_context/settings.json "${settings[@]}" --total_steps="$3" \
        --save_model_freq="$3" --train_dataset.json_dataset.path="$out/$2.jsonl" \
        --train_dataset.json_dataset.seq_length=1024 --train_dataset.json_dataset.batch_size="$batch" \
        --optimizer.adamw_optimizer.lr="$rate" --optimizer.adamw_optimizer.lr_warmup_steps=$(($3 / 20 + 1)) \
        --logger.output_dir="$out" --logger.experiment_id="$1" "${@:4}"
}

# The pool has so many scenes that the model cannot memorize them.
write_sentences() {
    write sentences --seed=2 --num="$sentences" --num_scenes=$((sentences * 3 / 4)) --num_clips=$((sentences / 25 + 1)) \
        --num_photos=$((sentences / 12 + 8))
}

# Trains on mosaics with each seed, prints the losses, and sets `start` to the best parameters.
train_on_mosaics() {
    write mosaics --seed=1 --num="$mosaics" --families=mosaic:1 --num_scenes=8
    write new_mosaics --seed=3 --num=64 --families=mosaic:1 --num_scenes=8
    local running=() seed process
    for seed in $seeds; do # the rate hardly decays, because the lookup is learned late
        train "mosaics_$seed" mosaics $((mosaics / batch)) --seed="$seed" --eval_steps=$((64 / batch)) \
            --optimizer.adamw_optimizer.lr_decay_steps=$((4 * mosaics / batch)) \
            --eval_dataset.text_processor.fields='{tokens}' --eval_dataset.json_dataset.path="$out/new_mosaics.jsonl" \
            --eval_dataset.json_dataset.seq_length=1024 --eval_dataset.json_dataset.batch_size="$batch" \
            > "$out/mosaics_$seed.log" 2>&1 &
        running+=($!)
    done
    for process in "${running[@]}"; do
        wait "$process" || { tail -n 5 "$out"/mosaics_*.log >&2 && exit 1; }
    done
    # shellcheck disable=SC2086
    start=$(python - "$out" $seeds <<'PYTHON'
import json
import sys

out, *seeds = sys.argv[1:]
losses = {}
for seed in seeds:
    with open(f"{out}/mosaics_{seed}/metrics.jsonl") as file:
        losses[seed] = [row["eval_loss"] for row in map(json.loads, file) if "eval_loss" in row][-1]
print(f"loss on new mosaics by seed: {losses}", file=sys.stderr)
print(f"trainstate_params::{out}/mosaics_{min(losses, key=losses.get)}/streaming_train_state")
PYTHON
    )
}

if [ "$form" = gpu ]; then
    # All sentences are written while the first stage trains.
    write_sentences > "$out/sentences.log" 2>&1 &
    writing=$!
    trap 'kill $writing 2> /dev/null || true' EXIT
    train_on_mosaics
    wait $writing || { tail -n 5 "$out/sentences.log" >&2 && exit 1; }
else
    write_sentences
    start=huggingface::scripts/in_context/model
fi
train all sentences "$steps" --optimizer.adamw_optimizer.lr_decay_steps="$steps" --load_checkpoint="$start"
python -m EasyLM.models.llama.convert_easylm_to_hf --float_dtype=bf16 --max_shard_mb=14 --output_dir="$out/model" \
    --load_checkpoint="trainstate_params::$out/all/streaming_train_state"
echo "model: $out/model"
