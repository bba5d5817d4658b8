"""Example prompts, their files and true answers, and the strips that visitors download."""

import dataclasses

import numpy as np
import pytest
from serve_kit import bomb, png

from EasyLM.errors import UserError
from evaluation.page import examples, strip
from evaluation.page import files as page_files
from evaluation.page.files import LIMITS, ExampleFiles
from evaluation.page.handlers import PromptFiles
from evaluation.page.pictures import enlarged
from tokenizer.media import images
from tokenizer.synthetic import scenes
from tokenizer.synthetic.seed_ranges import page_example_seed

SIZE = 12


@pytest.fixture(scope="module")
def analogies():
    return examples.analogies(SIZE)


@pytest.fixture(scope="module")
def sequence():
    return examples.sequences(SIZE, count=1)[0]


def test_examples_are_prompts_of_one_length(monkeypatch, analogies, sequence):
    names = ["segmentation", "depth", "normals", "edges", "inpainting", "colours"]
    assert [example.name for example in analogies] == names
    assert {example.images.shape for example in [*analogies, sequence]} == {(7, SIZE, SIZE, 3)}
    assert {example.truth.shape for example in analogies} == {(1, SIZE, SIZE, 3)}

    def raise_not_installed(*arguments, **options):
        raise UserError("not installed")

    monkeypatch.setattr("tokenizer.synthetic.photos.crop", raise_not_installed)
    assert len(examples.analogies(8)) == 5


def test_the_hole_of_an_inpainting_example_is_what_the_truth_fills(analogies):
    inpainting = analogies[4]
    *_, masked = inpainting.images
    has_hole = (masked != inpainting.truth[0]).any(-1)
    assert 0 < has_hole.mean() < 0.5 and (masked[has_hole] == 0).all()


def test_the_truth_of_an_analogy_is_known_for_its_query_after_its_own_pairs(analogies):
    example, other = analogies[:2]
    assert example.truth_after(example.images) is example.truth
    assert example.truth_after(example.images[[2, 3, 6]]) is example.truth
    assert example.truth_after(np.concatenate([example.images[:6], other.images[-1:]])) is None  # another query
    assert example.truth_after(np.concatenate([other.images[:6], example.images[-1:]])) is None  # another task
    assert example.truth_after(example.images[[0, 3, 6]]) is None  # an answer to another image
    assert example.truth_after(example.images[:6]) is None


def test_the_truth_of_a_sequence_is_the_rest_of_its_clip(sequence):
    clip = np.stack([frame["image"] for frame in scenes.clip(page_example_seed(1000), SIZE, 15)])
    np.testing.assert_array_equal(sequence.truth_after(clip[:7]), clip[7:])
    np.testing.assert_array_equal(sequence.truth_after(clip[2:5]), clip[5:])
    assert sequence.truth_after(clip[[0, 2]]) is None and sequence.truth_after(clip[[1, 0]]) is None


