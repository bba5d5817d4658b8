#!/usr/bin/env bash
# Runs the complete pipeline on a CPU: images -> visual sentences -> training -> Hugging Face export -> few-shot prompts.
#
#   bash scripts/quickstart.sh [FOLDER]     (default: runs/quickstart)
#
# Takes three to ten minutes after the installation. Needs Python 3.11 or newer; scripts/setup.sh installs the rest.
# Training starts from evaluation/demo_model and continues on newly rendered images. QUICKSTART_STEPS=20 shortens it. The
# answers are about as good as those of evaluation/demo_model, which knows these tasks.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
. "${VENV:-.venv}/bin/activate"
out=${1:-runs/quickstart}
steps=${QUICKSTART_STEPS:-40}
scenes=$((steps * 4))
rm -rf "$out/model"
export WANDB_MODE=${WANDB_MODE:-disabled}

echo "== 1. Render images, build visual sentences"
bash scripts/demo_sentences.sh "$out/data" 100 "$scenes" 1 "$scenes" $((scenes / 5))
python -m tokenizer.mix --inputs="$out/data/*.jsonl" --answers_only=True --output_file="$out/train.jsonl"
python -m tokenizer.detokenize --input_file="$out/data/depth.jsonl" --output_dir="$out/sentences" --limit=3

echo "== 2. Continue training from evaluation/demo_model"
python -m EasyLM.models.llama.llama_train --flagfile=configs/demo_finetune.flags --total_steps="$steps" \
    --optimizer.adamw_optimizer.lr=3e-5 --optimizer.adamw_optimizer.lr_decay_steps="$steps" --save_model_freq="$steps" \
    --train_dataset.json_dataset.path="$out/train.jsonl" --logger.output_dir="$out" \
    --logger.experiment_id="run_$(date +%s)"
run=$(ls -td "$out"/run_* | head -1)

echo "== 3. Export to Hugging Face"
python -m EasyLM.models.llama.convert_easylm_to_hf \
    --load_checkpoint="params::$run/streaming_params" --output_dir="$out/model"

echo "== 4. Evaluate few-shot prompts on held-out scenes and photographs"
held_out=$out/held_out
python -m tokenizer.render --output_dir="$held_out" --seed=101 --size=32 --num=24 --num_photos=24 --num_clips=24 \
    --clip_frames=8 --held_out_photos=True
python -m evaluation.fewshot --checkpoint="$out/model" --n_shots=0,1,3 --n_queries=16 \
    --input_dirs="$held_out/image,$held_out/image,$held_out/image,$held_out/image,$held_out/photo_gray" \
    --target_dirs="$held_out/segmentation,$held_out/depth,$held_out/normals,$held_out/edges,$held_out/photo_color" \
    --figures=scene_iou,depth_abs_rel,normal_degrees,edge_f_score, --clip_dirs="$held_out/frames" \
    --output_json="$out/figures.json" --output_plot="$out/curves.png" --output_picture="$out/answers.png"
