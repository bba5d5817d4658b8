"""The command that renders images: files, seeds, worker processes."""

import importlib.util
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tokenizer_kit import run_main

from EasyLM.errors import UserError
from tokenizer import render
from tokenizer.builders import views
from tokenizer.synthetic import layouts, photos, scenes

SECONDS = 60  # far more than any step takes


def test_render_writes_matching_stems(tmp_path):
    run_main(render, output_dir=str(tmp_path), num=2, num_photos=1, num_clips=1, clip_frames=3, size=24, workers=1)
    for name in ("image", *scenes.ANNOTATIONS):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["000000.png", "000001.png"]
    for name in ("photo_gray", "photo_color"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["000000.png"]
    assert len(list((tmp_path / "frames" / "000000").iterdir())) == 3


def test_render_writes_the_inputs_of_every_kind_of_sentence(tmp_path):
    settings = {"num": 4, "num_clips": 1, "clip_frames": 2, "size": 24, "workers": 1, "layouts": True}
    run_main(render, output_dir=str(tmp_path), **settings)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    sequence = "co3d/scene/000000"
    assert {name for name in files if name.split("/")[0] not in ("image", *scenes.ANNOTATIONS)} == {
        *(f"labels/{i:06d}.png" for i in range(4)),
        *(f"classes/{shape}/{i:06d}.png" for i, shape in enumerate(layouts.SHAPES)),
        *(f"{name}/000000/{i:03d}.png" for name in ("frames", "frames_depth") for i in range(2)),
        *(f"{sequence}/images/frame{i:06d}.jpg" for i in (1, 2)),
        *(f"{sequence}/{name}/frame{i:06d}.png" for name in ("masks", "depth_masks") for i in (1, 2)),
        *(f"{sequence}/depths/frame{i:06d}.jpg.geometric.png" for i in (1, 2)),
        "videos/000000.mp4",
    }
    for i in range(4):
        segmentation = scenes.scene(i, 24)["segmentation"]
        ids = views.label_ids(tmp_path / "labels" / f"{i:06d}.png", 24)
        table = np.array([scenes.BACKGROUND, *(scenes.PALETTE[shape] for shape in layouts.SHAPES)])
        assert np.array_equal(table[ids], segmentation) and ids.max() > 0
    # CO3D's depth images range from the nearest to the farthest point; scale the scene's depth in the same way.
    own = scenes.clip(0, 24, 1)[0]["depth"][..., 0].astype(float)
    stored = views.co3d_depth(tmp_path / sequence / "depths" / "frame000001.jpg.geometric.png", 24)[..., 0]
    expected = 255 * (0.2 + 0.8 * (own - own.min()) / np.ptp(own))
    assert np.abs(stored - expected).max() < 1.5


@pytest.mark.parametrize(
    "package, values, message",
    [
        ("skimage", {"num_photos": 1}, r"^--num_photos=1 needs the package skimage"),
        ("sklearn", {"num_photos": 1}, r"^--num_photos=1 needs the package sklearn"),
        (
            "av",
            {"num_clips": 1, "layouts": True},
            r"^--layouts=True needs the package av",
        ),
    ],
)
def test_a_missing_package_is_named_before_anything_is_rendered(tmp_path, monkeypatch, package, values, message):
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else installed(name))
    with pytest.raises(UserError, match=message):
        run_main(render, output_dir=f"{tmp_path}/out", num=1, **values)
    assert not (tmp_path / "out").exists()


def test_render_recolours_photographs(tmp_path):
    settings = {"num": 0, "num_photos": 2, "size": 24, "workers": 1, "recolour_photos": True}
    run_main(render, output_dir=str(tmp_path), **settings)
    rendered = np.asarray(Image.open(tmp_path / "photo_color" / "000001.png"))
    assert np.array_equal(rendered, photos.recolour(photos.crop(1, 24), 1))


@pytest.mark.parametrize("seed", [500, 900, 999])
def test_render_rejects_reserved_seeds(tmp_path, seed):
    with pytest.raises(UserError, match=rf"--seed={seed}: scenes {seed},000,000\.\..* are reserved.*0\.\.499"):
        run_main(render, output_dir=str(tmp_path), num=1, size=8, workers=1, seed=seed)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_worker_processes_exit_when_render_is_killed(tmp_path):
    """The error stream ends when the last process that holds it exits."""
    command = [sys.executable, "-m", "tokenizer.render", f"--output_dir={tmp_path}", "--num=100000", "--workers=2"]
    renderer = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + SECONDS
    while not list(tmp_path.glob("image/*.png")):
        assert time.monotonic() < deadline and renderer.poll() is None
        time.sleep(0.05)
    renderer.kill()
    renderer.communicate(timeout=SECONDS)
