#!/usr/bin/env bash
# Pictures and visual sentences for the demonstration model: photographs that scikit-image and scikit-learn carry, and
# rendered scenes with exact annotations. Every sentence is 8 pictures of 64 tokens: one row of 512.
#   bash scripts/demo_sentences.sh FOLDER SEED SCENES EPOCHS    -> FOLDER/pictures/..., FOLDER/*.jsonl
set -euo pipefail
out=$1 seed=$2 scenes=$3 epochs=$4
pictures=$out/pictures

python -m tokenizer.render --output_dir="$pictures" --seed="$seed" --size=32 \
    --num="$scenes" --num_photos="$scenes" --num_clips=$((scenes / 5)) --clip_frames=8

pairs() { # INPUT TARGET
    python -m tokenizer.build --kind=paired --input_dir="$pictures/$1" --target_dir="$pictures/$2" \
        --output_file="$out/$2.jsonl" --n_shots=4 --n_epochs="$epochs" --seed="$seed" --batch_size=64
}
for annotation in segmentation depth normals edges; do
    pairs image "$annotation"
done
pairs photo_gray photo_color
python -m tokenizer.build --kind=frames --input_dir="$pictures/frames" \
    --output_file="$out/frames.jsonl" --n_frames=8 --n_epochs="$epochs" --seed="$seed" --batch_size=64
