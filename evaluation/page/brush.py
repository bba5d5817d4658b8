"""The brush: a visitor paints a hole or a mask on an image of the prompt.

Shapes: see `evaluation.prompting`.
"""

import io
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from EasyLM.errors import UserError
from evaluation.page.files import LIMITS, decode, read_files
from evaluation.page.handlers import errors_for_visitors, visitor_error
from evaluation.page.pictures import save_enlarged, save_png
from evaluation.serving import uploads
from tokenizer.synthetic import scenes

if TYPE_CHECKING:
    import gradio

SIDE = 384  # pixels of the canvas
_OPAQUE = 128  # least alpha of a painted pixel
HELP = """Load an image of the prompt, paint on it, and choose what the painting is:
* *Hole*: the painted pixels of the image become black. If it is an example, its answer becomes the original image.
* *Mask*: the painting becomes the answer of an example, in its colours and on the background of the segmentations."""


def with_hole(image: np.ndarray, strokes: np.ndarray) -> np.ndarray:
    """Blackens the pixels of an image, uint8 [S,S,3], that are painted; see `read_strokes`."""
    return np.where(strokes[..., 3:] >= _OPAQUE, np.uint8(0), image)


def mask_of(strokes: np.ndarray) -> np.ndarray:
    """Returns the painted pixels in their colours, on the background of `scenes`: uint8 [S,S,3]."""
    return np.where(strokes[..., 3:] >= _OPAQUE, strokes[..., :3], np.array(scenes.BACKGROUND, np.uint8))


def read_strokes(paths: Sequence[str], size: int, folder: pathlib.Path) -> np.ndarray:
    """Reads the strokes of the canvas, RGBA uint8 [S,S,4], at the nearest pixels.

    Raises:
      UserError: if nothing is painted, or a file is not an image of the canvas.
    """
    contents = read_files(paths, folder)
    uploads.check_images({"strokes": contents}, LIMITS)
    strokes = np.zeros((size, size, 4), np.uint8)
    for content in contents:
        try:
            with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as image:
                layer = np.asarray(image.convert("RGBA").resize((size, size), Image.Resampling.NEAREST))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"the painting is not readable: {error}") from error
        strokes = np.where(layer[..., 3:] >= _OPAQUE, layer, strokes)
    if not (strokes[..., 3] >= _OPAQUE).any():
        raise UserError("paint something first")
    return strokes


def add_brush(slots: Sequence["gradio.Image"], size_of: Callable[[str], int], model: Any, folder: pathlib.Path) -> None:
    """Adds the canvas and its buttons below the slots [example, answer, ..., query] of an analogy.

    Args:
      slots: the image slots.
      size_of: returns the side of a model's images in pixels.
      model: the field with the name of the model.
      folder: where painted images are stored.
    """
    import gradio

    names = ["Query", *(f"Example {i + 1}" for i in range(len(slots) // 2))]
    with gradio.Accordion("Paint a hole or a mask", open=False, elem_id="brush"):
        gradio.Markdown(HELP)
        with gradio.Row():
            name = gradio.Dropdown(names, value=names[0], label="Image of the prompt", min_width=160, elem_id="painted")
            load = gradio.Button("Load the image", min_width=120, elem_id="load_painted")
        canvas = _canvas()
        source = gradio.State("")  # path of the loaded image
        with gradio.Row():
            hole = gradio.Button("Use as hole", min_width=120, elem_id="use_hole")
            mask = gradio.Button("Use as mask", min_width=120, elem_id="use_mask")

    def load_image(name: str, *paths: str | None) -> tuple:
        path = paths[_slot_number(names, name)]
        if path is None:
            raise visitor_error(f"{name}: add an image to this slot first.")
        with errors_for_visitors():
            (pixels,) = decode(read_files([path], folder), SIDE)
        return {"background": save_png(pixels, folder, "canvas"), "layers": [], "composite": None}, path

    def use(is_hole: bool, name: str, path: str, model: str, layers: list[str]) -> list:
        if not path:
            raise visitor_error("Load an image first.")
        if not is_hole and name == names[0]:
            raise visitor_error("Choose an example: the mask of the query is what the model draws.")
        with errors_for_visitors():
            (image,) = decode(read_files([path], folder), size_of(model))
            strokes = read_strokes(layers, len(image), folder)
        slot, updates = _slot_number(names, name), [gradio.skip()] * len(slots)
        painted = {slot: with_hole(image, strokes), slot + 1: image} if is_hole else {slot + 1: mask_of(strokes)}
        for i, pixels in painted.items():
            if i < len(slots):  # the query has no answer
                updates[i] = save_enlarged(pixels, folder, "painted")
        return updates

    load.click(load_image, [name, *slots], [canvas, source], api_visibility="private")
    inputs = [name, source, model, canvas]
    hole.click(lambda *values: use(True, *values), inputs, list(slots), api_visibility="private")
    mask.click(lambda *values: use(False, *values), inputs, list(slots), api_visibility="private")


def _slot_number(names: list[str], name: str) -> int:
    """Returns the number of the slot of an image: the query is the last one."""
    number = names.index(name)
    return 2 * (number - 1) if number else 2 * (len(names) - 1)


def _canvas() -> "gradio.ImageEditor":
    """Returns the canvas. Its value is the paths of the painted layers."""
    import gradio

    colours = [f"rgb{colour}" for colour in scenes.PALETTE.values()]
    canvas = gradio.ImageEditor(
        label="Canvas",
        type="filepath",
        format="png",
        sources=[],
        transforms=[],
        layers=False,
        brush=gradio.Brush(colors=colours, default_color=colours[0], default_size=24),
        canvas_size=(SIDE, SIDE),
        fixed_canvas=True,
        buttons=[],
        elem_id="canvas",
    )
    # As in `fields.image_slot`, the files are read with the limits of uploads.
    canvas.preprocess = lambda payload: [layer.path for layer in payload.layers] if payload else []
    # Browsers of this page upload their layers. This other way would keep them in memory without a limit.
    canvas.accept_blobs = None
    canvas.server_fns = []
    return canvas
