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
