"""Random layouts of scenes: solids, room and light."""

import dataclasses

import numpy as np

from tokenizer.synthetic.geometry import Solid

SHAPES = ("sphere", "box", "cylinder", "cone")
NEW_SHAPES = ("pyramid", "egg")
COLOURS = np.array(
    [
        (214, 48, 49),
        (38, 166, 91),
        (41, 98, 255),
        (250, 190, 40),
        (155, 70, 190),
        (20, 185, 190),
        (240, 120, 40),
        (235, 235, 235),
    ]
)
NEW_COLOURS = np.array([(120, 20, 60), (150, 220, 60), (250, 130, 170), (70, 70, 75)])
_ATTEMPTS = 60  # to place solids; from half of them on, new solids do not move


@dataclasses.dataclass(frozen=True)
class Style:
    """The distribution of layouts. The defaults are those of training.

    Attributes:
      shapes, colours: of solids.
      brightness: range of the brightness of floor and wall.
      tint: range of the share that is removed from each colour channel of floor and wall.
      horizon: frames without collisions.
    """

    shapes: tuple[str, ...] = SHAPES
    colours: np.ndarray = dataclasses.field(default_factory=lambda: COLOURS)
    brightness: tuple[float, float] = (0.75, 1.0)
    tint: tuple[float, float] = (0.0, 0.35)
    horizon: int = 8


# "scenes" differs from training scenes only by its seeds; the other splits also differ by their style.
SPLITS = {
    "scenes": Style(),
    "colours": Style(colours=NEW_COLOURS),
    "backgrounds": Style(brightness=(0.35, 0.65), tint=(0.35, 0.8)),
    "shapes": Style(shapes=NEW_SHAPES),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A scene at frame 0.

    Attributes:
      floor, wall: RGB in [0, 1].
      checks: whether the floor is checkered.
      light: unit vector towards the light.
    """

    solids: tuple[Solid, ...]
    floor: np.ndarray
    wall: np.ndarray
    checks: bool
    light: np.ndarray


def seeded_layout(seed: int, split: str = "scenes") -> Layout:
    """Returns the layout of a seed in a split."""
    return random_layout(np.random.default_rng([seed, 7]), SPLITS[split])


def random_layout(rng: np.random.Generator, style: Style = Style()) -> Layout:
    """Draws one to four solids that do not collide within the style's horizon, a room and a light."""
    solids: list[Solid] = []
    count = rng.choice([1, 2, 3, 4], p=[0.2, 0.35, 0.3, 0.15])
    hues = rng.permutation(len(style.colours))
    for attempt in range(_ATTEMPTS):
        if len(solids) == count:
            break
        is_still = attempt > _ATTEMPTS // 2
        solid = _random_solid(rng, style.shapes, style.colours[hues[len(solids)]] / 255, is_still)
        if all(_are_apart(solid, other, style.horizon) for other in solids):
            solids.append(solid)
    tint = rng.uniform(*style.brightness, (2, 1)) * (1 - rng.uniform(*style.tint, (2, 3)))
    azimuth = rng.uniform(-0.9, 0.9)
    light = np.array([np.sin(azimuth), 1.35, np.cos(azimuth)])
    return Layout(tuple(solids), tint[0], tint[1], bool(rng.random() < 0.2), light / np.linalg.norm(light))


def _random_solid(rng: np.random.Generator, shapes: tuple[str, ...], colour: np.ndarray, is_still: bool) -> Solid:
    shape = shapes[rng.integers(len(shapes))]
    radius = rng.uniform(0.65, 1.05)
    relative_heights = {"sphere": 2.0, "box": 1.5, "cylinder": rng.uniform(1.5, 2.2), "cone": rng.uniform(2.0, 2.7)}
    relative_heights |= {"pyramid": 1.9, "egg": 2.8}
    heading = rng.uniform(0, 2 * np.pi)
    speed = 0.0 if is_still else rng.uniform(0.3, 0.9)
    return Solid(
        shape=shape,
        position=np.array([rng.uniform(-1.7, 1.7), rng.uniform(-1.9, 1.6)]),
        radius=radius,
        height=relative_heights[shape] * radius,
        yaw=rng.uniform(0, np.pi / 2),
        colour=np.clip(colour * rng.uniform(0.85, 1.1), 0, 1),
        velocity=speed * np.array([np.cos(heading), np.sin(heading)]),
        yaw_rate=rng.uniform(-0.2, 0.2),
    )


def _are_apart(a: Solid, b: Solid, num_frames: int) -> bool:
    distances = np.hypot(*(a.path(num_frames) - b.path(num_frames)).T)
    return bool(np.all(distances > 1.15 * (a.radius + b.radius)))
