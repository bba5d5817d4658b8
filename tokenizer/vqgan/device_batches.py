"""Applies a function to batches over all devices: inputs of any length become batches of one size.

Shapes: n images of an input, B images of a batch.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import DTypeLike

from EasyLM.errors import UserError
from EasyLM.process_pool import available_cores


class DeviceBatches:
    """Batches that are sharded over devices.

    XLA runs a convolution on one CPU core. On CPUs a batch is therefore split into chunks that a pool of threads, one
    per core, computes.

    Attributes:
      batch_size: images of a batch, a multiple of the number of devices and of the chunks.
    """

    def __init__(
        self,
        batch_size: int,
        devices: Sequence[jax.Device] | None = None,
        max_chunk: int | None = None,
        min_chunk: int = 1,
    ):
        """Rounds `batch_size` up to a multiple of the number of devices and of the chunks.

        Args:
          devices: default: all.
          max_chunk: maximum number of images that a core computes at once (default: its share of a batch).
          min_chunk: minimum number; raises `batch_size` if necessary.

        Raises:
          UserError: if `batch_size` is below 1.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be at least 1")
        devices = devices or jax.devices()
        mesh = jax.make_mesh((len(devices),), ("image",), axis_types=(AxisType.Auto,), devices=devices)
        self._sharded, self._replicated = NamedSharding(mesh, P("image")), NamedSharding(mesh, P())
        cores = available_cores() if devices[0].platform == "cpu" else 1
        threads = max(min(cores, batch_size // min_chunk) // len(devices), 1)
        self._threads = ThreadPoolExecutor(threads) if threads > 1 else None
        share = max(-(-batch_size // (threads * len(devices))), min_chunk)  # images of a thread on each device
        chunk = max(max_chunk or share, min_chunk)
        self._chunks = threads * -(-share // min(chunk, share)) if threads > 1 else 1
        multiple = self._chunks * len(devices)
        self.batch_size = max(-(-batch_size // multiple), min_chunk) * multiple

    def replicate(self, tree: Any) -> Any:
        """Copies the arrays of a pytree to every device."""
        return jax.device_put(tree, self._replicated)

    def split(self, array_n: np.ndarray) -> Iterator[np.ndarray]:
        """Yields slices of `batch_size` rows; the last one may be shorter."""
        return (array_n[start : start + self.batch_size] for start in range(0, len(array_n), self.batch_size))

    def map(
        self,
        function: Callable[[jax.Array], jax.Array],
        batches: Iterable[np.ndarray],
        shape: tuple[int, ...],
        dtype: DTypeLike,
    ) -> Iterator[np.ndarray]:
        """Yields `function` of each batch `[n, *shape]`, n at most `batch_size`, as host arrays. Pads short batches.

        Fetches and dispatches a batch before it waits for the result of the previous one.

        Raises:
          UserError: if a batch has another shape.
        """
        pending: collections.deque = collections.deque()
        for batch in batches:
            if batch.shape[1:] != shape:
                raise UserError(f"an array of shape {batch.shape}: must be (n, {', '.join(map(str, shape))})")
            assert len(batch) <= self.batch_size, batch.shape
            padded = np.zeros((self.batch_size, *shape), dtype)
            padded[: len(batch)] = batch
            pending.append((self._dispatch(function, padded), len(batch)))
            if len(pending) > 1:
                yield _fetch(*pending.popleft())
        while pending:
            yield _fetch(*pending.popleft())

    def _dispatch(self, function: Callable, padded: np.ndarray) -> list[jax.Array | Future]:
        """Starts to compute the chunks of a batch; returns their pending results."""
        if self._threads is None:
            result = function(jax.device_put(padded, self._sharded))
            result.copy_to_host_async()
            return [result]

        def compute(chunk):
            return np.asarray(function(jax.device_put(chunk, self._sharded)))

        return [self._threads.submit(compute, chunk) for chunk in np.split(padded, self._chunks)]


def _fetch(chunks: list[jax.Array | Future], count: int) -> np.ndarray:
    arrays = [chunk.result() if isinstance(chunk, Future) else np.asarray(chunk) for chunk in chunks]
    return np.concatenate(arrays)[:count]
