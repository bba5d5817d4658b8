"""Helpers of tests of mappings: the held-out entries that a step uses."""

import numpy as np

from tokenizer.mappings import held_out, steps
from tokenizer.synthetic import palette


def colour_index(colour: np.ndarray) -> int:
    """The index of a palette colour; -1 for other colours."""
    (indices,) = np.nonzero((colour == palette.COLOURS).all(-1))
    return int(indices[0]) if len(indices) else -1


def entries(step: steps.Step) -> list[bool]:
    """Which entries of the tables of `held_out` a step uses: True for held-out ones. Copies use none."""
    if isinstance(step, steps.Exchange):
        return held_out.COLOUR_PAIRS[step.colours, step.images].tolist()
    if isinstance(step, steps.Recolour):
        indices = [(label, colour_index(colour)) for label, colour in enumerate(step.colours)]
        return [held_out.CLASS_COLOURS[label, index] for label, index in indices if index >= 0]
    if isinstance(step, steps.Mark):
        return [held_out.CLASS_COLOURS[step.label, step.colour]]
    if isinstance(step, steps.Ramp):
        low, high = map(colour_index, step.ends)
        return [held_out.COLOUR_PAIRS[low, high]] if low >= 0 and high >= 0 else []
    if isinstance(step, steps.Channels):
        return [held_out.CHANNELS[step.order, step.signs]]
    if isinstance(step, steps.HueTurn):
        return [180 <= step.degrees % 360 < 270]
    assert isinstance(step, steps.Geometry)
    return [held_out.GEOMETRIES[step.symmetry, step.down, step.right]]
