"""A prompt and its answer as one labelled picture.

Shapes: see `evaluation.prompting`.
"""

import bisect
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP, _LABEL_HEIGHT, _FONT_SIZE = 12, 36, 22  # pixels; readable above images of 256 pixels
_MAX_COLUMNS = 8
Row = Sequence[tuple[str, np.ndarray]]


def prompt_labels(num_images: int, is_analogy: bool) -> list[str]:
    """Returns the name of each image of a prompt."""
    if not is_analogy:
        return [f"Frame {i + 1}" for i in range(num_images)]
    return [*(f"{'Answer' if i % 2 else 'Example'} {i // 2 + 1}" for i in range(num_images - 1)), "Query"]


def answer_label(candidate: int, frame: int, num_frames: int) -> str:
    """Returns the name of a generated image; both numbers count from 0."""
    return f"Candidate {candidate + 1}" + (f", frame {frame + 1}" if num_frames > 1 else "")


def truth_label(frame: int, num_frames: int) -> str:
    """Returns the name of a true image; the number counts from 0."""
    return "Truth" + (f", frame {frame + 1}" if num_frames > 1 else "")


def prompt_rows(prompt: np.ndarray, is_analogy: bool) -> list[Row]:
    """Returns rows of (label, image) of a prompt, uint8 [P,S,S,3]. In an analogy, each answer is below its example."""
    labelled = list(zip(prompt_labels(len(prompt), is_analogy), prompt, strict=True))
    return [labelled[0::2], labelled[1::2]] if is_analogy else [labelled]


def answer_rows(answer: np.ndarray, truth: np.ndarray | None) -> list[Row]:
    """Returns rows of (label, image) of an answer, uint8 [C,F,S,S,3], and the truth, at least F images, if it is known.

    One new image: the truth and all candidates in one row. Several: the truth and each candidate in its own row.
    """
    num_frames = answer.shape[1]
    true_images: list[np.ndarray] = [] if truth is None else list(truth[:num_frames])
    rows = [[(truth_label(f, num_frames), image) for f, image in enumerate(true_images)]]
    for c, candidate in enumerate(answer):
        rows.append([(answer_label(c, f, num_frames), image) for f, image in enumerate(candidate)])
    return [[cell for row in rows for cell in row]] if num_frames == 1 else [row for row in rows if row]


def labelled_strip(rows: Sequence[Row], title: str) -> np.ndarray:
    """Draws rows of (label, image) below a title: uint8 [H,W,3]. Images, uint8 [S,S,3], keep their size.

    Rows of more than eight images continue in the next line.
    """
    lines = [row[i : i + _MAX_COLUMNS] for row in rows for i in range(0, len(row), _MAX_COLUMNS)]
    side, font = len(lines[0][0][1]), ImageFont.load_default(_FONT_SIZE)
    width = _GAP + max(map(len, lines)) * (side + _GAP)
    line_height = _LABEL_HEIGHT + side + _GAP
    canvas = Image.new("RGB", (width, _LABEL_HEIGHT + _GAP + len(lines) * line_height), "white")
    draw = ImageDraw.Draw(canvas)
    title = _fitting(title, font, width - 2 * _GAP)
    draw.text((_GAP, (_LABEL_HEIGHT + _GAP) / 2), title, fill="dimgray", font=font, anchor="lm")
    for i, line in enumerate(lines):
        top = _LABEL_HEIGHT + _GAP + i * line_height
        for j, (label, image) in enumerate(line):
            left = _GAP + j * (side + _GAP)
            draw.text((left, top + _LABEL_HEIGHT / 2), label, fill="black", font=font, anchor="lm")
            canvas.paste(Image.fromarray(image), (left, top + _LABEL_HEIGHT))
    return np.asarray(canvas)


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shortens a text to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    num_fitting = bisect.bisect(range(len(text)), width, key=lambda count: int(font.getlength(text[:count] + "…")))
    return text[: max(num_fitting - 1, 0)] + "…"
