"""Everything that no training sentence contains, so that a benchmark can test it.

    scenes, shapes, colours, rooms   the splits of `layouts.SPLITS`; `TRAINING_STYLES` avoids their values
    photographs                      `photos.HELD_OUT`
    class -> colour                  `CLASS_COLOURS`: the colour in which a class is drawn or marked
    colour -> colour                 `COLOUR_PAIRS`: exchanged colours of mosaics, and the two ends of colour ramps
    geometries                       `GEOMETRIES`: pairs of a symmetry of the square and a shift
    channels                         `CHANNELS`: signed permutations of the channels; `HUE_SECTOR`: turns of the hue
    compositions                     `COMPOSITIONS`: pairs of families that are never composed

The tables are drawn from a fixed seed. A quarter of each table is held out; True marks a held-out entry.
"""

import numpy as np

from tokenizer.synthetic import layouts, palette, scenes
from tokenizer.synthetic.layouts import Style

NUM_LABELS = 1 + len(scenes.PALETTE)  # label ids: the background and the shapes
NUM_COLOURS = len(palette.COLOURS)
NUM_SYMMETRIES = 8  # of the square: s % 4 quarter turns counterclockwise, for s >= 4 after a transposition
NUM_CHANNEL_ORDERS, NUM_SIGNS = 6, 8  # permutations of the channels; sets of inverted channels
IDENTITY, ROTATION = 0, 1  # symmetries

_SHARE = 4  # one of this many entries is held out


def _quarter(rng: np.random.Generator, candidates: np.ndarray, count: int) -> np.ndarray:
    """Returns a mask of `count` random candidates. The candidates are a mask of any shape."""
    chosen = np.zeros(candidates.size, bool)
    chosen[rng.permutation(np.flatnonzero(candidates))[:count]] = True
    return chosen.reshape(candidates.shape)


def _rows(rng: np.random.Generator, candidates: np.ndarray) -> np.ndarray:
    """Returns a mask with a quarter of each row."""
    return np.stack([_quarter(rng, row, len(row) // _SHARE) for row in candidates])


def _geometries(rng: np.random.Generator) -> np.ndarray:
    """All shifts of the rotation by 90 degrees, the benchmark's task `rotation`, and as many other geometries."""
    held_out = np.zeros((NUM_SYMMETRIES, palette.TILES, palette.TILES), bool)
    held_out[ROTATION] = True
    candidates = ~held_out
    candidates[IDENTITY, 0, 0] = False
    return held_out | _quarter(rng, candidates, held_out.size // _SHARE - held_out.sum())


_rng = np.random.default_rng(15)
CLASS_COLOURS = _rows(_rng, np.ones((NUM_LABELS, NUM_COLOURS), bool))  # [label, colour]
COLOUR_PAIRS = _rows(_rng, ~np.eye(NUM_COLOURS, dtype=bool))  # [colour, colour]
GEOMETRIES = _geometries(_rng)  # [symmetry, tiles down, tiles to the right]
_not_the_identity = np.arange(NUM_CHANNEL_ORDERS * NUM_SIGNS).reshape(NUM_CHANNEL_ORDERS, NUM_SIGNS) > 0
CHANNELS = _quarter(_rng, _not_the_identity, _not_the_identity.size // _SHARE)  # [order, signs]
HUE_SECTOR = (180.0, 270.0)  # degrees
COMPOSITIONS = (("marks", "geometry"), ("recolour", "channels"))  # (first family, second family)

# In compositions the rotation is trained: there, a held-out composition is the only new thing.
GEOMETRIES_IN_COMPOSITIONS = GEOMETRIES & (np.arange(NUM_SYMMETRIES) != ROTATION)[:, None, None]

# Colours of solids. Those of the split "colours" and their shades are far from all of them.
_far = np.abs(palette.COLOURS[:, None].astype(int) - layouts.NEW_COLOURS).max(-1).min(-1) > 60
_COLOURS = np.concatenate([layouts.COLOURS, palette.COLOURS[_far]])

# (share of the training scenes, style). The rooms are bright, dim or dark, and plain or tinted. The split "backgrounds"
# is dim and tinted at once. No style has both ranges of that split, but each of its brightnesses and tints occurs.
TRAINING_STYLES: tuple[tuple[float, Style], ...] = (
    (0.4, Style()),
    (0.15, Style(colours=_COLOURS)),
    (0.15, Style(colours=_COLOURS, brightness=(0.3, 0.75), tint=(0.0, 0.35))),
    (0.15, Style(colours=_COLOURS, brightness=(0.65, 1.0), tint=(0.35, 0.8))),
    (0.15, Style(colours=_COLOURS, brightness=(0.1, 0.35), tint=(0.0, 0.8))),
)


def training_style(rng: np.random.Generator) -> Style:
    """Draws the style of a training scene."""
    shares = [share for share, _ in TRAINING_STYLES]
    return TRAINING_STYLES[rng.choice(len(shares), p=shares)][1]
