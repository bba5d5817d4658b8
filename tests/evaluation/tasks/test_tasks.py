"""Tasks of folders: their examples, prompts and pixels."""

import numpy as np
import pytest
from fewshot_kit import write_pairs
from tokenizer_kit import TINY, write_image

from EasyLM.errors import UserError
from evaluation.tasks.baselines import baseline_answers
from evaluation.tasks.tasks import folder_clips, folder_pairs, load_task
from tokenizer.media import images


def test_prompts_are_indices_of_the_images_of_a_task(tmp_path):
    source, size = write_pairs(tmp_path), TINY.resolution
    task = load_task(source, shots=2, queries=3, seed=0, side=size)
    path_of_pixels = {images.load(path, size).tobytes(): path for path in tmp_path.rglob("*.png")}
    for row, answer in zip(task.prompts.images(2), task.prompts.answer_Q, strict=True):
        paths = [path_of_pixels[task.pixels[index].tobytes()] for index in (*row, answer)]
        assert [path.parent.name for path in paths] == ["image", "other"] * 3
        assert all(image.stem == annotation.stem for image, annotation in zip(paths[::2], paths[1::2], strict=True))
        assert len({path.stem for path in paths}) == 3


def test_frames_of_a_clip_are_in_natural_order(tmp_path):
    for number in (1, 2, 10, 11):
        write_image(tmp_path / "clip" / f"{number}.png", seed=number)
    (clip,) = folder_clips(str(tmp_path)).clips
    expected = [images.read(tmp_path / "clip" / f"{number}.png", 8) for number in (1, 2, 10, 11)]
    assert np.array_equal([frame(8) for frame in clip], expected)


def test_images_without_an_annotation_are_counted(tmp_path, capsys):
    write_pairs(tmp_path, 3)
    assert capsys.readouterr().out == ""
    (tmp_path / "other" / "1.png").unlink()
    source = folder_pairs(f"{tmp_path}/image", f"{tmp_path}/other", "")
    assert len(source.pairs) == 2
    expected = f"skipped 1 of 3 images of {tmp_path}/image: no annotation in {tmp_path}/other\n"
    assert capsys.readouterr().out == expected


def test_too_few_examples_are_an_error_that_names_the_task(tmp_path):
    with pytest.raises(UserError, match="other: 2 examples, too few for --n_shots=2"):
        load_task(write_pairs(tmp_path, 2), shots=2, queries=3, seed=0, side=8)


def test_baselines_equal_their_definitions(tmp_path):
    task = load_task(write_pairs(tmp_path), shots=2, queries=3, seed=0, side=TINY.resolution)
    answers = baseline_answers(task, 2)
    first, last, query = task.pixels[task.prompts.images(2)[:, [1, 3, 4]]].swapaxes(0, 1)
    assert np.array_equal(answers["copy_query"], query) and np.array_equal(answers["copy_last"], last)
    assert np.allclose(answers["mean_annotation"], (first + last) / 2)
    assert set(baseline_answers(task, 0)) == {"copy_query"}
