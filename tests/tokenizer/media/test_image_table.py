"""Each view reads every file of the table as its format says. libvips agrees, or the table says why not."""

import shutil
import subprocess

import numpy as np
import pytest
from image_table import CASES, SIDE, Case
from PIL import Image

from EasyLM.errors import UserError
from evaluation.serving import Limits, uploads
from tokenizer.builders import views
from tokenizer.media import images


def write(case: Case, folder) -> str:
    (folder / case.name).write_bytes(case.content)
    return str(folder / case.name)


def test_the_table_has_a_hundred_files_and_few_disagreements():
    assert len(CASES) > 100 and sum(bool(case.vips_differs) for case in CASES.values()) < len(CASES) / 10


@pytest.mark.parametrize("name", CASES)
def test_each_view_is_what_the_format_says(tmp_path, name):
    case = CASES[name]
    path = write(case, tmp_path)
    pixels = images.read(path, SIDE)
    np.testing.assert_allclose(pixels.astype(int), case.pixels, atol=case.tolerance)
    np.testing.assert_array_equal(views.read("gray", path, SIDE, "", False), views.gray(pixels))
    if case.ids is None:
        with pytest.raises(UserError, match=f"{name}: .*label ids"):
            views.label_ids(path, SIDE)
    else:
        np.testing.assert_array_equal(views.label_ids(path, SIDE), case.ids)
    if case.ids is None or case.ids.max() < 256:
        np.testing.assert_array_equal(views.depth(path, SIDE, 1, 2), pixels)  # is an image already
        return
    near, far = int(case.ids.max()), int(case.ids.max()) // 2
    brightness = np.clip((case.ids - far) / (near - far), 0, 1)
    np.testing.assert_array_equal(views.depth(path, SIDE, near, far)[..., 0], np.round(255 * brightness))


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith((".png", ".jpg", ".webp", ".bmp", ".gif"))])
def test_uploads_are_read_as_files_are(name):
    (pixels,) = uploads.decode_images([CASES[name].content], SIDE, Limits())
    np.testing.assert_allclose(255 * pixels, CASES[name].pixels, atol=CASES[name].tolerance + 0.01)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_depth_and_its_mask_have_the_orientation_of_their_image(tmp_path, orientation):
    def read(name) -> np.ndarray:
        for folder, bits, file in (("depths", 16, "a.jpg.geometric.png"), ("depth_masks", 2, "a.png")):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / file).write_bytes(CASES[f"{name}_{bits}.png"].content)
        return views.co3d_depth(tmp_path / "depths" / "a.jpg.geometric.png", SIDE)

    upright, turned = read("turned1"), read(f"turned{orientation}")
    assert len(np.unique(upright)) > 20 and not np.array_equal(upright, upright[::-1])
    np.testing.assert_array_equal(turned, upright)


def read_with_vips(path: str, folder) -> np.ndarray | str:
    """The pixels in libvips, over white; or its error."""
    output = folder / "vips.png"
    output.unlink(missing_ok=True)
    profile = ["--eprofile", "srgb"] if "icc" in path else []  # without an embedded profile it would take its own one
    command = ["vipsthumbnail", path, "--size", f"{SIDE}x{SIDE}!", *profile, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if not output.exists():
        return done.stderr.partition("\n")[0]
    with Image.open(output) as image:
        pixels = np.asarray(image.convert("RGBA")).astype(float)
    share = pixels[..., 3:] / 255
    return np.round(pixels[..., :3] * share + 255 * (1 - share))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("vipsthumbnail"), reason="needs libvips: apt-get install libvips-tools")
def test_libvips_agrees_or_the_table_says_why(tmp_path):
    lines, unexplained = [], []
    for case in CASES.values():
        path = write(case, tmp_path)
        ours, theirs = images.read(path, SIDE), read_with_vips(path, tmp_path)
        distance = theirs if isinstance(theirs, str) else f"{np.abs(theirs - ours).max():.0f} of 255"
        agrees = not isinstance(theirs, str) and np.abs(theirs - ours).max() <= 2 * case.tolerance
        if not agrees and not case.vips_differs:
            unexplained.append(case.name)
        lines.append(f"{case.name:28} {case.says:40} {'same' if agrees else distance}  {case.vips_differs}")
    print("\n".join(["file, what its format says, distance of libvips, why", *lines]))
    assert not unexplained
