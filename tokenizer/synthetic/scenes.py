"""Small ray-traced scenes with exact annotations: solids on a floor before a wall, one light, one camera.

Everything follows from a seed, so a data set needs no download and its annotations are right to the pixel.
Shapes: S size of the picture, P = (3 S)^2 rays (three by three a pixel, the middle one being the pixel's centre).
"""

import dataclasses

import numpy as np

from tokenizer.media import images

SHAPES = ("sphere", "box", "cylinder", "cone")
NEW_SHAPES = ("pyramid", "egg")
BACKGROUND, PALETTE = (
    (28, 26, 60),
    {
        "sphere": (235, 60, 75),
        "box": (70, 190, 80),
        "cylinder": (255, 205, 45),
        "cone": (55, 135, 245),
        "pyramid": (175, 70, 205),
        "egg": (120, 230, 235),
    },
)
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
ANNOTATIONS = ("segmentation", "depth", "normals", "edges")

_RAYS = 3
_EYE, _TARGET, _FIELD = np.array([0.0, 3.6, 6.4]), np.array([0.0, 0.55, -0.35]), np.deg2rad(19.5)
_WALL = -3.6
_LEAST, _MOST = np.array([-1.9, -2.2]), np.array([1.9, 1.9])  # where on the floor (x, z) solids are
NEAR, FAR = 3.6, 11.2  # white and black of a depth picture, in units along the view
_CREASE = np.cos(np.deg2rad(40))


@dataclasses.dataclass(frozen=True)
class Solid:
    """At `place` (x, z) on the floor, moving by `velocity` a frame and turning back at the floor's ends.

    `turn`, in radians, changes by `spin` a frame. Things move by a third of their width on the mean, too far for a copy
    of a frame to pass as the next one.
    """

    shape: str
    place: np.ndarray
    radius: float
    height: float
    turn: float
    colour: np.ndarray
    velocity: np.ndarray
    spin: float

    def at(self, frame: int) -> "Solid":
        return dataclasses.replace(
            self, place=_turned_back(self.place + frame * self.velocity), turn=self.turn + frame * self.spin
        )


@dataclasses.dataclass(frozen=True)
class Scene:
    solids: tuple[Solid, ...]
    floor: np.ndarray
    wall: np.ndarray
    checks: bool
    light: np.ndarray


@dataclasses.dataclass(frozen=True)
class Hits:
    """What the rays meet: `solid` the index [P] (-1 the room), `distance` [P], `normal` [P,3]."""

    solid: np.ndarray
    distance: np.ndarray
    normal: np.ndarray


@dataclasses.dataclass(frozen=True)
class Style:
    """What scenes are made of: the defaults are those of training.

    Attributes:
      brightness: of floor and wall, the range.
      tint: how much of a channel floor and wall lack, the range.
    """

    shapes: tuple[str, ...] = SHAPES
    colours: np.ndarray = dataclasses.field(default_factory=lambda: COLOURS)
    brightness: tuple[float, float] = (0.75, 1.0)
    tint: tuple[float, float] = (0.0, 0.35)


# Kinds of scenes by what no training scene has. With the default, only the seed tells scenes apart.
SPLITS = {
    "scenes": Style(),
    "colours": Style(colours=NEW_COLOURS),
    "backgrounds": Style(brightness=(0.35, 0.65), tint=(0.35, 0.8)),
    "shapes": Style(shapes=NEW_SHAPES),
}


def scene(seed: int, size: int, split: str = "scenes") -> dict[str, np.ndarray]:
    """One picture and its annotations: `image` and each of `ANNOTATIONS`, uint8 [size,size,3].

    segmentation has exactly the colours of `PALETTE` and `BACKGROUND`; depth is brighter where nearer; normals are
    (n + 1) / 2 in the camera's axes; edges are white where a neighbouring pixel shows another thing or another face.
    """
    return clip(seed, size, 1, split)[0]


def clip(seed: int, size: int, num_frames: int, split: str = "scenes") -> list[dict[str, np.ndarray]]:
    """`num_frames` moments of a scene whose solids move, each as `scene` gives it; the first is `scene(seed, size)`."""
    layout = _layout(seed, split)
    return [draw(layout, frame, size) for frame in range(num_frames)]


def shapes(seed: int) -> set[str]:
    """The shapes that `scene(seed, size)` has."""
    return {solid.shape for solid in _layout(seed).solids}


def label_ids(segmentation: np.ndarray) -> np.ndarray:
    """A segmentation picture as ids, uint8 [S,S]: 0 the background, then the shapes in the order of `PALETTE`."""
    colours = np.array([BACKGROUND, *PALETTE.values()])
    return np.argmax((segmentation[..., None, :] == colours).all(axis=-1), axis=-1).astype(np.uint8)


