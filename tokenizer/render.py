"""Pictures to learn from without a download: `python -m tokenizer.render --output_dir=D --num=200 --seed=0 --size=64`.

Writes `image/ segmentation/ depth/ normals/ edges/` (the scenes of scenes.py and their annotations, by stem),
`photo_gray/ photo_color/` (squares of real photographs) and `frames/<clip>/<number>.png` (scenes in motion).
"""

import concurrent.futures
import multiprocessing
import os
from functools import partial

from tqdm import tqdm

from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from tokenizer import images, photos, pictures, scenes

_SEEDS = 10**6  # room between two values of --seed, so that their pictures differ

FLAGS = {
    "output_dir": Flag("", "Folder to write into."),
    "num": Flag(100, "Scenes, each with its annotations."),
    "num_photos": Flag(0, "Squares of photographs, each in colour and in gray."),
    "num_clips": Flag(0, "Scenes in motion."),
    "clip_frames": Flag(8, "Pictures of a clip."),
    "size": Flag(64, "Side of a picture in pixels."),
    "seed": Flag(0, "Another seed gives other pictures."),
    "held_out_photos": Flag(False, "Squares of the photographs that no training set has."),
    "workers": Flag(os.cpu_count() or 1, "Processes."),
}


def main(config) -> None:
    """Writes the pictures."""
    if not config.output_dir:
        raise UserError("--output_dir is missing")
    least = {"num": 0, "num_photos": 0, "num_clips": 0, "clip_frames": 1, "size": 8, "seed": 0, "workers": 1}
    for name, value in least.items():
        if not value <= config[name] < _SEEDS:
            raise UserError(f"--{name}={config[name]}: must be {value}..{_SEEDS - 1}")
    jobs = [
        *(partial(_scene, i) for i in range(config.num)),
        *(partial(_photo, i, held_out=config.held_out_photos) for i in range(config.num_photos)),
        *(partial(_clip, i, frames=config.clip_frames) for i in range(config.num_clips)),
    ]
    jobs = [partial(job, first_seed=config.seed * _SEEDS, size=config.size, root=config.output_dir) for job in jobs]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(config.workers, spawn) as pool:
        done = pool.map(_call, jobs, chunksize=max(1, min(16, len(jobs) // (4 * config.workers))))
        for _ in tqdm(done, total=len(jobs), unit="scene", desc="rendering"):
            pass


def _call(job) -> None:
    job()


def _scene(index: int, *, first_seed: int, size: int, root: str) -> None:
    for name, picture in scenes.scene(first_seed + index, size).items():
        images.save(os.path.join(root, name, f"{index:06d}.png"), picture)


def _photo(index: int, *, held_out: bool, first_seed: int, size: int, root: str) -> None:
    colour = photos.crop(first_seed + index, size, held_out)
    for name, picture in {"photo_color": colour, "photo_gray": pictures.gray(colour)}.items():
        images.save(os.path.join(root, name, f"{index:06d}.png"), picture)


def _clip(index: int, *, frames: int, first_seed: int, size: int, root: str) -> None:
    for number, moment in enumerate(scenes.clip(first_seed + index, size, frames)):
        images.save(os.path.join(root, "frames", f"{index:06d}", f"{number:03d}.png"), moment["image"])


if __name__ == "__main__":
    run(main, FLAGS)
