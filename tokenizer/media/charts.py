"""Matplotlib figures: creation, common style, atomic save. Needs the extra `quickstart`."""

import os
import pathlib
from typing import TYPE_CHECKING

from EasyLM import storage
from EasyLM.errors import UserError, check_installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHART_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", ".svg")
DPI = 110
TITLE_SIZE, LABEL_SIZE, TICK_SIZE = 11, 9, 8  # points


def check_output(path: str, flag: str) -> None:
    """Checks that `save` can write the path, and creates its folder, before the chart is computed.

    Raises:
      UserError: naming the flag, if the extension is unknown, matplotlib is missing or the file cannot be written.
    """
    if not path.lower().endswith(CHART_EXTENSIONS):
        raise UserError(f"--{flag}={path}: must end with one of {', '.join(CHART_EXTENSIONS)}")
    check_installed(f"--{flag}", "quickstart", "matplotlib")
    storage.check_output(path, flag)


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure, width and height in inches, that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(axes: "Axes") -> None:
    """Applies the common style: no upper and right frame, small tick labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=TICK_SIZE)


def save(figure: "Figure", path: str | os.PathLike) -> None:
    """Atomically writes the figure in the format of the path's extension."""
    path = pathlib.Path(path)
    with storage.atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())
