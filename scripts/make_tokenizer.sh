#!/usr/bin/env bash
# Trains the small tokenizer of tokenizer/pretrained: images of 32x32 pixels, 8x8 codes out of 1024.
#
#   bash scripts/make_tokenizer.sh [FOLDER]     (default: build/tokenizer)
#
# Renders the images, then trains for 3000 steps: 15 minutes on two CPU cores (50 to 75 images/s).
# Needs the extra `quickstart`, no GPU and no download.
set -euo pipefail
out=${1:-build/tokenizer}

# The held-out images have a different seed, and photographs that are not in the training data.
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
# The weight is small at first: a large weight from the start costs 2 to 3 dB of PSNR after 700 steps.
train 2200 0.1
train 3000 1.0

echo "model: $out/run/vqgan (copy it to tokenizer/pretrained); reconstructions: $out/run/reconstructions.png"
