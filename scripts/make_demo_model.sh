#!/usr/bin/env bash
# Trains the demonstration model that ships in evaluation/demo_model, from nothing.
# 1,200 steps took 28 minutes on two busy cores; data before that about 10.
#   bash scripts/make_demo_model.sh [FOLDER]     (default: build/demo_model)
set -euo pipefail
out=${1:-build/demo_model}
bash scripts/demo_sentences.sh "$out/data" 1 3000 4
files=$(ls "$out"/data/*.jsonl | paste -sd,)

WANDB_MODE=${WANDB_MODE:-disabled} python -m EasyLM.models.llama.llama_train \
    --load_llama_config=json::scripts/demo_model.json --total_steps=1200 --log_freq=20 --save_model_freq=200 \
    --train_dataset.json_dataset.path="$files" --train_dataset.text_processor.fields='{tokens}' \
    --train_dataset.json_dataset.seq_length=512 --train_dataset.json_dataset.batch_size=8 \
    --train_dataset.json_dataset.shuffle_seed=0 \
    --optimizer.adamw_optimizer.lr=2e-3 --optimizer.adamw_optimizer.end_lr=1e-4 \
    --optimizer.adamw_optimizer.lr_warmup_steps=100 --optimizer.adamw_optimizer.lr_decay_steps=1200 \
    --optimizer.adamw_optimizer.weight_decay=0.01 --checkpointer.save_optimizer_state=True \
    --logger.output_dir="$out" --logger.experiment_id=run

python -m EasyLM.models.llama.convert_easylm_to_hf --float_dtype=bf16 \
    --load_checkpoint="trainstate_params::$out/run/streaming_train_state" --output_dir="$out/model"
echo "model: $out/model (copy it to evaluation/demo_model)"
