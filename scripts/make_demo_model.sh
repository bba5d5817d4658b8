#!/usr/bin/env bash
# Trains the demonstration model (evaluation/demo_model) on sentences of `tokenizer.mappings`: mappings that only the examples
# define, and tasks of scenes, clips and photographs. evaluation/EVAL.md has the results.
#
#   bash scripts/make_demo_model.sh cpu|gpu [FOLDER]     (default: build/demo_model)
#
# gpu: from random weights, for one H100 with 16 cores. Training stops LIMIT seconds (530) after the start; elsewhere, set
#      LIMIT=0 (no limit).
# cpu: continues from evaluation/demo_model on new scenes, on two cores, in about an hour and a half.
# SENTENCES, STEPS, BATCH (gpu) and LOOKUP (flags of lookup.py) make it shorter. Needs the extra `quickstart` and no download.
# Run it in the root of the repository. A run that has begun in FOLDER/all is continued.
#
# The gpu form has two stages. In the first the model learns to look up, from random symbols (scripts/demo_model/lookup.py).
# The second has all families of `tokenizer.mappings`. Only answers and frames are in the loss.
set -euo pipefail
form=${1:-} out=${2:-build/demo_model}
case $form in
gpu)
    sentences=${SENTENCES:-220000} encode=512 batch=${BATCH:-32} rate=1e-3 steps=${STEPS:-18500}
    settings=(--dtype=bf16 --mesh_dim=1,-1,1 --llama.remat_block=) # there is memory for all values of the backward pass
    export XLA_PYTHON_CLIENT_PREALLOCATE=false # several processes share the device
    limit=${LIMIT:-530}
    ;;
cpu)
    sentences=${SENTENCES:-6000} encode=64 batch=4 rate=6e-4 steps=${STEPS:-1500}
    settings=(--mesh_dim=-1,1,1)
    limit=0 # none
    # Two CPU devices that split a batch are up to 25% faster than one device with two threads.
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2"
    ;;
*)
    echo "choose the form: bash scripts/make_demo_model.sh cpu|gpu [FOLDER]" >&2
    exit 2
    ;;
esac
export WANDB_MODE=${WANDB_MODE:-disabled}
mkdir -p "$out"

# The pool has so many scenes that the model cannot memorize them. The tasks of scenes have about half of the sentences:
# with a third, the annotations that the model drew were clearly worse.
families=mosaic:4,recolour:4,marks:2,channels:1,geometry:4,ramps:2,composed:3,segmentation:6,depth:3,normals:3,edges:3
families+=,inpainting:3,colorization:3,photo_color:2,frames:5
write_sentences() {
    python -m tokenizer.mappings --output_file="$out/sentences.jsonl" --batch_size="$encode" \
        --seed=2 --num="$sentences" --families="$families" --num_scenes=$((sentences / 2)) \
        --num_clips=$((sentences / 40 + 1)) --num_photos=$((sentences / 12 + 8))
    python -m tokenizer.mix --inputs="$out/sentences.jsonl" --answers_only=True --output_file="$out/answers.jsonl"
}

if [ "$form" = gpu ]; then
    # The sentences are written while the first stage trains.
    write_sentences > "$out/sentences.log" 2>&1 &
    writing=$!
    trap 'kill $writing 2> /dev/null || true' EXIT
    # shellcheck disable=SC2086
    python scripts/demo_model/lookup.py --output_file="$out/lookup" --dtype=bf16 ${LOOKUP:-}
    start=params::$out/lookup
    wait $writing || { tail -n 5 "$out/sentences.log" >&2 && exit 1; }
else
    write_sentences
    start=huggingface::evaluation/demo_model
fi
left=$((limit > 0 && limit > SECONDS ? limit - SECONDS : limit > 0)) # 0: no limit
# At the time limit, the trainer saves its state, and timeout exits with 124.
timeout --foreground --signal=TERM "$left" python -m EasyLM.models.llama.llama_train --flagfile=configs/demo.flags \
    "${settings[@]}" --total_steps="$steps" --save_model_freq="$steps" \
    --train_dataset.json_dataset.path="$out/answers.jsonl" \
    --train_dataset.json_dataset.tokenizer_processes="$(nproc)" \
    --train_dataset.json_dataset.batch_size="$batch" --optimizer.adamw_optimizer.lr="$rate" \
    --optimizer.adamw_optimizer.lr_warmup_steps=$((steps / 20 + 1)) --optimizer.adamw_optimizer.lr_decay_steps="$steps" \
    --logger.output_dir="$out" --logger.experiment_id=all --load_checkpoint="$start" || [ $? -eq 124 ]
python -m EasyLM.models.llama.convert_easylm_to_hf --float_dtype=bf16 --max_shard_mb=14 --output_dir="$out/model" \
    --load_checkpoint="trainstate_params::$out/all/streaming_train_state"
echo "model: $out/model (copy it to evaluation/demo_model)"
