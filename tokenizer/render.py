"""Pictures to learn from without a download: `python -m tokenizer.render --output_dir=D --num=200 --seed=0 --size=64`.

Writes `image/ segmentation/ depth/ normals/ edges/` (the scenes of scenes.py and their annotations, by stem),
`photo_gray/ photo_color/` (squares of real photographs) and `frames/<clip>/<number>.png` (scenes in motion). With
`--layouts=True` also what the other kinds of sentences are made from: `labels/` (ids), `classes/<shape>/`, and of the
clips `frames_depth/<clip>/`, `videos/<clip>.mp4` (needs the extra `video`) and `co3d/` (laid out as CO3D is).
"""

import concurrent.futures
import multiprocessing
import os
from functools import partial

import numpy as np
from tqdm import tqdm

from EasyLM.flags import Flag, run
from EasyLM.process_pool import exit_with_parent
from tokenizer.builders import views
from tokenizer.media import images, video_writer
from tokenizer.synthetic import photos, scenes

_SEEDS = 10**6  # room between two values of --seed, so that their pictures differ

FLAGS = {
    "output_dir": Flag("", "Folder to write into.", required=True),
    "num": Flag(100, "Scenes, each with its annotations.", least=0, most=_SEEDS - 1),
    "num_photos": Flag(0, "Squares of photographs, each in colour and in gray.", least=0, most=_SEEDS - 1),
    "num_clips": Flag(0, "Scenes in motion.", least=0, most=_SEEDS - 1),
    "clip_frames": Flag(8, "Pictures of a clip.", least=1, most=_SEEDS - 1),
    "size": Flag(64, "Side of a picture in pixels.", least=8, most=_SEEDS - 1),
    "seed": Flag(0, "Another seed gives other pictures.", least=0, most=_SEEDS - 1),
    "held_out_photos": Flag(False, "Squares of the photographs that no training set has."),
    "recolour_photos": Flag(False, "Change the colours of photographs at random."),
    "layouts": Flag(False, "Also label ids, classes, depth of clips, videos, and CO3D's layout."),
    "workers": Flag(os.cpu_count() or 1, "Worker processes.", least=1, most=_SEEDS - 1),
}


def main(config) -> None:
    """Writes the pictures."""
    photo_flags = {"held_out": config.held_out_photos, "recolour": config.recolour_photos}
    jobs = [
        *(partial(_scene, i, labels=config.layouts) for i in range(config.num)),
        *(partial(_class, i) for i in range(config.num) if config.layouts),
        *(partial(_photo, i, **photo_flags) for i in range(config.num_photos)),
        *(partial(_clip, i, frames=config.clip_frames, layouts=config.layouts) for i in range(config.num_clips)),
    ]
    jobs = [partial(job, first_seed=config.seed * _SEEDS, size=config.size, root=config.output_dir) for job in jobs]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(config.workers, spawn, exit_with_parent) as pool:
        done = pool.map(_call, jobs, chunksize=max(1, min(16, len(jobs) // (4 * config.workers))))
        for _ in tqdm(done, total=len(jobs), unit="scene", desc="rendering"):
            pass


def _call(job) -> None:
    job()


def _scene(index: int, *, labels: bool, first_seed: int, size: int, root: str) -> None:
    drawn = scenes.scene(first_seed + index, size)
    if labels:
        drawn["labels"] = scenes.label_ids(drawn["segmentation"])
    for name, picture in drawn.items():
        images.save(os.path.join(root, name, f"{index:06d}.png"), picture)


def _class(index: int, *, first_seed: int, size: int, root: str) -> None:
    """A scene of one shape only: one in thirteen is."""
    shape = scenes.SHAPES[index % len(scenes.SHAPES)]
    seeds = np.random.default_rng([first_seed + index, 13])
    while scenes.shapes(seed := int(seeds.integers(2**40))) != {shape}:
        pass
    images.save(os.path.join(root, "classes", shape, f"{index:06d}.png"), scenes.scene(seed, size)["image"])


def _photo(index: int, *, held_out: bool, recolour: bool, first_seed: int, size: int, root: str) -> None:
    colour = photos.crop(first_seed + index, size, held_out)
    if recolour:
        colour = photos.recoloured(colour, first_seed + index)
    for name, picture in {"photo_color": colour, "photo_gray": views.gray(colour)}.items():
        images.save(os.path.join(root, name, f"{index:06d}.png"), picture)


def _clip(index: int, *, frames: int, layouts: bool, first_seed: int, size: int, root: str) -> None:
    clip = scenes.clip(first_seed + index, size, frames)
    for number, moment in enumerate(clip):
        images.save(os.path.join(root, "frames", f"{index:06d}", f"{number:03d}.png"), moment["image"])
        if layouts:
            images.save(os.path.join(root, "frames_depth", f"{index:06d}", f"{number:03d}.png"), moment["depth"])
            _co3d_frame(os.path.join(root, "co3d", "scene", f"{index:06d}"), f"frame{number + 1:06d}", moment)
    if layouts:
        video = os.path.join(root, "videos", f"{index:06d}.mp4")
        video_writer.write(video, np.stack([moment["image"] for moment in clip]), fps=8)


def _co3d_frame(sequence: str, name: str, moment: dict[str, np.ndarray]) -> None:
    """Depths are float16, stored as the 16 bits of a gray picture; all of a scene's are valid."""
    solid = np.where(scenes.label_ids(moment["segmentation"]) > 0, np.uint8(255), np.uint8(0))
    depth = scenes.distances(moment["depth"]).astype(np.float16).view(np.uint16)
    images.save(os.path.join(sequence, "images", f"{name}.jpg"), moment["image"])
    images.save(os.path.join(sequence, "masks", f"{name}.png"), solid)
    images.save(os.path.join(sequence, "depths", f"{name}.jpg.geometric.png"), depth)
    images.save(os.path.join(sequence, "depth_masks", f"{name}.png"), np.ones_like(solid))


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
