"""Ray-traced scenes with exact annotations: solids on a floor before a wall, one light, one camera.

A scene is a function of a seed. Its annotations are computed from the geometry.
Shapes: S side of the image, P = (3 S)^2 rays, 3x3 per pixel; the middle ray passes through the pixel's centre.
"""

import functools
from collections.abc import Sequence

import numpy as np

from tokenizer.media import images
from tokenizer.synthetic.geometry import WALL_Z, Hits, Solid, trace
from tokenizer.synthetic.layouts import Layout, seeded_layout

ANNOTATIONS = ("segmentation", "depth", "normals", "edges")
BACKGROUND = (28, 26, 60)
PALETTE = {
    "sphere": (235, 60, 75),
    "box": (70, 190, 80),
    "cylinder": (255, 205, 45),
    "cone": (55, 135, 245),
    "pyramid": (175, 70, 205),
    "egg": (120, 230, 235),
}
NEAR, FAR = 3.6, 11.2  # distances along the view axis: white and black in a depth image

_RAYS_PER_SIDE = 3
_EYE, _TARGET, _HALF_FIELD = np.array([0.0, 3.6, 6.4]), np.array([0.0, 0.55, -0.35]), np.deg2rad(19.5)
_CREASE_COSINE = np.cos(np.deg2rad(40))


def scene(seed: int, size: int, split: str = "scenes") -> dict[str, np.ndarray]:
    """Returns an image and its annotations: `image` and each of `ANNOTATIONS`, uint8 [size,size,3].

    A segmentation has the colours of `PALETTE` and `BACKGROUND` only. Depth is brighter where nearer. Normals are
    (n + 1) / 2 in the camera's axes. Edges are white where a neighbouring pixel shows another solid or another face.
    """
    return clip(seed, size, 1, split)[0]


def clip(seed: int, size: int, num_frames: int, split: str = "scenes") -> list[dict[str, np.ndarray]]:
    """Returns the frames of a scene with moving solids, each as `scene` does. The first is `scene(seed, size)`."""
    layout = seeded_layout(seed, split)
    return [render(layout, frame, size) for frame in range(num_frames)]


def label_ids(segmentation: np.ndarray) -> np.ndarray:
    """Converts a segmentation image to ids, uint8 [S,S]: 0 is the background, then shapes in the order of `PALETTE`."""
    colours = np.array([BACKGROUND, *PALETTE.values()])
    return np.argmax((segmentation[..., None, :] == colours).all(axis=-1), axis=-1).astype(np.uint8)


def depth_to_distance(depth: np.ndarray) -> np.ndarray:
    """Converts a depth image to distances along the view axis, float64 [S,S], in 256 steps."""
    return FAR - (FAR - NEAR) * depth[..., 0] / 255


def render(layout: Layout, frame: int, size: int) -> dict[str, np.ndarray]:
    """Returns the image and annotations of a frame, as `scene` does."""
    solids = [solid.at(frame) for solid in layout.solids]
    rays_P3, axes_33 = _camera(size * _RAYS_PER_SIDE)
    hits = trace(solids, np.broadcast_to(_EYE, rays_P3.shape), rays_P3)
    points_P3 = _EYE + hits.distance[:, None] * rays_P3
    light_P = _illumination(solids, layout.light, points_P3, hits.normal)
    colour_P3 = _shade(layout, solids, hits, points_P3, rays_P3, light_P)
    image_SS3 = colour_P3.reshape(size, _RAYS_PER_SIDE, size, _RAYS_PER_SIDE, 3).mean(axis=(1, 3))

    def at_centres(array_P: np.ndarray) -> np.ndarray:
        middle = _RAYS_PER_SIDE // 2
        return array_P.reshape(size, _RAYS_PER_SIDE, size, _RAYS_PER_SIDE, -1)[:, middle, :, middle]

    solid_SS = at_centres(hits.solid)[..., 0]
    depth_SS = at_centres(hits.distance * (rays_P3 @ axes_33[2]))[..., 0]
    normal_SS3 = at_centres(hits.normal @ axes_33.T)
    brightness_SS1 = np.clip((FAR - depth_SS[..., None]) / (FAR - NEAR), 0, 1)
    colours = np.array([*(PALETTE[solid.shape] for solid in solids), BACKGROUND], np.uint8)  # [-1]: background
    facing_SS3 = normal_SS3 * np.array([1, 1, -1])  # blue grows towards the viewer
    edges_SS1 = np.where(_edges(solid_SS, normal_SS3), np.uint8(255), np.uint8(0))[..., None]
    return {
        "image": images.to_uint8(image_SS3),
        "segmentation": colours[solid_SS],
        "depth": images.to_uint8(np.repeat(brightness_SS1, 3, axis=-1)),
        "normals": np.round(127.5 * (facing_SS3 + 1)).astype(np.uint8),
        "edges": np.repeat(edges_SS1, 3, axis=-1),
    }


