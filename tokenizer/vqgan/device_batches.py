"""A function of batches over all devices: inputs of any length in, batches of one size on the devices, results out.

Shapes: n pictures of a part, B of a batch.
"""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.errors import UserError


class Spread:
    """Devices that share each batch. `batch_size`, what they compute at a time, is a multiple of their number.

    XLA computes a convolution on one core, so on CPUs a batch is cut once more: pieces that threads take in turns, one
    a core.
    """

    def __init__(self, batch_size: int, devices=None, piece: int | None = None, least: int = 1):
        """Takes `devices` (default: all); `batch_size` grows to a multiple of their number, and of the pieces.

        `piece`: how many pictures a core had best compute at a time (default: its share of a batch).
        `least`: how many it must; where the batch has fewer, it grows.

        Raises:
          UserError: if `batch_size` is below 1.
        """
        if batch_size < 1:
            raise UserError(f"--batch_size={batch_size}: must be at least 1")
        devices = devices or jax.devices()
        mesh = jax.make_mesh((len(devices),), ("picture",), axis_types=(AxisType.Auto,), devices=devices)
        self._split, self._everywhere = NamedSharding(mesh, P("picture")), NamedSharding(mesh, P())
        cores = os.cpu_count() or 1 if devices[0].platform == "cpu" else 1
        threads = max(min(cores, batch_size // least) // len(devices), 1)
        self._threads = ThreadPoolExecutor(threads) if threads > 1 else None
        share = -(-batch_size // (threads * len(devices)))  # of a thread, on each device
        share, piece = max(share, least), max(piece or share, least)
        self._pieces = threads * -(-share // min(piece, share)) if threads > 1 else 1
        each = self._pieces * len(devices)
        self.batch_size = max(-(-batch_size // each), least) * each

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
            pending.append((self._begin(function, padded), len(part)))
            if len(pending) > 1:
                yield _fetch(*pending.popleft())
        while pending:
            yield _fetch(*pending.popleft())

    def _begin(self, function: Callable, padded: np.ndarray) -> list[jax.Array | Future]:
        """The results of the pieces of a batch, under way."""
        if self._threads is None:
            result = function(jax.device_put(padded, self._split))
            result.copy_to_host_async()
            return [result]

        def compute(piece):
            return np.asarray(function(jax.device_put(piece, self._split)))

        return [self._threads.submit(compute, piece) for piece in np.split(padded, self._pieces)]


def _fetch(pieces: list[jax.Array | Future], count: int) -> np.ndarray:
    arrays = [piece.result() if isinstance(piece, Future) else np.asarray(piece) for piece in pieces]
    return np.concatenate(arrays)[:count]
