"""Sentences of pictures to sentences of codes, as a stream: read ahead by worker processes, encoded in batches.

What is in memory at a time depends on the batch and the longest sentence, not on how many sentences there are.
Shapes: n pictures, S the side in pixels, N tokens a picture.
"""

import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from EasyLM import process_pool
from EasyLM.errors import UserError
from tokenizer.builders import image_ref
from tokenizer.builders.code_cache import CodeCache
from tokenizer.builders.image_ref import Picture
from tokenizer.media import images

_ON_DEVICE = 2  # batches at a time: one is moved while the other is computed


class Encoder:
    """Batches on their way through the device, in threads, and how long the device had none.

    Attributes:
      pictures: encoded so far.
    """

    def __init__(self, codec):
        """Compiles, so that this counts as no waiting."""
        self._codec, self._lock = codec, threading.Lock()
        side = codec.config.resolution
        codec.encode(np.zeros((1, side, side, 3), np.float32))
        self._threads = concurrent.futures.ThreadPoolExecutor(_ON_DEVICE)
        self._at_work, self._idle_since, self._idle = 0, time.monotonic(), 0.0
        self._begin, self.pictures = time.monotonic(), 0

    def submit(self, pixels_nSS3: np.ndarray) -> concurrent.futures.Future:
        """Begins to encode bytes; the result is the codes, uint16 [n,N]."""
        return self._threads.submit(self._encode, pixels_nSS3)

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        pixels = images.to_float32(pixels)
        with self._lock:
            if not self._at_work:
                self._idle += time.monotonic() - self._idle_since
            self._at_work += 1
        try:
            return self._codec.encode(pixels).astype(np.uint16)
        finally:
            with self._lock:
                self._at_work -= 1
                self._idle_since = time.monotonic()
                self.pictures += len(pixels)

    def waiting_share(self) -> float:
        """The share of the time since the beginning in which the device waited for pictures."""
        with self._lock:
            now = time.monotonic()
            idle = self._idle + (0 if self._at_work else now - self._idle_since)
            return idle / max(now - self._begin, 1e-9)

    def figures(self) -> str:
        """What a progress bar says."""
        return (
            f"{self.pictures / (time.monotonic() - self._begin):.0f} images/s, device waits {self.waiting_share():.0%}"
        )

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


@dataclasses.dataclass
class _Wanted:
    """A picture of sentences that are under way: how many of them, and its codes [N] or what is wrong with it."""

    uses: int = 0
    found: np.ndarray | UserError | None = None


class Pipeline:
    """The pictures between the first wish and the last use of each; every one is read and encoded once meanwhile."""

    def __init__(self, read: Callable, encoder: Encoder, cache: CodeCache, batch_size: int, depth: int):
        """`read` begins to read one of `pictures.groups` and gives a future; `depth` pictures are under way at most,
        or as many as one sentence has."""
        self._read, self._encoder, self._cache = read, encoder, cache
        self._batch_size, self._depth = batch_size, depth
        self._wanted: dict[Picture, _Wanted] = {}
        self._reading: collections.deque = collections.deque()  # (group, future), in order
        self._batch: list[tuple[Picture, np.ndarray]] = []
        self._encoding: collections.deque = collections.deque()  # (pictures, future), in order

    def run(self, sentences: Iterable) -> Iterator[tuple[object, np.ndarray | dict[str, str]]]:
        """Yields (sentence, codes uint16 [pictures,N]) of each sentence (anything with `pictures`), in order.

        In place of the codes stands {path: reason} if pictures cannot be read.
        """
        waiting: collections.deque = collections.deque()
        for sentence in sentences:
            self._want(sentence.pictures)
            waiting.append(sentence)
            while len(self._wanted) > self._depth and self._advance():
                yield from self._finished(waiting)
            yield from self._finished(waiting)
        while self._advance():
            yield from self._finished(waiting)
        assert not waiting and not self._wanted

    def _want(self, sentence: list[Picture]) -> None:
        new = []
        for picture in dict.fromkeys(sentence):
            if picture not in self._wanted:
                self._wanted[picture] = _Wanted(found=self._cache.get(picture))
                if self._wanted[picture].found is None:
                    new.append(picture)
            self._wanted[picture].uses += 1
        self._reading.extend((group, self._read(group)) for group in image_ref.groups(new))

    def _finished(self, waiting: collections.deque) -> Iterator[tuple]:
        while waiting and all(self._wanted[picture].found is not None for picture in waiting[0].pictures):
            sentence = waiting.popleft()
            found = [self._wanted[picture].found for picture in sentence.pictures]
            for picture in set(sentence.pictures):
                self._wanted[picture].uses -= 1
                if not self._wanted[picture].uses:
                    del self._wanted[picture]
            wrong = {p.path: str(f) for p, f in zip(sentence.pictures, found) if isinstance(f, UserError)}
            yield sentence, wrong or np.stack(found)

    def _advance(self) -> bool:
        """Takes the next step for the oldest picture under way; False if there is none."""
        if self._encoding and (len(self._encoding) > _ON_DEVICE or not (self._reading or self._batch)):
            batch, future = self._encoding.popleft()
            for picture, codes in zip(batch, future.result(), strict=True):
                self._wanted[picture].found = codes
                self._cache.put(picture, codes)
        elif self._reading:
            self._take(*self._reading.popleft())
        elif self._batch:
            self._flush()
        else:
            return False
        return True

    def _take(self, group: list[Picture], future: concurrent.futures.Future) -> None:
        try:
            pixels = process_pool.result(future, group[0].path)
        except UserError as error:
            for picture in group:
                self._wanted[picture].found = error
            return
        for picture, picture_pixels in zip(group, pixels, strict=True):
            self._batch.append((picture, picture_pixels))
            if len(self._batch) == self._batch_size:
                self._flush()

    def _flush(self) -> None:
        batch, pixels = zip(*self._batch)
        self._encoding.append((batch, self._encoder.submit(np.stack(pixels))))
        self._batch = []
