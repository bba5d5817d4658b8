"""What visitors paint: strokes become holes and masks."""

import shutil

import numpy as np
import pytest
from PIL import Image
from serve_kit import bomb, png

from EasyLM.errors import UserError
from evaluation.page import brush
from evaluation.serving.request_errors import RequestError
from tokenizer.synthetic import scenes

SIZE = 8
CELL = brush.SIDE // SIZE  # pixels of the canvas for each pixel of the image


def write_strokes(path, painted: dict[tuple[int, int], tuple[int, ...]]) -> str:
    """Writes a layer of the canvas whose squares are painted, each the size of one pixel of the image."""
    layer = np.zeros((brush.SIDE, brush.SIDE, 4), np.uint8)
    for (row, column), colour in painted.items():
        layer[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = colour
    Image.fromarray(layer).save(path)
    return str(path)


def test_painted_pixels_become_a_hole_or_a_mask(tmp_path):
    red, faint = (235, 60, 75, 255), (9, 9, 9, 100)  # the edge of a stroke is not opaque
    strokes = brush.read_strokes([write_strokes(tmp_path / "0.png", {(1, 2): red, (3, 4): faint})], SIZE, tmp_path)
    image = np.full((SIZE, SIZE, 3), 77, np.uint8)
    hole = brush.with_hole(image, strokes)
    assert (hole[1, 2] == 0).all() and (hole != image).any(-1).sum() == 1
    mask = brush.mask_of(strokes)
    assert tuple(mask[1, 2]) == red[:3] == scenes.PALETTE["sphere"]
    assert (mask == scenes.BACKGROUND).all(-1).sum() == SIZE * SIZE - 1


def test_later_layers_lie_above_earlier_ones(tmp_path):
    paths = [
        write_strokes(tmp_path / "0.png", {(0, 0): (1, 1, 1, 255), (0, 1): (1, 1, 1, 255)}),
        write_strokes(tmp_path / "1.png", {(0, 1): (2, 2, 2, 255)}),
    ]
    assert brush.read_strokes(paths, SIZE, tmp_path)[0, :2, 0].tolist() == [1, 2]


def test_wrong_strokes_are_refused(tmp_path):
    with pytest.raises(UserError, match="paint something first"):
        brush.read_strokes([write_strokes(tmp_path / "0.png", {})], SIZE, tmp_path)
    with pytest.raises(UserError, match="paint something first"):
        brush.read_strokes([], SIZE, tmp_path)
    (tmp_path / "bomb.png").write_bytes(bomb())
    with pytest.raises(RequestError, match="pixels"):
        brush.read_strokes([str(tmp_path / "bomb.png")], SIZE, tmp_path)
    for content in (b"garbage", png(0)[:100]):
        (tmp_path / "broken.png").write_bytes(content)
        with pytest.raises(UserError, match="readable"):
            brush.read_strokes([str(tmp_path / "broken.png")], SIZE, tmp_path)


RED, EMPTY = {(1, 2): (235, 60, 75, 255)}, None


@pytest.fixture
def slots(tmp_path) -> list[str | None]:
    """The files of [example, answer, example, answer, query]."""
    for i in range(5):
        Image.fromarray(np.full((SIZE, SIZE, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(5)]


def value_of(path: str) -> int:
    """Returns the value of the pixels of an image of one colour."""
    (value,) = np.unique(Image.open(path))
    return int(value)


def hole_in(path: str) -> int:
    """Returns the value of the pixels of an image, and asserts that only the painted ones are black."""
    image = np.asarray(Image.open(path).resize((SIZE, SIZE), Image.Resampling.NEAREST))
    black, value = np.unique(image)
    assert black == 0 and np.argwhere((image == 0).all(-1)).tolist() == [[1, 2]]
    return int(value)


def test_a_painting_belongs_to_the_image_that_was_loaded(tmp_path, slots):
    used, layers = brush.Brush(5, tmp_path), [write_strokes(tmp_path / "layer.png", RED)]
    assert used.names == ["Query", "Example 1", "Example 2"]
    second = used.load("Example 2", slots)
    loaded, new = used.mask(second, slots, layers, SIZE)
    assert loaded == second and set(new) == {3}
    assert tuple(np.asarray(Image.open(new[3]))[1 * 32, 2 * 32]) == RED[1, 2][:3]
    with_hole, new = used.hole(second, slots, layers, SIZE)
    assert (hole_in(new[2]), value_of(new[3]), set(new)) == (20, 20, {2, 3})
    shown = [slots[0], slots[1], new[2], new[3], slots[4]]
    assert hole_in(used.hole(with_hole, shown, layers, SIZE)[1][2]) == 20  # painting goes on
    query, new = used.hole(used.load("Query", slots), slots, layers, SIZE)
    assert query.name == "Query" and set(new) == {4} and hole_in(new[4]) == 40


def test_a_painting_on_an_image_that_was_replaced_is_refused(tmp_path, slots):
    used, layers = brush.Brush(5, tmp_path), [write_strokes(tmp_path / "layer.png", RED)]
    loaded = used.load("Example 1", slots)
    same = shutil.copy(slots[0], tmp_path / "copy.png")  # gradio copies the files that the page writes
    for use in (used.hole, used.mask):
        for other in (slots[2], EMPTY):
            with pytest.raises(UserError, match="an earlier image of Example 1: load the image again"):
                use(loaded, [other, *slots[1:]], layers, SIZE)
        assert use(loaded, [same, "any", EMPTY, "other", "slot"], layers, SIZE)


def test_what_cannot_be_painted_is_refused(tmp_path, slots):
    used, layers = brush.Brush(5, tmp_path), [write_strokes(tmp_path / "layer.png", RED)]
    with pytest.raises(UserError, match="Example 2: add an image to this slot first"):
        used.load("Example 2", [*slots[:2], EMPTY, EMPTY, slots[4]])
    with pytest.raises(UserError, match="load an image first"):
        used.mask(EMPTY, slots, layers, SIZE)
    with pytest.raises(UserError, match="the model draws the mask of the query"):
        used.mask(used.load("Query", slots), slots, layers, SIZE)


@pytest.mark.slow  # gradio takes seconds to import
def test_the_canvas_accepts_strokes_as_uploads_only():
    """gradio would keep strokes that a browser sends to `accept_blobs` in memory, without a limit."""
    pytest.importorskip("gradio")
    from gradio.components.image_editor import EditorData
    from gradio.data_classes import FileData

    canvas = brush._canvas()
    assert canvas.accept_blobs is None and "server_fns" not in canvas.get_config()
    layer, background = FileData(path="/a/layer.png"), FileData(path="/a/bomb.png")
    assert canvas.preprocess(EditorData(background=background, layers=[layer])) == ["/a/layer.png"]
    assert canvas.preprocess(None) == [] == canvas.preprocess(EditorData(id="unknown"))
