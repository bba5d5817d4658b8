"""Renders synthetic images: `python -m tokenizer.render --output_dir=D --num=200 --seed=0 --size=64`.

Writes `image/ segmentation/ depth/ normals/ edges/` (scenes and their annotations, matched by stem), `photo_gray/
photo_color/` (crops of photographs), `flat/` (flat areas in the 64 colours of `synthetic.palette`) and
`frames/<clip>/<number>.png` (scenes in motion). `--layouts=True` adds the inputs of the other kinds of sentences:
`labels/` (ids), `classes/<shape>/`, and for each clip `frames_depth/<clip>/`, `videos/<clip>.mp4` (needs the extra
`video`) and `co3d/` (CO3D's layout).
"""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable
from functools import partial

import numpy as np
from ml_collections import ConfigDict

from EasyLM.errors import check_installed, prefix_errors
from EasyLM.flags import Flag, run
from EasyLM.process_pool import available_cores, exit_with_parent
from EasyLM.progress import progress
from EasyLM.storage import lock_output_folder
from tokenizer.builders import views
from tokenizer.media import images, video_writer
from tokenizer.synthetic import layouts, palette, photos, scenes, seed_ranges

_MAX = seed_ranges.SEEDS_PER_BLOCK - 1

FLAGS = {
    "output_dir": Flag("", "Folder to write into.", required=True),
    "num": Flag(100, "Scenes, each with its annotations.", least=0, most=_MAX),
    "num_photos": Flag(0, "Crops of photographs, each in colour and in gray.", least=0, most=_MAX),
    "num_flat": Flag(0, "Images of flat areas with sharp edges.", least=0, most=_MAX),
    "num_clips": Flag(0, "Scenes in motion.", least=0, most=_MAX),
    "clip_frames": Flag(8, "Frames of a clip.", least=1, most=_MAX),
    "size": Flag(64, "Side of an image in pixels.", least=8, most=_MAX),
    "seed": Flag(
        0,
        f"Different seeds give different images; {seed_ranges.FIRST_HELD_OUT} and above are reserved for test sets.",
        least=0,
    ),
    "held_out_photos": Flag(False, "Crop the held-out photographs instead of the training ones."),
    "recolour_photos": Flag(False, "Change the colours of photographs at random."),
    "layouts": Flag(False, "Also write label ids, classes, depths of clips, videos, and clips in CO3D's layout."),
    "workers": Flag(available_cores(), "Worker processes.", least=1, most=_MAX),
}


def main(config: ConfigDict) -> None:
    """Renders all images in worker processes."""
    with prefix_errors(f"--seed={config.seed}"):
        first_seed = seed_ranges.training_seed(config.seed)
    if config.num_photos:
        photos.check_available(f"--num_photos={config.num_photos}")
    if config.layouts and config.num_clips:
        check_installed("--layouts=True", "video", "av")
    photo_settings = {"held_out": config.held_out_photos, "recolour": config.recolour_photos}
    jobs = [
        *(partial(_scene, i, labels=config.layouts) for i in range(config.num)),
        *(partial(_class, i) for i in range(config.num) if config.layouts),
        *(partial(_photo, i, **photo_settings) for i in range(config.num_photos)),
        *(partial(_flat, i) for i in range(config.num_flat)),
        *(partial(_clip, i, frames=config.clip_frames, extra=config.layouts) for i in range(config.num_clips)),
    ]
    jobs = [partial(job, first_seed=first_seed, size=config.size, root=config.output_dir) for job in jobs]
    spawn = multiprocessing.get_context("spawn")
    with (
        lock_output_folder(config.output_dir, "output_dir"),
        concurrent.futures.ProcessPoolExecutor(config.workers, spawn, exit_with_parent) as pool,
    ):
        results = pool.map(_call, jobs, chunksize=max(1, min(16, len(jobs) // (4 * config.workers))))
        for _ in progress(results, total=len(jobs), unit="scene", desc="rendering"):
            pass


def _call(job: Callable[[], None]) -> None:
    job()


def _scene(index: int, *, labels: bool, first_seed: int, size: int, root: str) -> None:
    scene_images = scenes.scene(first_seed + index, size)
    if labels:
        scene_images["labels"] = scenes.label_ids(scene_images["segmentation"])
    for name, pixels in scene_images.items():
        images.save(os.path.join(root, name, f"{index:06d}.png"), pixels)


def _class(index: int, *, first_seed: int, size: int, root: str) -> None:
    """Renders a scene whose solids all have one shape; about one layout in thirteen qualifies."""
    shape = layouts.SHAPES[index % len(layouts.SHAPES)]
    seeds = np.random.default_rng([first_seed + index, 13])
    while True:
        seed = int(seeds.integers(2**40))
        if {solid.shape for solid in layouts.seeded_layout(seed).solids} == {shape}:
            break
    images.save(os.path.join(root, "classes", shape, f"{index:06d}.png"), scenes.scene(seed, size)["image"])


def _photo(index: int, *, held_out: bool, recolour: bool, first_seed: int, size: int, root: str) -> None:
    colour = photos.crop(first_seed + index, size, held_out)
    if recolour:
        colour = photos.recolour(colour, first_seed + index)
    for name, pixels in {"photo_color": colour, "photo_gray": views.gray(colour)}.items():
        images.save(os.path.join(root, name, f"{index:06d}.png"), pixels)


def _flat(index: int, *, first_seed: int, size: int, root: str) -> None:
    images.save(os.path.join(root, "flat", f"{index:06d}.png"), palette.flat_image(first_seed + index, size))


def _clip(index: int, *, frames: int, extra: bool, first_seed: int, size: int, root: str) -> None:
    clip = scenes.clip(first_seed + index, size, frames)
    for number, scene_images in enumerate(clip):
        images.save(os.path.join(root, "frames", f"{index:06d}", f"{number:03d}.png"), scene_images["image"])
        if extra:
            images.save(os.path.join(root, "frames_depth", f"{index:06d}", f"{number:03d}.png"), scene_images["depth"])
            _co3d_frame(os.path.join(root, "co3d", "scene", f"{index:06d}"), f"frame{number + 1:06d}", scene_images)
    if extra:
        video = os.path.join(root, "videos", f"{index:06d}.mp4")
        video_writer.write(video, np.stack([scene_images["image"] for scene_images in clip]), fps=8)


def _co3d_frame(sequence: str, name: str, scene_images: dict[str, np.ndarray]) -> None:
    """Writes a frame in CO3D's layout: float16 depths as the bits of a 16-bit gray image, all of them valid."""
    is_solid = np.where(scenes.label_ids(scene_images["segmentation"]) > 0, np.uint8(255), np.uint8(0))
    depth = scenes.depth_to_distance(scene_images["depth"]).astype(np.float16).view(np.uint16)
    images.save(os.path.join(sequence, "images", f"{name}.jpg"), scene_images["image"])
    images.save(os.path.join(sequence, "masks", f"{name}.png"), is_solid)
    images.save(os.path.join(sequence, "depths", f"{name}.jpg.geometric.png"), depth)
    images.save(os.path.join(sequence, "depth_masks", f"{name}.png"), np.ones_like(is_solid))


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
