"""Charts without a plotting package: panels of bars or a curve, one below the other, as bytes [height,width,3]."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 900, 300  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 90, 20, 40, 50  # around its plot
INK, BAR, GRID = (40, 40, 40), (66, 113, 174), (225, 225, 225)
MOST_LABELS = 12  # along the x axis; of more, every second (third, ...) is written


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart: a bar a value, or a curve through them. With `log`, the y axis has powers of ten."""

    title: str
    x_title: str
    labels: Sequence[str]  # of the places along the x axis
    values: Sequence[float]  # 0 or more; at most as many
    curve: bool = False
    log: bool = False


def draw(panels: Sequence[Panel]) -> np.ndarray:
    """The panels, top to bottom."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), "white")
    drawing, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for number, panel in enumerate(panels):
        _draw_panel(drawing, font, panel, HEIGHT * number)
    return np.asarray(canvas)


def _draw_panel(drawing, font, panel: Panel, top: int) -> None:
    left, right, upper, lower = LEFT, WIDTH - RIGHT, top + TOP, top + HEIGHT - BOTTOM
    drawing.text((left, top + 10), panel.title, INK, font)
    drawing.text(((left + right) // 2, lower + 38), panel.x_title, INK, font, anchor="mm")
    ticks = _log_ticks(panel.values) if panel.log else _ticks(max(panel.values, default=0))

    def height(value: float) -> float:
        """The y of a value: the lowest tick lies on the axis."""
        if panel.log:
            share = np.log10(max(value, ticks[0]) / ticks[0]) / np.log10(ticks[-1] / ticks[0])
        else:
            share = value / ticks[-1]
        return lower - share * (lower - upper)

    for tick in ticks:
        drawing.line((left, height(tick), right, height(tick)), GRID)
        drawing.text((left - 8, height(tick)), f"{tick:,g}", INK, font, anchor="rm")
    count = max(len(panel.labels), 1)
    step = (right - left) / count
    middles = [left + step * (i + 0.5) for i in range(count)]
    if panel.curve:
        points = [(x, height(value)) for x, value in zip(middles, panel.values)]
        drawing.line(points, BAR, width=2)
    else:
        for x, value in zip(middles, panel.values):
            drawing.rectangle((x - step * 0.4, height(value), x + step * 0.4, lower), BAR)
    drawing.line((left, lower, right, lower), INK)
    for i in range(0, len(panel.labels), -(-count // MOST_LABELS)):
        drawing.text((middles[i], lower + 14), panel.labels[i], INK, font, anchor="mm")


def _ticks(largest: float) -> list[float]:
    """0 and up to five round numbers, the last of them at least `largest`."""
    if largest <= 0:
        return [0, 1]
    rough = largest / 5
    power = 10 ** np.floor(np.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * (1 - 1e-9))
    return [step * i for i in range(int(np.ceil(largest / step - 1e-9)) + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten around the positive values, two at least."""
    positive = [value for value in values if value > 0] or [1]
    low, high = int(np.floor(np.log10(min(positive)))), int(np.ceil(np.log10(max(positive))))
    return [10.0**power for power in range(low, max(high, low + 1) + 1)]
