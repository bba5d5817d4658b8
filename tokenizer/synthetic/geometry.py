"""Solids on a floor before a wall, and their intersections with rays.

Coordinates: x to the right, y up from the floor (y = 0), z towards the camera; the wall is the plane z = WALL_Z.
Shapes: P rays.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

WALL_Z = -3.6
_FLOOR_MIN, _FLOOR_MAX = np.array([-1.9, -2.2]), np.array([1.9, 1.9])  # the part of the floor, in (x, z), for solids
_MAX_HALF_DIAGONAL = 1.3  # of the footprint of a solid, in radii: the pyramid's is 0.9 * sqrt(2)
_MIN_DISTANCE = 1e-6  # of a hit, so that a ray does not hit the surface on which it starts

# Distance along each ray to the solid [P], infinite without a hit, and outward normal at the hit [P,3].
Intersection = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Solid:
    """A solid that stands on the floor, moves in a straight line and is reflected at the floor's ends.

    The mean speed is a third of a solid's width per frame, so a copy of a frame is a poor prediction of the next one.

    Attributes:
      shape: a key of `INTERSECTIONS`.
      position: (x, z) of the centre.
      radius, height: in units of the room.
      yaw: rotation about the vertical axis in radians.
      colour: RGB in [0, 1].
      velocity: (x, z) per frame.
      yaw_rate: radians per frame.
    """

    shape: str
    position: np.ndarray
    radius: float
    height: float
    yaw: float
    colour: np.ndarray
    velocity: np.ndarray
    yaw_rate: float

    def at(self, frame: int) -> "Solid":
        """The solid `frame` frames later."""
        return dataclasses.replace(
            self,
            position=_reflect(self.position + frame * self.velocity),
            yaw=self.yaw + frame * self.yaw_rate,
        )

    def path(self, num_frames: int) -> np.ndarray:
        """The positions in the first frames: [frames,2]."""
        return _reflect(self.position + np.arange(num_frames)[:, None] * self.velocity)


@dataclasses.dataclass(frozen=True)
class Hits:
    """The nearest surface on each ray.

    Attributes:
      solid: index of the solid [P]; -1 is the floor or the wall.
      distance: along the ray [P].
      normal: unit vectors [P,3].
    """

    solid: np.ndarray
    distance: np.ndarray
    normal: np.ndarray


def trace(solids: Sequence[Solid], origin_P3: np.ndarray, rays_P3: np.ndarray) -> Hits:
    """Finds the nearest surface on each ray: a solid, the floor or the wall.

    Args:
      rays_P3: unit vectors.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        to_floor = np.where(rays_P3[:, 1] < 0, -origin_P3[:, 1] / rays_P3[:, 1], np.inf)
        to_wall = np.where(rays_P3[:, 2] < 0, (WALL_Z - origin_P3[:, 2]) / rays_P3[:, 2], np.inf)
        on_floor = to_floor < to_wall
        nearest = np.minimum(to_floor, to_wall)
        normal = np.where(on_floor[:, None], np.array([0.0, 1, 0]), np.array([0.0, 0, 1]))
        index = np.full(len(rays_P3), -1)
        for i, solid in enumerate(solids):
            cos, sin = np.cos(solid.yaw), np.sin(solid.yaw)
            to_local_33 = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])  # world axes to the solid's own
            near = np.flatnonzero(_passes(solid, origin_P3, rays_P3))  # a solid covers a small part of an image
            origin = (origin_P3[near] - np.array([solid.position[0], 0, solid.position[1]])) @ to_local_33.T
            ray = rays_P3[near] @ to_local_33.T
            distance, facing = INTERSECTIONS[solid.shape](solid.radius, solid.height, origin, ray)
            closer = distance < nearest[near]
            hit = near[closer]
            nearest[hit] = distance[closer]
            normal[hit] = facing[closer] @ to_local_33
            index[hit] = i
    return Hits(index, nearest, normal)


def _passes(solid: Solid, origin_P3: np.ndarray, rays_P3: np.ndarray) -> np.ndarray:
    """True for the rays that meet the bounding sphere of a solid, ahead of their origins or not: bool [P]."""
    to_centre_P3 = np.array([solid.position[0], solid.height / 2, solid.position[1]]) - origin_P3
    along_P = _dot(to_centre_P3, rays_P3)
    reach = (_MAX_HALF_DIAGONAL * solid.radius) ** 2 + (solid.height / 2) ** 2
    return _dot(to_centre_P3, to_centre_P3) - along_P**2 <= reach


def _reflect(position: np.ndarray) -> np.ndarray:
    """Maps positions [...,2] on a straight line to the positions after reflections at the ends of the floor."""
    travelled = (position - _FLOOR_MIN) % (2 * (_FLOOR_MAX - _FLOOR_MIN))
    return _FLOOR_MIN + np.minimum(travelled, 2 * (_FLOOR_MAX - _FLOOR_MIN) - travelled)


def _sphere(radius: float, height: float, origin: np.ndarray, ray: np.ndarray) -> Intersection:
    origin = origin - np.array([0, radius, 0])
    near, _ = _roots(1.0, np.sum(origin * ray, axis=-1), np.sum(origin * origin, axis=-1) - radius**2)
    distance = _where_hit(near, np.isfinite(near))
    return distance, _points(origin, ray, distance) / radius


