#!/usr/bin/env bash
# Trains a small tokenizer: images of 32x32 pixels, 8x8 codes out of 1024.
#
#   bash scripts/make_tokenizer.sh cpu|gpu [FOLDER]     (default: build/tokenizer)
#
# gpu: 7000 steps of 64 images, four minutes on an H100. The result is tokenizer/pretrained; README.md there has its metrics.
# cpu: 3000 steps of 16 images, about 20 minutes on two cores that reach 50 images/s.
# Needs the extra `quickstart` and no download.
set -euo pipefail
form=${1:-} out=${2:-build/tokenizer}
case $form in
cpu) images=3000 steps=${STEPS:-3000} batch=16 lr=2e-3 warmup=100 average=0.995 ;;
gpu) images=8000 steps=${STEPS:-7000} batch=64 lr=2e-3 warmup=200 average=0.998 ;;
*)
    echo "choose the form: bash scripts/make_tokenizer.sh cpu|gpu [FOLDER]" >&2
    exit 2
    ;;
esac

# The held-out images have a different seed, and photographs that are not in the training data.
python -m tokenizer.render --output_dir="$out/train" --size=32 --num="$images" --num_photos="$images" \
    --num_flat="$((3 * images))" --seed=1
python -m tokenizer.render --output_dir="$out/held_out" --size=32 --num=64 --num_photos=64 --num_flat=64 --seed=2 \
    --held_out_photos=True

dirs=()
for name in image segmentation depth normals edges photo_color photo_gray flat; do dirs+=("$out/train/$name"); done
WANDB_MODE=${WANDB_MODE:-disabled} python -m tokenizer.train_vqgan \
    --input_dirs="$(IFS=,; echo "${dirs[*]}")" --eval_dirs="$out/held_out" \
    --vqgan.resolution=32 --vqgan.hidden_channels=32 --vqgan.channel_mult=1,2,3 --vqgan.num_res_blocks=1 \
    --vqgan.num_embeddings=1024 --vqgan.z_channels=32 --vqgan.quantized_embed_dim=8 \
    --vqgan.resample_with_conv=False --vqgan.norm_groups=4 \
    --total_steps="$steps" --locality_weight=1 --batch_size="$batch" --lr="$lr" --lr_warmup_steps="$warmup" \
    --average_decay="$average" --log_freq=100 --save_model_freq=1000 --logger.output_dir="$out" --logger.experiment_id=run

python scripts/flat_colours.py --vqgan="$out/run/vqgan"
echo "model: $out/run/vqgan; reconstructions: $out/run/reconstructions.png"
