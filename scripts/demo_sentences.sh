#!/usr/bin/env bash
# Renders images and builds visual sentences for scripts/quickstart.sh.
#
#   bash scripts/demo_sentences.sh FOLDER SEED SCENES EPOCHS PHOTOS CLIPS
#
# Writes FOLDER/pictures/... and FOLDER/*.jsonl: scenes with their annotations (EPOCHS epochs), scenes with a hole and gray
# scenes (2 epochs), photographs of scikit-image and scikit-learn (2 epochs), and clips. SCENES, PHOTOS and CLIPS are
# counts; 0 leaves them out. Each sentence has 8 images of 64 tokens: one row of 512 tokens.
# Needs the extra `quickstart`, no GPU and no download.
set -euo pipefail
out=$1 seed=$2 scenes=$3 epochs=$4 photos=$5 clips=$6
pictures=$out/pictures

python -m tokenizer.render --output_dir="$pictures" --seed="$seed" --size=32 \
    --num="$scenes" --num_photos="$photos" --num_clips="$clips" --clip_frames=8 \
    --recolour_photos=True

build() { # NAME KIND FLAGS...
    python -m tokenizer.build --kind="$2" --output_file="$out/$1.jsonl" --seed="$seed" --batch_size=64 "${@:3}"
}
if [ "$scenes" -gt 0 ]; then
    for annotation in segmentation depth normals edges; do
        build "$annotation" paired --input_dir="$pictures/image" --target_dir="$pictures/$annotation" \
            --n_shots=4 --n_epochs="$epochs"
    done
    for kind in inpainting colorization; do
        build "$kind" "$kind" --input_dir="$pictures/image" --n_shots=4 --n_epochs=2
    done
fi
if [ "$photos" -gt 0 ]; then
    build photo_color paired --input_dir="$pictures/photo_gray" --target_dir="$pictures/photo_color" --n_shots=4 --n_epochs=2
fi
if [ "$clips" -gt 0 ]; then
    build frames frames --input_dir="$pictures/frames" --n_frames=8
fi
