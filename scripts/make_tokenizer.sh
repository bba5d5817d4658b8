#!/usr/bin/env bash
# Trains the small tokenizer of the quickstart: pictures of 32x32 pixels, 8x8 codes out of 1024.
# The 3000 steps took 15 minutes on two cores (50 to 75 images/s); rendering comes before that.
#   bash scripts/make_tokenizer.sh [FOLDER]     (default: build/tokenizer)
set -euo pipefail
out=${1:-build/tokenizer}

# Held out: another seed, and photographs that the training set lacks.
python -m tokenizer.render --output_dir="$out/train" --size=32 --num=3000 --num_photos=3000 --seed=1
python -m tokenizer.render --output_dir="$out/held_out" --size=32 --num=64 --num_photos=64 --seed=2 \
    --held_out_photos=True

dirs=()
for name in image segmentation depth normals edges photo_color photo_gray; do dirs+=("$out/train/$name"); done
train() { # STEPS LOCALITY_WEIGHT
    WANDB_MODE=${WANDB_MODE:-disabled} python -m tokenizer.train_vqgan \
        --input_dirs="$(IFS=,; echo "${dirs[*]}")" --eval_dirs="$out/held_out" \
        --vqgan.resolution=32 --vqgan.hidden_channels=32 --vqgan.channel_mult=1,2,3 --vqgan.num_res_blocks=1 \
        --vqgan.num_embeddings=1024 --vqgan.z_channels=32 --vqgan.quantized_embed_dim=8 \
        --vqgan.resample_with_conv=False --vqgan.norm_groups=4 \
        --total_steps="$1" --locality_weight="$2" --batch_size=16 --lr=2e-3 --lr_warmup_steps=100 \
        --average_decay=0.995 --log_freq=25 --save_model_freq=500 --logger.output_dir="$out" --logger.experiment_id=run
}
# At first codes must learn to say anything; a large weight from the start held them back (2 to 3 dB after 700 steps).
train 2200 0.1
train 3000 1.0

echo "model: $out/run/vqgan (copy it to tokenizer/pretrained); pictures: $out/run/reconstructions.png"
