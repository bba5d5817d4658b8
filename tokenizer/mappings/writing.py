"""Writes sentences of mappings: workers compose them, the codec encodes their new images, the main process writes.

Shapes: n sentences, m images, S the side in pixels, N codes of an image.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from EasyLM import process_pool
from EasyLM.data import records
from EasyLM.data.tokenizer_names import TOKENIZER_KEY, TOKENS_PER_IMAGE_KEY
from EasyLM.process_pool import Workers
from EasyLM.progress import progress
from tokenizer.builders.resumable_file import ResumableFile
from tokenizer.formats import ImageTokenizer
from tokenizer.mappings.pool import Pool
from tokenizer.mappings.sentences import NEW_IMAGE, Mixture, Sentences, compose_range
from tokenizer.media import images

_SENTENCES_AT_ONCE = 64  # that a worker composes at a time
_PENDING_PER_WORKER = 3


@dataclasses.dataclass
class Timing:
    """Where the time went.

    Attributes:
      composing: CPU seconds of the workers.
      encoded: images that the codec encoded.
      waiting: seconds in which the main process waited for the workers.
    """

    composing: float = 0.0
    encoded: int = 0
    waiting: float = 0.0


def write_sentences(
    directory: str, mixture: Mixture, seeds: range, codec: ImageTokenizer, file: ResumableFile, workers: Workers
) -> dict[str, Any]:
    """Writes the sentences that the file does not contain yet, and returns the report.

    Args:
      directory: of the pool.
      seeds: one for each sentence of the file.
      workers: compose the sentences.
    """
    state = file.state or {"sentences": 0, "seconds": 0.0}
    first, start = state["sentences"], time.monotonic()
    timing = Timing()
    pool = Pool(directory)
    common = {TOKENIZER_KEY: codec.digest, TOKENS_PER_IMAGE_KEY: codec.tokens_per_image}
    bar = progress(total=len(seeds), initial=first, unit="sentence", desc="writing")
    with bar:
        composed = _compose(workers, directory, mixture, seeds[first:], timing)
        for sentences, tokens_nT in _encode(composed, pool, codec, timing):
            for tokens_T, keys in zip(tokens_nT, sentences.keys, strict=True):
                file.write(records.record_line(tokens_T, **common, **keys))
            bar.update(len(tokens_nT))
            state["sentences"] += len(tokens_nT)
            if file.save_is_due():
                file.save({**state, "seconds": state["seconds"] + time.monotonic() - start})
    seconds, written = time.monotonic() - start, state["sentences"] - first
    return {
        "sentences": state["sentences"],
        "seconds": round(state["seconds"] + seconds, 1),
        "sentences_per_second": round(written / max(seconds, 1e-9), 1),
        "composing_ms": round(1000 * timing.composing / max(written, 1), 2),
        "images_encoded": timing.encoded,
        "waiting_share": round(timing.waiting / max(seconds, 1e-9), 3),
    }


def _compose(workers: Workers, directory: str, mixture: Mixture, seeds: range, timing: Timing) -> Iterator[Sentences]:
    """Yields all sentences in order, while the workers compose the next ones."""
    pending: collections.deque = collections.deque()
    parts = (seeds[start : start + _SENTENCES_AT_ONCE] for start in range(0, len(seeds), _SENTENCES_AT_ONCE))

    def finish() -> Sentences:
        start = time.monotonic()
        sentences = process_pool.result(pending.popleft(), "a part of the pool")
        timing.waiting += time.monotonic() - start
        timing.composing += sentences.seconds
        return sentences

    for part in parts:
        pending.append(workers.submit(compose_range, directory, mixture, part))
        if len(pending) > _PENDING_PER_WORKER * workers.processes:
            yield finish()
    while pending:
        yield finish()


def _encode(
    composed: Iterable[Sentences], pool: Pool, codec: ImageTokenizer, timing: Timing
) -> Iterator[tuple[Sentences, np.ndarray]]:
    """Yields sentences and their tokens, int32 [n, 16 N]. An image of the pool is encoded once, at its first use."""
    codes_of_pool = np.zeros((pool.num_images, codec.tokens_per_image), np.uint16)
    is_requested = np.zeros(pool.num_images, bool)
    waiting: collections.deque[tuple[Sentences, np.ndarray]] = collections.deque()  # with the new numbers of the pool

    def pixels() -> Iterator[np.ndarray]:
        for sentences in composed:
            used = np.unique(sentences.numbers[sentences.numbers != NEW_IMAGE])
            unknown = used[~is_requested[used]]
            is_requested[unknown] = True
            waiting.append((sentences, unknown))
            yield pool.pixels(unknown)
            yield sentences.pixels

    none = np.zeros((0, codec.tokens_per_image), np.uint16)
    encoded = none  # codes of the waiting sentences so far
    batches = codec.encode_batches(_rebatch(pixels(), codec.batch_size))
    for codes in itertools.chain(batches, [none]):  # the last sentences can have no image to encode
        encoded = np.concatenate([encoded, codes.astype(np.uint16)])
        timing.encoded += len(codes)
        while waiting and len(encoded) >= len(waiting[0][1]) + len(waiting[0][0].pixels):
            sentences, unknown = waiting.popleft()
            codes_of_pool[unknown], encoded = np.split(encoded, [len(unknown)])
            new_codes, encoded = np.split(encoded, [len(sentences.pixels)])
            yield sentences, _tokens(sentences.numbers, codes_of_pool, new_codes, codec.num_codes)
    assert not waiting and not len(encoded)


def _rebatch(arrays: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Yields the images of all arrays as float32 batches; only the last one is shorter than `batch_size`."""
    parts, count = [], 0
    for array in arrays:
        while len(array):
            parts.append(array[: batch_size - count])
            count += len(parts[-1])
            array = array[len(parts[-1]) :]
            if count == batch_size:
                yield images.to_float32(np.concatenate(parts))
                parts, count = [], 0
    if parts:
        yield images.to_float32(np.concatenate(parts))


def _tokens(numbers_n16: np.ndarray, codes_of_pool: np.ndarray, new_codes: np.ndarray, num_codes: int) -> np.ndarray:
    """Returns the tokens of sentences, int32 [n, 16 N]."""
    codes_n16N = codes_of_pool[numbers_n16]
    codes_n16N[numbers_n16 == NEW_IMAGE] = new_codes
    tokens_nT = codes_n16N.reshape(len(numbers_n16), -1).astype(np.int32)
    records.check_ids(tokens_nT, num_codes)
    return tokens_nT