def distances(depth: np.ndarray) -> np.ndarray:
    """A depth picture as distances along the view, float64 [S,S], as exact as its 256 steps."""
    return FAR - (FAR - NEAR) * depth[..., 0] / 255


def _layout(seed: int, split: str = "scenes") -> Scene:
    return arrange(np.random.default_rng([seed, 7]), style=SPLITS[split])


def arrange(rng: np.random.Generator, horizon: int = 8, style: Style = Style()) -> Scene:
    """Places one to four solids that do not meet within `horizon` frames."""
    solids = []
    wanted = rng.choice([1, 2, 3, 4], p=[0.2, 0.35, 0.3, 0.15])
    hues = rng.permutation(len(style.colours))
    for attempt in range(60):
        if len(solids) == wanted:
            break
        solid = _random_solid(rng, style.shapes, style.colours[hues[len(solids)]] / 255, still=attempt > 30)
        if all(_apart(solid.at(frame), [other.at(frame) for other in solids]) for frame in range(horizon)):
            solids.append(solid)
    tint = rng.uniform(*style.brightness, (2, 1)) * (1 - rng.uniform(*style.tint, (2, 3)))
    azimuth = rng.uniform(-0.9, 0.9)
    light = np.array([np.sin(azimuth), 1.35, np.cos(azimuth)])
    return Scene(tuple(solids), tint[0], tint[1], bool(rng.random() < 0.2), light / np.linalg.norm(light))


def _random_solid(rng: np.random.Generator, shapes: tuple[str, ...], colour: np.ndarray, still: bool) -> Solid:
    shape = shapes[rng.integers(len(shapes))]
    radius = rng.uniform(0.65, 1.05)
    tall = {"sphere": 2.0, "box": 1.5, "cylinder": rng.uniform(1.5, 2.2), "cone": rng.uniform(2.0, 2.7)}
    tall |= {"pyramid": 1.9, "egg": 2.8}
    heading = rng.uniform(0, 2 * np.pi)
    speed = 0.0 if still else rng.uniform(0.3, 0.9)
    return Solid(
        shape=shape,
        place=np.array([rng.uniform(-1.7, 1.7), rng.uniform(-1.9, 1.6)]),
        radius=radius,
        height=tall[shape] * radius,
        turn=rng.uniform(0, np.pi / 2),
        colour=np.clip(colour * rng.uniform(0.85, 1.1), 0, 1),
        velocity=speed * np.array([np.cos(heading), np.sin(heading)]),
        spin=rng.uniform(-0.2, 0.2),
    )


def _apart(solid: Solid, others: list[Solid]) -> bool:
    return all(np.hypot(*(solid.place - other.place)) > 1.15 * (solid.radius + other.radius) for other in others)


def _turned_back(place: np.ndarray) -> np.ndarray:
    """Where something is that comes back whenever it reaches an end of the floor."""
    gone = (place - _LEAST) % (2 * (_MOST - _LEAST))
    return _LEAST + np.minimum(gone, 2 * (_MOST - _LEAST) - gone)


