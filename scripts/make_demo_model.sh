#!/usr/bin/env bash
# Trains the demonstration model that ships in evaluation/demo_model, from nothing: 14.7 million tokens, 97 minutes on two cores
# of which others used the larger part; data before that about 10 minutes. More steps make it better still.
#   bash scripts/make_demo_model.sh [FOLDER]     (default: build/demo_model)
#
# First comes what a copy of an earlier picture explains: clips, and scenes with a hole. After 300 steps the loss falls at
# once, when a head of the second layer has learned to attend to the same place of the picture before. Begun with all
# sentences, heads first attend to the same place two pictures back, where the last annotation is, which explains little
# of an annotation: after 2,100 steps the model still drew the empty room.
set -euo pipefail
out=${1:-build/demo_model}
export WANDB_MODE=${WANDB_MODE:-disabled}
bash scripts/demo_sentences.sh "$out/clips" 1 0 0 2500 500
bash scripts/demo_sentences.sh "$out/scenes" 2 7296 3 0 0

train() { # EXPERIMENT STEPS DECAY_STEPS RATE ORDER FILES FLAGS...
    python -m EasyLM.models.llama.llama_train \
        --load_llama_config=json::scripts/demo_model.json --total_steps="$2" --log_freq=50 --save_model_freq=200 \
        --train_dataset.json_dataset.path="$6" --train_dataset.text_processor.fields='{tokens}' \
        --train_dataset.json_dataset.seq_length=512 --train_dataset.json_dataset.batch_size=2 \
        --train_dataset.json_dataset.shuffle_seed="$5" \
        --optimizer.adamw_optimizer.lr="$4" --optimizer.adamw_optimizer.end_lr=3e-5 \
        --optimizer.adamw_optimizer.lr_warmup_steps=50 --optimizer.adamw_optimizer.lr_decay_steps="$3" \
        --optimizer.adamw_optimizer.weight_decay=0.01 --checkpointer.save_optimizer_state=True \
        --logger.output_dir="$out" --logger.experiment_id="$1" "${@:7}"
}
all=$(ls "$out"/clips/*.jsonl "$out"/scenes/*.jsonl | paste -sd,)
colours=$out/clips/photo_color.jsonl
train copy 400 8000 3e-3 0 "$out/clips/frames.jsonl,$out/scenes/inpainting.jsonl"
train all 4800 4800 2.5e-3 0 "$all" --load_checkpoint="trainstate_params::$out/copy/streaming_train_state"
train again 2700 2700 2e-3 1 "$all,$colours,$colours" \
    --load_checkpoint="trainstate_params::$out/all/streaming_train_state"
train last 6500 6500 2e-3 2 "$all,$colours,$colours" \
    --load_checkpoint="trainstate_params::$out/again/streaming_train_state"

python -m EasyLM.models.llama.convert_easylm_to_hf --float_dtype=bf16 \
    --load_checkpoint="trainstate_params::$out/last/streaming_train_state" --output_dir="$out/model"
echo "model: $out/model (copy it to evaluation/demo_model)"
