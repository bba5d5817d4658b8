"""What visitors paint: strokes become holes and masks."""

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
