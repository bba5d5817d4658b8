"""Images of folders as training rows."""

import os

import numpy as np
import pytest
from tokenizer_kit import write_image

from EasyLM.errors import UserError
from EasyLM.training import batches
from tokenizer.media import images
from tokenizer.training import ImageRows, image_rows


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        write_image(tmp_path / "pictures" / f"{i}.png", i, 8)
    return tmp_path


def test_rows_are_a_function_of_their_number(folder):
    source = ImageRows(str(folder / "pictures"), "input_dirs", 8, seed=3)
    rows = source.rows(0, 18)["pixels"]
    np.testing.assert_array_equal(rows[4:9], source.rows(4, 5)["pixels"])
    epochs = [{row.tobytes() for row in rows[start : start + 6]} for start in (0, 6, 12)]
    assert len(epochs[0]) == 6 and epochs[0] == epochs[1] == epochs[2]
    assert not np.array_equal(rows[:6], rows[6:12])


def test_images_are_decoded_once_if_all_of_them_fit_into_memory(folder, monkeypatch):
    loaded, load = [], images.load
    monkeypatch.setattr(images, "load", lambda path, size: loaded.append(path) or load(path, size))
    source = ImageRows(str(folder / "pictures"), "input_dirs", 8, seed=3)
    cached = np.concatenate([source.rows(start, 6)["pixels"] for start in (0, 6, 12)])
    assert len(loaded) == 6
    monkeypatch.setattr(image_rows, "MAX_CACHE_BYTES", 6 * 8 * 8 * 3 * 4 - 1)
    uncached = ImageRows(str(folder / "pictures"), "input_dirs", 8, seed=3).rows(0, 18)["pixels"]
    np.testing.assert_array_equal(uncached, cached)
    assert len(loaded) == 6 + 18


def test_a_run_does_not_resume_on_other_images(folder):
    """Files of another size or name prevent a resume, even if their number is equal; modification times do not."""

    def source():
        return ImageRows(str(folder / "pictures"), "input_dirs", 8, seed=3)

    before = batches.dataset_state(source(), 4)
    file = folder / "pictures" / "2.png"
    data = file.read_bytes()
    os.utime(file, (1, 1))
    assert batches.rows_consumed(before, source()) == 4
    file.write_bytes(data + b"more")
    with pytest.raises(UserError, match="belongs to other data or another order: names_and_sizes changed"):
        batches.rows_consumed(before, source())
    file.write_bytes(data)
    file.rename(folder / "pictures" / "9.png")
    with pytest.raises(UserError, match="belongs to other data or another order: names_and_sizes changed"):
        batches.rows_consumed(before, source())


def test_the_next_image_takes_the_place_of_an_unusable_one(folder, monkeypatch):
    directory = folder / "pictures"

    def source(max_errors):
        return ImageRows(str(directory), "input_dirs", 8, seed=3, max_errors=max_errors)

    whole = source(0).rows(0, 18)["pixels"]
    with_cache = [np.flatnonzero((whole == images.load(directory / f"{i}.png", 8)).all((1, 2, 3))) for i in range(6)]
    (directory / "2.png").write_bytes(b"")
    (directory / "3.png").write_bytes(b"text")
    expected = whole.copy()
    expected[with_cache[2]] = expected[with_cache[3]] = images.load(directory / "4.png", 8)
    os.mkfifo(directory / "9.png")
    np.testing.assert_array_equal(source(3).rows(0, 18)["pixels"], expected)
    np.testing.assert_array_equal(source(3).rows(11, 5)["pixels"], expected[11:16])  # as after a resume
    monkeypatch.setattr(image_rows, "MAX_CACHE_BYTES", 0)
    np.testing.assert_array_equal(source(3).rows(0, 18)["pixels"], expected)
    with pytest.raises(UserError, match=r"[23]\.png: not a readable image.*after 2 others .--max_errors=2"):
        source(2).rows(0, 18)
    with pytest.raises(UserError, match=r"9\.png: is a pipe"):
        source(0)
    for i in range(6):
        (directory / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.png: neither this image nor any other one can be read"):
        source(99).rows(0, 6)