def test_files_of_examples_are_read_without_loss(tmp_path, analogies):
    files = ExampleFiles(analogies, tmp_path, "analogy")
    assert [caption for _, caption in files.sheets] == [example.name for example in analogies]
    prompt = PromptFiles.read(files.save(3), SIZE, files)
    np.testing.assert_array_equal(prompt.images, analogies[3].images)
    np.testing.assert_array_equal(prompt.shown, enlarged(analogies[3].images))
    assert prompt.shown.shape == (7, 264, 264, 3)  # the least multiple of 12 from 256 on
    assert prompt.truth is analogies[3].truth
    images.save(tmp_path / "own.png", analogies[3].images[0] // 2)
    replaced = PromptFiles.read([str(tmp_path / "own.png"), *files.save(3)[1:]], SIZE, files)
    assert replaced.truth is None
    np.testing.assert_array_equal(replaced.images[0], analogies[3].images[0] // 2)


def coloured(*values: int) -> np.ndarray:
    """Returns an image of 256 pixels and one colour for each value. No colour is gray, as text is."""
    return np.stack([np.full((256, 256, 3), (value, 0, 200), np.uint8) for value in values])


def corner(picture: np.ndarray, value: int) -> tuple[int, int]:
    """Returns where the image of this colour is, and asserts that it is whole."""
    top, left = np.argwhere((picture == (value, 0, 200)).all(-1)).min(0)
    np.testing.assert_array_equal(picture[top : top + 256, left : left + 256], coloured(value)[0])
    return int(top), int(left)


def test_a_strip_has_each_answer_below_its_example_and_a_label_above_each_image():
    prompt, truth, answer = coloured(10, 20, 30, 40, 50), coloured(60), coloured(70, 80)[:, None]
    rows = [*strip.prompt_rows(prompt, is_analogy=True), *strip.answer_rows(answer, truth)]
    labels = [[label for label, _ in row] for row in rows]
    assert labels == [
        ["Example 1", "Example 2", "Query"],
        ["Answer 1", "Answer 2"],
        ["Truth", "Candidate 1", "Candidate 2"],
    ]
    picture = strip.labelled_strip(rows, "seed 0")
    tops, lefts = np.array([corner(picture, value) for value in (10, 30, 50, 20, 40, 60, 70, 80)]).T
    assert len(set(tops)) == 3 and list(tops) == sorted(tops) and len(set(lefts)) == 3
    assert list(lefts[:3]) == list(lefts[5:]) == sorted(lefts[:3]) and list(lefts[3:5]) == list(lefts[:2])
    for top, left in zip(tops, lefts, strict=True):
        label = picture[top - 36 : top, left : left + 256]
        assert label.min() < 60 and (label == 255).all(-1).mean() > 0.5
    blank = strip.labelled_strip(rows, "")
    assert (picture[:40] != blank[:40]).any() and (picture[60:] == blank[60:]).all()


def test_a_strip_of_frames_has_a_line_for_each_candidate_and_breaks_long_rows():
    answer = coloured(70, 80, 90, 100).reshape(2, 2, 256, 256, 3)
    rows = strip.answer_rows(answer, coloured(40, 50, 60))
    labels = [[label for label, _ in row] for row in rows]
    assert labels[0] == ["Truth, frame 1", "Truth, frame 2"]
    assert labels[2] == ["Candidate 2, frame 1", "Candidate 2, frame 2"]
    assert [len(row) for row in strip.answer_rows(answer, None)] == [2, 2]
    frames = strip.prompt_rows(coloured(*range(10)), is_analogy=False)
    picture = strip.labelled_strip([*frames, *rows], "t" * 1000)
    (first, _), (last, _), (truth, _) = (corner(picture, value) for value in (7, 8, 40))
    assert (picture[:40, -12:] == 255).all() and picture[:40].min() < 120  # the title is shortened
    assert first < last < truth and picture.shape[1] < 9 * 280


def test_only_files_of_the_page_are_read(tmp_path, analogies):
    """Otherwise a visitor could look at any image of the server: gradio does not check the paths of all requests."""
    folder = tmp_path / "page"
    folder.mkdir()
    files = ExampleFiles(analogies[:1], folder, "analogy")
    images.save(tmp_path / "private.png", analogies[0].images[0])
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    for path in (
        tmp_path / "private.png",
        folder / ".." / "private.png",
        folder / "link.png",
        folder / "gone.png",
        folder,
    ):
        with pytest.raises(UserError, match="no longer stored"):
            PromptFiles.read([str(path)], SIZE, files)
    (folder / "text.png").write_text("no image")
    for other, label in ((files.save(0)[0], "Answer 1"), (str(folder / "text.png"), "Example 1")):
        with pytest.raises(UserError, match=f"^{label}: not a readable image"):
            PromptFiles.read([other, str(folder / "text.png"), files.save(0)[2]], SIZE, files)


def test_limits_are_those_of_an_image_and_errors_name_its_slot(tmp_path, monkeypatch, analogies):
    """The photographs of a prompt have more pixels than one image may have."""
    files = ExampleFiles(analogies[:1], tmp_path, "analogy")
    (tmp_path / "photo.png").write_bytes(png(0, 50))
    photos = [str(tmp_path / "photo.png")] * 3
    with monkeypatch.context() as patch:
        patch.setattr(page_files, "LIMITS", dataclasses.replace(LIMITS, pixels=2 * 50**2))
        assert PromptFiles.read(photos, SIZE, files).images.shape == (3, SIZE, SIZE, 3)
    (tmp_path / "bomb.png").write_bytes(bomb(8001, 8000))
    (tmp_path / "large.png").write_bytes(bytes(LIMITS.body_bytes + 1))
    cases = [("bomb.png", "an image has at most 64 million pixels"), ("large.png", "an image file has at most 16 MB")]
    for name, message in [*cases, ("gone.png", "a file is no longer stored")]:
        with pytest.raises(UserError, match=f"^Answer 1: {message}"):
            PromptFiles.read([photos[0], str(tmp_path / name), photos[0]], SIZE, files)
