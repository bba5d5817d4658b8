"""A function of batches over all devices: inputs of any length in, batches of one size on the devices, results out.

Shapes: n pictures of a part, B of a batch.
"""

import collections
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.errors import UserError


class Spread:
    """Devices that share each batch. `batch_size`, what they compute at a time, is a multiple of their number."""

    def __init__(self, batch_size: int, devices=None):
        """Takes `devices` (default: all); `batch_size` grows to a multiple of their number.

        Raises:
          UserError: if `batch_size` is below 1.
        """
        if batch_size < 1:
            raise UserError(f"--batch_size={batch_size}: must be at least 1")
        devices = devices or jax.devices()
        mesh = jax.make_mesh((len(devices),), ("picture",), axis_types=(AxisType.Auto,), devices=devices)
        self._split, self._everywhere = NamedSharding(mesh, P("picture")), NamedSharding(mesh, P())
        self.batch_size = -(-batch_size // len(devices)) * len(devices)

    def copied(self, tree):
        """The arrays of a tree, whole on every device."""
        return jax.device_put(tree, self._everywhere)

    def cut(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """Parts of an array, `batch_size` long; the last one may be shorter."""
        return (array[start : start + self.batch_size] for start in range(0, len(array), self.batch_size))

    def map(self, function: Callable, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype) -> Iterator:
        """`function` of each part [n, *shape], n at most `batch_size`, as arrays of the host; the parts are padded.

        A part is asked for, and given to the devices, before the result of the one before it is waited for.
        """
        pending: collections.deque = collections.deque()
        for part in parts:
            assert part.shape[1:] == shape and len(part) <= self.batch_size, part.shape
            padded = np.zeros((self.batch_size, *shape), dtype)
            padded[: len(part)] = part
            result = function(jax.device_put(padded, self._split))
            result.copy_to_host_async()
            pending.append((result, len(part)))
            if len(pending) > 1:
                yield _fetch(*pending.popleft())
        while pending:
            yield _fetch(*pending.popleft())


def _fetch(result: jax.Array, count: int) -> np.ndarray:
    return np.asarray(result)[:count]