def _edges(solid_SS: np.ndarray, normal_SS3: np.ndarray) -> np.ndarray:
    """True where one of the four neighbours belongs to another solid, or the normal changes by over 40 degrees."""
    is_edge_SS = np.zeros(solid_SS.shape, bool)
    for axis in (0, 1):
        a, b = ((slice(None),) * axis + (part,) for part in (slice(1, None), slice(None, -1)))
        creased = np.sum(normal_SS3[a] * normal_SS3[b], axis=-1) < _CREASE_COSINE
        differs = (solid_SS[a] != solid_SS[b]) | creased
        is_edge_SS[a] |= differs
        is_edge_SS[b] |= differs
    return is_edge_SS


@functools.lru_cache(maxsize=4)
def _camera(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rays [side^2,3], row by row, and the camera's axes (right, up, forward) as rows."""
    forward = (_TARGET - _EYE) / np.linalg.norm(_TARGET - _EYE)
    right = np.cross(forward, [0, 1, 0])
    right /= np.linalg.norm(right)
    axes_33 = np.stack([right, np.cross(right, forward), forward])
    steps = ((np.arange(side) + 0.5) / side * 2 - 1) * np.tan(_HALF_FIELD)
    down, across = np.meshgrid(-steps, steps, indexing="ij")
    rays = np.stack([across.ravel(), down.ravel(), np.ones(side * side)], axis=-1) @ axes_33
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True), axes_33


def _illumination(solids: Sequence[Solid], light: np.ndarray, points_P3: np.ndarray, normal_P3: np.ndarray):
    """Direct light on each point [P], 0..1: Lambert's law, zero in the shadow of a solid."""
    facing_P = np.clip(normal_P3 @ light, 0, 1)
    lit = np.flatnonzero(facing_P)
    starts = points_P3[lit] + 1e-3 * normal_P3[lit]
    facing_P[lit[trace(solids, starts, np.broadcast_to(light, starts.shape)).solid >= 0]] = 0
    return facing_P


def _shade(
    layout: Layout,
    solids: Sequence[Solid],
    hits: Hits,
    points_P3: np.ndarray,
    rays_P3: np.ndarray,
    light_P: np.ndarray,
) -> np.ndarray:
    """Colours [P,3] in 0..1: ambient and direct light, highlights on solids, checks on the floor."""
    room = np.where(points_P3[:, 2:3] > WALL_Z + 1e-6, layout.floor, layout.wall)
    if layout.checks:
        squares = (np.floor(points_P3[:, 0] / 1.4) + np.floor(points_P3[:, 2] / 1.4)) % 2
        on_floor = points_P3[:, 1] < 1e-6
        room = room * np.where(on_floor & (squares > 0), 0.72, 1.0)[:, None]
    colours = np.array([*(solid.colour for solid in solids), (0, 0, 0)])
    is_solid = hits.solid[:, None] >= 0
    base = np.where(is_solid, colours[hits.solid], room)
    shade = np.where(is_solid, 0.45 + 0.7 * light_P[:, None], 0.6 + 0.45 * light_P[:, None])
    shaded_P3 = base * shade
    shiny = np.flatnonzero((hits.solid >= 0) & (light_P > 0))
    halfway = layout.light - rays_P3[shiny]
    halfway /= np.linalg.norm(halfway, axis=-1, keepdims=True)
    shine = np.clip(np.sum(halfway * hits.normal[shiny], axis=-1), 0, 1) ** 40
    shaded_P3[shiny] += 0.45 * shine[:, None]
    return shaded_P3