def draw(layout: Scene, frame: int, size: int) -> dict[str, np.ndarray]:
    """The picture and annotations of one moment."""
    solids = [solid.at(frame) for solid in layout.solids]
    rays_P3, axes_33 = _camera(size * _RAYS)
    hits = trace(solids, np.broadcast_to(_EYE, rays_P3.shape), rays_P3)
    points_P3 = _EYE + hits.distance[:, None] * rays_P3
    light_P = _light(solids, layout.light, points_P3, hits.normal)
    colour_P3 = _paint(layout, solids, hits, points_P3, rays_P3, light_P)
    image = colour_P3.reshape(size, _RAYS, size, _RAYS, 3).mean(axis=(1, 3))

    def centre(array):
        return array.reshape(size, _RAYS, size, _RAYS, -1)[:, _RAYS // 2, :, _RAYS // 2]

    solid_SS = centre(hits.solid)[..., 0]
    depth_SS = centre(hits.distance * (rays_P3 @ axes_33[2]))[..., 0]
    normal_SS3 = centre(hits.normal @ axes_33.T)
    shade_SS1 = np.clip((FAR - depth_SS[..., None]) / (FAR - NEAR), 0, 1)
    table = np.array([*(PALETTE[solid.shape] for solid in solids), BACKGROUND], np.uint8)  # index -1 is the last
    facing_SS3 = normal_SS3 * np.array([1, 1, -1])  # blue grows towards the viewer
    return {
        "image": images.to_uint8(image),
        "segmentation": table[solid_SS],
        "depth": images.to_uint8(np.repeat(shade_SS1, 3, axis=-1)),
        "normals": np.round(127.5 * (facing_SS3 + 1)).astype(np.uint8),
        "edges": np.repeat(np.where(edges(solid_SS, normal_SS3), np.uint8(255), np.uint8(0))[..., None], 3, axis=-1),
    }


def edges(solid_SS: np.ndarray, normal_SS3: np.ndarray) -> np.ndarray:
    """True where one of the four neighbours belongs to another thing, or its surface turns by over 40 degrees."""
    found = np.zeros(solid_SS.shape, bool)
    for axis in (0, 1):
        one, other = ((slice(None),) * axis + (part,) for part in (slice(1, None), slice(None, -1)))
        turned = np.sum(normal_SS3[one] * normal_SS3[other], axis=-1) < _CREASE
        differs = (solid_SS[one] != solid_SS[other]) | turned
        found[one] |= differs
        found[other] |= differs
    return found


def _camera(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rays [side^2,3], row by row, and the camera's axes (right, up, forward) as rows."""
    forward = (_TARGET - _EYE) / np.linalg.norm(_TARGET - _EYE)
    right = np.cross(forward, [0, 1, 0])
    right /= np.linalg.norm(right)
    axes_33 = np.stack([right, np.cross(right, forward), forward])
    steps = ((np.arange(side) + 0.5) / side * 2 - 1) * np.tan(_FIELD)
    down, across = np.meshgrid(-steps, steps, indexing="ij")
    rays = np.stack([across.ravel(), down.ravel(), np.ones(side * side)], axis=-1) @ axes_33
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True), axes_33


def trace(solids: list[Solid], origin_P3: np.ndarray, rays_P3: np.ndarray) -> Hits:
    """The nearest thing on each ray: a solid, the floor or the wall."""
    with np.errstate(divide="ignore", invalid="ignore"):
        to_floor = np.where(rays_P3[:, 1] < 0, -origin_P3[:, 1] / rays_P3[:, 1], np.inf)
        to_wall = np.where(rays_P3[:, 2] < 0, (_WALL - origin_P3[:, 2]) / rays_P3[:, 2], np.inf)
        on_floor = to_floor < to_wall
        nearest = np.minimum(to_floor, to_wall)
        normal = np.where(on_floor[:, None], np.array([0.0, 1, 0]), np.array([0.0, 0, 1]))
        index = np.full(len(rays_P3), -1)
        for i, solid in enumerate(solids):
            cos, sin = np.cos(solid.turn), np.sin(solid.turn)
            turn_33 = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])  # world to the solid's own axes
            origin = (origin_P3 - np.array([solid.place[0], 0, solid.place[1]])) @ turn_33.T
            distance, facing = _MEET[solid.shape](solid.radius, solid.height, origin, rays_P3 @ turn_33.T)
            closer = distance < nearest
            nearest = np.where(closer, distance, nearest)
            normal = np.where(closer[:, None], facing @ turn_33, normal)
            index = np.where(closer, i, index)
    return Hits(index, nearest, normal)


