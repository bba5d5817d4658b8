#!/usr/bin/env bash
# Trains models of three sizes on the same number of sentences and prints their loss on held-out scenes and clips.
#
#   bash scripts/demo_sizes.sh DATA_FOLDER [FOLDER] [STEPS]     (defaults: build/demo_sizes, 1200)
#
# Takes 12 minutes on two CPU cores. DATA_FOLDER is the output folder of make_demo_model.sh; only its sentences are needed.
set -euo pipefail
data=$1 out=${2:-build/demo_sizes} steps=${3:-1200}
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2" # as in make_demo_model.sh
export WANDB_MODE=${WANDB_MODE:-disabled}
# 208 sentences: 26 evaluation steps of 8 rows measure each one once. Photographs are left out, because the training
# data has crops of the same photographs.
[ -e "$out/held_out/frames.jsonl" ] || bash scripts/demo_sentences.sh "$out/held_out" 103 96 1 0 16

for size in 64,176,2,2 96,256,3,3 128,384,4,4; do
    IFS=, read -r width inner layers heads <<<"$size"
    python -m EasyLM.models.llama.llama_train --flagfile=configs/demo.flags --llama.hidden_size="$width" \
        --llama.intermediate_size="$inner" --llama.num_hidden_layers="$layers" --llama.num_attention_heads="$heads" \
        --total_steps="$steps" --log_freq="$steps" --save_model_freq="$steps" --eval_steps=26 \
        --train_dataset.json_dataset.path="$data/clips/*.jsonl,$data/scenes/*.jsonl" \
        --eval_dataset.json_dataset.path="$out/held_out/*.jsonl" --eval_dataset.text_processor.fields='{tokens}' \
        --eval_dataset.json_dataset.seq_length=512 --eval_dataset.json_dataset.batch_size=8 \
        --optimizer.adamw_optimizer.lr=3e-3 --optimizer.adamw_optimizer.lr_decay_steps="$steps" \
        --checkpointer.save_optimizer_state=False --logger.output_dir="$out" --logger.experiment_id="width_$width"
    echo "width $width, $layers layers: $(tail -1 "$out/width_$width/metrics.jsonl")"
done