def _box(radius: float, height: float, origin: np.ndarray, ray: np.ndarray) -> Intersection:
    half = np.array([radius * 0.8, height / 2, radius * 0.8])
    origin = origin - np.array([0, height / 2, 0])
    low, high = (-half - origin) / ray, (half - origin) / ray
    entry = np.minimum(low, high)
    near, far = entry.max(axis=-1), np.maximum(low, high).min(axis=-1)
    axis = np.eye(3)[entry.argmax(axis=-1)]
    return _where_hit(near, near < far), -np.sign(ray) * axis


def _cylinder(radius: float, height: float, origin: np.ndarray, ray: np.ndarray) -> Intersection:
    flat = np.array([1.0, 0, 1])
    near, _ = _roots(
        np.sum(flat * ray * ray, -1), np.sum(flat * origin * ray, -1), np.sum(flat * origin**2, -1) - radius**2
    )
    level = origin[:, 1] + near * ray[:, 1]
    side = _where_hit(near, (level >= 0) & (level <= height))
    lid = (height - origin[:, 1]) / ray[:, 1]
    spot = origin + lid[:, None] * ray
    lid = _where_hit(lid, np.hypot(spot[:, 0], spot[:, 2]) <= radius)
    distance = np.minimum(side, lid)
    outward = flat * _points(origin, ray, distance) / radius
    return distance, np.where((lid < side)[:, None], np.array([0.0, 1, 0]), outward)


def _cone(radius: float, height: float, origin: np.ndarray, ray: np.ndarray) -> Intersection:
    slope = radius / height
    weights = np.array([1.0, -(slope**2), 1.0])
    origin = origin - np.array([0, height, 0])  # from the apex
    roots = _roots(np.sum(weights * ray * ray, -1), np.sum(weights * origin * ray, -1), np.sum(weights * origin**2, -1))
    inside = [(origin[:, 1] + t * ray[:, 1] <= 0) & (origin[:, 1] + t * ray[:, 1] >= -height) for t in roots]
    distance = np.minimum(*(_where_hit(t, valid) for t, valid in zip(roots, inside)))
    points = _points(origin, ray, distance)
    outward = np.stack([points[:, 0], -(slope**2) * points[:, 1], points[:, 2]], axis=-1)
    return distance, outward / np.maximum(np.linalg.norm(outward, axis=-1, keepdims=True), 1e-9)


def _pyramid(radius: float, height: float, origin: np.ndarray, ray: np.ndarray) -> Intersection:
    half = radius * 0.9
    sides_43 = np.array([(height, half, 0), (-height, half, 0), (0, half, height), (0, half, -height)])
    sides_43 = sides_43 / np.hypot(height, half)
    towards = ray @ sides_43.T
    reach = (half * height / np.hypot(height, half) - origin @ sides_43.T) / towards
    entry, floor = np.where(towards < 0, reach, -np.inf), -origin[:, 1] / ray[:, 1]
    near = entry.max(axis=-1)
    far = np.minimum(np.where(towards > 0, reach, np.inf).min(axis=-1), np.where(ray[:, 1] < 0, floor, np.inf))
    return _where_hit(near, near < far), sides_43[entry.argmax(axis=-1)]


def _egg(radius: float, height: float, origin: np.ndarray, ray: np.ndarray) -> Intersection:
    axes = np.array([radius, height / 2, radius])
    origin, ray = (origin - np.array([0, height / 2, 0])) / axes, ray / axes
    near, _ = _roots(np.sum(ray * ray, -1), np.sum(origin * ray, -1), np.sum(origin * origin, -1) - 1)
    distance = _where_hit(near, np.isfinite(near))
    outward = _points(origin, ray, distance) / axes
    return distance, outward / np.linalg.norm(outward, axis=-1, keepdims=True)


# Shape -> intersection of rays with a solid of this radius and height that stands at the origin.
INTERSECTIONS: dict[str, Callable[[float, float, np.ndarray, np.ndarray], Intersection]] = {
    "sphere": _sphere,
    "box": _box,
    "cylinder": _cylinder,
    "cone": _cone,
    "pyramid": _pyramid,
    "egg": _egg,
}


def _where_hit(distance: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`distance` where it is valid and ahead of the ray's origin, else infinite."""
    return np.where(valid & (distance > _MIN_DISTANCE), distance, np.inf)


def _points(origin: np.ndarray, ray: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The points at `distance` on rays; the origin if it is infinite."""
    return origin + np.where(np.isfinite(distance), distance, 0)[:, None] * ray


def _dot(a_P3: np.ndarray, b_P3: np.ndarray) -> np.ndarray:
    """Inner products [P]. Sums over a last axis of 3 take five times as long."""
    return a_P3[..., 0] * b_P3[..., 0] + a_P3[..., 1] * b_P3[..., 1] + a_P3[..., 2] * b_P3[..., 2]


def _roots(a: np.ndarray | float, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both solutions of a t^2 + 2 b t + c = 0, the smaller first; NaN if there is none."""
    root = np.sqrt(b * b - a * c)
    return np.minimum((-b - root) / a, (-b + root) / a), np.maximum((-b - root) / a, (-b + root) / a)
