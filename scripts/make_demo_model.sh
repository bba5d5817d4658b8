#!/usr/bin/env bash
# Trains the demonstration model of evaluation/demo_model from scratch, on 49 million tokens.
#
#   bash scripts/make_demo_model.sh [FOLDER]     (default: build/demo_model)
#
# Takes about 25 minutes for the data, then 68, 86 and 57 minutes for the three stages of training, on two shared CPU
# cores. Needs the extra `quickstart`, no GPU and no download.
#
# Stage 1 has two runs, with 4 layers, at half the cost of 8 layers.
#   Warm-up: clips and scenes with a hole, where a copy of the previous image predicts most of the next one. The loss drops
#   when a head of the second layer learns to attend to the same position of the previous image. Training on all sentences
#   from the start can instead teach heads to attend two images back, to the previous annotation, which predicts little of
#   the next one.
#   Then: all sentences.
# Stage 2: the same sentences, with 8 layers initialized from the 4 layers.
# Stage 3: new scenes, because the model has memorized part of the old ones, and colorization.
set -euo pipefail
out=${1:-build/demo_model}
export WANDB_MODE=${WANDB_MODE:-disabled}
bash scripts/demo_sentences.sh "$out/clips" 3 0 0 8000 6000
bash scripts/demo_sentences.sh "$out/scenes" 2 8192 3 0 0
bash scripts/demo_sentences.sh "$out/more" 4 16384 1 0 0

# Two CPU devices that split a batch are up to 25% faster than one device with two threads.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2"
train() { # EXPERIMENT LAYERS STEPS RATE ORDER FILES WEIGHTS FLAGS...
    python -m EasyLM.models.llama.llama_train --flagfile=configs/demo.flags \
        --llama.num_hidden_layers="$2" --total_steps="$3" --train_dataset.json_dataset.shuffle_seed="$5" \
        --train_dataset.json_dataset.path="$6" --train_dataset.json_dataset.weights="$7" \
        --optimizer.adamw_optimizer.lr="$4" --optimizer.adamw_optimizer.lr_decay_steps="${DECAY:-$3}" \
        --logger.output_dir="$out" --logger.experiment_id="$1" "${@:8}"
}
to_hf() { # EXPERIMENT FOLDER FLAGS...
    python -m EasyLM.models.llama.convert_easylm_to_hf \
        --load_checkpoint="trainstate_params::$out/$1/streaming_train_state" --output_dir="$out/$2" "${@:3}"
}
files=$(printf "$out/scenes/%s.jsonl," segmentation depth normals edges inpainting)
files+=$out/clips/photo_color.jsonl,$out/clips/frames.jsonl
DECAY=8000 train copy 4 400 3e-3 0 "$out/clips/frames.jsonl,$out/scenes/inpainting.jsonl" 1,1
train all 4 11000 2.5e-3 0 "$files" 4,2,2,3,2,2,3 \
    --load_checkpoint="trainstate_params::$out/copy/streaming_train_state"
to_hf all shallow
python scripts/deepen_model.py --hf_model="$out/shallow" --output_dir="$out/deepened"
train deep 8 7000 1.5e-3 5 "$files" 4,2,2,3,2,2,5 --load_checkpoint="huggingface::$out/deepened"

files=$(printf "$out/more/%s.jsonl," segmentation depth normals edges inpainting colorization)
files+=$out/clips/photo_color.jsonl,$out/clips/frames.jsonl
train last 8 5500 1.2e-3 11 "$files" 6,2,2,3,3,3,2,5 \
    --load_checkpoint="trainstate_params::$out/deep/streaming_train_state"

to_hf last model --float_dtype=bf16
echo "model: $out/model (copy it to evaluation/demo_model)"
