"""The perceptual hash of an image is that of other programs, and survives resizing and compression."""

import hashlib

import numpy as np
import pytest
import scipy.fft
from bench_filter import photograph
from PIL import Image

from tokenizer.filter import measuring
from tokenizer.filter.listing import Entry


def _measured(path, scores=()):
    (measured,) = measuring.measure([Entry("x", str(path), "")], scores)
    return measured


def _distance(one, other) -> int:
    return (int(one["phash"], 16) ^ int(other["phash"], 16)).bit_count()


def test_the_perceptual_hash_is_that_of_imagehash(tmp_path):
    """imagehash resizes the gray image itself, so that bits near the median can differ."""
    for seed in range(5):
        luminance_SS = photograph(32, seed).mean(axis=2)
        low_KK = scipy.fft.dct(scipy.fft.dct(luminance_SS, axis=0), axis=1)[:8, :8]
        bits = "".join("01"[bit] for bit in (low_KK > np.median(low_KK)).flatten().astype(int))
        assert f"{measuring.perceptual_hash(luminance_SS):064b}" == bits
        image = Image.fromarray(photograph(200, seed))
        image.save(tmp_path / "a.png")
        resized_SS = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
        theirs = measuring.perceptual_hash(resized_SS)
        assert (int(_measured(tmp_path / "a.png")["phash"], 16) ^ theirs).bit_count() <= 2


@pytest.mark.parametrize("seed", range(5))
def test_a_resized_or_compressed_copy_has_a_near_hash_and_another_image_a_distant_one(tmp_path, seed):
    image = Image.fromarray(photograph(300, seed))
    image.save(tmp_path / "a.png")
    image.resize((150, 120)).save(tmp_path / "small.webp")
    image.save(tmp_path / "a.jpg", quality=30)  # decoded at 1/4 of its size
    Image.fromarray(photograph(300, seed + 9)).save(tmp_path / "other.png")
    first = _measured(tmp_path / "a.png")
    assert _distance(first, _measured(tmp_path / "small.webp")) <= 2
    assert _distance(first, _measured(tmp_path / "a.jpg")) <= 2
    assert _distance(first, _measured(tmp_path / "other.png")) >= 16


def test_sides_size_contrast_and_digests(tmp_path):
    path = tmp_path / "half.png"
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 64:] = 200
    Image.fromarray(pixels).save(path)
    measured = _measured(path)
    data = path.read_bytes()
    assert (measured["width"], measured["height"], measured["bytes"]) == (128, 64, len(data))
    assert measured["contrast"] == pytest.approx(100, abs=3)  # half 0, half 200, a blurred edge
    assert measured["sha256"] == hashlib.sha256(data).hexdigest() and measured["md5"] == hashlib.md5(data).hexdigest()
    Image.new("RGB", (128, 64), (7, 90, 200)).save(path)
    uniform = _measured(path)
    assert uniform["contrast"] == 0 and uniform["phash"] is None


def test_an_image_that_cannot_be_read_gives_the_reason(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"text")
    assert "bad.png: not a readable image" in _measured(tmp_path / "bad.png")
    assert "gone.png: no such file" in _measured(tmp_path / "gone.png")
