"""The brush: a visitor paints a hole or a mask on an image of the prompt.

Shapes: see `evaluation.prompting`.
"""

import dataclasses
import functools
import hashlib
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from EasyLM.errors import UserError
from evaluation.page.files import LIMITS, decode, read_file
from evaluation.page.handlers import errors_for_visitors
from evaluation.page.pictures import save_enlarged, save_png
from evaluation.serving import uploads
from tokenizer.synthetic import scenes

if TYPE_CHECKING:
    import gradio

QUERY = "Query"
SIDE = 384  # pixels of the canvas
_NOT_LOADED = "No image is loaded."
_OPAQUE = 128  # least alpha of a painted pixel
HELP = """Load an image of the prompt, paint on it, and choose what the painting is:
* *Hole*: the painted pixels of the image become black. If it is an example, its answer becomes the original image.
* *Mask*: the painting becomes the answer of an example, in its colours and on the background of the segmentations.

The painting belongs to the image on the canvas: to paint on another one, load that."""


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
    contents = [read_file(path, folder) for path in paths]
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


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The image on the canvas. What a visitor paints belongs to it, whatever is chosen or replaced meanwhile.

    Attributes:
      name: the image's name in the prompt.
      path: its file.
      digest: that of the file in its slot: of `path`, or of the same image with a hole.
    """

    name: str
    path: str
    digest: str


class Brush:
    """Makes new images of an analogy's prompt from what a visitor paints.

    Attributes:
      names: the images that can be painted on: the query and the examples.

    `slots` are the paths of the prompt's images [example, answer, ..., query]; None: an empty slot.
    """

    def __init__(self, num_slots: int, folder: pathlib.Path):
        """`folder`: where the page's files are."""
        self.names = [QUERY, *(f"Example {i + 1}" for i in range(num_slots // 2))]
        self._folder = folder

    def load(self, name: str, slots: Sequence[str | None]) -> Loaded:
        """Returns the image of this name. Raises UserError if its slot is empty, or its file is no longer stored."""
        path = slots[self._slot(name)]
        if path is None:
            raise UserError(f"{name}: add an image to this slot first")
        return Loaded(name, path, self._digest(path))

    def hole(
        self, loaded: Loaded | None, slots: Sequence[str | None], layers: Sequence[str], size: int
    ) -> tuple[Loaded, dict[int, str]]:
        """Makes a hole in the loaded image; of an example, the answer becomes the whole image.

        Args:
          loaded: the image on the canvas; None: the canvas is empty.
          slots: see the class.
          layers: paths of the painted layers.
          size: side of the model's images in pixels.

        Returns:
          The loaded image, and the paths of the new images by the numbers of their slots.

        Raises:
          UserError: if no image is loaded, or its slot has another one now; see also `read_strokes`.
        """
        loaded, slot = self._checked(loaded, slots)
        image = decode(read_file(loaded.path, self._folder), size)
        new = {slot: self._save(with_hole(image, read_strokes(layers, size, self._folder)))}
        if loaded.name != QUERY:  # the query has no answer
            new[slot + 1] = self._save(image)
        return dataclasses.replace(loaded, digest=self._digest(new[slot])), new

    def mask(
        self, loaded: Loaded | None, slots: Sequence[str | None], layers: Sequence[str], size: int
    ) -> tuple[Loaded, dict[int, str]]:
        """Makes what is painted the answer of the loaded example. Arguments, results and errors: as `hole`."""
        loaded, slot = self._checked(loaded, slots)
        if loaded.name == QUERY:
            raise UserError("load an example to paint a mask: the model draws the mask of the query")
        return loaded, {slot + 1: self._save(mask_of(read_strokes(layers, size, self._folder)))}

    def _checked(self, loaded: Loaded | None, slots: Sequence[str | None]) -> tuple[Loaded, int]:
        """Returns the loaded image and the number of its slot, which has this image still."""
        if loaded is None:
            raise UserError("load an image first")
        slot = self._slot(loaded.name)
        path = slots[slot]
        if path is None or self._digest(path) != loaded.digest:
            raise UserError(f"the canvas shows an earlier image of {loaded.name}: load the image again")
        return loaded, slot

    def _slot(self, name: str) -> int:
        """Returns the number of the slot of an image: the query is the last one."""
        number = self.names.index(name)
        return 2 * (number - 1) if number else 2 * (len(self.names) - 1)

    def _digest(self, path: str) -> str:
        """Returns a digest of a file. Paths do not tell: browsers get copies of the files that the page writes."""
        return hashlib.sha256(read_file(path, self._folder)).hexdigest()

    def _save(self, image: np.ndarray) -> str:
        return save_enlarged(image, self._folder, "painted")


def add_brush(slots: Sequence["gradio.Image"], size_of: Callable[[str], int], model: Any, folder: pathlib.Path) -> None:
    """Adds the canvas and its buttons below the slots [example, answer, ..., query] of an analogy.

    Args:
      slots: the image slots.
      size_of: returns the side of a model's images in pixels.
      model: the field with the name of the model.
      folder: where painted images are stored.
    """
    import gradio

    brush = Brush(len(slots), folder)
    with gradio.Accordion("Paint a hole or a mask", open=False, elem_id="brush"):
        gradio.Markdown(HELP)
        with gradio.Row():
            name = gradio.Dropdown(
                brush.names, value=QUERY, label="Image of the prompt", min_width=200, elem_id="painted"
            )
            load = gradio.Button("Load the image", min_width=200, elem_id="load_painted")
        shown = gradio.Markdown(_NOT_LOADED, elem_id="on_canvas")
        with gradio.Column(visible=False) as frame:
            canvas = _canvas()
        state = gradio.State(None)  # the loaded image
        with gradio.Row():
            hole = gradio.Button("Use as hole", min_width=120, elem_id="use_hole")
            mask = gradio.Button("Use as mask", min_width=120, elem_id="use_mask")

    def load_image(name: str, *paths: str | None) -> tuple:
        with errors_for_visitors():
            loaded = brush.load(name, paths)
            pixels = decode(read_file(loaded.path, folder), SIDE)
        # A new label of the canvas would make gradio forget its limits: see `_canvas`.
        background = save_png(pixels, folder, "canvas")
        value: dict[str, Any] = {"background": background, "layers": [], "composite": None}
        return loaded, f"On the canvas: **{name}**", value, gradio.Column(visible=True)

    def use(make: Callable, loaded: Loaded | None, model: str, layers: list[str], *paths: str | None) -> list:
        with errors_for_visitors():
            loaded, new = make(loaded, paths, layers, size_of(model))
        return [loaded, *(new.get(i, gradio.skip()) for i in range(len(slots)))]

    loading = [state, shown, canvas, frame]
    # gradio would not draw strokes on an image that replaces a painted one: each image has a new canvas.
    removed = load.click(
        lambda: (None, _NOT_LOADED, None, gradio.Column(visible=False)), None, loading, api_visibility="private"
    )
    removed.then(load_image, [name, *slots], loading, api_visibility="private")
    for button, make in ((hole, brush.hole), (mask, brush.mask)):
        inputs, outputs = [state, model, canvas, *slots], [state, *slots]
        button.click(functools.partial(use, make), inputs, outputs, api_visibility="private")


def _canvas() -> "gradio.ImageEditor":
    """Returns the canvas. Its value is the paths of the painted layers."""
    import gradio

    colours = [f"rgb{colour}" for colour in scenes.PALETTE.values()]
    canvas = gradio.ImageEditor(
        label="Canvas",
        show_label=False,  # the line above it names its image
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
