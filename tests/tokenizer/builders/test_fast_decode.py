"""--fast_decode: what the decoder of JPEG gives at a fraction of its sides, resized; nothing else changes."""

import numpy as np
import pytest
import tokenizer_kit
from build_kit import SIDE, assert_codes_of, build_records, report_of
from PIL import Image
from tokenizer_kit import smooth_image

from tokenizer import build
from tokenizer.media import images

ORIENTATION = 0x0112  # an EXIF tag


def reduced(path, side=SIDE) -> np.ndarray:
    """Reads an image at a fraction of its sides with Pillow alone."""
    with Image.open(path) as image:
        image.draft(None, (side, side))
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))


@pytest.fixture
def photo(tmp_path):
    """A JPEG of seven times the side, with texture."""
    pixels = smooth_image(1, 7 * SIDE).astype(int) + np.random.default_rng(0).integers(-20, 20, (7 * SIDE, 7 * SIDE, 3))
    path = tmp_path / "in" / "a.jpg"
    path.parent.mkdir()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=95)
    return path


def test_it_is_close_to_the_whole_image(photo):
    whole, fast = images.read(photo, SIDE), images.read(photo, SIDE, fast_decode=True)
    np.testing.assert_array_equal(fast, reduced(photo))
    error = np.mean(np.square(whole.astype(float) - fast))
    assert 0 < error < 255**2 / 10**3  # 30 dB


def test_small_and_lossless_images_and_the_orientation_are_those_of_the_whole_image(photo, tmp_path):
    with Image.open(photo) as image:
        image.save(tmp_path / "a.png")
        image.resize((2 * SIDE - 1, 2 * SIDE - 1)).save(tmp_path / "small.jpg")
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for name in ("a.png", "small.jpg"):
        np.testing.assert_array_equal(images.read(tmp_path / name, SIDE, True), images.read(tmp_path / name, SIDE))
    turned = images.read(tmp_path / "turned.jpg", SIDE, True)
    # Rows and columns are resized one after the other, which rounds.
    np.testing.assert_allclose(turned, np.rot90(reduced(tmp_path / "turned.jpg"), -1).astype(int), atol=1)


def test_a_build_has_the_codes_of_the_fast_pixels(photo, tiny, codec, tmp_path):
    settings = {"input_dir": str(photo.parent), "output_file": f"{tmp_path}/out.jsonl", "vqgan": tiny, "batch_size": 8}
    ((tokens, _),) = build_records(
        "", tiny, tmp_path / "out.jsonl", "images", input_dir=str(photo.parent), fast_decode=True
    )
    assert_codes_of(codec, tokens, [reduced(photo)])
    assert report_of(tmp_path / "out.jsonl")["identity"]["fast_decode"] is True
    # The identity of other builds is that of versions without the flag.
    tokenizer_kit.run_main(build, **settings, workers=1)
    assert "fast_decode" not in report_of(tmp_path / "out.jsonl")["identity"]
    whole = build_records("", tiny, tmp_path / "out.jsonl", "images", input_dir=str(photo.parent))[0][0]
    assert_codes_of(codec, whole, [images.read(photo, SIDE)])