def _first(distance: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return np.where(valid & (distance > 1e-6), distance, np.inf)


def _roots(a, b, c) -> tuple[np.ndarray, np.ndarray]:
    """Both solutions of a t^2 + 2 b t + c = 0; nan where there is none."""
    root = np.sqrt(b * b - a * c)
    return np.minimum((-b - root) / a, (-b + root) / a), np.maximum((-b - root) / a, (-b + root) / a)


def _meet_sphere(radius, height, origin, ray):
    origin = origin - np.array([0, radius, 0])
    near, _ = _roots(1.0, np.sum(origin * ray, axis=-1), np.sum(origin * origin, axis=-1) - radius**2)
    distance = _first(near, np.isfinite(near))
    return distance, (origin + np.where(np.isfinite(distance), distance, 0)[:, None] * ray) / radius


def _meet_box(radius, height, origin, ray):
    half = np.array([radius * 0.8, height / 2, radius * 0.8])
    origin = origin - np.array([0, height / 2, 0])
    one, other = (-half - origin) / ray, (half - origin) / ray
    entry = np.minimum(one, other)
    near, far = entry.max(axis=-1), np.maximum(one, other).min(axis=-1)
    axis = np.eye(3)[entry.argmax(axis=-1)]
    return _first(near, near < far), -np.sign(ray) * axis


def _meet_cylinder(radius, height, origin, ray):
    flat = np.array([1.0, 0, 1])
    near, _ = _roots(
        np.sum(flat * ray * ray, -1), np.sum(flat * origin * ray, -1), np.sum(flat * origin**2, -1) - radius**2
    )
    level = origin[:, 1] + near * ray[:, 1]
    side = _first(near, (level >= 0) & (level <= height))
    lid = (height - origin[:, 1]) / ray[:, 1]
    spot = origin + lid[:, None] * ray
    lid = _first(lid, np.hypot(spot[:, 0], spot[:, 2]) <= radius)
    distance = np.minimum(side, lid)
    reached = origin + np.where(np.isfinite(distance), distance, 0)[:, None] * ray
    return distance, np.where((lid < side)[:, None], np.array([0.0, 1, 0]), flat * reached / radius)


def _meet_cone(radius, height, origin, ray):
    slope = radius / height
    weights = np.array([1.0, -(slope**2), 1.0])
    origin = origin - np.array([0, height, 0])  # from the apex
    roots = _roots(np.sum(weights * ray * ray, -1), np.sum(weights * origin * ray, -1), np.sum(weights * origin**2, -1))
    inside = [(origin[:, 1] + t * ray[:, 1] <= 0) & (origin[:, 1] + t * ray[:, 1] >= -height) for t in roots]
    distance = np.minimum(*(_first(t, ok) for t, ok in zip(roots, inside)))
    reached = origin + np.where(np.isfinite(distance), distance, 0)[:, None] * ray
    outward = np.stack([reached[:, 0], -(slope**2) * reached[:, 1], reached[:, 2]], axis=-1)
    return distance, outward / np.maximum(np.linalg.norm(outward, axis=-1, keepdims=True), 1e-9)


def _meet_pyramid(radius, height, origin, ray):
    half = radius * 0.9
    sides_43 = np.array([(height, half, 0), (-height, half, 0), (0, half, height), (0, half, -height)])
    sides_43 = sides_43 / np.hypot(height, half)
    towards = ray @ sides_43.T
    reach = (half * height / np.hypot(height, half) - origin @ sides_43.T) / towards
    entry, floor = np.where(towards < 0, reach, -np.inf), -origin[:, 1] / ray[:, 1]
    near = entry.max(axis=-1)
    far = np.minimum(np.where(towards > 0, reach, np.inf).min(axis=-1), np.where(ray[:, 1] < 0, floor, np.inf))
    return _first(near, near < far), sides_43[entry.argmax(axis=-1)]


def _meet_egg(radius, height, origin, ray):
    axes = np.array([radius, height / 2, radius])
    origin, ray = (origin - np.array([0, height / 2, 0])) / axes, ray / axes
    near, _ = _roots(np.sum(ray * ray, -1), np.sum(origin * ray, -1), np.sum(origin * origin, -1) - 1)
    distance = _first(near, np.isfinite(near))
    outward = (origin + np.where(np.isfinite(distance), distance, 0)[:, None] * ray) / axes
    return distance, outward / np.linalg.norm(outward, axis=-1, keepdims=True)


_MEET = {
    "sphere": _meet_sphere,
    "box": _meet_box,
    "cylinder": _meet_cylinder,
    "cone": _meet_cone,
    "pyramid": _meet_pyramid,
    "egg": _meet_egg,
}


def _light(solids: list[Solid], light: np.ndarray, points_P3: np.ndarray, normal_P3: np.ndarray) -> np.ndarray:
    """Light that falls on each point, 0..1: Lambert's law, none where a solid stands in the way."""
    facing_P = np.clip(normal_P3 @ light, 0, 1)
    blocked = trace(solids, points_P3 + 1e-3 * normal_P3, np.broadcast_to(light, points_P3.shape)).solid >= 0
    return np.where(blocked, 0.0, facing_P)


def _paint(layout: Scene, solids, hits: Hits, points_P3, rays_P3, light_P) -> np.ndarray:
    """Colours [P,3] in 0..1: ambient and falling light, a highlight on solids, checks on the floor."""
    room = np.where(points_P3[:, 2:3] > _WALL + 1e-6, layout.floor, layout.wall)
    if layout.checks:
        squares = (np.floor(points_P3[:, 0] / 1.4) + np.floor(points_P3[:, 2] / 1.4)) % 2
        on_floor = points_P3[:, 1] < 1e-6
        room = room * np.where(on_floor & (squares > 0), 0.72, 1.0)[:, None]
    table = np.array([*(solid.colour for solid in solids), (0, 0, 0)])
    is_solid = hits.solid[:, None] >= 0
    base = np.where(is_solid, table[hits.solid], room)
    halfway = layout.light - rays_P3
    halfway /= np.linalg.norm(halfway, axis=-1, keepdims=True)
    shine = np.where(light_P > 0, np.clip(np.sum(halfway * hits.normal, axis=-1), 0, 1) ** 40, 0)
    shade = np.where(is_solid, 0.45 + 0.7 * light_P[:, None], 0.6 + 0.45 * light_P[:, None])
    return base * shade + np.where(is_solid, 0.45 * shine[:, None], 0.0)
