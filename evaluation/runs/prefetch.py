"""Batches of examples whose images are loaded by threads while the device computes."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from EasyLM.errors import prefix_errors
from evaluation.runs.example import Example

_PREFETCHED_BATCHES = 2  # in memory while one batch is computed


def loaded_batches(
    examples: Sequence[Example],
    batch_size: int,
    load: Callable[[Any], Any],
    num_workers: int,
    shape: Callable[[Any], tuple],
) -> Iterator[tuple[list, list]]:
    """Yields batches (examples, loaded values) of one shape each, so that each shape is compiled once.

    If a shape has several batches, its last batch is padded with copies of the last value. Its list of values is then
    longer than its list of examples.

    Args:
      examples: in the order of their files; batches group them by shape.
      batch_size: number of examples of a batch.
      load: returns the value of an example; called in a thread.
      num_workers: number of threads.
      shape: returns the shape of an example.

    Raises:
      UserError: raised by `load`; prefixed with the example's name.
    """
    groups = collections.defaultdict(list)
    for example in examples:
        groups[shape(example)].append(example)
    batches = [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
    with ThreadPoolExecutor(num_workers) as pool:
        waiting: collections.deque = collections.deque()
        for batch in itertools.chain(batches, itertools.repeat(None, _PREFETCHED_BATCHES)):
            if batch is not None:
                waiting.append((batch, [pool.submit(_load, load, example) for example in batch]))
            if waiting and (batch is None or len(waiting) > _PREFETCHED_BATCHES):
                ready, futures = waiting.popleft()
                values = [future.result() for future in futures]
                size = min(batch_size, len(groups[shape(ready[0])]))
                yield ready, values + values[-1:] * (size - len(values))


def _load(load: Callable, example: Example) -> Any:
    with prefix_errors(example.name):
        return load(example)
